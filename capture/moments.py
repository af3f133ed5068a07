"""Mean and scatter of vectors that come in batches, and their principal components.

Moments are merged in float64, batch by batch (Chan, Golub and LeVeque, Updating formulae and a pairwise
algorithm for computing sample variances, 1979), so memory is that of one batch and a matrix of the channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Components:
    """The first principal components of vectors, the one with the most variance first."""

    basis: Values
    """Of length 1, each turned so that its largest entry is positive; (components, channels)."""
    variances: Values
    """The vectors' variance along each, (components,)."""
    total: float
    """Their variance along all there are."""


@dataclass
class Moments:
    """Number, mean and scatter of vectors."""

    n: int = 0
    """How many."""
    mean: Values = field(default_factory=lambda: np.zeros(0))
    """Their mean, float64 (channels,)."""
    scatter: Values = field(default_factory=lambda: np.zeros((0, 0)))
    """Sum of the outer products of their deviations, float64 (channels, channels)."""

    def add(self, vectors: Values) -> None:
        """Merge `vectors` (n, channels); those that are not finite are left out."""
        vectors = vectors[np.isfinite(vectors).all(1)].astype(np.float64)
        n = len(vectors)
        if n == 0:
            return
        mean = vectors.mean(0)
        centred = vectors - mean
        scatter = centred.T @ centred
        if self.n == 0:
            self.n, self.mean, self.scatter = n, mean, scatter
            return
        total, delta = self.n + n, mean - self.mean
        self.scatter = self.scatter + scatter + np.outer(delta, delta) * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    def components(self, n: int) -> Components:
        """Return the first `n` components, or all where there are fewer channels."""
        variances, vectors = np.linalg.eigh(self.scatter / max(self.n, 1))
        order = np.argsort(-variances, kind="stable")[:n]
        basis = vectors[:, order].T
        largest = np.take_along_axis(basis, np.abs(basis).argmax(1)[:, None], 1)
        variances = variances.clip(0)
        return Components(basis * np.sign(largest), variances[order], float(variances.sum()))
