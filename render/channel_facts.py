"""One channel over all rows: its range, histogram, the rows that excite it most, its mean for each class.

The one-pass statistics of a store have them of every row, at no cost. What they do not have comes from some
rows, read in bounded time, and says so; `lacking` then tells how a capture keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import SelectionError
from ..capture.statistics import edges
from .selection import class_column
from .surveys import some_rows, statistics_of
from .view import class_name

if TYPE_CHECKING:
    from ..capture.reader import Run
    from ..capture.summary import TapStatistics

Json = dict[str, Any]
Values = NDArray[Any]
Take = Callable[[Values], Values]

_BINS = 48
_TOP = 16
_MOST_CLASSES = 4096


def channel_facts(run: Run, name: str, channel: int, look: bool = True) -> Json:
    """Return what is known of a channel, as JSON; numbers that are not finite are None.

    Args:
        run: the store.
        name: the tap.
        channel: which.
        look: whether rows may be read where statistics do not tell.

    Returns:
        `rows` that it is of, and `whole`, whether these are all; `numbers`, `histogram`, `top`, `classes`,
        each None where it is not known; `lacking`, what the store does not keep with how to keep it.
    """
    its = statistics_of(run, name)
    facts: Json = {"rows": 0, "whole": False, "numbers": None, "histogram": None, "top": None}
    facts |= {"classes": None, "lacking": [], "sampled": []}
    if its is not None:
        facts |= {"rows": run.n_committed, "whole": True, "numbers": _numbers(its, channel)}
        facts["histogram"] = _histogram(its, channel)
        facts["top"] = _top(run, its, channel)
        facts["classes"] = _classes(run, its, channel)
    wanted = [part for part in ("numbers", "histogram", "top", "classes") if facts[part] is None]
    if wanted and look and run.manifest.layout.values:
        sampled = _sampled(run, name, channel)
        facts["sampled"] = [part for part in wanted if sampled[part] is not None]
        facts |= {part: sampled[part] for part in facts["sampled"]}
        facts["sample_rows"] = sampled["rows"]
        if sampled["rows"] == run.n_committed:
            facts |= {"sampled": [], "rows": sampled["rows"], "whole": True}
            wanted = []
    flags = {"numbers": "cheap", "histogram": "histogram", "top": "top:16", "classes": "classes"}
    facts["lacking"] = [{"what": part, "stats": flags[part]} for part in wanted]
    return facts


def all_channel_facts(run: Run, name: str, channels: Sequence[int]) -> list[Json]:
    """Return what statistics tell of some channels, without a look at any row."""
    return [channel_facts(run, name, channel, look=False) for channel in channels]


def finite(value: Any) -> float | None:
    """Return a number that JSON can hold, or None."""
    return float(value) if math.isfinite(value) else None


def _numbers(its: TapStatistics, channel: int) -> Json:
    assert its.count is not None
    assert its.n_nan is not None
    assert its.n_inf is not None
    assert its.minimum is not None
    assert its.maximum is not None
    assert its.mean is not None
    assert its.variance is not None
    assert its.zero_fraction is not None
    return {
        "count": int(its.count[channel]),
        "nan": int(its.n_nan[channel]),
        "inf": int(its.n_inf[channel]),
        "zero": finite(its.zero_fraction[channel]),
        "minimum": finite(its.minimum[channel]),
        "maximum": finite(its.maximum[channel]),
        "mean": finite(its.mean[channel]),
        "deviation": finite(np.sqrt(its.variance[channel])),
    }


def _histogram(its: TapStatistics, channel: int) -> Json | None:
    if its.histogram is None:
        return None
    counts = its.histogram[channel]
    found = np.flatnonzero(counts)
    if not found.size:
        return None
    first, last = int(found[0]), int(found[-1]) + 1
    limits = [finite(edge) for edge in edges()[first : last + 1]]
    return {"counts": counts[first:last].tolist(), "edges": limits, "octaves": True}


def _top(run: Run, its: TapStatistics, channel: int) -> list[Json] | None:
    if its.top_rows is not None and its.top_values is not None and its.top_positions is not None:
        found = zip(
            its.top_rows[channel].tolist(),
            its.top_values[channel].tolist(),
            its.top_positions[channel].tolist(),
            strict=True,
        )
        return [{"row": row, "value": finite(value), "at": at} for row, value, at in found if row >= 0]
    try:
        maxima = run.stats.pooled(its.name, "maximum")[:, channel]
    except SelectionError:
        return None
    rows = np.flatnonzero(run.committed())
    return _greatest(rows, maxima)


def _greatest(rows: Values, maxima: Values) -> list[Json]:
    order = np.argsort(-np.where(np.isfinite(maxima), maxima, -np.inf), kind="stable")[:_TOP]
    return [{"row": int(rows[i]), "value": finite(maxima[i])} for i in order if np.isfinite(maxima[i])]


def _classes(run: Run, its: TapStatistics, channel: int) -> list[Json] | None:
    try:
        means = run.stats.class_means(its.name)[:, channel]
    except SelectionError:  # no means of rows, or no labels
        return None
    rows = np.flatnonzero(run.committed())
    labels = class_column(run, "label", rows)
    if labels is None or labels.dtype.kind == "U":
        return None
    counts = np.bincount(labels[labels >= 0], minlength=len(means))
    maps = its.class_maps
    found = []
    for label in np.flatnonzero(counts[: len(means)])[:_MOST_CLASSES].tolist():
        one: Json = {"name": class_name(run.classes, label), "rows": int(counts[label])}
        one["mean"] = finite(means[label])
        if maps is not None and label < len(maps) and maps.ndim == 4:
            one["map"] = [[finite(float(f"{v:.5g}")) for v in line] for line in maps[label, channel].tolist()]
        found.append(one)
    return found


def _sampled(run: Run, name: str, channel: int) -> Json:
    """Return the facts of some rows."""
    pieces, rows = [], []
    for maps, piece in some_rows(run, name, [channel]):
        rows += piece
        pieces.append(maps.flat[:, 0])
    flat = np.concatenate([piece.ravel() for piece in pieces]) if pieces else np.zeros(0)
    ok = flat[np.isfinite(flat)].astype(np.float64)
    maxima = np.array([_row_of(one, np.max) for piece in pieces for one in piece])
    means = np.array([_row_of(one, np.mean) for piece in pieces for one in piece])
    order = np.argsort(rows, kind="stable")
    at = np.array(rows, np.intp)[order]
    return {
        "rows": len(rows),
        "numbers": _sampled_numbers(flat, ok),
        "histogram": _sampled_histogram(ok),
        "top": _greatest(at, maxima[order]) if len(rows) else None,
        "classes": _sampled_classes(run, at, means[order]) if len(rows) else None,
    }


def _row_of(values: Values, by: Callable[[Values], Any]) -> float:
    ok = values[np.isfinite(values)].astype(np.float64)
    return float(by(ok)) if ok.size else math.nan


def _sampled_numbers(flat: Values, ok: Values) -> Json:
    n_nan = int(np.isnan(flat).sum())
    numbers: Json = {"count": int(ok.size), "nan": n_nan, "inf": int(flat.size - ok.size - n_nan)}
    if not ok.size:
        return numbers | dict.fromkeys(("zero", "minimum", "maximum", "mean", "deviation"))
    found = {"zero": (ok == 0).mean(), "minimum": ok.min(), "maximum": ok.max(), "mean": ok.mean()}
    return numbers | {key: finite(value) for key, value in (found | {"deviation": ok.std()}).items()}


def _sampled_histogram(ok: Values) -> Json | None:
    if not ok.size:
        return None
    counts, limits = np.histogram(ok, _BINS if ok.min() < ok.max() else 1)
    return {"counts": counts.tolist(), "edges": limits.tolist(), "octaves": False}


def _sampled_classes(run: Run, rows: Values, means: Values) -> list[Json] | None:
    labels = class_column(run, "label", rows)
    if labels is None:
        return None
    found = []
    for label in np.unique(labels).tolist()[:_MOST_CLASSES]:
        named = class_name(run.classes, label)
        if named is not None:
            its = means[labels == label]
            mean = its[np.isfinite(its)].mean() if np.isfinite(its).any() else math.nan
            found.append({"name": named, "rows": len(its), "mean": finite(mean)})
    return found
