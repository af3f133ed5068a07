"""Where every byte goes: arrays, inner chunks, blocks, and the memory that a block is gathered in.

A *slab* is the host memory of one step: the rows of every array, one array behind the other, the taps
first, so that one copy from a device moves all of them. A block is a whole number of slabs. Row `r` of
the data set lies in block `r // block_rows`, there in slab `r % block_rows // step_rows`, there at row
`r % step_rows` of each array: arithmetic alone, whatever batches the rows came in.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .codecs import Codec
from .dtypes import DType

if TYPE_CHECKING:
    from .statistics import Statistics

#: Bytes of an inner chunk are kept near this: small reads, few checksums.
CHUNK_BYTES = 512 * 1024

#: Name of the array that says where each row of a ragged tap begins, and its shape; see `ragged`.
EXTENTS = "extents"

#: Arrays start at multiples of this inside a slab: a memory page.
ALIGNMENT = 4096


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store: a tap's values or a column of the rows."""

    name: str
    """The tap's or the column's name, as the user says it."""
    path: str
    """The array's folder inside the store."""
    dims: tuple[str, ...]
    """Names of all axes, `row` first."""
    shape: tuple[int, ...]
    """Shape of one row."""
    dtype: DType
    """Element type, as stored."""
    codec: str = "none"
    """See `layertap.capture.codecs`."""
    codes: bool = False
    """Whether its int8 values are codes, of which some stand for NaN and infinity."""
    role: str = ""
    """`ragged` where rows differ in shape and `shape` is their bound; `padded` where they are filled up to
    it; `extents` of what says how they lie."""

    @property
    def is_ragged(self) -> bool:
        """Whether rows lie packed on disk, each in a shape of its own."""
        return self.role == "ragged"

    @property
    def is_extents(self) -> bool:
        """Whether it says where the rows of a ragged array begin, and their shapes."""
        return self.role == "extents"

    @property
    def varies(self) -> bool:
        """Whether the layer gives rows that differ in shape."""
        return self.role in ("ragged", "padded")

    @property
    def stored_axes(self) -> int:
        """Number of axes on disk."""
        return 1 if self.is_ragged else len(self.dims)

    @property
    def group(self) -> str:
        """The folder that its folder lies in: that of the tap."""
        return self.path.rpartition("/")[0]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row before encoding."""
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n

    @cached_property
    def encoding(self) -> Codec:
        """The codec of the array's inner chunks."""
        return Codec(self.codec, self.dtype.itemsize)


