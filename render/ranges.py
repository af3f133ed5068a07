"""What the page knows of all rows of a layer: its range, how much each channel matters, and percentiles.

`survey` knows the same for pictures, and reads every row where the store keeps no statistics of it. Who opens
a page of a large store must not wait for that: here a bounded number of rows, spread evenly over those that
are captured, is read in bounded time, and what follows says of how many. The sums are those of `survey`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import SelectionError
from .importance import F_RATIO
from .importance import MEASURES as OF_VALUES
from .scale import cut_of
from .selection import ChannelChoice
from .spec import MontageSpec
from .survey import Totals, cut_by_histogram
from .view import LayerView, axes_order, layer_view

if TYPE_CHECKING:
    from ..capture.reader import Run
    from ..capture.summary import TapStatistics

Floats = NDArray[np.float64]
Values = NDArray[Any]

#: What a look at some rows may take, where no statistics were kept: rows, bytes and seconds.
MOST_ROWS, MOST_BYTES, MOST_S = 1024, 64 * 2**20, 1.0
_PIECES = 16
#: How channels can be ordered, beside their own order.
MEASURES = (*OF_VALUES, F_RATIO)


@dataclass(frozen=True, eq=False)
class Ranges:
    """What is known of each channel of a layer, shape (channels,)."""

    low: Floats
    """Least finite value; NaN where there is none."""
    high: Floats
    """Greatest finite value."""
    measures: dict[str, Floats]
    """How much each channel matters, larger for what comes first; by those of `MEASURES` that are known."""
    odd: dict[str, list[int]]
    """Channels that are `dead` or `constant`, or hold `NaN` or `infinite` values."""
    n_rows: int
    """Rows that were looked at."""
    whole: bool
    """Whether these are all captured rows, so that no value lies outside `low` and `high`."""

    @property
    def limits(self) -> tuple[float, float]:
        """Least and greatest value of the layer; NaN where none is finite."""
        if not self.low.size:
            return math.nan, math.nan
        return float(np.fmin.reduce(self.low)), float(np.fmax.reduce(self.high))

    @property
    def signed(self) -> bool:
        """Whether any value is negative."""
        return self.limits[0] < 0


@dataclass(frozen=True, eq=False)
class Cuts:
    """Where a percentile cuts a layer's scale."""

    limits: Floats
    """The lower and the upper limit, shape (2,), or (channels, 2); NaN where the scale is not cut."""
    n_rows: int
    """Rows that it is a percentile of."""
    about: bool
    """Whether these are edges of a histogram's bins, the next ones outside of the percentile."""


def ranges(run: Run, name: str) -> Ranges:
    """Return what is known of a layer's channels."""
    its = statistics_of(run, name)
    if its is None:
        return _of_rows(run, name)
    totals = Totals.of_statistics(its)
    assert totals is not None
    assert its.minimum is not None
    assert its.maximum is not None
    measures = _measures(totals)
    with suppress(SelectionError):  # no means of rows, or no labels
        measures[F_RATIO] = run.stats.f_ratio(name)
    assert its.n_nan is not None
    assert its.n_inf is not None
    odd = _odd(totals, its.minimum, its.maximum, its.n_nan > 0, its.n_inf > 0)
    return Ranges(its.minimum, its.maximum, measures, odd, run.n_committed, True)


def cuts(run: Run, name: str, clip: float, symmetric: bool, by_channel: bool) -> Cuts:
    """Return where a percentile cuts a layer's scale, or that of each of its channels.

    Args:
        run: the store.
        name: the tap.
        clip: per cent; of the values' sizes where the scale is symmetric around 0.
        symmetric: whether it is.
        by_channel: whether each channel has a scale of its own.
    """
    its = statistics_of(run, name)
    if its is None or its.histogram is None:
        return _cuts_of_rows(run, name, clip, symmetric, by_channel)
    parts = [its] if not by_channel else [_one(its, channel) for channel in range(len(its.histogram))]
    found = [cut_by_histogram(part, clip, symmetric) or (math.nan, math.nan) for part in parts]
    return Cuts(np.array(found if by_channel else found[0]), run.n_committed, True)


def statistics_of(run: Run, name: str) -> TapStatistics | None:
    """Return what was computed of a layer while it was captured; None where nothing was of what is drawn.

    Statistics of (token, component) are of tokens, say, while the tiles are components.
    """
    its, dims = run.stats[name], run[name].dims[1:]
    order = axes_order(dims)
    same = its.axis is None or not order or its.axis == dims[order[0]]
    return its if its.count is not None and same and run.n_committed else None


