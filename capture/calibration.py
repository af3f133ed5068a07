"""What this machine does in a second with what a model gives: copies, codecs, checksums, the disk.

Each is timed alone, on captured values, for long enough to be told from the clock and no longer. What runs
beside a model is slower; the ladder measures that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checksum import CRC_BYTES, crc32c
from .codecs import CODECS
from .dtypes import is_float, named_dtype
from .layout import ArraySpec, Layout
from .place import Place
from .shard import count_nonfinite

Values = NDArray[Any]

#: What every tap of floats is tried as, beside what it is stored as.
HALF = "float16"

_LEAST_S = 0.01  # that something is timed for
_SAMPLE_BYTES, _COPIED_BYTES = 2**20, 64 * 2**20
_ITEMSIZE_HALF = 2


@dataclass(frozen=True)
class Encoded:
    """What a codec makes of the values of one tap."""

    bytes_a_row: float
    """Bytes of a row on disk, with checksums."""
    seconds_a_row: float
    """Seconds in which one thread sums and encodes a row."""


@dataclass(frozen=True)
class Calibration:
    """What was timed of this machine."""

    copy_rate: float
    """Bytes a second that one thread copies in memory."""
    disk_rate: float | None
    """Bytes a second that become durable where the store would be; None: not tried."""
    transfer_rates: Mapping[str, float]
    """Bytes a second from the device to the host, `pageable` and `pinned`; empty: there is no device."""
    codecs: Mapping[str, float]
    """Bytes a second, before they are encoded, that one thread sums and encodes of all taps, by codec."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "copy_bytes_a_s": self.copy_rate,
            "disk_bytes_a_s": self.disk_rate,
            "transfer_bytes_a_s": dict(self.transfer_rates),
            "codec_bytes_a_s": dict(self.codecs),
        }


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of `work`: the quickest of some runs of it."""
    work()  # the first brings memory and code
    best, spent = float("inf"), 0.0
    while spent < _LEAST_S:
        start = time.perf_counter()
        work()
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
    return max(best, 1e-9)


def copy_rate() -> float:
    """Return the bytes a second that one thread copies from memory to memory."""
    source = np.ones(_COPIED_BYTES, np.uint8)
    target = np.zeros_like(source)
    return _COPIED_BYTES / timed(lambda: np.copyto(target, source))


def copy_s(values: Values) -> float:
    """Return the seconds in which one thread copies a row of `values`, (rows, ...)."""
    values = np.ascontiguousarray(values)
    target = np.zeros_like(values)
    return timed(lambda: np.copyto(target, values)) / max(1, len(values))


def encodings(array: ArraySpec, values: Values, layout: Layout) -> dict[tuple[str, str], Encoded]:
    """Return what each codec makes of `values` (rows, ...), by element type and codec.

    Types are that of the store, and float16 where that is narrower.
    """
    found = {}
    forms = [(str(array.dtype), values)]
    if is_float(array.dtype) and array.dtype.itemsize > _ITEMSIZE_HALF:
        with np.errstate(over="ignore"):
            forms.append((HALF, values.astype(np.float16)))
    for name, form in forms:
        spec = replace(array, dtype=named_dtype(name), codec="none")
        n_rows = max(1, min(len(form), layout.chunk_rows(spec), _SAMPLE_BYTES // max(1, spec.row_bytes)))
        chunk = np.ascontiguousarray(form[:n_rows]).reshape(-1).view(np.uint8).data
        for codec in CODECS:
            found[name, codec] = _encoded(replace(spec, codec=codec), chunk, n_rows)
    return found


def total(encoded: Sequence[tuple[Encoded, int]]) -> float:
    """Return the bytes a second of all taps, each with what is `Encoded` of it and its bytes a row."""
    seconds = sum(one.seconds_a_row for one, _ in encoded)
    return sum(n_bytes for _, n_bytes in encoded) / max(seconds, 1e-12)


def disk_rate(place: Place, probe: bytes) -> float | None:
    """Return the bytes a second at which `probe` becomes durable at a place; None: not tried."""
    return place.durable_rate(probe)


def _encoded(array: ArraySpec, chunk: memoryview, n_rows: int) -> Encoded:
    encoding, sizes = array.encoding, []

    def work() -> None:
        count_nonfinite([chunk], array.dtype, array.codes)
        data = encoding.encode(chunk)
        crc32c(data)
        sizes.append(memoryview(data).nbytes)

    seconds = timed(work)
    return Encoded((sizes[-1] + CRC_BYTES) / n_rows, seconds / n_rows)
