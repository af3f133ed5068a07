"""What is known of a tap over all captured rows: its limits, percentiles, and measures of its channels.

They come from the statistics of the store where it keeps what they follow from. Otherwise all rows are read,
in pieces, so that memory does not grow with them. What was found is kept with the run until it has more rows.

Percentiles are values of the data, found exactly: sixteen bits of the numbers at a time, counted in 65,536
bins, so that no value is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..capture.measure import chan
from ..capture.statistics import BINS, SIDE, edges
from ..capture.summary import by_class, f_ratio
from .importance import F_RATIO
from .scale import Limits, cut_limits, place_of_percentile

if TYPE_CHECKING:
    from ..capture.reader import Run
    from ..capture.summary import TapStatistics
    from .scale import Clip

Values = NDArray[Any]
Rows = NDArray[np.intp]
_T = TypeVar("_T")

#: Bytes of the floats of one piece, or one row where that is larger.
PIECE_BYTES = 32 * 2**20
_BITS = 16  # of a number that are told at a time

_FOUND: WeakKeyDictionary[Any, tuple[int, dict[tuple[Any, ...], Any]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class DataLimits:
    """Between which values a tap lies over all captured rows."""

    low: float
    """Least finite value; NaN where there is none."""
    high: float
    """Greatest finite value."""
    n_rows: int
    """Captured rows."""
    cut: Limits | None = None
    """Where the percentiles of `clip` lie, where they were asked for."""
    about: bool = False
    """Whether these are edges of a histogram's bins, the next ones outside of the percentiles."""


@dataclass(frozen=True, eq=False)
class Captured:
    """All captured rows of a tap."""

    run: Run
    """The store."""
    name: str
    """The tap's name."""
    unit: str
    """The axis that its channels lie on."""
    n_channels: int
    """How many there are."""
    dtype: np.dtype[Any]
    """What its values are read as: float32 or float64."""
    pieces: Callable[[], Iterable[tuple[Rows, Values]]]
    """Reads them anew: rows by their numbers, and floats of shape (rows, channels, ...)."""
    whole: bool = True
    """Whether these are all of its values, so that the statistics are of the same ones."""

    def limits(self, clip: Clip | None, symmetric: Callable[[bool], bool]) -> DataLimits:
        """Return its limits.

        Args:
            clip: percentiles, as in `TilesSpec`.
            symmetric: whether the scale is so, given whether any value is negative.
        """
        low, high = self._once("limits", self._limits)
        n = self.run.n_committed
        if clip is None or np.isnan(low):
            return DataLimits(low, high, n)
        sizes = symmetric(low < 0)
        cut, about = self._once("cut", lambda: self._cut(clip, sizes), clip, sizes)
        return DataLimits(low, high, n, cut, about)

    def importance(self, by: str) -> Values:
        """Return the measure `by` of each channel over all of them, larger for what comes first."""
        return self._once("importance", lambda: self._importance(by), by)

    def n_ranked(self, by: str) -> int:
        """Return how many rows a ranking by `by` is over: of classes those that have one."""
        if by != F_RATIO:
            return self.run.n_committed
        return self._once("classes", lambda: int((self.run.stats.labels() >= 0).sum()))

    def _once(self, what: str, find: Callable[[], _T], *of: Any) -> _T:
        """Return what `find` finds; it is called once."""
        known, key = found(self.run), (what, self.name, self.whole, *of)
        if key not in known:
            known[key] = find()
        value: _T = known[key]
        return value

    def _values(self) -> Iterator[Values]:
        for _, values in self.pieces():
            yield values

    def _limits(self) -> Limits:
        its = self._statistics()
        if its is not None:
            assert its.minimum is not None
            assert its.maximum is not None
            return float(np.fmin.reduce(its.minimum)), float(np.fmax.reduce(its.maximum))
        low = high = np.nan
        for values in self._values():
            finite = values[np.isfinite(values)]
            if finite.size:
                low, high = np.fmin(low, finite.min()), np.fmax(high, finite.max())
        return float(low), float(high)

    def _cut(self, clip: Clip, symmetric: bool) -> tuple[Limits, bool]:
        its = self._statistics()
        if its is not None and its.histogram is not None:
            outer = cut_by_histogram(its, clip, symmetric)
            if outer is not None:
                return outer, True
        wanted = clip if isinstance(clip, tuple) else (clip,)
        absolute = symmetric and not isinstance(clip, tuple)
        values = percentiles(self._values, wanted, self.dtype, absolute=absolute)
        at = dict(zip(wanted, values, strict=True))
        return cut_limits(at.__getitem__, clip, symmetric), False

    def _importance(self, by: str) -> Values:
        if by == F_RATIO:
            return self._f_ratio()
        its = self._statistics()
        totals = None if its is None else Totals.of_statistics(its)
        if totals is None or (by == "l1" and totals.size is None):
            totals = Totals.of(self._values())
        return totals.importance(by)

    def _f_ratio(self) -> Values:
        stats = self.run.stats
        if self._statistics() is not None and "pooled" in stats.names:
            return stats.f_ratio(self.name)
        labels = stats.labels()
        parts = ((_means(values), labels[rows]) for rows, values in self.pieces())
        return f_ratio(*by_class(parts, int(labels.max(initial=-1)) + 1, self.n_channels))

    def _statistics(self) -> TapStatistics | None:
        """Return what the store keeps of each channel, where its channels are those that are drawn."""
        if not self.whole or "channels" not in self.run.stats.names:
            return None
        its = self.run.stats[self.name]
        same = its.axis == self.unit and its.count is not None and len(its.count) == self.n_channels
        return its if same else None


