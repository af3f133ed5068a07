"""What is known of all rows of a layer: its range, and how much each channel matters.

The one-pass statistics of a store say it of every row. Where they were not kept, a bounded number of rows,
spread evenly over those that are captured, is looked at; what follows says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import SelectionError
from .view import axes_order, has_class_token, read_maps, wrap

if TYPE_CHECKING:
    from ..capture.reader import Run
    from ..capture.summary import TapStatistics

Floats = NDArray[np.float64]
Values = NDArray[Any]

#: What a look at some rows may take, where no statistics were kept: rows, bytes and seconds.
MOST_ROWS, MOST_BYTES, MOST_S = 256, 64 * 2**20, 1.0
_PIECES = 16
#: How channels can be ordered, beside their own order.
MEASURES = ("mean", "maximum", "variance", "l1", "l2", "sparsity", "f_ratio")


@dataclass(frozen=True, eq=False)
class Survey:
    """What is known of each channel of a layer, shape (channels,)."""

    low: Floats
    """Least finite value; NaN where there is none."""
    high: Floats
    """Greatest finite value."""
    measures: dict[str, Floats]
    """How much each channel matters, larger for what comes first; by the names of `MEASURES`."""
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


def survey(run: Run, name: str) -> Survey:
    """Return what is known of a layer's channels."""
    its = statistics_of(run, name)
    return _from_rows(run, name) if its is None else _from_statistics(run, its)


def statistics_of(run: Run, name: str) -> TapStatistics | None:
    """Return what was computed of a layer while it was captured; None where nothing was of what is drawn.

    Statistics of (token, component) are of tokens, say, while the tiles are components.
    """
    its, dims = run.stats[name], run[name].dims[1:]
    order = axes_order(dims)
    same = its.axis is None or not order or its.axis == dims[order[0]]
    return its if its.count is not None and same and run.n_committed else None


def _from_statistics(run: Run, its: TapStatistics) -> Survey:
    assert its.count is not None
    assert its.minimum is not None
    assert its.maximum is not None
    assert its.mean is not None
    assert its.variance is not None
    assert its.zero_fraction is not None
    measures = {
        "mean": its.mean,
        "maximum": its.maximum,
        "variance": its.variance,
        "l2": np.sqrt((its.variance + its.mean**2) * its.count),
        "sparsity": 1 - its.zero_fraction,
    }
    if not (its.minimum < 0).any():
        measures["l1"] = its.mean * its.count
    with suppress(SelectionError):  # no means of rows, or no labels
        measures["f_ratio"] = run.stats.f_ratio(its.name)
    return Survey(its.minimum, its.maximum, measures, run.n_committed, True)


def _from_rows(run: Run, name: str) -> Survey:
    total: _Totals | None = None
    n_rows = 0
    for maps, rows in some_rows(run, name):
        n_rows += len(rows)
        values = np.moveaxis(maps.flat, 1, 0)
        total = (total or _Totals(len(values))).add(values.reshape(len(values), -1))
    if total is None:
        none = np.zeros(0)
        return Survey(none, none, {}, 0, False)
    return Survey(total.low, total.high, total.measures(), n_rows, n_rows == run.n_committed)


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps of some rows of one layer."""

    values: Values
    """Floats of shape (rows, channels, height, width)."""
    cells: NDArray[np.bool_] | None
    """Which pixels of a map are values, shape (height, width), where a sequence was wrapped."""

    @property
    def flat(self) -> Values:
        """The values that are in the data, shape (rows, channels, values)."""
        if self.cells is None:
            return self.values.reshape(*self.values.shape[:2], -1)
        found: Values = self.values[:, :, self.cells]
        return found


def maps_of(run: Run, name: str, rows: Sequence[int], channels: Sequence[int] | None = None) -> Maps:
    """Return maps of rows of one shape; of all their channels where none are named."""
    tap = run[name].of_one_shape(rows)
    order = axes_order(tap.dims[1:])
    n_channels = tap.shape[1 + order[0]] if order else 1
    values = read_maps(tap, np.array(rows), order, range(n_channels) if channels is None else channels)
    if len(order) == 2 and has_class_token(tap.shape[1 + order[1]]):
        values = values[:, :, 1:]
    maps, cells, _ = wrap(values, len(order))
    return Maps(maps, cells)


def some_rows(run: Run, name: str, channels: Sequence[int] | None = None) -> Iterator[tuple[Maps, list[int]]]:
    """Yield pieces of a layer and their rows, spread evenly over those that are captured, until time is up.

    Where the rows are few enough, they are all of them.
    """
    tap = run[name]
    rows = _spread(run, max(1, MOST_BYTES // max(1, math.prod(tap.bound) * tap.dtype.itemsize)))
    pieces = [rows[i::_PIECES] for i in range(min(_PIECES, len(rows)))]
    if tap.is_ragged:
        pieces = [[row] for row in rows if all(tap.of_one_shape([row]).shape)]
    started = time.monotonic()
    for piece in pieces:
        yield maps_of(run, name, piece, channels), piece
        if time.monotonic() - started > MOST_S:
            return


def _spread(run: Run, most: int) -> list[int]:
    """Return as many captured rows as may be looked at, spread evenly, in order."""
    n = run.n_committed
    wanted = min(n, MOST_ROWS, most)
    at = np.linspace(0, n - 1, wanted).round().astype(np.int64) if wanted else np.zeros(0, np.int64)
    rows: list[int] = (at if run.complete else np.flatnonzero(run.committed())[at]).tolist()
    return rows


class _Totals:
    """What adds up over pieces of rows, of finite values alone; shape (channels,)."""

    def __init__(self, n_channels: int) -> None:
        self.low, self.high = np.full((2, n_channels), np.nan)
        self.n, self.sum, self.squares, self.absolute, self.nonzero = np.zeros((5, n_channels))

    def add(self, values: Values) -> _Totals:
        """Add values, shape (channels, values)."""
        finite = np.isfinite(values)
        values = np.where(finite, values, 0).astype(np.float64)
        some = finite.any(1)
        low = np.where(finite, values, np.inf).min(1, initial=np.inf)
        high = np.where(finite, values, -np.inf).max(1, initial=-np.inf)
        self.low = np.fmin(self.low, np.where(some, low, np.nan))
        self.high = np.fmax(self.high, np.where(some, high, np.nan))
        self.n += finite.sum(1)
        self.sum += values.sum(1)
        self.squares += np.square(values).sum(1)
        self.absolute += np.abs(values).sum(1)
        self.nonzero += (values != 0).sum(1)
        return self

    def measures(self) -> dict[str, Floats]:
        """Return what ranks the channels; NaN where there is no finite value."""
        n = np.where(self.n > 0, self.n, np.nan)
        mean = self.sum / n
        return {
            "mean": mean,
            "maximum": self.high,
            "variance": np.maximum(self.squares / n - mean**2, 0),
            "l1": self.absolute,
            "l2": np.sqrt(self.squares),
            "sparsity": self.nonzero / n,
        }
