"""Numbers to palette entries: one honest scale for all that shares it.

- Values >= 0 run from 0 to the largest through a sequential map. Where any value is negative, the map is
  diverging and symmetric around 0, so that sign and size read off at a glance.
- A value outside limits that were given, or that percentiles gave, is not clipped in silence: it has an entry
  of its own, over or under.
- NaN, +inf and -inf have an entry each. A map that is zero everywhere, or that has one value everywhere, is
  drawn in an entry of its own, because as a colour it could be mistaken for a weak channel. A map of one
  pixel has its colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .colormaps import DIVERGING, N_COLOURS, WHITE, Mark

Values = NDArray[Any]
#: The lower and the upper one; NaN: as it is without.
Limits = tuple[float, float]
#: One percentile or two; see `TilesSpec.clip`.
Clip = float | tuple[float, float]


@dataclass(frozen=True, eq=False)
class TileFacts:
    """What each map holds; every array has shape (rows, channels)."""

    low: Values
    """Smallest finite value; NaN where there is none."""
    high: Values
    """Largest finite value; NaN where there is none."""
    n_nan: Values
    """NaN values."""
    n_positive_infinity: Values
    """Values of +inf."""
    n_negative_infinity: Values
    """Values of -inf."""
    zero: Values
    """Whether it is zero everywhere."""
    constant: Values
    """Whether it has one finite value everywhere that is not zero."""

    @classmethod
    def of(cls, values: Values, n_cells: int) -> TileFacts:
        """Look at `values`, shape (rows, channels, height, width), of which `n_cells` a map are real."""
        with np.errstate(invalid="ignore"):  # NaN is counted below
            low, high = values.min(axis=(2, 3)), values.max(axis=(2, 3))
        none = np.zeros(low.shape, np.int64)
        n_nan, n_positive, n_negative = none, none, none
        finite = np.isfinite(low) & np.isfinite(high)
        if not finite.all():
            n_nan = np.isnan(values).sum(axis=(2, 3))
            n_positive = (values == np.inf).sum(axis=(2, 3))
            n_negative = (values == -np.inf).sum(axis=(2, 3))
            ok = np.isfinite(values)
            some = ok.any(axis=(2, 3))
            low = np.where(some, np.where(ok, values, np.inf).min(axis=(2, 3)), np.nan)
            high = np.where(some, np.where(ok, values, -np.inf).max(axis=(2, 3)), np.nan)
        flat = finite & (low == high) & (n_cells > 1)
        return cls(low, high, n_nan, n_positive, n_negative, flat & (low == 0), flat & (low != 0))


@dataclass(frozen=True, eq=False)
class Scale:
    """A colour map and the limits between which it runs."""

    colormap: str
    """Name of the colour map."""
    low: Values
    """Lower limit in the data's units; shape () or (rows or 1, channels or 1)."""
    high: Values
    """Upper limit, like `low`."""
    given: bool = False
    """Whether the user gave the limits, so that values may lie outside them."""
    clip: Clip | None = None
    """Percentiles that gave the limits, so that values may lie outside them."""
    cut: Values | None = None
    """With `clip`: where they did, shaped like `low`; elsewhere they would have left no range."""

    @property
    def open(self) -> bool:
        """Whether values may lie outside the limits."""
        return self.given or self.clip is not None

    @property
    def diverging(self) -> bool:
        """Whether the colours are symmetric around 0."""
        return self.colormap in DIVERGING

    @property
    def single(self) -> bool:
        """Whether one pair of limits holds for everything, so that a bar can be true."""
        return self.low.size == 1 and bool(np.isfinite(self.low).all() and np.isfinite(self.high).all())

    @property
    def limits(self) -> tuple[float, float]:
        """The one pair of limits; only where `single`."""
        return float(self.low.flat[0]), float(self.high.flat[0])

    def indices(self, values: Values) -> NDArray[np.uint8]:
        """Return the palette entry of each value, shape (rows, channels, height, width).

        What is not finite or lies outside the limits has that of some other value: see `entries`.
        """
        low, high = self._colour_limits()
        low, high = _over_maps(low), _over_maps(high)
        size = np.maximum(np.abs(low), np.abs(high))
        # Far from 1 the arithmetic would over- or underflow in float32, and even in float64.
        if values.dtype.itemsize > 4 or not bool(((size > 1e-30) & (size < 1e30)).all()):
            size = np.where(size > 0, size, 1.0)
            with np.errstate(over="ignore", invalid="ignore"):
                values, low, high = values.astype(np.float64) / size, low / size, high / size
        span = high - low
        slope = np.where(span > 0, (N_COLOURS - 1) / np.where(span > 0, span, 1), 0).astype(values.dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            position = (values - low.astype(values.dtype)) * slope
            if self.diverging:  # zeros alone span nothing, and are in the middle
                position += np.where(span > 0, 0, (N_COLOURS - 1) / 2).astype(values.dtype)
            np.rint(position, out=position)
            total = position.sum()
        if not np.isfinite(total):
            position[~np.isfinite(position)] = 0
        entries: NDArray[np.uint8] = np.clip(position, 0, N_COLOURS - 1).astype(np.uint8)
        return entries

    def _colour_limits(self) -> tuple[Values, Values]:
        """Return where the first and last colour lie: around 0 alike for a diverging map."""
        low, high = np.nan_to_num(self.low), np.nan_to_num(self.high)
        if not self.diverging:
            return low, high
        largest = np.maximum(np.abs(low), np.abs(high))
        return -largest, largest

    def bar(self, n: int) -> NDArray[np.uint8]:
        """Return the entries of a bar of `n` pixels that runs from the lower to the upper limit."""
        low, high = (float(limit.item()) for limit in self._colour_limits())
        first, last = ((limit - low) / (high - low) if high > low else 0.0 for limit in self.limits)
        return np.rint(np.linspace(first, last, n) * (N_COLOURS - 1)).astype(np.uint8)


def _over_maps(limit: Values) -> Values:
    """Return limits so that they go with values of shape (rows, channels, height, width)."""
    return limit.reshape(*limit.shape, 1, 1) if limit.ndim == 2 else limit


def fit(low: Values, high: Values, colormap: str | None, signed: bool) -> Scale:
    """Return the scale that holds values between `low` and `high`.

    Args:
        low: smallest finite values of what shares a scale, any shape; NaN where there is none.
        high: largest finite values.
        colormap: the colour map to use, or None for the one that fits the sign.
        signed: whether anything drawn with it is negative.

    """
    name = colormap or colormap_for("auto", signed)
    if name in DIVERGING:
        largest = np.maximum(np.abs(low), np.abs(high))
        return Scale(name, np.asarray(-largest), np.asarray(largest))
    return Scale(name, np.asarray(low if signed else np.where(np.isnan(low), np.nan, 0)), np.asarray(high))


def colormap_for(sign: str, signed: bool) -> str:
    """Return the colour map for a `sign` as in `TilesSpec`, where any value is negative or none."""
    diverging = signed if sign == "auto" else sign == "diverging"
    return "RdBu_r" if diverging else "viridis"


def place_of_percentile(percentile: float, n: int) -> int:
    """Return which of `n` values in order is a percentile: the first that so many per cent do not exceed."""
    return max(math.ceil(round(percentile * n / 100, 6)) - 1, 0)


def cut_limits(at: Callable[[float], float], clip: Clip, symmetric: bool) -> Limits:
    """Return the limits that the percentiles of `clip` give.

    Args:
        at: returns a percentile of the values; of their sizes where it is one and the scale symmetric.
        clip: as in `TilesSpec`.
        symmetric: whether the scale is symmetric around 0.

    """
    if isinstance(clip, tuple):
        return at(clip[0]), at(clip[1])
    high = at(clip)
    return (-high if symmetric else math.nan), high


def cut_of(values: Values, clip: Clip, symmetric: bool) -> Limits:
    """Return the limits that the percentiles of the finite `values` give; NaN where there is none."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return math.nan, math.nan
    if symmetric and not isinstance(clip, tuple):
        finite = np.abs(finite)

    def at(percentile: float) -> float:
        place = place_of_percentile(percentile, finite.size)
        return float(np.partition(finite, place)[place])

    return cut_limits(at, clip, symmetric)


def clipped(scale: Scale, cuts: Values, clip: Clip) -> Scale:
    """Return `scale` between the limits that percentiles give, where these leave a range.

    Args:
        scale: one that holds all values.
        cuts: `Limits` of each pair of its limits, shape (..., 2).
        clip: the percentiles.

    """
    low = np.where(np.isnan(cuts[..., 0]), scale.low, cuts[..., 0])
    high = np.where(np.isnan(cuts[..., 1]), scale.high, cuts[..., 1])
    ranges = low < high
    low, high = np.where(ranges, low, scale.low), np.where(ranges, high, scale.high)
    return Scale(scale.colormap, low, high, clip=clip, cut=ranges)


def entries(values: Values, scale: Scale, facts: TileFacts) -> NDArray[np.uint8]:
    """Return the palette entry of each value, marks included; shape (rows, channels, height, width)."""
    indices = scale.indices(values)
    if scale.open:
        low, high = (_over_maps(limit).astype(values.dtype) for limit in (scale.low, scale.high))
        indices[values > high] = Mark.OVER
        indices[values < low] = Mark.UNDER
    if facts.n_nan.any() or facts.n_positive_infinity.any() or facts.n_negative_infinity.any():
        indices[np.isnan(values)] = Mark.NAN
        indices[values == np.inf] = Mark.POSITIVE_INFINITY
        indices[values == -np.inf] = Mark.NEGATIVE_INFINITY
    indices[facts.zero] = Mark.ZERO
    indices[facts.constant] = Mark.CONSTANT
    return indices


def blank(indices: NDArray[np.uint8], cells: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """Return `indices` with white where a wrapped sequence has no cell; `cells` has shape (height, width)."""
    if cells is not None:
        indices[:, :, ~cells] = WHITE
    return indices
