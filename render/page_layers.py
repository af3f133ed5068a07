"""A tap as the web page knows it: what its tiles are, what they look like, and why it may have none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..capture.layout import EXTENTS
from .selection import can_draw
from .view import axes_order, has_class_token, wrap

if TYPE_CHECKING:
    from ..capture.reader import Tap


@dataclass(frozen=True)
class Shape:
    """How one channel of a row becomes a map."""

    height: int
    width: int
    """Of the map."""
    offset: int
    """Values before the first that is in the map: 1 where a class token is left out."""
    n_cells: int
    """Values that are in the map; where a sequence was wrapped, the last line may not be full."""
    axes: tuple[str, ...]
    """Names of the axes of a map's values: two, one of a sequence, or none."""
    note: str
    """How its values became maps, where that is not plain."""

    @classmethod
    def of(cls, dims: tuple[str, ...], shape: tuple[int, ...]) -> Shape:
        """Return the shape of the maps of rows with axes `dims` of sizes `shape`."""
        order = axes_order(dims)
        axes, sizes = tuple(dims[i] for i in order[1:]), tuple(shape[i] for i in order[1:])
        if len(sizes) != 1:
            height, width = sizes or (1, 1)
            return cls(height, width, 0, height * width, axes, "")
        offset = int(has_class_token(sizes[0]))
        n = sizes[0] - offset
        maps, _, note = wrap(np.empty((0, 0, n)), 2)
        note = f"{note}, class token left out" if offset else note
        return cls(maps.shape[2], maps.shape[3], offset, n, axes, note)


@dataclass(frozen=True)
class Layer:
    """A tap as the page knows it."""

    name: str
    """The tap."""
    type: str
    """The layer's type."""
    unit: str
    """What a tile is: channel, feature, head and so on."""
    n_channels: int
    """How many tiles a row has."""
    map: Shape
    """What a tile looks like; of rows that differ in shape, the greatest."""
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    """Names and sizes of a row's axes."""
    dtype: str
    """Element type."""
    is_ragged: bool
    """Whether rows differ in shape."""
    about: str
    """What was done to the layer's values before they were stored; empty where nothing was."""
    refusal: str
    """Why it cannot be drawn; empty where it can."""

    @classmethod
    def of(cls, tap: Tap, rows: NDArray[np.intp]) -> Layer:
        """Return what is known of a tap without reading its values; `rows` are captured."""
        dims, shape = tap.dims[1:], tuple(tap.bound)
        order = axes_order(dims)
        refusal = _refusal(tap, rows)
        drawn = not refusal
        return cls(
            tap.name,
            tap.type,
            dims[order[0]] if order else "value",
            shape[order[0]] if order else 1,
            Shape.of(dims, shape) if drawn else Shape(0, 0, 0, 0, (), ""),
            dims,
            shape,
            str(tap.dtype),
            tap.is_ragged,
            str(tap.reduction) if tap.reduction.steps else "",
            refusal,
        )


def _refusal(tap: Tap, rows: NDArray[np.intp]) -> str:
    """Return why a tap cannot be drawn; empty where it can."""
    if "rank" in tap.dims:
        return "it holds the largest values of each place, and no maps"
    dims = tap.dims[1:]
    if not can_draw(tap):
        return f"maps are real numbers on one to three axes, not {tap.dtype} on {', '.join(dims)}"
    if tap.is_ragged and rows.size:
        tiled = axes_order(dims)[0]
        sizes = tap.parts[EXTENTS][rows][:, 1 + tiled]
        if (sizes != sizes[0]).any():
            return f"rows have {sizes.min()} to {sizes.max()} {dims[tiled]}s, so there is none that all have"
    return ""
