"""The rows of a slab as they are measured: runs of rows that have as many channels and places.

Rows that all have one shape are one such run, as they lie in memory. Of a ragged tap, rows are moved together
first, so that what is measured does not depend on how a batch was padded; rows of one shape that follow each
other are one run. Of a padded tap, the places that its mask names are taken, and of int8 codes, what they
stand for: both a piece at a time, as it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import ArraySpec, Layout, array_view
from .reduce_arrays import dequantized
from .statistics import channel_axis, channel_last

Values = NDArray[Any]


@dataclass(frozen=True)
class Alike:
    """Rows that follow each other in a slab and have as many channels and places."""

    first: int
    """The first of them in the slab."""
    values: Values
    """As they are stored: (rows, channels, positions), or (rows, positions, channels)."""
    last: bool
    """Whether channels are the last axis."""
    sizes: tuple[int, ...]
    """Of the axes of positions."""
    bound: tuple[int, ...]
    """The greatest such sizes, by which positions are numbered."""
    mask: Values | None = None
    """Which positions count, of shape `sizes`; None: all."""
    scale: Values | None = None
    """What int8 codes are times, (rows, channels) or (rows, 1)."""

    @property
    def stop(self) -> int:
        """The row of the slab behind the last of them."""
        return self.first + len(self.values)

    @property
    def n_channels(self) -> int:
        """How many channels there are."""
        return int(self.values.shape[2 if self.last else 1])

    @cached_property
    def n_positions(self) -> int:
        """How many positions count."""
        return int(self.values.shape[1 if self.last else 2]) if self._own is None else len(self._own)

    @property
    def is_copied(self) -> bool:
        """Whether `take` copies, so that little should be taken at once."""
        return self.mask is not None or self.scale is not None

    @cached_property
    def _own(self) -> NDArray[np.intp] | None:
        return None if self.mask is None else np.flatnonzero(self.mask)

    def take(self, rows: Any, channels: slice, positions: slice) -> Values:
        """Return some values, on the axes of `values`; rows are a slice or an array of numbers."""
        where = self._where(positions)
        some = self.values[(rows, where, channels) if self.last else (rows, channels, where)]
        if self.scale is None:
            return some
        scale = self.scale[rows]
        scale = scale if scale.shape[1] == 1 else scale[:, channels]
        return dequantized(some, scale[:, None] if self.last else scale[:, :, None])

    def _where(self, positions: slice) -> Any:
        if self._own is None:
            return positions
        own = self._own[positions]
        side_by_side = len(own) > 0 and own[-1] - own[0] == len(own) - 1  # needs no copy
        return slice(int(own[0]), int(own[-1]) + 1) if side_by_side else own

    def numbered(self, positions: Values) -> Values:
        """Return the numbers of positions, counted as in a row of the bound's shape."""
        at = positions if self._own is None else self._own[positions]
        if self.sizes == self.bound:
            return np.asarray(at)
        return np.asarray(np.ravel_multi_index(np.unravel_index(at, self.sizes), self.bound))


def alike(layout: Layout, i: int, slab: NDArray[np.uint8], n_rows: int) -> Iterator[Alike]:
    """Yield the runs of the first `n_rows` rows of tap `i` in a slab; of a ragged one, once it is packed."""
    array = layout.taps[i]
    if array.is_ragged:
        yield from _ragged(layout, i, slab, n_rows)
        return
    values = array_view(layout, i, slab)[:n_rows]
    if array.role == "padded":
        mask = array_view(layout, layout.numbers[i][1], slab)[:n_rows]
        yield from _padded(array, layout.arrays[layout.numbers[i][1]].dims, values, mask)
        return
    scale = None
    if array.codes:
        number = next(n for n in layout.numbers[i] if layout.arrays[n].path.endswith("/scale"))
        scale = array_view(layout, number, slab)[:n_rows]
        axis = channel_axis(array)
        per_channel = axis is not None and array.dims[1 + axis] in layout.arrays[number].dims
        scale = scale.reshape(n_rows, -1 if per_channel else 1)
    yield _run(array, 0, values, scale=scale)