@dataclass(frozen=True)
class Layout:
    """The arrays of a store and how their rows are cut into steps and blocks."""

    taps: tuple[ArraySpec, ...]
    """The values of the taps, in the order of the model."""
    columns: tuple[ArraySpec, ...]
    """What is known about each row, filled on the host."""
    step_rows: int
    """Rows of one slab: the batch size."""
    block_rows: int
    """Rows of one block, a multiple of `step_rows`."""
    statistics: Statistics | None = None
    """What is computed of the taps."""
    values: bool = True
    """Whether the taps' values are written; else their statistics alone."""
    parts: tuple[ArraySpec, ...] = ()
    """What reduced taps hold beside their values, in the folders of these: scales, positions."""

    @cached_property
    def moved(self) -> tuple[ArraySpec, ...]:
        """Taps, then their parts: what the device moves."""
        return self.taps + self.parts

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """What a slab holds: taps, their parts, columns, and what statistics keep of each row."""
        return self.moved + self.columns + self.row_statistics

    @cached_property
    def numbers(self) -> tuple[tuple[int, ...], ...]:
        """The places among `arrays` of each tap's values and of its parts."""
        found = {tap.group: [i] for i, tap in enumerate(self.taps)}
        for i, part in enumerate(self.parts, start=len(self.taps)):
            found[part.group].append(i)
        return tuple(map(tuple, found.values()))

    def numbers_of(self, tap: ArraySpec) -> tuple[int, ...]:
        """Return the places among `arrays` of a tap's values and of its parts."""
        return self.numbers[self.taps.index(tap)]

    @cached_property
    def row_statistics(self) -> tuple[ArraySpec, ...]:
        """The array that statistics keep of each row, where there is one."""
        return () if self.statistics is None else self.statistics.row_arrays

    @cached_property
    def stored(self) -> tuple[ArraySpec, ...]:
        """What is on disk, in the order of a commit record: of `arrays`, then the blocks' statistics."""
        arrays = self.arrays if self.values else self.arrays[len(self.moved) :]
        return arrays + (() if self.statistics is None else (self.statistics.blocks,))

    @cached_property
    def stored_at(self) -> dict[str, int]:
        """Path -> place in a commit record."""
        return {array.path: i for i, array in enumerate(self.stored)}

    def shard(self, array: ArraySpec, n_rows: int) -> tuple[Layout, int]:
        """Return how a shard of `array` is laid out, and its rows, for a block of `n_rows` rows."""
        if self.statistics is None or array.path != self.statistics.blocks.path:
            return self, n_rows
        n = self.statistics.n_pieces
        return Layout((), (array,), n, n), n

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each array starts inside a slab, in bytes."""
        offsets, end = [], 0
        for array in self.arrays:
            offsets.append(end)
            end += aligned(array.row_bytes * self.step_rows)
        return tuple(offsets)

    @cached_property
    def device_bytes(self) -> int:
        """Bytes at the start of a slab that hold the taps and their parts."""
        return sum(aligned(array.row_bytes * self.step_rows) for array in self.moved)

    @cached_property
    def slab_bytes(self) -> int:
        """Bytes of one slab."""
        return slab_bytes(self.arrays, self.step_rows)

    @property
    def steps_per_block(self) -> int:
        """Slabs of one block."""
        return self.block_rows // self.step_rows

    @property
    def block_bytes(self) -> int:
        """Bytes of the memory that one block is gathered in."""
        return self.slab_bytes * self.steps_per_block

    def chunk_rows(self, array: ArraySpec) -> int:
        """Return the rows of an inner chunk: near `CHUNK_BYTES`, dividing a slab or made of slabs."""
        return chunk_rows(array.row_bytes, self.step_rows, self.steps_per_block)


def array_view(layout: Layout, i: int, slab: NDArray[np.uint8]) -> NDArray[Any]:
    """Return the rows of array `i` in the memory of a slab; shape (step_rows, *shape), no copy."""
    array, offset = layout.arrays[i], layout.offsets[i]
    data = slab[offset : offset + array.row_bytes * layout.step_rows]
    return data.view(array.dtype).reshape(layout.step_rows, *array.shape)


def aligned(n_bytes: int) -> int:
    """Return `n_bytes` rounded up to a multiple of `ALIGNMENT`."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def slab_bytes(arrays: tuple[ArraySpec, ...], step_rows: int) -> int:
    """Return the bytes of one slab of `step_rows` rows."""
    return sum(aligned(array.row_bytes * step_rows) for array in arrays)


def chunk_rows(row_bytes: int, step_rows: int, steps: int) -> int:
    """Return the rows of an inner chunk of an array whose rows take `row_bytes`.

    The result divides `step_rows`, or is a multiple of it that divides `steps * step_rows`, so that a
    chunk lies in one slab or in whole slabs.
    """
    limit = max(1, CHUNK_BYTES // max(1, row_bytes))
    if limit >= step_rows:
        return step_rows * largest_divisor(steps, limit // step_rows)
    return largest_divisor(step_rows, limit)


def largest_divisor(n: int, limit: int) -> int:
    """Return the largest divisor of `n` up to `limit`, which is 1 at least."""
    divisors = _divisors(n)
    return divisors[bisect_right(divisors, limit) - 1]


@lru_cache(maxsize=64)
def _divisors(n: int) -> tuple[int, ...]:
    """Return the divisors of `n` in order; a store may say any number, and all of its arrays share it."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))
