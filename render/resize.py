"""Maps of few cells brought to the size of a picture, and laid where the model saw it.

Cells are areas, as in torch's interpolation with `align_corners=False`: cell i of n covers the share from
i / n to (i + 1) / n of an axis, and the centre of a pixel lies half a pixel from its edge.

- `nearest`: a pixel has the value of the cell that its centre lies in (torch's `nearest-exact`).
- `bilinear`: between the four cells whose centres are nearest to that of the pixel, each cell by how near it
  is; beyond the outermost centres that of the outermost.

A value that is not finite covers its own cell and nothing else: other pixels are made of the finite cells
near them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError

RESIZES = ("bilinear", "nearest")
Values = NDArray[Any]


@dataclass(frozen=True)
class Area:
    """A rectangle on a picture, in pixels from its top left; it may reach beyond the picture."""

    top: float
    left: float
    bottom: float
    right: float

    @property
    def size(self) -> tuple[float, float]:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left

    def part(self, top: float, left: float, bottom: float, right: float) -> Area:
        """Return a part of it, by shares of its height and width."""
        height, width = self.size
        return Area(
            self.top + top * height,
            self.left + left * width,
            self.top + bottom * height,
            self.left + right * width,
        )

    def times(self, factor: float) -> Area:
        """Return it on a picture that is magnified."""
        return Area(*(factor * edge for edge in (self.top, self.left, self.bottom, self.right)))


def cell_of(cell: Sequence[int], cells: tuple[int, int], area: Area) -> Area:
    """Return the area of a cell (y, x) of as many `cells` (down, across) as cover `area`."""
    (y, x), (height, width) = cell, cells
    return area.part(y / height, x / width, (y + 1) / height, (x + 1) / width)


def resized(
    maps: Values, area: Area, shape: tuple[int, int], how: str = "bilinear"
) -> tuple[Values, NDArray[np.bool_]]:
    """Return maps at the size of a picture, and which of its pixels they cover.

    Args:
        maps: shape (..., height, width), floats.
        area: where on the picture they lie.
        shape: height and width of the picture.
        how: `bilinear` or `nearest`.

    Returns:
        Values of shape (..., *shape), zero where the maps do not reach, and a mask of `shape`.

    """
    ys, xs = (
        _places(n, length, start, stop)
        for n, length, start, stop in zip(
            maps.shape[-2:], shape, (area.top, area.left), (area.bottom, area.right), strict=True
        )
    )
    inside = ys.inside[:, None] & xs.inside
    nearest = maps[..., ys.nearest[:, None], xs.nearest]
    if how == "nearest":
        return np.where(inside, nearest, 0), inside
    finite = np.isfinite(maps)
    if finite.all():
        return np.where(inside, _between(maps, ys, xs), 0), inside
    shares = _between(finite.astype(maps.dtype), ys, xs)
    sums = _between(np.where(finite, maps, 0), ys, xs)
    values = np.where(np.isfinite(nearest), sums / np.where(shares > 0, shares, 1), nearest)
    return np.where(inside, values, 0), inside


@dataclass(frozen=True, eq=False)
class _Places:
    """Where the pixels of one axis lie among the cells."""

    nearest: NDArray[np.intp]
    """The cell that holds each pixel's centre."""
    below: NDArray[np.intp]
    """The last cell whose centre is not beyond the pixel's."""
    above: NDArray[np.intp]
    """The next cell."""
    share: NDArray[np.float64]
    """How much of the next cell it has, 0 to 1."""
    inside: NDArray[np.bool_]
    """Whether it lies among the cells at all."""


def _places(n: int, length: int, start: float, stop: float) -> _Places:
    at = (np.arange(length) + 0.5 - start) / (stop - start) * n
    nearest = np.clip(np.floor(at), 0, n - 1).astype(np.intp)
    centred = np.clip(at - 0.5, 0, n - 1)
    below = np.floor(centred).astype(np.intp)
    return _Places(nearest, below, np.minimum(below + 1, n - 1), centred - below, (at >= 0) & (at < n))


def _between(maps: Values, ys: _Places, xs: _Places) -> Values:
    down, across = (places.share.astype(maps.dtype) for places in (ys, xs))
    lines = maps[..., ys.below, :] * (1 - down)[:, None] + maps[..., ys.above, :] * down[:, None]
    return np.asarray(lines[..., xs.below] * (1 - across) + lines[..., xs.above] * across)


def averaged(maps: Values, cells: NDArray[np.bool_], divisor: int) -> tuple[Values, NDArray[np.bool_]]:
    """Return maps smaller by a whole number in each direction, of means, and which pixels are covered whole.

    What is left at the right and at the bottom is cut off, as it is of a picture that is averaged down. A
    mean over a value that is not finite is not finite, so that none is lost.
    """
    if divisor == 1:
        return maps, cells
    height, width = (n // divisor for n in cells.shape)
    parts = (height, divisor, width, divisor)
    kept = (..., slice(height * divisor), slice(width * divisor))
    with np.errstate(invalid="ignore"):  # infinities of both signs
        means = maps[kept].reshape(*maps.shape[:-2], *parts).mean(axis=(-3, -1))
    return means, np.asarray(cells[kept].reshape(parts).all(axis=(1, 3)))


def check_resize(how: str) -> None:
    """Raise DrawError where maps cannot be resized by `how`."""
    if how not in RESIZES:
        raise DrawError(f"maps are resized {' or '.join(RESIZES)}, not {how!r}")
