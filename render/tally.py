"""Statistics of layers: those that were kept while capturing, or the same ones by one pass over some rows.

A pass holds a few MiB at a time and counts into the very bins that a capture does, so that a picture is drawn
from either alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError
from ..capture.measure import chan
from ..capture.moments import Moments
from ..capture.statistics import BIN_BITS, BINS, FIRST_OCTAVE, SIDE
from ..capture.summary import TapStatistics

if TYPE_CHECKING:
    from ..capture.reader import Run, Tap

Values = NDArray[Any]
Floats = NDArray[np.float64]

_PIECE = 2**18  # values that are counted at once
_SAMPLE_VALUES = 2**22  # of the largest layer, as far as these are more than the fewest rows
_LEAST_ROWS = 64
_FRACTION, _BIAS = 23, 127  # of a float32
_FIRST_KEY = (FIRST_OCTAVE + _BIAS) << BIN_BITS


class Tally:
    """What is counted of one tap, channel by channel.

    Args:
        n_channels: how many there are.
    """

    def __init__(self, n_channels: int) -> None:
        self.n_channels = n_channels
        self.count, self.n_nan, self.n_inf, self.n_zero = np.zeros((4, n_channels), np.int64)
        self.minimum, self.maximum = np.full((2, n_channels), np.nan)
        self.mean, self.squares = np.zeros((2, n_channels))
        self.histogram = np.zeros((n_channels, BINS), np.int64)
        #: Means of each row, (rows, channels), piece by piece; NaN where no value is finite.
        self.means: list[Floats] = []

    @np.errstate(over="ignore", invalid="ignore")
    def add(self, values: Floats, own: Values | None = None) -> None:
        """Count `values` (rows, channels, positions); where `own` is given, those for which it is true."""
        finite, nan = np.isfinite(values), np.isnan(values)
        n_all = np.full(self.n_channels, values.shape[0] * values.shape[2])
        if own is not None:
            finite, nan, n_all = finite & own, nan & own, own.sum((0, 2))
        whole = bool(finite.all())
        n_in_row = np.full(values.shape[:2], values.shape[2]) if whole else finite.sum(2)
        count, n_nan = n_in_row.sum(0), nan.sum((0, 2))
        self.n_nan += n_nan
        self.n_inf += n_all - count - n_nan
        known = values if whole else np.where(finite, values, 0.0)
        self.n_zero += (known == 0).sum((0, 2)) - (values.shape[0] * values.shape[2] - count)
        low, high = (known if whole else np.where(finite, values, end) for end in (np.inf, -np.inf))
        self.minimum = np.fmin(self.minimum, np.where(count > 0, low.min((0, 2), initial=np.inf), np.nan))
        self.maximum = np.fmax(self.maximum, np.where(count > 0, high.max((0, 2), initial=-np.inf), np.nan))
        sums = known.sum(2)
        mean = sums.sum(0) / np.maximum(count, 1)
        squares = np.square(np.where(finite, known - mean[:, None], 0.0)).sum((0, 2))
        self.mean, self.squares = chan(self.count, self.mean, self.squares, count, mean, squares)
        self.count += count
        self.means.append(np.where(n_in_row > 0, sums / np.maximum(n_in_row, 1), np.nan))
        self._bin(known, None if whole else finite)

    def _bin(self, values: Floats, finite: Values | None) -> None:
        with np.errstate(over="ignore"):
            bits = values.astype(np.float32).view(np.int32)
        side = np.clip(((bits & 0x7FFFFFFF) >> (_FRACTION - BIN_BITS)) - (_FIRST_KEY - 1), 0, SIDE)
        bins = np.where(bits < 0, SIDE - side, SIDE + side)
        bins += (np.arange(self.n_channels, dtype=np.int32) * BINS)[None, :, None]
        found = np.bincount(bins.ravel() if finite is None else bins[finite], minlength=self.histogram.size)
        self.histogram += found.reshape(-1, BINS)

    def statistics(self, name: str, axis: str | None) -> TapStatistics:
        """Return what was counted, as a store gives it."""
        some = self.count > 0
        return TapStatistics(
            name,
            int(self.n_nan.sum()),
            int(self.n_inf.sum()),
            axis,
            self.count,
            self.n_nan,
            self.n_inf,
            self.n_zero,
            self.minimum,
            self.maximum,
            np.where(some, self.mean, np.nan),
            np.where(some, self.squares / np.maximum(self.count, 1), np.nan),
            self.histogram,
        )


@dataclass(frozen=True, eq=False)
class Tallied:
    """The statistics of some layers, and of what rows."""

    layers: tuple[TapStatistics, ...]
    means: tuple[Floats, ...]
    """Of each row and channel, where a pass was made; else none."""
    source: str
    """Of which rows, and from where, in words."""


def tallied(
    run: Run, names: Sequence[str], rows: Sequence[int] | None, sample: int, seed: int, needs: str
) -> Tallied:
    """Return the statistics of taps.

    Args:
        run: the store.
        names: the taps.
        rows: of which rows; None is all that are captured, or a sample of them where they must be read.
        sample: rows of the sample at most; see `sample_size`.
        seed: what the sample is drawn by.
        needs: what must be kept by a store for it to serve: `channels`, `histogram` or `pooled`.

    Raises:
        DrawError: the store keeps neither these statistics nor values.
    """
    if rows is None and needs in run.stats.names:
        return Tallied(tuple(run.stats[name] for name in names), (), f"kept while capturing: {_all(run)}")
    chosen, source = rows_to_read(run, rows, sample, seed, needs)
    tallies = [tally(run[name], chosen) for name in names]
    layers = tuple(t.statistics(name, axis_of(run[name])) for t, name in zip(tallies, names, strict=True))
    return Tallied(layers, tuple(np.concatenate(t.means) for t in tallies), source)


def rows_to_read(
    run: Run, rows: Sequence[int] | None, sample: int, seed: int, needs: str
) -> tuple[Values, str]:
    """Return the rows of a pass, and what they are in words; as for `tallied`.

    Raises:
        DrawError: the store has no values.
    """
    if run.stats.names and not run.manifest.layout.values:
        raise DrawError(
            f"{run.path} has neither {needs!r} statistics of these rows nor values to compute them from; "
            "capture with stats='all' (--stats all), or with values"
        )
    if rows is not None:
        n = len(rows)
        return np.asarray(rows), f"of {n:,} chosen row{'s' if n > 1 else ''}"
    done = np.flatnonzero(run.committed())
    if len(done) <= sample:
        return done, f"read from the store: {_all(run)}"
    chosen = np.sort(np.random.default_rng(seed).choice(done, sample, replace=False))
    source = f"of {sample:,} of {run.n_rows:,} rows, drawn at random (seed {seed})"
    return chosen, source if run.complete else f"{source}; the capture is not finished"


def sample_size(run: Run, names: Sequence[str]) -> int:
    """Return how many rows are read at most where nobody says, by the size of the largest of some taps."""
    return max(_LEAST_ROWS, _SAMPLE_VALUES // max(math.prod(run[name].bound) for name in names))


def _all(run: Run) -> str:
    n = run.n_committed
    if run.complete:
        return f"all {n:,} rows" if n > 1 else "the row"
    return f"{n:,} captured rows; the capture is not finished"


def axis_of(tap: Tap) -> str | None:
    """Return the name of the axis that the channels lie on, as in a store's statistics."""
    dims = tap.dims[1:]
    if not dims:
        return None
    return dims[-1] if dims[-1] in ("feature", "component") else dims[0]


