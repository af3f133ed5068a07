"""Steps that project channels by a matrix, which the store keeps: random projections and PCA."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .errors import PlanError
from .reduce_base import (
    HALF,
    VALUES,
    Error,
    Json,
    Rows,
    Step,
    Values,
    channel_of,
    check_real,
    computed,
)

#: Rows that a basis is fitted to where nothing is said.
FIT_ROWS = 1024


class Projection(Step):
    """What projects channels by a matrix: `project` and `pca`."""

    @property
    def by_place(self) -> bool:
        """True."""
        return True

    @property
    @abstractmethod
    def d(self) -> int:
        """Components."""

    @abstractmethod
    def matrix(self, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return the basis (components, channels) and what is taken away from rows of `n` channels first."""

    def after(self, rows: Rows) -> dict[str, Rows]:
        """Return components in place of channels."""
        axis = channel_of(rows, self)
        dims = tuple("component" if i == axis else dim for i, dim in enumerate(rows.dims))
        return {VALUES: Rows(rows.sized({axis: self.d}).shape, dims, computed(rows.dtype))}

    def constants(self, rows: Rows) -> dict[str, tuple[tuple[str, ...], Values]]:
        """Return the basis, and the mean where there is one."""
        axis = channel_of(rows, self)
        basis, mean = self.matrix(rows.shape[axis])
        dim = "projected" if rows.dims[axis] == "component" else rows.dims[axis]
        found: dict[str, tuple[tuple[str, ...], Values]] = {"basis": (("component", dim), basis)}
        return found if mean is None else found | {"mean": ((dim,), mean)}


@dataclass(frozen=True)
class Project(Projection):
    """A random projection of the channels, which keeps distances: coefficients = basis @ channels."""

    kind: ClassVar[str] = "project"

    n: int
    """Components."""
    seed: int = 0
    """What the basis is made from."""
    sparse: bool = False
    """Entries of 0 and +-sqrt(3 / n) at 2/3 and 1/6 each, and not Gaussian ones."""

    def __post_init__(self) -> None:
        if type(self.n) is not int or self.n < 1:
            raise PlanError(f"a projection has at least one component, not {self.n}")

    @property
    def d(self) -> int:
        """Components."""
        return self.n

    def arguments(self) -> str:
        """Return the number of components, and how."""
        return f"{self.n},seed={self.seed}" + (",sparse" if self.sparse else "")

    def to_json(self) -> Json:
        """Return the number of components, and how."""
        return {"n": self.n, "seed": self.seed, "sparse": self.sparse}

    def bind(self, rows: Rows) -> Step | None:
        """Hold it to rows with channels."""
        check_real(rows, self)
        channel_of(rows, self)
        return self

    def matrix(self, n: int) -> tuple[NDArray[np.float32], None]:
        """Return the basis."""
        return _random_basis(self.n, n, self.seed, self.sparse), None

    def error(self, rows: Rows) -> Error:
        """Return that of a sum of products (Higham, section 3.1); how well distances are kept is chance.

        Of m points, all squared distances are kept within 1 +- e with a probability of at least
        1 - m^2 exp(-n (e^2 - e^3) / 4) (Dasgupta and Gupta, An elementary proof of a theorem of Johnson and
        Lindenstrauss, 2003; Achlioptas, Database-friendly random projections, 2003, for sparse ones).
        """
        e = min(1.0, math.sqrt(16 / self.n))
        text = (
            f"coefficients within {{:.2g}} of the sum of magnitudes, distances within {e:.0%} mostly"
            if e < 1
            else "coefficients within {:.2g} of the sum of magnitudes, and too few to keep distances"
        )
        return _product(text, rows, self)


@dataclass(frozen=True)
class Pca(Projection):
    """Principal components of the channels: coefficients = basis @ (channels - mean).

    Give a basis, or only how many components: `record_dataset` then fits them to the first rows, and
    `layertap.fit_pca` does so beforehand.
    """

    kind: ClassVar[str] = "pca"

    n: int | None = None
    """Components."""
    basis: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """Shape (components, channels), its rows orthonormal; None: to be fitted."""
    mean: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """Shape (channels,); None: nothing is taken away."""
    rows: int | None = None
    """Rows that it is, or was, fitted to."""
    explained: float | None = field(default=None, compare=False)
    """Share of the variance of these rows that the components hold."""

    def __post_init__(self) -> None:
        if self.basis is not None:
            basis = np.ascontiguousarray(self.basis, np.float32)
            mean = None if self.mean is None else np.ascontiguousarray(self.mean, np.float32)
            if basis.ndim != 2 or 0 in basis.shape or (mean is not None and mean.shape != basis.shape[1:]):
                raise PlanError("a basis has the shape (components, channels), its mean (channels,)")
            for name, value in (("basis", basis), ("mean", mean), ("n", len(basis))):
                object.__setattr__(self, name, value)
        if self.n is None or type(self.n) is not int or self.n < 1:
            raise PlanError("PCA takes a number of components, or a basis")

    @property
    def d(self) -> int:
        """Components."""
        assert self.n is not None
        return self.n

    def arguments(self) -> str:
        """Return the number of components, and to how many rows they are fitted."""
        return f"{self.n}" + (f",rows={self.rows}" if self.rows is not None else "")

    def to_json(self) -> Json:
        """Return the number of components; the basis is an array of the store."""
        return {"n": self.n, "rows": self.rows, "explained": self.explained}

    def bind(self, rows: Rows) -> Step | None:
        """Hold the basis to the channels."""
        check_real(rows, self)
        n = rows.shape[channel_of(rows, self)]
        if self.basis is None:
            raise PlanError(
                "PCA has no basis yet, and a loop of your own cannot be run beforehand: fit it with "
                "layertap.fit_pca, and give what that returns"
            )
        if self.basis.shape[1] != n:
            raise PlanError(f"the basis is of {self.basis.shape[1]} channels, and the rows have {n}")
        return self

    def matrix(self, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return basis and mean."""
        assert self.basis is not None
        return self.basis, self.mean

    def error(self, rows: Rows) -> Error:
        """Return that of a sum of products (Higham, section 3.1), and what the components leave out.

        The mean squared error of what `basis` gives back is the variance that is not explained (Eckart and
        Young, 1936), of the rows that it was fitted to.
        """
        lost = "" if self.explained is None else f", and {1 - self.explained:.2%} of the variance is left out"
        return _product(f"coefficients within {{:.2g}} of the sum of magnitudes{lost}", rows, self)


def _product(text: str, rows: Rows, step: Projection) -> Error:
    unit = 2.0**-53 if rows.dtype == np.float64 else HALF
    relative = (rows.shape[channel_of(rows, step)] + 4) * unit
    return Error(text.format(relative), relative=relative, absolute=2.0**-126, of="sum of magnitudes")


@lru_cache(maxsize=64)
def _random_basis(d: int, n: int, seed: int, sparse: bool) -> NDArray[np.float32]:
    """Return a basis (d, n) with rows of expected length sqrt(n / d).

    Made of raw bits, which numpy promises to keep for a seed; its distributions may change.
    """
    raw = np.random.PCG64(seed).random_raw(2 * d * n)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    if sparse:
        sign = np.where(raw[::2] & np.uint64(2**10), 1.0, -1.0)
        entries = np.where(uniform[1::2] < 1 / 3, sign * math.sqrt(3.0), 0.0)
    else:  # Box and Muller
        entries = np.sqrt(-2 * np.log(uniform[::2])) * np.cos(2 * np.pi * uniform[1::2])
    basis = (entries.reshape(d, n) / math.sqrt(d)).astype(np.float32)
    basis.flags.writeable = False
    return basis
