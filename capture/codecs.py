"""How the bytes of an inner chunk are encoded, and how Zarr v3 names that.

Only codecs that zarr-python, TensorStore and zarrs all read are offered. numcodecs does the work; it
gives up the interpreter's lock while it compresses. Shuffling bytes or bits makes zstd *worse* on
feature maps, half of which are zeros, so `zstd` has none; `lz4` needs it to gain anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from .errors import FormatError, PlanError

Json = dict[str, Any]
Bytes = bytes | bytearray | memoryview

#: What `--codec` accepts.
CODECS = ("none", "lz4", "zstd")


@dataclass(frozen=True)
class Codec:
    """One way to hold an inner chunk's bytes; its CRC-32C comes behind it in every case."""

    name: str
    """`none`, `lz4` (bit-shuffled, in a Blosc frame) or `zstd` (level 1)."""
    itemsize: int
    """Bytes of one element, which the bit shuffle needs."""

    def json(self) -> list[Json]:
        """Return the Zarr v3 codecs between the array's bytes and the checksum."""
        if self.name == "lz4":
            return [{"name": "blosc", "configuration": self._blosc()}]
        if self.name == "zstd":
            return [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}]
        return []

    def encode(self, data: Bytes) -> Bytes:
        """Return `data` encoded; with `none`, `data` itself and no copy."""
        if self.name == "none":
            return data
        return memoryview(_numcodec(self.name, self.itemsize).encode(data)).cast("B")

    def decode(self, data: Bytes, n_bytes: int) -> Bytes:
        """Return the `n_bytes` that were encoded as `data`.

        Raises:
            FormatError: `data` does not decode to that many bytes.
        """
        if self.name == "none":
            decoded = memoryview(data)
        else:
            try:  # into memory of its own: in a longer one the rest would stay what it was, unnoticed
                decoded = memoryview(_numcodec(self.name, self.itemsize).decode(data))
            except (RuntimeError, ValueError) as error:
                raise FormatError(f"a chunk does not decode with {self.name}: {error}") from error
        if decoded.nbytes != n_bytes:
            raise FormatError(f"a chunk decodes to {decoded.nbytes} bytes and should hold {n_bytes}")
        return decoded

    def _blosc(self) -> Json:
        return {
            "cname": "lz4",
            "clevel": 5,
            "shuffle": "bitshuffle",
            "typesize": self.itemsize,
            "blocksize": 0,
        }


def check_codec(name: str) -> str:
    """Return `name` where it is a codec.

    Raises:
        PlanError: it is none.
    """
    if name not in CODECS:
        raise PlanError(f"there is no codec {name!r}; choose one of {', '.join(CODECS)}")
    return name


@cache
def _numcodec(name: str, itemsize: int) -> Any:
    import numcodecs
    from numcodecs.blosc import Blosc

    if name == "lz4":
        return Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE, typesize=itemsize)
    return numcodecs.Zstd(level=1)
