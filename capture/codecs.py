"""How the bytes of an inner chunk are encoded, and how Zarr v3 names that.

Only codecs that zarr-python, TensorStore and zarrs all read are offered. numcodecs does the work; it
gives up the interpreter's lock while it compresses. Shuffling bytes or bits makes zstd *worse* on
feature maps, half of which are zeros, so `zstd` has none; `lz4` needs it to gain anything.

What is decoded comes from anywhere. numcodecs allocates what a frame's header claims, 100 GB if need be, and
C-Blosc 1.21 reads past the end of a frame that is shorter than its header says, up to a crash. So the header
is read here first, and decoding goes into memory of the size that is known beforehand.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, PlanError

Json = dict[str, Any]
Bytes = bytes | bytearray | memoryview

#: What `--codec` accepts.
CODECS = ("none", "lz4", "zstd")

# A byte of LZ4 stands for 255 at most, four of zstd for a block of 128 KiB; rounded up.
_MOST_PACKED = {"none": 1, "lz4": 512, "zstd": 65536}
_LARGEST_BLOSC = 2**31 - 1 - 16  # C-Blosc counts in int32
_BLOSC_VERSION, _BLOSC_LZ4 = 2, 1
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


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

    def decode(self, data: Bytes, n_bytes: int, into: NDArray[np.uint8] | None = None) -> Bytes:
        """Return the `n_bytes` that were encoded as `data`.

        Args:
            data: the encoded bytes.
            n_bytes: how many there should be.
            into: contiguous memory of so many bytes that a codec other than `none` decodes to.

        Raises:
            FormatError: `data` does not decode to that many bytes.
        """
        data = memoryview(data)
        claimed = {"none": _plain_bytes, "lz4": _blosc_bytes, "zstd": _zstd_bytes}[self.name](data)
        if claimed is not None and claimed != n_bytes:
            raise FormatError(f"a chunk decodes to {claimed} bytes and should hold {n_bytes}")
        if self.name == "none":
            return data
        if data.nbytes < self.least_bytes(n_bytes):
            raise FormatError(f"a chunk of {data.nbytes} bytes cannot decode to {n_bytes} with {self.name}")
        try:
            # Exactly as long as what is claimed: in a longer one the rest would stay what it was, unnoticed.
            decoded: NDArray[np.uint8] = np.empty(n_bytes, np.uint8) if into is None else into
            _numcodec(self.name, self.itemsize).decode(data, decoded)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise FormatError(f"a chunk does not decode with {self.name}: {error}") from error
        return decoded.data

    def least_bytes(self, n_bytes: int) -> int:
        """Return the fewest bytes that `n_bytes` can be encoded in; what is shorter claims too much."""
        return -(-n_bytes // _MOST_PACKED[self.name])

    def most_bytes(self, n_bytes: int) -> int:
        """Return the most bytes that `n_bytes` can take encoded; what is longer holds something else."""
        return n_bytes if self.name == "none" else n_bytes + n_bytes // 128 + 1024

    def _blosc(self) -> Json:
        return {
            "cname": "lz4",
            "clevel": 5,
            "shuffle": "bitshuffle",
            "typesize": self.itemsize,
            "blocksize": 0,
        }


def _plain_bytes(data: memoryview) -> int:
    return data.nbytes


def _blosc_bytes(data: memoryview) -> int:
    """Return what a Blosc frame decodes to, of a header that is true of the frame."""
    if data.nbytes < 16:
        raise FormatError("a chunk is too short for Blosc")
    version, _, flags, typesize, n_bytes, block_bytes, n_encoded = struct.unpack_from("<4B3I", data)
    if (
        version != _BLOSC_VERSION
        or flags >> 5 != _BLOSC_LZ4
        or typesize < 1
        or n_encoded != data.nbytes
        or not 0 < block_bytes <= max(n_bytes, typesize)
        or not 0 < n_bytes <= _LARGEST_BLOSC
    ):
        raise FormatError("the header of a chunk's Blosc frame is not that of lz4, or not true of the chunk")
    return int(n_bytes)


def _zstd_bytes(data: memoryview) -> int | None:
    """Return what a zstd frame says that it decodes to, or None where it says nothing (RFC 8878, 3.1.1.1)."""
    header = bytes(data[:18])
    if header[:4] != _ZSTD_MAGIC or len(header) < 6:
        raise FormatError("a chunk does not begin with a zstd frame")
    descriptor = header[4]
    single = descriptor >> 5 & 1
    width = (single, 2, 4, 8)[descriptor >> 6]
    if width == 0:
        return None
    at = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    field = header[at : at + width]
    if len(field) < width:
        raise FormatError("a chunk ends in the header of its zstd frame")
    return int.from_bytes(field, "little") + (256 if width == 2 else 0)


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
