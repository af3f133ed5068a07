"""What changes from layer to layer, as numbers: resolution, sparsity, correlation, effective rank.

Of some rows of a tap, in one pass over them: with c channels, memory is for c * c products and one piece of
the rows, however many these are. Each position of each row is a sample of c values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError, SelectionError
from .means import Reading

if TYPE_CHECKING:
    from ..capture.reader import Run, Tap

Values = NDArray[Any]

#: Of more channels neither correlation nor rank is computed: the products would take more than 32 MiB.
MOST_CHANNELS = 2048


@dataclass(frozen=True)
class Depth:
    """What is measured of one layer."""

    resolution: tuple[int, ...]
    """Sizes of the axes of one channel, the greatest of all rows; none where it is a single value."""
    varies: bool
    """Whether rows differ in them."""
    n_channels: int
    zeros: float
    """Share of the finite values that are exactly zero; NaN where there is none."""
    correlation: float
    """Mean of the absolute Pearson correlation of two channels, over all pairs that vary; NaN without one."""
    rank: float
    """Effective rank of the covariance of the channels; NaN where none varies."""
    n_samples: int
    """Positions of all rows together; the rank is below their number."""
    n_left_out: int
    """Channels with a value that is not finite, which have no part in correlation and rank."""


def measure(run: Run, name: str, rows: Values) -> Depth:
    """Measure one tap over some rows.

    The effective rank is that of Roy and Vetterli 2007 ("The effective rank: a measure of effective
    dimensionality") of the covariance C of the channels: with the eigenvalues l_i of C and
    p_i = l_i / sum(l), it is exp(-sum(p_i ln p_i)). It lies between 1, where all channels are one up to
    factors, and their number, where they are uncorrelated and of one variance.

    Raises:
        DrawError: its values are no maps, or its rows differ in their number of channels.

    """
    moments: Moments | None = None
    shapes: set[tuple[int, ...]] = set()
    n_samples = 0
    for reading, some in _readings(run[name], rows):
        n = reading.n_channels
        moments = moments or Moments(n)
        if moments.n_channels != n:
            raise DrawError(
                f"{name} has {moments.n_channels} {reading.unit}s in some of the measured rows and {n} in "
                f"row {some[0]}; measure rows that have as many (measured=, --measured)"
            )
        for _, values in reading.pieces(some, range(n)):
            samples = np.moveaxis(values, 1, 0).reshape(n, -1)
            n_samples += samples.shape[1]
            moments.add(samples.astype(np.float64))
        sizes = tuple(reading.tap.shape[1 + axis] for axis in reading.order[1:])
        shapes.add((values.shape[2],) if reading.class_token else sizes)
    if moments is None:
        raise DrawError(f"{name} has no value in the rows that were to be measured; name others (--measured)")
    resolution = tuple(np.max(list(shapes), axis=0).tolist())
    measured = moments.zeros(), moments.correlation(), moments.rank()
    left_out = int(moments.not_finite.sum())
    return Depth(resolution, len(shapes) > 1, moments.n_channels, *measured, n_samples, left_out)


def _readings(tap: Tap, rows: Values) -> Iterator[tuple[Reading, Values]]:
    """Yield rows that are read alike: all, or each by itself where they differ in shape and have values."""
    try:
        alike = tap.of_one_shape(rows.tolist())
    except SelectionError:
        for row in rows.tolist():
            one = tap.of_one_shape([row])
            if all(one.bound):
                yield Reading.of(one), np.array([row])
        return
    yield Reading.of(alike), rows


class Moments:
    """Mean, products and range of channels, over all samples that were added.

    Products are of deviations from the mean, merged as in Chan, Golub and LeVeque 1983, in float64.
    """

    def __init__(self, n_channels: int) -> None:
        self.n_channels = n_channels
        self.n = self.n_finite = self.n_zero = 0
        self.mean = np.zeros(n_channels)
        self.low, self.high = np.full(n_channels, np.inf), np.full(n_channels, -np.inf)
        self.not_finite = np.zeros(n_channels, np.bool_)
        few = n_channels <= MOST_CHANNELS
        self.products = np.zeros((n_channels, n_channels)) if few else None

    def add(self, samples: Values) -> None:
        """Add samples, float64 of shape (channels, samples), which are overwritten."""
        finite = np.isfinite(samples)
        self.n_finite += int(finite.sum())
        self.n_zero += int((samples == 0).sum())
        if not finite.all():
            self.not_finite |= ~finite.all(axis=1)
            samples[~finite] = 0  # each entry of the products is of its two channels alone
        self.low = np.minimum(self.low, samples.min(axis=1))
        self.high = np.maximum(self.high, samples.max(axis=1))
        if self.products is None:
            return
        n = samples.shape[1]
        with np.errstate(over="ignore", invalid="ignore"):
            mean = samples.mean(axis=1)
            samples -= mean[:, None]
            off = mean - self.mean
            self.products += samples @ samples.T + np.outer(off, off) * (self.n * n / (self.n + n))
            self.mean += off * (n / (self.n + n))
        self.n += n

    def zeros(self) -> float:
        """Return the share of finite values that are zero."""
        return self.n_zero / self.n_finite if self.n_finite else np.nan

    def correlation(self) -> float:
        """Return the mean of the absolute correlations of two channels that vary."""
        products = self._of_varying()
        if products is None or len(products) < 2:
            return np.nan
        size = np.sqrt(np.diag(products))
        with np.errstate(divide="ignore", invalid="ignore"):
            r = np.minimum(np.abs(products / size / size[:, None]), 1.0)
        n = len(r)
        return float((r.sum() - np.trace(r)) / (n * (n - 1)))

    def rank(self) -> float:
        """Return the effective rank; see `measure`."""
        products = self._of_varying()
        if products is None or not len(products):
            return np.nan
        values = np.clip(np.linalg.eigvalsh(products / np.abs(products).max()), 0.0, None)
        p = values[values > 0] / values.sum()
        return float(np.exp(-(p * np.log(p)).sum()))

    def _of_varying(self) -> Values | None:
        """Return the products of the channels that vary; None where float64 does not hold them."""
        if self.products is None:
            return None
        # What rounding leaves of a constant channel is no variance.
        varying = ~self.not_finite & (self.low < self.high)
        products: Values = self.products[np.ix_(varying, varying)]
        return products if np.isfinite(products).all() and (np.diag(products) > 0).all() else None
