"""Computing a block's statistics of one tap, from its rows in memory, piece by piece.

A piece is at most `_PIECE` values, so that what is computed of it, one thing after the other, finds it in the
processor's cache, and nothing here is as large as a tap. numpy gives up the interpreter's lock in all but the
counting of bins.

What is added up, and how exactly:

* Means and squares of deviations are taken for each row and channel by two passes over the piece, and merged
  in float64 by the pairwise formula of Chan, Golub and LeVeque (1983, "Algorithms for computing the sample
  variance"), so a mean that is large beside the deviations costs nothing.
* Where positions lie side by side and values are float32, the passes are float32: the deviations from the
  rounded mean of the row are exact to half a unit of their last place, and numpy adds them in pairs, so a sum
  of squares is right to 5e-6 of itself, and the mean, corrected by the sum of the deviations, to 5e-6
  standard deviations. (Where the rounded mean lies further off than the values, these are a few units of
  their last place apart, and nothing is rounded.) Values whose squares could overflow or vanish take float64;
  so does all else.
* Sums for classes and Gram matrices are float64.

Values that are not finite are counted and left out of the rest.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .alike import Alike, alike, joined
from .dtypes import BFLOAT16
from .layout import ArraySpec, Layout, array_view
from .ragged import pack
from .statistics import (
    BIN_BITS,
    BINS,
    FIRST_OCTAVE,
    LAST_OCTAVE,
    MOST_GRAM_CHANNELS,
    SIDE,
    Statistics,
    TapFields,
    cells,
    channel_last,
    is_label,
    is_narrow,
)

Values = NDArray[Any]
Floats = NDArray[np.float64]

_PIECE = 64 * 1024  # values
_STRIP = 16 * 1024  # rows times channels
_SHORT = 256  # positions of which float32 is summed one after the other, in eight sums or more
_GRAM_PIECE = 4 * _PIECE
_TILE = 64  # channels
_MOST_PRODUCT, _LONGEST_RUN = 2**18, 1024  # multiplications, and positions
_BINNED_CHANNELS = 64  # at a time: their bins must fit the cache too
_LEAST_SPAN, _MOST_SPAN = 1e-15, 1e15
_BITS, _BIAS, _FRACTION = 0x7FFFFFFF, 127, 23
_FIRST_KEY = (FIRST_OCTAVE + _BIAS) << BIN_BITS
_LAST_KEY = (LAST_OCTAVE + 1 + _BIAS) << BIN_BITS
_INFINITE_KEY = 255 << BIN_BITS


class _Scratch(threading.local):
    """Memory that a thread uses again for each piece."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[np.uint8]] = {}

    def take(self, name: str, shape: Sequence[int], dtype: Any) -> Values:
        n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        memory = self._kept.get(name)
        if memory is None or memory.nbytes < n_bytes:
            memory = self._kept[name] = np.empty(n_bytes, np.uint8)
        return np.asarray(memory[:n_bytes].view(dtype).reshape(shape))

    def forget(self) -> None:
        self._kept.clear()


_scratch = _Scratch()


def scratch_bytes(statistics: Statistics | None, step_rows: int) -> int:
    """Return the most that a thread holds while it measures slabs of `step_rows` rows."""
    if statistics is None:
        return 0
    names, taps = statistics.names, statistics.taps
    largest = max(tap.channels * math.prod(tap.positions) for tap in taps) * step_rows
    n = min(_PIECE, largest)
    # Values as floats, deviations, masks, and as much again of what numpy makes where some are not finite.
    n_bytes = n * (8 + 8 + 1 + 32)
    if any(tap.copied for tap in taps):  # values, or codes and which of them are none; and where they are
        n_bytes += 16 * n + 16 * max(math.prod(tap.positions) for tap in taps if tap.copied)
    if "histogram" in names:
        n_bytes += n * (4 + 4 + 8 + 4) + 3 * 8 * _BINNED_CHANNELS * (BINS + 1)
    if "classes" in names:
        n_bytes = max(n_bytes, 4 * 8 * max(n, *(math.prod(tap.positions) for tap in taps)))
    if "gram" in names:
        n_bytes += max(
            (_gram_bytes(tap, step_rows) for tap in taps if tap.channels <= MOST_GRAM_CHANNELS), default=0
        )
    if "top" in names:
        n_bytes += 8 * 8 * statistics.k * max(tap.channels for tap in taps)
    return n_bytes + 64 * 1024