def n_channels_of(tap: Tap) -> int:
    """Return how many channels a tap has."""
    axis = axis_of(tap)
    return 1 if axis is None else tap.bound[tap.dims[1:].index(axis)]


def pieces(tap: Tap, rows: Values) -> Iterator[tuple[Floats, Values | None]]:
    """Yield float64 (rows, channels, positions) of a tap, and which are its own where it is padded."""
    axis = axis_of(tap)
    at = 0 if axis is None else tap.dims.index(axis)
    n = 1 if tap.is_ragged else max(1, _PIECE // max(1, math.prod(tap.bound)))
    for start in range(0, len(rows), n):
        some = rows[start : start + n]
        values = np.asarray(tap[int(some[0])])[None] if tap.is_ragged else np.asarray(tap[some])
        own = None
        if "mask" in tap.parts:
            mask = tap.mask
            sizes = zip(tap.dims[1:], tap.bound, strict=True)
            shape = [len(some), *(size if dim in mask.dims else 1 for dim, size in sizes)]
            own = np.broadcast_to(np.asarray(mask[some]).reshape(shape), values.shape)
        yield (
            _channels_first(values, at).astype(np.float64),
            None if own is None else _channels_first(own, at),
        )


def _channels_first(values: Values, at: int) -> Values:
    """Return values as (rows, channels, positions); `at` is the channels' axis, 0 where there is none."""
    if at == 0:
        return values.reshape(len(values), 1, 1)
    return np.moveaxis(values, at, 1).reshape(len(values), values.shape[at], -1)


def tally(tap: Tap, rows: Values) -> Tally:
    """Count some rows of a tap.

    Raises:
        DrawError: the number of channels differs from row to row.
    """
    found = Tally(n_channels_of(tap))
    for values, own in pieces(tap, rows):
        if values.shape[1] != found.n_channels:
            raise DrawError(
                f"rows of {tap.name} have {values.shape[1]} and {found.n_channels} {axis_of(tap)}s, so there "
                "is no channel that all have; statistics take layers whose channels are the same in each row"
            )
        found.add(values, own)
    return found


def moments(tap: Tap, rows: Values) -> Moments:
    """Return the moments of the channels at all positions of some rows that are finite in all channels."""
    found = Moments()
    for values, own in pieces(tap, rows):
        if own is not None:
            values = np.where(own, values, np.nan)
        found.add(np.moveaxis(values, 1, 2).reshape(-1, values.shape[1]))
    return found


def together(its: TapStatistics) -> TapStatistics:
    """Return the statistics of a layer as if it were one channel."""
    assert its.count is not None and its.minimum is not None and its.maximum is not None  # noqa: PT018
    assert its.n_zero is not None
    return replace(
        its,
        count=its.count.sum(keepdims=True),
        n_zero=its.n_zero.sum(keepdims=True),
        minimum=np.fmin.reduce(its.minimum, keepdims=True),
        maximum=np.fmax.reduce(its.maximum, keepdims=True),
        histogram=None if its.histogram is None else its.histogram.sum(0, keepdims=True),
    )