def found(run: Run) -> dict[tuple[Any, ...], Any]:
    """Return what was found of the captured rows of `run` so far; what is put there need not be found."""
    n, known = _FOUND.get(run, (-1, {}))
    if n != run.n_committed:
        known = {}
        _FOUND[run] = run.n_committed, known
    return known


def percentiles(
    pieces: Callable[[], Iterable[Values]],
    wanted: Sequence[float],
    dtype: np.dtype[Any],
    *,
    absolute: bool = False,
) -> list[float]:
    """Return percentiles of all finite values in `pieces`, or of their sizes; NaN where there is none.

    Args:
        pieces: gives arrays, anew each time.
        wanted: per cent.
        dtype: of these arrays, float32 or float64.
        absolute: whether they are of absolute values.
    """
    n_bits, prefixes = 8 * dtype.itemsize, [0] * len(wanted)
    places: list[int] = []
    for shift in range(n_bits - _BITS, -1, -_BITS):
        counts = np.zeros((len(wanted), 2**_BITS), np.int64)
        for values in pieces():
            keys = _keys(values, absolute)
            for i, prefix in enumerate(prefixes):
                told = shift + _BITS
                mine = keys if told == n_bits else keys[keys >> keys.dtype.type(told) == prefix]
                bins = mine >> keys.dtype.type(shift) & keys.dtype.type(2**_BITS - 1)
                counts[i] += np.bincount(bins.astype(np.intp), minlength=2**_BITS)
        if not counts.any():
            return [np.nan] * len(wanted)
        places = places or [place_of_percentile(one, int(counts[0].sum())) for one in wanted]
        for i, below in enumerate(np.cumsum(counts, axis=1)):
            at = int(np.searchsorted(below, places[i], side="right"))
            places[i] -= int(below[at - 1]) if at else 0
            prefixes[i] = prefixes[i] << _BITS | at
    return [_value(key, dtype) for key in prefixes]


def _keys(values: Values, absolute: bool) -> Values:
    """Return whole numbers in the order of the finite values."""
    finite = values[np.isfinite(values)]
    finite = np.abs(finite) if absolute else finite + 0  # of zeros there is one then
    unsigned = np.dtype(f"u{finite.dtype.itemsize}")
    bits, sign = finite.view(unsigned), unsigned.type(1 << (8 * unsigned.itemsize - 1))
    return np.where(bits & sign, ~bits, bits | sign)


def _value(key: int, dtype: np.dtype[Any]) -> float:
    """Return the value that has `key`."""
    n_bits = 8 * dtype.itemsize
    sign, all_bits = 1 << (n_bits - 1), (1 << n_bits) - 1
    bits = key ^ sign if key & sign else key ^ all_bits
    return float(np.array([bits], f"u{dtype.itemsize}").view(dtype)[0])


