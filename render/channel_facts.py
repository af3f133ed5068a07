"""One channel over all rows: its range, histogram, the rows that excite it most, its mean for each class.

The one-pass statistics of a store have them of every row, at no cost. What they do not have comes from some
rows, read in bounded time, counted as a capture counts, and says so; `lacking` then tells how a capture keeps
it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import SelectionError
from ..capture.statistics import edges
from .ranges import some_rows, statistics_of
from .selection import class_column
from .tally import Tally
from .view import class_name

if TYPE_CHECKING:
    from ..capture.reader import Run
    from ..capture.summary import TapStatistics

Json = dict[str, Any]
Values = NDArray[Any]

_TOP = 16
_MOST_CLASSES = 4096
#: What there is to know of a channel, and the statistics of a capture that keep it.
_PARTS = {"numbers": "cheap", "histogram": "histogram", "top": f"top:{_TOP}", "classes": "classes"}


def finite(value: Any) -> float | None:
    """Return a number that JSON can hold, or None."""
    return float(value) if math.isfinite(value) else None


class ChannelFacts:
    """What is known of the channels of a layer.

    Args:
        run: the store.
        name: the tap.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        self._its = statistics_of(run, name)

    def of(self, channel: int, look: bool = True) -> Json:
        """Return what is known of a channel, as JSON; numbers that are not finite are None.

        Args:
            channel: which.
            look: whether rows may be read where statistics do not tell.

        Returns:
            `rows` that it is of, and `whole`, whether these are all; the `_PARTS`, each None where it is not
            known; those that are `sampled`, of `sample_rows`; `lacking`, what the store does not keep of all
            rows, with how to keep it.
        """
        kept, n = self._kept(channel), self.run.n_committed
        wanted = [part for part in _PARTS if kept.get(part) is None]
        facts: Json = dict.fromkeys(_PARTS) | kept
        facts |= {"rows": n if kept else 0, "whole": bool(kept), "sampled": [], "sample_rows": 0}
        if wanted and look and self.run.manifest.layout.values:
            looked, n_looked = self._looked(channel)
            facts |= {part: looked[part] for part in wanted}
            if n_looked == n:
                facts |= {"rows": n, "whole": True}
                wanted = []
            facts |= {
                "sampled": [part for part in wanted if looked[part] is not None],
                "sample_rows": n_looked,
            }
        return facts | {"lacking": [{"what": part, "stats": _PARTS[part]} for part in wanted]}

    def _kept(self, channel: int) -> Json:
        """Return the parts that statistics tell; none where there are none."""
        if self._its is None:
            return {}
        return _counted(self._its, channel) | {"top": self._top(channel), "classes": self._classes(channel)}

    def _looked(self, channel: int) -> tuple[Json, int]:
        """Return the parts that some rows tell, and how many rows."""
        tally, rows, maxima = Tally(1), list[int](), list[Values]()
        for values, some in some_rows(self.run, self.name, [channel]):
            tally.add(values.astype(np.float64))
            maxima.append(np.where(np.isfinite(values), values, -np.inf).max((1, 2), initial=-np.inf))
            rows += some
        if not rows:
            return dict.fromkeys(_PARTS), 0
        order, means = np.argsort(rows), np.concatenate(tally.means)[:, 0]
        at = np.array(rows)[order]
        parts = _counted(tally.statistics(self.name, None), 0)
        parts["top"] = _greatest(at, np.concatenate(maxima)[order])
        parts["classes"] = _means_of_classes(self.run, at, means[order])
        return parts, len(rows)

    def _top(self, channel: int) -> list[Json] | None:
        its = self._its
        assert its is not None
        if its.top_rows is not None and its.top_values is not None and its.top_positions is not None:
            columns = (its.top_rows[channel], its.top_values[channel], its.top_positions[channel])
            found = zip(*(column.tolist() for column in columns), strict=True)
            return [{"row": row, "value": finite(value), "at": at} for row, value, at in found if row >= 0]
        if self._greatest_rows is None:
            return None
        rows, maxima = self._greatest_rows
        return _greatest(rows[:, channel], maxima[:, channel])

    @cached_property
    def _greatest_rows(self) -> tuple[Values, Values] | None:
        """Rows with the greatest maxima, and these, (k, channels), in one pass; None where none were kept."""
        found: tuple[Values, Values] | None = None
        for block in self.run.blocks:
            numbers = self.run.rows_of(block)
            try:
                maxima = self.run.stats.pooled(self.name, "maximum", numbers)
            except SelectionError:
                return None
            rows = np.broadcast_to(np.arange(self.run.n_rows)[numbers, None], maxima.shape)
            if found is not None:
                rows, maxima = (np.concatenate(both) for both in zip(found, (rows, maxima), strict=True))
            first = np.argsort(-np.where(np.isfinite(maxima), maxima, -np.inf), axis=0, kind="stable")[:_TOP]
            found = np.take_along_axis(rows, first, 0), np.take_along_axis(maxima, first, 0)
        return found

    @cached_property
    def _by_class(self) -> tuple[Values, Values] | None:
        """Rows of each class, and means of each class and channel; None where they were not kept."""
        try:
            means = self.run.stats.class_means(self.name)
            labels = self.run.stats.labels()
        except SelectionError:  # no means of rows, or no labels
            return None
        return np.bincount(labels[labels >= 0], minlength=len(means)), means

    def _classes(self, channel: int) -> list[Json] | None:
        if self._by_class is None or self._its is None:
            return None
        counts, means = self._by_class
        maps = self._its.class_maps
        there = np.flatnonzero(counts).tolist()
        found = _classes_of(self.run, ((label, counts[label], means[label, channel]) for label in there))
        if maps is not None and maps.ndim == 4:
            for one, label in zip(found, there, strict=False):
                if label < len(maps):
                    lines = maps[label, channel].tolist()
                    one["map"] = [[finite(float(f"{v:.5g}")) for v in line] for line in lines]
        return found