def _gram_bytes(tap: TapFields, step_rows: int) -> int:
    """Return the bytes of the sums, of a piece's tiles and of their products, with two masks."""
    tile, wide = _tiling(tap.channels)
    most = min(max(1, _GRAM_PIECE // wide), step_rows * math.prod(tap.positions))
    values = wide * -(-most // _run(tile)) * _run(tile)
    return 8 * wide**2 + (8 + 8 + 2 + (16 if tap.copied else 0)) * values


def forget_scratch() -> None:
    """Give back what this thread keeps for measuring."""
    _scratch.forget()


def measure(
    layout: Layout, i: int, slabs: Sequence[NDArray[np.uint8]], n_rows: int, first_row: int, entries: Floats
) -> None:
    """Compute the statistics of tap `i` over the first `n_rows` rows of a block.

    Args:
        layout: how slabs are laid out; it has statistics.
        i: which of its taps.
        slabs: the block's slabs, in order; the rows' means and maxima are written into them.
        n_rows: rows of the block that exist.
        first_row: index of the first of them in the data set.
        entries: the block's entries, those of all taps; those of this one are written.
    """
    assert layout.statistics is not None
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        _Block(layout, layout.statistics, i, slabs, n_rows, first_row, entries).measure()


@dataclass(frozen=True)
class _Moments:
    """What is known of some positions of each row and channel; all of shape (rows, channels)."""

    n: Any  # one number where all are finite
    mean: Values
    squares: Values
    high: Values
    low: Values


class _Block:
    """One tap's rows of a block."""

    def __init__(
        self,
        layout: Layout,
        statistics: Statistics,
        i: int,
        slabs: Sequence[NDArray[np.uint8]],
        n_rows: int,
        first_row: int,
        entries: Floats,
    ) -> None:
        self.layout, self.statistics, self.i, self.first_row = layout, statistics, i, first_row
        self.array: ArraySpec = layout.taps[i]
        self.tap: TapFields = statistics.taps[i]
        n = [min(layout.step_rows, n_rows - j * layout.step_rows) for j in range(len(slabs))]
        self.slabs = [(slab, rows) for slab, rows in zip(slabs, n, strict=True) if rows > 0]
        if self.array.is_ragged:
            for j, (slab, rows) in enumerate(self.slabs):
                pack(self.array, layout, slab, rows, first_row + j * layout.step_rows)
        self.last = channel_last(self.array)
        self.axis = 1 if self.last else 2  # of the positions
        self.out = self.tap.views(entries)
        for view in self.out.values():
            view.fill(0)

    def measure(self) -> None:
        """Go over all pieces, then over what needs other pieces."""
        out = self.out
        out["minimum"].fill(np.inf)
        out["maximum"].fill(-np.inf)
        if "top_value" in out:
            out["top_value"].fill(-np.inf)
            out["top_row"].fill(-1)
        first = self.first_row
        for slab, n_rows in self.slabs:
            pooled = self._pooled(slab, n_rows)
            for rows, channels in self._strips(n_rows):
                self._strip(slab, n_rows, rows, channels, first + rows.start, pooled)
            if "histogram" in out and self.last:
                for some in joined(self.layout, self.i, slab, n_rows):
                    self._bin_features(some)
            if "class_sum" in out:
                for some in self._alike(slab, n_rows):
                    self._classes(some, self._labels(slab, n_rows))
            first += n_rows
        if "gram" in out:
            self._gram()
        if "top_value" in out:
            self._find_top()
        never = out["count"] == 0
        for name in ("minimum", "maximum", "mean"):
            out[name][never] = np.nan

    def _alike(self, slab: NDArray[np.uint8], n_rows: int) -> Iterator[Alike]:
        return alike(self.layout, self.i, slab, n_rows)

    def _pooled(self, slab: NDArray[np.uint8], n_rows: int) -> Values | None:
        """Return where the means and maxima of a slab's rows go: (rows, 2, channels)."""
        if self.tap.pooled < 0:
            return None
        view = array_view(self.layout, len(self.layout.arrays) - 1, slab)[:n_rows]
        return view[:, self.tap.pooled : self.tap.pooled + 2 * self.tap.channels].reshape(n_rows, 2, -1)

    def _labels(self, slab: NDArray[np.uint8], n_rows: int) -> Values:
        i = next(i for i, column in enumerate(self.layout.columns) if is_label(column))
        return array_view(self.layout, len(self.layout.moved) + i, slab)[:n_rows]

    def _strips(self, n_rows: int) -> Iterator[tuple[slice, slice]]:
        """Yield rows and channels of which what is known of each row and channel is merged at once."""
        wide = min(self.tap.channels, _STRIP)
        if "histogram" in self.out and not self.last:
            wide = min(wide, max(_BINNED_CHANNELS, _STRIP // n_rows))
        yield from _parts(n_rows, self.tap.channels, max(1, _STRIP // wide), wide)

    def _strip(
        self,
        slab: NDArray[np.uint8],
        n_slab_rows: int,
        rows: slice,
        channels: slice,
        first_row: int,
        pooled: Values | None,
    ) -> None:
        shape = (rows.stop - rows.start, channels.stop - channels.start)
        found = _Moments(*_scratch.take("moments", (5, *shape), np.float64))
        for some in self._alike(slab, n_slab_rows):
            low, high = max(rows.start, some.first), min(rows.stop, some.stop)
            if low < high:
                inside = [part[low - rows.start : high - rows.start] for part in _all(found)]
                self._fill(some, slice(low - some.first, high - some.first), channels, inside)
        self._add(found, channels)
        all_known = found.n.min() > 0
        if pooled is not None:
            pooled[rows, 0, channels] = found.mean if all_known else np.where(found.n > 0, found.mean, np.nan)
            pooled[rows, 1, channels] = found.high if all_known else np.where(found.n > 0, found.high, np.nan)
        if "top_value" in self.out:
            self._rank(found.high, channels, first_row)

    def _fill(self, some: Alike, rows: slice, channels: slice, found: Sequence[Values]) -> None:
        """Write what is known of each row and channel, and add up what is counted."""
        n_positions = some.n_positions
        n_there = max(0, min(channels.stop, some.n_channels) - channels.start) if n_positions else 0
        if n_there < channels.stop - channels.start:  # of what is not there, as of what is not finite
            for part, nothing in zip(found, (0, 0, 0, -np.inf, np.inf), strict=True):
                part[:, n_there:] = nothing
        if n_there == 0:
            return
        n_rows, fit = rows.stop - rows.start, max(1, _PIECE // n_positions)
        wide = min(n_there, fit)
        if "histogram" in self.out and not self.last:
            wide = min(wide, max(_BINNED_CHANNELS, fit // n_rows))
        for these, several in _parts(n_rows, n_there, max(1, fit // wide), wide):
            one: _Moments | None = None
            at = slice(rows.start + these.start, rows.start + these.stop)
            of = slice(channels.start + several.start, channels.start + several.stop)
            for start in range(0, n_positions, _PIECE):
                piece = _floats(some.take(at, of, slice(start, start + _PIECE)))
                moments = _moments(piece, self.axis)
                self._count(piece, of, moments)
                one = moments if one is None else _merged(one, moments)
            assert one is not None
            for whole, part in zip(found, _all(one), strict=True):
                whole[these, several] = part

    def _count(self, piece: Values, channels: slice, moments: _Moments) -> None:
        """Add up what is counted: zeros, what is not finite, and the bins."""
        out, total = self.out, piece.shape[self.axis] * len(piece)
        out["zero"][channels] += _zeros(piece, self.axis)
        if isinstance(moments.n, np.ndarray):  # else all are finite
            nan = np.isnan(piece).sum((0, self.axis))
            out["nan"][channels] += nan
            out["inf"][channels] += total - moments.n.sum(0) - nan
        if "histogram" in out and not self.last:
            self._bin(piece, channels)

    def _add(self, found: _Moments, channels: slice) -> None:
        """Merge the rows of a piece, then the piece into what came before it."""
        out, n = self.out, found.n.sum(0)
        mean = (found.n * found.mean).sum(0) / np.maximum(n, 1)
        squares = found.squares.sum(0) + (found.n * (found.mean - mean) ** 2).sum(0)
        before = out["count"][channels]
        out["mean"][channels], out["squares"][channels] = chan(
            before, out["mean"][channels], out["squares"][channels], n, mean, squares
        )
        before += n
        np.maximum(out["maximum"][channels], found.high.max(0), out=out["maximum"][channels])
        np.minimum(out["minimum"][channels], found.low.min(0), out=out["minimum"][channels])

    def _bin(self, piece: Values, channels: slice) -> None:
        for start in range(0, channels.stop - channels.start, _BINNED_CHANNELS):
            some = slice(start, start + _BINNED_CHANNELS)
            keys = _keys(piece[:, :, some] if self.last else piece[:, some])
            n = keys.shape[2 if self.last else 1]
            offsets = np.arange(0, n * (BINS + 1), BINS + 1, dtype=np.int64)
            at = _scratch.take("index", keys.shape, np.int64)
            np.add(keys, offsets if self.last else offsets[:, None], out=at)
            counts = np.bincount(at.reshape(-1), minlength=n * (BINS + 1)).reshape(n, BINS + 1)
            first = channels.start + start
            self.out["histogram"][first : first + n] += counts[:, :BINS]

    def _bin_features(self, some: Alike) -> None:
        """Count the bins of few features over many positions: those of all would not fit the cache."""
        n_rows, n_positions = some.stop - some.first, some.n_positions
        if n_positions == 0:
            return
        for channels in _cut(some.n_channels, _BINNED_CHANNELS):
            most = _PIECE // (channels.stop - channels.start)
            for rows in _cut(n_rows, max(1, most // n_positions)):
                for positions in _cut(n_positions, most):
                    self._bin(_floats(some.take(rows, channels, positions)), channels)

    def _rank(self, high: Floats, channels: slice, first_row: int) -> None:
        """Keep the rows with the highest maxima, the earlier of equals."""
        value, row = self.out["top_value"][:, channels], self.out["top_row"][:, channels]
        better = np.flatnonzero(high.max(0) > value[-1])
        if not len(better):
            return
        rows = np.arange(first_row, first_row + len(high), dtype=np.float64)
        values = np.concatenate([value[:, better], high[:, better]])
        numbers = np.concatenate([row[:, better], np.broadcast_to(rows[:, None], (len(high), len(better)))])
        order = np.argsort(-values, axis=0, kind="stable")[: self.statistics.k]
        value[:, better] = np.take_along_axis(values, order, 0)
        row[:, better] = np.take_along_axis(numbers, order, 0)

    def _find_top(self) -> None:
        """Look up where in its row each of the highest values lies; the first of equals."""
        value, row, position = (self.out[f"top_{name}"] for name in ("value", "row", "position"))
        value[row < 0], position[row < 0] = np.nan, -1
        if self.tap.positions == ():
            return
        kept = np.flatnonzero(row.ravel() >= 0)
        if not kept.size:  # not one value of the block is finite
            return
        within = (row.ravel()[kept] - self.first_row).astype(np.intp)
        order = np.argsort(within, kind="stable")
        starts = np.flatnonzero(np.diff(within[order], prepend=-1))
        for same_row in np.split(kept[order], starts[1:]):
            number = int(row.flat[same_row[0]]) - self.first_row
            slab, at = divmod(number, self.layout.step_rows)
            some = next(one for one in self._alike(*self.slabs[slab]) if at < one.stop)
            channels, sought = same_row % self.tap.channels, value.flat[same_row]
            position.flat[same_row] = some.numbered(_first(some, at - some.first, channels, sought))

    def _classes(self, rows_of: Alike, labels: Values) -> None:
        """Add each row's map, made smaller, to those of its class."""
        sums, tap = self.out["class_sum"], self.tap
        there = np.flatnonzero((labels >= 0) & (labels < self.statistics.n_classes))
        np.add.at(self.out["class_rows"], labels[there].astype(np.intp), 1)
        n_positions = rows_of.n_positions
        wide = max(1, min(tap.channels, _PIECE // n_positions))
        high = max(1, _PIECE // (wide * n_positions))
        for start in range(0, tap.channels, wide):
            for first in range(0, len(there), high):
                rows = there[first : first + high]
                some = rows_of.take(rows, slice(start, start + wide), slice(None))
                maps = some.astype(np.float64)
                if self.last:
                    maps = np.ascontiguousarray(maps.transpose(0, 2, 1))
                maps = shrunk(maps.reshape(*maps.shape[:2], *tap.positions), tap.grid)
                for label, one in zip(labels[rows].tolist(), maps, strict=True):
                    sums[int(label), start : start + wide] += one

    def _gram(self) -> None:
        n = self.tap.channels
        tile, wide = _tiling(n)
        n_tiles = wide // tile
        total = _scratch.take("total", (wide, wide), np.float64)
        total.fill(0)
        for slab, n_rows in self.slabs:
            for tiles in chain.from_iterable(map(self._tiles, joined(self.layout, self.i, slab, n_rows))):
                product = _scratch.take("product", (tiles.shape[1], tile, tile), np.float64)
                for i, j in zip(*np.triu_indices(n_tiles), strict=True):
                    np.matmul(tiles[i], tiles[j].swapaxes(1, 2), out=product)
                    total[i * tile : (i + 1) * tile, j * tile : (j + 1) * tile] += product.sum(0)
        self.out["gram"][:] = total[np.triu_indices(n)]

    def _tiles(self, of: Alike) -> Iterator[Floats]:
        """Yield values as float64 (tiles of channels, runs of positions, channels, positions), zeros behind.

        The products of such tiles are so small that the linear algebra library does not share them out among
        threads of its own, which would take the model's processors and wait for the next one in a loop.
        """
        n, n_positions = of.n_channels, of.n_positions
        if n_positions == 0:
            return
        tile, wide = _tiling(self.tap.channels)
        run = _run(tile)
        most = max(1, _GRAM_PIECE // wide)
        for rows in _cut(of.stop - of.first, max(1, most // n_positions)):
            for positions in _cut(n_positions, most):
                piece = of.take(rows, slice(None), positions)
                n_here = piece.shape[0] * piece.shape[self.axis]
                long = -(-n_here // run) * run
                if self.last:
                    some = _scratch.take("tiles", (long, wide), np.float64)
                    some[n_here:], some[:, n:] = 0, 0
                    some[:n_here, :n] = piece.reshape(n_here, n)
                else:
                    some = _scratch.take("tiles", (wide, long), np.float64)
                    some[n:], some[:, n_here:] = 0, 0
                    inside = some[:n, :n_here].reshape(n, piece.shape[0], -1)
                    np.copyto(inside, piece.transpose(1, 0, 2))
                finite = np.isfinite(some)
                if not finite.all():
                    some[~finite] = 0
                if self.last:
                    yield some.reshape(-1, run, wide // tile, tile).transpose(2, 0, 3, 1)
                else:
                    yield some.reshape(wide // tile, tile, -1, run).transpose(0, 2, 1, 3)


def _tiling(n_channels: int) -> tuple[int, int]:
    """Return the channels of a tile, and of all tiles."""
    tile = min(_TILE, n_channels)
    return tile, -(-n_channels // tile) * tile


def _run(tile: int) -> int:
    """Return how many positions are multiplied at once for tiles of so many channels."""
    return min(_LONGEST_RUN, _MOST_PRODUCT // tile**2)


def chan(
    n: Values, mean: Values, squares: Values, n_other: Values, mean_other: Values, squares_other: Values
) -> tuple[Floats, Floats]:
    """Return the mean of two sets of values and the sum of their squared deviations, from those of each."""
    share = n_other / np.maximum(n + n_other, 1)
    delta = np.where(n > 0, mean_other - mean, 0)
    merged = np.where(n > 0, mean + delta * share, mean_other)
    return np.where(n_other > 0, merged, mean), squares + squares_other + delta**2 * n * share


def shrunk(maps: Floats, grid: tuple[int, ...]) -> Floats:
    """Return maps whose axes behind the second are means over `cells`; shape (rows, channels, *grid)."""
    for axis, n in enumerate(grid, start=2):
        size = maps.shape[axis]
        if n == size:
            continue
        weights = np.zeros((size, n))
        for i, cell in enumerate(cells(size, n)):
            weights[cell, i] = 1 / (cell.stop - cell.start)
        maps = np.moveaxis(np.matmul(np.moveaxis(maps, axis, -1), weights), -1, axis)
    return maps


def _all(moments: _Moments) -> tuple[Any, ...]:
    return moments.n, moments.mean, moments.squares, moments.high, moments.low


def _parts(n_rows: int, n_channels: int, high: int, wide: int) -> Iterator[tuple[slice, slice]]:
    for channels in _cut(n_channels, wide):
        for rows in _cut(n_rows, high):
            yield rows, channels


def _cut(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _merged(a: _Moments, b: _Moments) -> _Moments:
    n, n_other = (np.broadcast_to(one.n, one.mean.shape) for one in (a, b))
    mean, squares = chan(n, a.mean, a.squares, n_other, b.mean, b.squares)
    finite = not isinstance(a.n, np.ndarray) and not isinstance(b.n, np.ndarray)
    return _Moments(
        a.n + b.n if finite else n + n_other,
        mean,
        squares,
        np.maximum(a.high, b.high),
        np.minimum(a.low, b.low),
    )


def _floats(piece: Values) -> Values:
    """Return a piece as float32 where that holds every value, else as float64; a view where it is that."""
    if piece.dtype in (np.float32, np.float64):
        return piece
    if piece.dtype == BFLOAT16:  # the upper half of a float32; ml_dtypes converts one by one
        wide = _scratch.take("values", piece.shape, np.uint32)
        np.left_shift(piece.view(np.uint16), 16, out=wide, dtype=np.uint32)
        return np.asarray(wide.view(np.float32))
    if piece.dtype == np.float16:
        return _from_halves(piece.view(np.uint16))
    floats = _scratch.take("values", piece.shape, np.float32 if is_narrow(piece.dtype) else np.float64)
    np.copyto(floats, piece, casting="unsafe")
    return floats


def _from_halves(bits: NDArray[np.uint16]) -> Values:
    """Return float16 as float32 by moving the bits: four times as fast as numpy's cast."""
    wide = _scratch.take("values", bits.shape, np.uint32)
    sign = _scratch.take("deviations", bits.shape, np.uint32)
    np.copyto(wide, bits)
    np.bitwise_and(wide, 0x8000, out=sign)
    sign <<= 16
    wide &= 0x7FFF
    wide <<= 13
    floats = np.asarray(wide.view(np.float32))
    floats *= np.float32(2.0**112)
    if floats.max() >= 65536:  # where the exponent was all ones
        wide[floats >= 65536] |= 0x7F800000
    wide |= sign
    return floats


def _moments(piece: Values, axis: int) -> _Moments:
    n = piece.shape[axis]
    high: Values
    low: Values
    if n == 1:
        high = low = piece.reshape(len(piece), -1)
        if not np.isfinite(high).all():
            return _masked(piece, axis)
        return _Moments(1.0, high, np.zeros(high.shape), high, low)
    if axis == 2 and n < _SHORT and piece.flags.c_contiguous:  # two times as fast as max()
        starts, shape = np.arange(0, piece.size, n), piece.shape[:2]
        high, low = (f.reduceat(piece.reshape(-1), starts).reshape(shape) for f in (np.maximum, np.minimum))
    else:
        high, low = piece.max(axis), piece.min(axis)
    # Of values that are not finite, so is the span: NaN is less than nothing.
    span = high - low
    widest = span.max()
    if not widest < np.inf and not (np.isfinite(high).all() and np.isfinite(low).all()):
        return _masked(piece, axis)
    found = _short(piece, span) if axis == 2 and widest < _MOST_SPAN else None
    mean, squares = found or _long(piece, axis)
    same = span == 0
    if same.any():
        mean, squares = np.where(same, high, mean), np.where(same, 0, squares)
    return _Moments(float(n), mean, squares, high, low)


def _short(piece: Values, span: Values) -> tuple[Floats, Floats] | None:
    """Return means and squares by float32, or None where that would not be exact enough."""
    n = piece.shape[2]
    if piece.dtype != np.float32 or ((span > 0) & (span < _LEAST_SPAN)).any():
        return None
    near = _sum(piece)
    near /= np.float32(n)
    deviations = _scratch.take("deviations", piece.shape, np.float32)
    np.subtract(piece, near[:, :, None], out=deviations)
    rest = _sum(deviations).astype(np.float64)
    if n < _SHORT:
        squares = np.einsum("rcp,rcp->rc", deviations, deviations).astype(np.float64)
    else:
        np.square(deviations, out=deviations)
        squares = _sum(deviations).astype(np.float64)
    return near + rest / n, np.maximum(squares - rest * rest / n, 0)


def _sum(values: Values) -> Values:
    """Return sums over positions; einsum's of few are as exact as sums in pairs, and faster."""
    if values.shape[2] < _SHORT:
        return np.asarray(np.einsum("rcp->rc", values))
    return np.asarray(np.add.reduce(values, 2))


def _long(piece: Values, axis: int) -> tuple[Floats, Floats]:
    n = piece.shape[axis]
    deviations = _scratch.take("deviations", piece.shape, np.float64)
    np.copyto(deviations, piece)
    mean = np.add.reduce(deviations, axis) / n
    deviations -= np.expand_dims(mean, axis)
    rest = np.add.reduce(deviations, axis)
    np.square(deviations, out=deviations)
    squares = np.add.reduce(deviations, axis)
    return mean + rest / n, np.maximum(squares - rest**2 / n, 0)


def _masked(piece: Values, axis: int) -> _Moments:
    """Return the moments of what is finite."""
    finite = np.isfinite(piece)
    n = finite.sum(axis).astype(np.float64)
    mean = np.where(finite, piece, 0).sum(axis, dtype=np.float64) / np.maximum(n, 1)
    deviations = np.where(finite, piece - np.expand_dims(mean, axis), 0)
    rest = deviations.sum(axis)
    squares = np.maximum((deviations**2).sum(axis) - rest**2 / np.maximum(n, 1), 0)
    high = piece.max(axis, where=finite, initial=-np.inf).astype(np.float64)
    low = piece.min(axis, where=finite, initial=np.inf).astype(np.float64)
    return _Moments(n, mean + rest / np.maximum(n, 1), squares, high, low)


def _zeros(piece: Values, axis: int) -> Values:
    """Return how many values of each channel are zero."""
    zero = np.equal(piece, 0, out=_scratch.take("zero", piece.shape, np.bool_))
    if axis == 2 and len(piece) == 1:
        return np.asarray(np.bitwise_count(np.packbits(zero, axis=2)).sum((0, 2), dtype=np.int64))
    # 255 of them fit a byte, and bytes are added without a cast.
    flat = zero.view(np.uint8).reshape(-1, *piece.shape[1:] if axis == 2 else piece.shape[2:])
    parts = [np.add.reduce(flat[i : i + 255], 0, dtype=np.uint8) for i in range(0, len(flat), 255)]
    total = parts[0] if len(parts) == 1 else np.sum(parts, 0, dtype=np.int64)
    return np.asarray(total.sum(1, dtype=np.int64) if axis == 2 else total)


def _keys(piece: Values) -> NDArray[np.int32]:
    """Return the bin of each value; `BINS` where it is not finite."""
    if piece.dtype != np.float32:
        short = _scratch.take("short", piece.shape, np.float32)
        np.copyto(short, piece, casting="unsafe")
        not_finite = ~np.isfinite(piece)  # what float32 cannot hold is finite all the same
    else:
        short, not_finite = piece, None
    bits = short.view(np.int32)
    keys = np.bitwise_and(bits, _BITS, out=_scratch.take("keys", piece.shape, np.int32))
    keys >>= _FRACTION - BIN_BITS
    if not_finite is None and keys.max() >= _INFINITE_KEY:
        not_finite = keys >= _INFINITE_KEY
    np.clip(keys, _FIRST_KEY - 1, _LAST_KEY, out=keys)
    keys -= _FIRST_KEY - 1
    signs = np.right_shift(bits, 31, out=_scratch.take("signs", piece.shape, np.int32))
    keys ^= signs  # a minus where the sign bit is set: -x is ~x + 1
    keys -= signs
    keys += SIDE
    if not_finite is not None:
        keys[not_finite] = BINS
    return keys


def _first(of: Alike, row: int, channels: Values, sought: Floats) -> Values:
    """Return for some channels of a row where the value that is sought there comes first."""
    found = np.full(len(channels), -1)
    long = max(1, _PIECE // of.n_channels) if of.is_copied else _PIECE
    for start in range(0, of.n_positions, long):
        some = of.take(slice(row, row + 1), slice(None), slice(start, start + long))[0]
        some = some.T if of.last else some
        high = max(1, _PIECE // some.shape[1])
        for i in range(0, len(channels), high):
            same = some[channels[i : i + high]].astype(np.float64) == sought[i : i + high, None]
            at = np.where(same.any(1), start + same.argmax(1), -1)
            found[i : i + high] = np.where(found[i : i + high] < 0, at, found[i : i + high])
    return found
