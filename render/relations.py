"""How alike layers are to each other, and the channels of a layer: CKA and correlation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError
from ..capture.trust import check_room
from .tally import axis_of, moments, n_channels_of, rows_to_read, tallied

if TYPE_CHECKING:
    from ..capture.reader import Run
    from ..capture.summary import TapStatistics

Floats = NDArray[np.float64]

MOST_CHANNELS = 4096  # of which correlations are drawn
# Beyond so many standard deviations from zero, what a mean is off by shows in correlations (3e-4 of them).
_FARTHEST_MEAN = 30


def layer_cka(
    run: Run, names: Sequence[str], rows: Sequence[int] | None, sample: int, seed: int
) -> tuple[Floats, str, str]:
    """Return the linear CKA of each two layers' means of rows, (layers, layers), and what to say of it.

    That is of which rows it is, and a caution where these are few.
    """
    kept = rows is None and "pooled" in run.stats.names
    found = tallied(run, names, rows, sample, seed, "pooled")
    # A channel without a finite value would leave out every row for all layers.
    usable = [i for i, its in enumerate(found.layers) if its.count is not None and (its.count > 0).all()]
    values = np.full((len(names), len(names)), np.nan)
    if usable:
        part = run.stats.cka([names[i] for i in usable]) if kept else cka([found.means[i] for i in usable])
        values[np.ix_(usable, usable)] = part
    n_rows = run.n_committed if kept else len(found.means[0])
    n_most = max(n_channels_of(run[name]) for name in names)
    said = []
    if n_rows <= n_most:
        few = f"{n_rows:,} row{'s' if n_rows > 1 else ''} and up to {n_most:,} channels"
        said.append(f"{few}: with fewer rows than channels, CKA is high for any two layers")
    if any(its.nan or its.inf for its in found.layers):
        said.append("rows with a mean that is not finite are left out")
    return values, found.source, "; ".join(said)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # NaN where numbers are too large
def cka(features: Sequence[Floats]) -> Floats:
    """Return the linear CKA of each two sets of features of the same rows, each (rows, channels).

    Kornblith et al. 2019, equation 3 with linear kernels. Rows with a feature that is not finite are left
    out. NaN where features are constant.
    """
    finite = np.all([np.isfinite(one).all(1) for one in features], axis=0)
    centred = [one[finite] - one[finite].mean(0) if finite.any() else one[finite] for one in features]
    n_rows, n_most = int(finite.sum()), max(one.shape[1] for one in centred)
    by_rows = n_rows < n_most  # the smaller products: |Y'X|^2 is the sum of the products of XX' and YY'
    if by_rows:
        check_room(8 * len(centred) * n_rows**2, f"the products of {n_rows} rows")
        centred = [one @ one.T for one in centred]
    norms = np.zeros((len(centred), len(centred)))
    for i, one in enumerate(centred):
        for j, other in enumerate(centred[: i + 1]):
            total = (one * other).sum() if by_rows else np.square(one.T @ other).sum()
            norms[i, j] = norms[j, i] = total
    own = np.sqrt(np.diag(norms))
    return np.asarray(norms / np.outer(own, own))


def channel_correlation(
    run: Run, name: str, rows: Sequence[int] | None, sample: int, seed: int, clusters: bool
) -> tuple[Floats, NDArray[np.intp], str, str]:
    """Return the correlation of each two channels of a layer over all positions, as it is drawn.

    Returns:
        Correlations (channels, channels), NaN where a channel is constant; the channels in that order; the
        axis that they lie on; and of which rows it is.

    Raises:
        DrawError: there is one channel alone, or too many.
    """
    tap = run[name]
    n, axis = n_channels_of(tap), axis_of(tap) or "value"
    if not 2 <= n <= MOST_CHANNELS:
        raise DrawError(
            f"{name} has {n} {axis}{'s' if n > 1 else ''}; correlations are drawn of 2 to {MOST_CHANNELS}"
        )
    if rows is None and "gram" in run.stats.names and _serves(run.stats[name]):
        found = tallied(run, (name,), rows, sample, seed, "gram")
        covariance, source = _covariance(found.layers[0]), found.source
    else:
        chosen, source = rows_to_read(run, rows, sample, seed, "gram")
        both = moments(tap, chosen)
        n_vectors = max(both.n, 1)
        covariance = both.scatter / n_vectors if both.n else np.full((n, n), np.nan)
        # Deviations of a channel that is constant are nothing but rounding.
        still = np.diag(covariance) <= (1e-13 * np.abs(both.mean if both.n else np.zeros(n))) ** 2
        covariance[still, still] = np.nan
    correlation = _scaled(covariance)
    order = clustered(correlation) if clusters else np.arange(n)
    return correlation[np.ix_(order, order)], order, axis, source


def _serves(its: TapStatistics) -> bool:
    """Return whether the sums of products that a store keeps tell the correlations."""
    if its.gram is None or its.mean is None or its.variance is None or its.nan or its.inf:
        return False
    varies = its.variance > 0
    return bool((np.abs(its.mean[varies]) <= _FARTHEST_MEAN * np.sqrt(its.variance[varies])).all())


def _covariance(its: TapStatistics) -> Floats:
    assert its.gram is not None
    assert its.mean is not None
    assert its.count is not None
    n = np.maximum(its.count, 1)
    covariance: Floats = its.gram / n - np.outer(its.mean, its.mean)
    assert its.minimum is not None
    still = its.minimum == its.maximum
    covariance[still, still] = np.nan
    return covariance


def _scaled(covariance: Floats) -> Floats:
    deviation = np.sqrt(np.diag(covariance))
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = covariance / np.outer(deviation, deviation)
    correlation = np.clip(correlation, -1, 1)
    known = np.isfinite(np.diag(correlation))
    correlation[known, known] = 1
    return np.asarray(correlation)


def clustered(correlation: Floats) -> NDArray[np.intp]:
    """Return an order in which channels that are alike stand together; those without correlations last.

    Average linkage (Sokal and Michener 1958) of the distances 1 - r, by chains of nearest neighbours
    (Benzécri 1982), which takes time by the square of the number of channels. Of two clusters, that of the
    lowest channel comes first.
    """
    known = np.flatnonzero(np.isfinite(np.diag(correlation)))
    rest = np.setdiff1d(np.arange(len(correlation)), known)
    distance = 1 - correlation[np.ix_(known, known)]
    np.fill_diagonal(distance, np.inf)
    members: dict[int, list[int]] = {i: [int(channel)] for i, channel in enumerate(known)}
    chain: list[int] = []
    while len(members) > 1:
        if not chain:
            chain.append(next(iter(members)))
        last = chain[-1]
        nearest = int(distance[last].argmin())
        if len(chain) > 1 and distance[last, chain[-2]] <= distance[last, nearest]:
            _merge(distance, members, last, chain[-2])
            del chain[-2:]
        else:
            chain.append(nearest)
    ordered: list[int] = next(iter(members.values()), [])
    return np.array([*ordered, *rest.tolist()], np.intp)


def _merge(distance: Floats, members: dict[int, list[int]], a: int, b: int) -> None:
    """Make one cluster of two, in the place of `a`; its distances are the means over its members."""
    n_a, n_b = len(members[a]), len(members[b])
    row = (n_a * distance[a] + n_b * distance[b]) / (n_a + n_b)
    distance[a], distance[:, a] = row, row
    distance[a, a] = np.inf
    distance[b], distance[:, b] = np.inf, np.inf
    first, second = sorted((members[a], members.pop(b)), key=min)
    members[a] = first + second