def _counted(its: TapStatistics, channel: int) -> Json:
    """Return range and histogram."""
    assert its.count is not None
    assert its.n_nan is not None
    assert its.n_inf is not None
    assert its.minimum is not None
    assert its.maximum is not None
    assert its.mean is not None
    assert its.variance is not None
    assert its.zero_fraction is not None
    numbers = {
        "count": int(its.count[channel]),
        "nan": int(its.n_nan[channel]),
        "inf": int(its.n_inf[channel]),
        "zero": finite(its.zero_fraction[channel]),
        "minimum": finite(its.minimum[channel]),
        "maximum": finite(its.maximum[channel]),
        "mean": finite(its.mean[channel]),
        "deviation": finite(np.sqrt(its.variance[channel])),
    }
    return {"numbers": numbers, "histogram": _histogram(its, channel)}


def _histogram(its: TapStatistics, channel: int) -> Json | None:
    if its.histogram is None:
        return None
    counts = its.histogram[channel]
    found = np.flatnonzero(counts)
    if not found.size:
        return None
    first, last = int(found[0]), int(found[-1]) + 1
    limits = [finite(edge) for edge in edges()[first : last + 1]]
    return {"counts": counts[first:last].tolist(), "edges": limits}


def _greatest(rows: Values, maxima: Values) -> list[Json]:
    """Return the rows with the greatest maxima, the earlier of equals first."""
    order = np.argsort(-np.where(np.isfinite(maxima), maxima, -np.inf), kind="stable")[:_TOP]
    return [{"row": int(rows[i]), "value": finite(maxima[i])} for i in order if np.isfinite(maxima[i])]


def _means_of_classes(run: Run, rows: Values, means: Values) -> list[Json] | None:
    """Return the mean of the means of some rows for each of their classes."""
    labels = class_column(run, "label", rows)
    if labels is None:
        return None

    def of_each() -> Iterable[tuple[int | str, int, float]]:
        for label in np.unique(labels).tolist():
            its = means[labels == label]
            ok = its[np.isfinite(its)]
            yield label, len(its), ok.mean() if ok.size else math.nan

    return _classes_of(run, of_each())


def _classes_of(run: Run, parts: Iterable[tuple[int | str, int, float]]) -> list[Json]:
    """Return classes by name, from their labels, rows and means; rows without a class are in none."""
    named = ((class_name(run.classes, label), n, mean) for label, n, mean in parts)
    found = [
        {"name": name, "rows": int(n), "mean": finite(mean)} for name, n, mean in named if name is not None
    ]
    return found[:_MOST_CLASSES]
