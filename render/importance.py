"""How much a channel matters, so that the n most important can be drawn.

Values that are not finite are left out: one NaN must neither put its channel first nor upset the order of
the others. A channel without a finite value comes last.

Here are rankings of values in memory; `survey` has those over all captured rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError, closest

if TYPE_CHECKING:
    from ..capture.summary import RunStatistics

Values = NDArray[Any]
_Measure = Callable[[Values, Values, Values], Values]


def check_measure(by: str) -> None:
    """Raise DrawError where channels cannot be ranked by `by`."""
    if by not in RANKINGS:
        raise DrawError(f"channels cannot be ranked by {by!r}. {closest(by, RANKINGS)}")


def check_ranks(values: Values, by: str, what: str) -> None:
    """Raise DrawError where `by` is the same for every channel because each is a single value.

    Args:
        values: as for `rank`.
        by: likewise.
        what: the layer's name, for the error.

    """
    if by not in ("variance", "sparsity") or values.shape[1] < 2 or values[:, 0].size != 1:
        return
    measures = importance(values, by)
    if (measures == measures[0]).all():
        raise DrawError(
            f"{by} does not rank {what}, a vector: of one value in one row it is the same for all "
            f"{values.shape[1]}; mean, maximum, l1 and l2 rank vectors"
        )


# Of the greatest value of a channel: far more than its stored means are off, which are float32.
_MEANS_OFF, _MAXIMA_OFF = 2e-5, 1e-12


def candidates(stats: RunStatistics, name: str, rows: Values, by: str, n: int) -> Values | None:
    """Return channels of a tap among which the `n` most important ones of `rows` certainly are, in order.

    They follow from what was kept of each row and channel while capturing, so that only they need be read.
    None: read them all, because nothing was kept that tells, or some values are not finite.
    """
    if by not in ("mean", "maximum") or "pooled" not in stats.names or any(stats.not_finite(name)):
        return None
    its = stats[name]
    if not stats.covers(name) or its.minimum is None or its.maximum is None or n >= len(its.minimum):
        return None
    measures = stats.pooled(name, by, rows).astype(np.float64)
    if not np.isfinite(measures).all():  # of rows that differ in shape, some have no such channel
        return None
    measure = measures.mean(0) if by == "mean" else measures.max(0)
    off = np.maximum(np.abs(its.minimum), np.abs(its.maximum)) * (_MEANS_OFF if by == "mean" else _MAXIMA_OFF)
    least = np.partition(measure - off, len(measure) - n)[len(measure) - n]
    return np.flatnonzero(~(measure + off < least))


def rank(values: Values, by: str) -> NDArray[np.intp]:
    """Return the channels from the most important to the least; equals stay in their order.

    Args:
        values: shape (rows, channels, height, width); the measure is over all but the channels.
        by: one of `MEASURES`, or `index`, which keeps the order.

    """
    if by == "index":
        return np.arange(values.shape[1])
    return ranked(importance(values, by))


def ranked(measures: Values) -> NDArray[np.intp]:
    """Return channels by falling measure; equals stay in their order, and what has none (NaN) comes last."""
    return np.argsort(-np.where(np.isnan(measures), -np.inf, measures), kind="stable")


def importance(values: Values, by: str) -> NDArray[np.float64]:
    """Return the measure `by` of each channel, shape (channels,), larger for what comes first.

    Args:
        values: shape (rows, channels, height, width).
        by: `mean`, `maximum`, `variance`, `l1`, `l2`, or `sparsity`: the share of values that are not
            zero, so that the least sparse channel comes first.

    Returns:
        Measures in float64; minus infinity for a channel without a finite value.

    """
    flat = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1).astype(np.float64)
    finite = np.isfinite(flat)
    n_finite = finite.sum(axis=1)
    flat = np.where(finite, flat, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):  # float64 can overflow in a square: then it leads
        measures = MEASURES[by](flat, finite, np.maximum(n_finite, 1))
    measures = np.where(np.isnan(measures), np.inf, measures)
    return np.where(n_finite > 0, measures, -np.inf)


def _mean(flat: Values, finite: Values, n: Values) -> Values:
    return np.asarray(flat.sum(axis=1) / n)


def _maximum(flat: Values, finite: Values, n: Values) -> Values:
    return np.asarray(np.where(finite, flat, -np.inf).max(axis=1, initial=-np.inf))


def _variance(flat: Values, finite: Values, n: Values) -> Values:
    deviation = np.where(finite, flat - _mean(flat, finite, n)[:, None], 0.0)
    return np.asarray((deviation**2).sum(axis=1) / n)


def _l1(flat: Values, finite: Values, n: Values) -> Values:
    return np.asarray(np.abs(flat).sum(axis=1))


def _l2(flat: Values, finite: Values, n: Values) -> Values:
    return np.asarray(np.sqrt((flat**2).sum(axis=1)))


def _density(flat: Values, finite: Values, n: Values) -> Values:
    return np.asarray(((flat != 0) & finite).sum(axis=1) / n)


MEASURES: dict[str, _Measure] = {
    "mean": _mean,
    "maximum": _maximum,
    "variance": _variance,
    "l1": _l1,
    "l2": _l2,
    "sparsity": _density,
}

#: Of all captured rows with a class, and never of the rows drawn alone.
F_RATIO = "f_ratio"
#: All that channels can be ranked by.
RANKINGS = ("index", *MEASURES, F_RATIO)