def joined(layout: Layout, i: int, slab: NDArray[np.uint8], n_rows: int) -> Iterator[Alike]:
    """Yield the same values in fewer runs, for what is the same whichever row they are of.

    Positions of ragged rows whose channels are last lie behind each other through all rows.
    """
    array = layout.taps[i]
    axis = channel_axis(array)
    if not array.is_ragged or axis is None or not channel_last(array):
        yield from alike(layout, i, slab, n_rows)
        return
    flat, sizes = _packed(layout, i, slab, n_rows)
    ends = np.cumsum(sizes.prod(1))
    for start, stop in _runs(sizes[:, -1]):
        low, high, n = int(ends[start - 1]) if start else 0, int(ends[stop - 1]), int(sizes[start, -1])
        if high > low:
            positions = (high - low) // n
            yield Alike(0, flat[low:high].reshape(1, positions, n), True, (positions,), (positions,))


def _run(array: ArraySpec, first: int, values: Values, **more: Any) -> Alike:
    """Return rows of a shape of their own, which is no greater than the array's."""
    axis, shape = channel_axis(array), values.shape[1:]
    if axis is None:
        bound, sizes, flat = array.shape, shape, (len(values), 1, math.prod(shape))
        return Alike(first, values.reshape(flat), False, sizes, bound, **more)
    bound, sizes = (of[:axis] + of[axis + 1 :] for of in (array.shape, shape))
    last, n = channel_last(array), math.prod(sizes)
    flat = (len(values), n, shape[axis]) if last else (len(values), shape[axis], n)
    return Alike(first, values.reshape(flat), last, sizes, bound, **more)


def _packed(layout: Layout, i: int, slab: NDArray[np.uint8], n_rows: int) -> tuple[Values, Values]:
    """Return the elements of a step of a ragged tap, and the shapes of its rows, which `pack` has moved."""
    table = array_view(layout, layout.numbers[i][1], slab)[:n_rows].view(np.int64)
    return array_view(layout, i, slab).reshape(-1), table[:, 1:]


def _ragged(layout: Layout, i: int, slab: NDArray[np.uint8], n_rows: int) -> Iterator[Alike]:
    flat, sizes = _packed(layout, i, slab, n_rows)
    at = 0
    for start, stop in _runs(sizes):
        shape = (stop - start, *sizes[start].tolist())
        n = math.prod(shape)
        yield _run(layout.taps[i], start, flat[at : at + n].reshape(shape))
        at += n


def _padded(array: ArraySpec, dims: tuple[str, ...], values: Values, mask: Values) -> Iterator[Alike]:
    """Yield runs of padded rows that have the same places of their own."""
    axis = channel_axis(array)
    names = [dim for i, dim in enumerate(array.dims[1:]) if i != axis]
    of_channels = (
        None if axis is None or array.dims[1 + axis] not in dims else dims.index(array.dims[1 + axis])
    )
    for start, stop in _runs(mask):
        own, some = mask[start], values[start:stop]
        if of_channels is not None:
            assert axis is not None
            # Those of its own are the first ones.
            n = int(own.any(tuple(i for i in range(own.ndim) if i != of_channels - 1)).sum())
            some = some[(slice(None),) * (1 + axis) + (slice(0, n),)]
            own = own.any(of_channels - 1)
        shape = [array.shape[array.dims.index(dim) - 1] for dim in names]
        own = own.reshape([n if dim in dims else 1 for dim, n in zip(names, shape, strict=True)])
        yield _run(array, start, some, mask=np.broadcast_to(own, shape))


def _runs(of_rows: Values) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each run of rows that are equal."""
    n_rows = len(of_rows)
    changes = [row for row in range(1, n_rows) if (of_rows[row] != of_rows[row - 1]).any()]
    yield from pairwise([0, *changes, n_rows])