def cut_by_histogram(its: TapStatistics, clip: Clip, symmetric: bool) -> Limits | None:
    """Return edges of bins next to percentiles, on their outer sides; None where a bin is too wide."""
    assert its.histogram is not None
    assert its.minimum is not None
    assert its.maximum is not None
    counts = its.histogram.sum(axis=0)
    least, most = float(np.fmin.reduce(its.minimum)), float(np.fmax.reduce(its.maximum))
    if symmetric and not isinstance(clip, tuple):
        sizes = np.zeros(BINS, np.int64)
        sizes[SIDE:] = counts[SIDE:]
        sizes[SIDE + 1 :] += counts[:SIDE][::-1]
        counts, least, most = sizes, 0.0, max(-least, most)
    bounds = np.clip(edges(), least, most)
    wanted = clip if isinstance(clip, tuple) else (clip,)
    bins = [_bin(counts, percentile) for percentile in wanted]
    if set(bins) & {0, SIDE, BINS - 1}:
        return None
    outer = [float(bounds[i + (n == len(bins) - 1)]) for n, i in enumerate(bins)]
    return cut_limits(dict(zip(wanted, outer, strict=True)).__getitem__, clip, symmetric)


def _bin(counts: Values, percentile: float) -> int:
    place = place_of_percentile(percentile, int(counts.sum()))
    return int(np.searchsorted(np.cumsum(counts), place, side="right"))


def _means(values: Values) -> Values:
    """Return the mean of the finite values of each row and channel; NaN where there is none."""
    flat = values.reshape(*values.shape[:2], -1).astype(np.float64)
    finite = np.isfinite(flat)
    n = finite.sum(axis=2)
    total = np.where(finite, flat, 0.0).sum(axis=2)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


@dataclass(frozen=True, eq=False)
class Totals:
    """What all measures of each channel follow from; every array has shape (channels,)."""

    n: Values
    """Finite values."""
    mean: Values
    """Mean of them; 0 where there is none."""
    squares: Values
    """Sum of the squared deviations from the mean."""
    maximum: Values
    """Greatest; minus infinity where there is none."""
    size: Values | None
    """Sum of the absolute values; None where it is not known."""
    n_nonzero: Values
    """Finite values that are not zero."""

    @classmethod
    def of(cls, pieces: Iterable[Values]) -> Totals:
        """Add up arrays of shape (rows, channels, ...), of which there is one at least."""
        return reduce(cls._with, map(cls._of_piece, pieces))

    @classmethod
    def _of_piece(cls, values: Values) -> Totals:
        flat = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1).astype(np.float64)
        finite = np.isfinite(flat)
        n = finite.sum(axis=1)
        flat = np.where(finite, flat, 0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            mean = flat.sum(axis=1) / np.maximum(n, 1)
            squares = (np.where(finite, flat - mean[:, None], 0.0) ** 2).sum(axis=1)
            size = np.abs(flat).sum(axis=1)
        maximum = np.where(finite, flat, -np.inf).max(axis=1, initial=-np.inf)
        return cls(n, mean, squares, maximum, size, ((flat != 0) & finite).sum(axis=1))

    def _with(self, other: Totals) -> Totals:
        with np.errstate(over="ignore", invalid="ignore"):
            mean, squares = chan(self.n, self.mean, self.squares, other.n, other.mean, other.squares)
        assert self.size is not None
        assert other.size is not None
        return Totals(
            self.n + other.n,
            mean,
            squares,
            np.maximum(self.maximum, other.maximum),
            self.size + other.size,
            self.n_nonzero + other.n_nonzero,
        )

    @classmethod
    def of_statistics(cls, its: TapStatistics) -> Totals | None:
        """Return what the statistics of a store say; None where it keeps none."""
        if its.count is None or its.mean is None or its.variance is None:
            return None
        assert its.minimum is not None
        assert its.maximum is not None
        assert its.n_zero is not None
        mean = np.where(its.count > 0, its.mean, 0.0)
        positive = bool((np.where(its.count > 0, its.minimum, 0.0) >= 0).all())
        return cls(
            its.count,
            mean,
            np.where(its.count > 0, its.variance, 0.0) * its.count,
            np.where(its.count > 0, its.maximum, -np.inf),
            mean * its.count if positive else None,
            its.count - its.n_zero,
        )

    def importance(self, by: str) -> Values:
        """Return the measure `by` of each channel, like `importance` of all values together.

        A measure that is not known is NaN for every channel; only `l1` can be.
        """
        n = np.maximum(self.n, 1)
        with np.errstate(over="ignore", invalid="ignore"):
            measures = {
                "mean": self.mean,
                "maximum": self.maximum,
                "variance": self.squares / n,
                "l1": np.full(len(n), np.nan) if self.size is None else self.size,
                "l2": np.sqrt(self.squares + self.n * self.mean**2),
                "sparsity": self.n_nonzero / n,
            }[by]
        return np.where(self.n > 0, measures, -np.inf)