def _one(its: TapStatistics, channel: int) -> TapStatistics:
    """Return what limits follow from, of one channel."""
    assert its.histogram is not None
    assert its.minimum is not None
    assert its.maximum is not None
    at = slice(channel, channel + 1)
    return replace(its, histogram=its.histogram[at], minimum=its.minimum[at], maximum=its.maximum[at])


def _of_rows(run: Run, name: str) -> Ranges:
    read = list(some_rows(run, name))
    if not read:
        none = np.zeros(0)
        return Ranges(none, none, {}, {}, 0, False)
    totals = Totals.of(values for values, _ in read)
    low = np.fmin.reduce([_least(values) for values, _ in read])
    high = np.where(totals.n > 0, totals.maximum, np.nan)
    nan, inf = (np.any([of(values).any((0, 2)) for values, _ in read], axis=0) for of in (np.isnan, np.isinf))
    n_rows = sum(len(rows) for _, rows in read)
    odd = _odd(totals, low, high, nan, inf)
    return Ranges(low, high, _measures(totals), odd, n_rows, n_rows == run.n_committed)


def _odd(totals: Totals, low: Floats, high: Floats, nan: Values, inf: Values) -> dict[str, list[int]]:
    flat = (totals.n > 1) & (low == high) & ~nan & ~inf
    found = {"dead": flat & (low == 0), "constant": flat & (low != 0), "NaN": nan, "infinite": inf}
    return {what: np.flatnonzero(those).tolist() for what, those in found.items() if those.any()}


def _least(values: Values) -> Floats:
    """Return the least finite value of each channel of (rows, channels, values); NaN where there is none."""
    low = np.where(np.isfinite(values), values, np.inf).min((0, 2), initial=np.inf)
    return np.where(low < np.inf, low, np.nan).astype(np.float64)


def _measures(totals: Totals) -> dict[str, Floats]:
    known = [by for by in OF_VALUES if by != "l1" or totals.size is not None]
    return {by: totals.importance(by) for by in known}


def _cuts_of_rows(run: Run, name: str, clip: float, symmetric: bool, by_channel: bool) -> Cuts:
    read = list(some_rows(run, name))
    if not read:
        return Cuts(np.full(2, np.nan), 0, False)
    flat = np.concatenate([np.moveaxis(v, 1, 0).reshape(v.shape[1], -1) for v, _ in read], axis=1)
    found = [cut_of(values, clip, symmetric) for values in (flat if by_channel else flat[None])]
    n_rows = sum(len(rows) for _, rows in read)
    return Cuts(np.array(found if by_channel else found[0]), n_rows, False)


def maps_of(run: Run, name: str, rows: Sequence[int], channels: Sequence[int] | None = None) -> LayerView:
    """Return maps of rows of one shape, as a montage has them; of all channels where none are named."""
    which = "all" if channels is None else tuple(channels)
    spec = MontageSpec(rows=tuple(rows), layers=(name,), channels=which)
    return layer_view(run, run[name].of_one_shape(spec.rows), spec, ChannelChoice.parse(spec.channels))


def some_rows(
    run: Run, name: str, channels: Sequence[int] | None = None
) -> Iterator[tuple[Values, list[int]]]:
    """Yield values of some rows, (rows, channels, values), and the rows, until time is up.

    They are spread evenly over those that are captured; where these are few enough, they are all of them.
    """
    tap = run[name]
    rows = _spread(run, max(1, MOST_BYTES // max(1, math.prod(tap.bound) * tap.dtype.itemsize)))
    pieces = [rows[i::_PIECES] for i in range(min(_PIECES, len(rows)))]
    if tap.is_ragged:
        pieces = [[row] for piece in pieces for row in piece]
    started = time.monotonic()
    for piece in pieces:
        yield _values_of(run, name, piece, channels), piece
        if time.monotonic() - started > MOST_S:
            return


def _values_of(run: Run, name: str, rows: list[int], channels: Sequence[int] | None) -> Values:
    tap = run[name].of_one_shape(rows)
    if not all(tap.shape[1:]):  # a row without tokens, say
        tiled = axes_order(tap.dims[1:])[0]
        return np.empty((len(rows), tap.shape[1 + tiled] if channels is None else len(channels), 0))
    maps = maps_of(run, name, rows, channels)
    inside = maps.values if maps.cells is None else maps.values[:, :, maps.cells]
    return inside.reshape(*inside.shape[:2], -1)


def _spread(run: Run, most: int) -> list[int]:
    """Return as many captured rows as may be looked at, spread evenly, in order."""
    n = run.n_committed
    wanted = min(n, MOST_ROWS, most)
    at = np.linspace(0, n - 1, wanted).round().astype(np.int64) if wanted else np.zeros(0, np.int64)
    rows: list[int] = (at if run.complete else np.flatnonzero(run.committed())[at]).tolist()
    return rows
