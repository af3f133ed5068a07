"""From heat maps and pictures to a sheet: where everything stands. Pure functions.

A map is brought to the size of the picture first and scaled then, so that colours and bar speak of what is
drawn: resized, a peak may be lower than its cell, and a map scaled before would not reach the end of its bar.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import SelectionError
from .blocks import Block, scaled, tile_columns
from .colormaps import BLACK, N_COLOURS, WHITE
from .fields import shares
from .heat import TIMES
from .heat_maps import Heat, Seen
from .layout import (
    COLUMN_GAP,
    HEAD_GAP,
    LINE_GAP,
    MARGIN,
    NARROWEST,
    NOTE,
    NOTE_LINE,
    NUMBER_ROOM,
    PHOTO_SIDE,
    SHORTEST_BAR,
    Page,
    check_size,
    gap_of,
    numbering,
    put_title,
    range_of,
    row_about,
    row_name,
    row_words,
)
from .lettering import wrap
from .resize import Area, averaged, cell_of, resized
from .sheet import Outline, Panel, Photo, Sheet
from .view import LayerView, RowView, View

if TYPE_CHECKING:
    from .overlay import OverlaySpec

_FOOT_GAP = 12  # above what is said of all maps
_GREY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
_OUTER, _INNER = (0, 0, 0), (255, 255, 255)  # lines of a box: one of them stands off from any colour
_SMALLEST_BOX = 4

_SCOPES = {
    "layer": "one scale for each layer",
    "figure": "one scale for the figure",
    "row": "a scale for each row of a layer",
}


@dataclass(frozen=True)
class _Canvas:
    """The size at which pictures and maps are drawn."""

    times: int
    """By how much a picture is magnified so that no cell of a map is smaller than a pixel."""
    divisor: int
    """By how much that is averaged down to go on a page."""
    factor: int
    """Sheet pixels for each pixel of the result, in each direction."""
    shape: tuple[int, int]
    """Height and width of the magnified picture."""

    @classmethod
    def of(cls, picture: tuple[int, int], heats: Sequence[Heat], spec: OverlaySpec) -> _Canvas:
        cells = max(n / side for heat in heats for n, side in zip(heat.cells, heat.area.size, strict=True))
        times = max(1, math.ceil(cells - 1e-9))
        shape = (picture[0] * times, picture[1] * times)
        check_size(*shape)
        largest = max(shape)
        if spec.magnification is not None:
            return cls(times, 1, spec.magnification, shape)
        divisor = max(1, round(largest / PHOTO_SIDE)) if largest > 2 * PHOTO_SIDE else 1
        divisor = min(divisor, *shape)
        return cls(times, divisor, max(1, round(PHOTO_SIDE / (largest // divisor))), shape)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the sheet."""
        height, width = (n // self.divisor * self.factor for n in self.shape)
        return width, height

    def picture(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a picture at the size of the canvas, averaged down."""
        large = pixels.repeat(self.times, axis=0).repeat(self.times, axis=1)
        if self.divisor == 1:
            return large
        whole = np.ones(self.shape, np.bool_)
        means, _ = averaged(large.transpose(2, 0, 1).astype(np.float32), whole, self.divisor)
        return np.ascontiguousarray(np.rint(means).astype(np.uint8).transpose(1, 2, 0))

    def view(self, heat: Heat, how: str) -> LayerView:
        """Return the maps at that size, as channels of a layer."""
        values, cells = resized(heat.maps, heat.area.times(self.times), self.shape, how)
        values, cells = averaged(values, cells, self.divisor)
        return LayerView(
            heat.name,
            heat.tap.type,
            tuple(heat.tap.shape[1:]),
            heat.labels,
            len(heat.labels),
            heat.unit,
            None,
            values,
            None if cells.all() else cells,
        )

    def outlines(self, area: Area, x: int, y: int) -> list[Outline]:
        """Return the lines around an area of a picture that stands at `x` and `y`, kept on it."""
        width, height = self.size
        on = area.times(self.times * self.factor / self.divisor)
        left, right = _within(on.left, on.right, width)
        top, bottom = _within(on.top, on.bottom, height)
        outer = Outline(x + left, y + top, right - left, bottom - top, _OUTER)
        inner = Outline(outer.x + 1, outer.y + 1, outer.width - 2, outer.height - 2, _INNER)
        return [outer, inner]


def _within(start: float, stop: float, length: int) -> tuple[int, int]:
    """Return whole pixels within `length` that hold what lies from `start` to `stop`, and a few at least."""
    least = min(_SMALLEST_BOX, length)
    first = min(max(math.floor(start + 1e-6), 0), length - least)
    return first, max(first + least, min(math.ceil(stop - 1e-6), length))


@dataclass(frozen=True, eq=False)
class _Column:
    """A layer's place on the sheet."""

    heat: Heat
    block: Block
    x: int
    panel: Panel
    """Its tiles of the first row, placed at 0."""
    numbered: bool
    box: Area | None
    """What is outlined on the picture."""

    @property
    def width(self) -> int:
        return max(self.panel.size[0], NARROWEST)


def overlay(
    rows: Sequence[RowView], heats: Sequence[Heat], seen: Seen, spec: OverlaySpec, unfinished: str | None
) -> Sheet:
    """Lay out each row's picture and, beside it, the same below the maps of every layer.

    Raises:
        SelectionError: a layer has no such cell.
        DrawError: the sheet would be too large.

    """
    pictures = [row.picture for row in rows if row.picture is not None]
    assert len(pictures) == len(rows)
    height, width = pictures[0].shape[:2]
    canvas = _Canvas.of((height, width), heats, spec)
    shown = [canvas.picture(picture) for picture in pictures]
    page = Page()
    view = View(tuple(rows), tuple(canvas.view(heat, spec.resize) for heat in heats), unfinished)
    y = page.unfinished(view, put_title(page, spec, MARGIN))
    photo_width = max(canvas.size[0], NARROWEST) if spec.original else 0
    x = MARGIN + (photo_width + COLUMN_GAP if photo_width else 0)
    columns = _columns(view, heats, canvas, seen, spec, x)
    right = columns[-1].x + columns[-1].width
    check_size(right, max(column.panel.size[1] for column in columns) * len(rows))
    bottom = max(page.head(c.x, y, c.width, c.block) for c in columns) + HEAD_GAP
    for i, (row, picture) in enumerate(zip(rows, shown, strict=True)):
        y = bottom + (LINE_GAP if i else 0)
        if not spec.original:
            y = (
                page.lines(
                    MARGIN, y - (NOTE_LINE // 2 if i else 2), wrap(row_about(row), right - MARGIN, NOTE)
                )
                + 2
            )
        below = _beneath(picture, spec)
        bottom = max(_tiles(page, c, canvas, i, y, below, spec, last=i == len(rows) - 1) for c in columns)
        if spec.original:
            bottom = max(bottom, _original(page, row, picture, columns, canvas, y, photo_width))
    foot = wrap(_about_all(columns, canvas, seen, spec), right - MARGIN, NOTE)
    return page.sheet(right + MARGIN, page.lines(MARGIN, bottom + _FOOT_GAP, foot) + MARGIN, spec.title)


def _columns(
    view: View, heats: Sequence[Heat], canvas: _Canvas, seen: Seen, spec: OverlaySpec, x: int
) -> list[_Column]:
    columns = []
    for heat, block in zip(heats, scaled(view, spec), strict=True):
        width, n = canvas.size[0], len(heat.labels)
        gap, numbered = numbering(heat.labels, width, spec) if heat.unit != "map" else (gap_of(width), False)
        gap_y = gap_of(width) + (NUMBER_ROOM if numbered else 0)
        colormap, opacity = block.scale.colormap, _opacity(spec, block.scale.diverging)
        columns_of_it, tiles = tile_columns(n, spec), block.tiles[0]
        panel = Panel(x, 0, tiles, columns_of_it, canvas.factor, gap, gap_y, colormap, opacity=opacity)
        columns.append(
            _Column(heat, _named(block, heat, len(view.rows)), x, panel, numbered, _box(heat, seen, spec))
        )
        x += columns[-1].width + COLUMN_GAP
    return columns


def _named(block: Block, heat: Heat, n_rows: int) -> Block:
    """Return `block` with remarks that do not number the only map of a row."""
    if heat.unit != "map":
        return block
    remarks = block.remarks
    if n_rows == 1:
        remarks = tuple(replace(one, words=_of_map(f"{one.words} 0"), tiles=()) for one in remarks)
    return replace(block, remarks=remarks, notes=tuple(map(_of_map, block.notes)))


def _of_map(text: str) -> str:
    """Return what is said of map 0 of a layer, where that is the only one: `all zero`, `NaN in the map`."""
    for numbered, alone in ((" in 0", " in the map"), (": 0", "")):
        if text.endswith(numbered):
            return text.removesuffix(numbered) + alone
    return text


def _opacity(spec: OverlaySpec, diverging: bool) -> NDArray[np.float32]:
    """Return how opaque each palette entry is: marks wholly, so that they are what the caption shows."""
    opacity = np.ones(256, np.float32)
    opacity[BLACK : WHITE + 1] = 0  # where a map does not reach
    position = np.abs(np.linspace(-1, 1, N_COLOURS)) if diverging else np.linspace(0, 1, N_COLOURS)
    opacity[:N_COLOURS] = spec.alpha * (position if fades(spec, diverging) else 1)
    return opacity


def fades(spec: OverlaySpec, diverging: bool) -> bool:
    """Return whether colours fade towards 0."""
    return diverging if spec.fade is None else spec.fade


def _beneath(picture: NDArray[np.uint8], spec: OverlaySpec) -> NDArray[np.uint8]:
    if spec.beneath == "colour":
        return picture
    grey = np.rint(picture @ np.array(_GREY, np.float32)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _box(heat: Heat, seen: Seen, spec: OverlaySpec) -> Area | None:
    """Return what is outlined: what the chosen cell sees, or else where it lies; or the patch that asks.

    Raises:
        SelectionError: the layer has no such cell.

    """
    if heat.patch is not None:
        return cell_of(heat.patch, heat.cells, heat.area)
    if spec.cell is None:
        return None
    (y, x), (height, width) = spec.cell, heat.cells
    if y >= height or x >= width:
        raise SelectionError(
            f"cell ({y}, {x}) of {heat.name} is not there; there are {height} {TIMES} {width}, counted from 0"
        )
    field = shares(heat.tap, spec.cell)
    return cell_of(spec.cell, heat.cells, heat.area) if field is None else seen.area.part(*field)


def _tiles(
    page: Page,
    column: _Column,
    canvas: _Canvas,
    i: int,
    y: int,
    below: NDArray[np.uint8],
    spec: OverlaySpec,
    *,
    last: bool,
) -> int:
    """Put the maps of row `i` of one layer at `y`, with bar and caption where they are due."""
    tiles = column.block.tiles[i]
    beneath = np.broadcast_to(below, (len(tiles), *below.shape))
    panel = replace(column.panel, y=y + NUMBER_ROOM, tiles=tiles, beneath=beneath)
    page.panels.append(panel)
    if column.numbered:
        page.numbers(panel, [str(label) for label in column.heat.labels])
    if column.box is not None:
        for k in range(len(tiles)):
            page.outlines += canvas.outlines(column.box, *panel.place(k))
    y = panel.y + panel.size[1]
    if not last and spec.scope != "row":
        return y
    y = page.bar(column.x, y + 12, max(panel.size[0], SHORTEST_BAR), column.block, i)
    if not last:
        return y
    said = [line for text in _about(column, spec) for line in wrap(text, column.width, NOTE)]
    page.notes += column.heat.notes
    return page.remarks(column.x, page.lines(column.x, y, said), column.width, column.block)


def _about(column: _Column, spec: OverlaySpec) -> list[str]:
    """Return what the maps of one layer show."""
    (height, width), said = column.heat.cells, [*column.heat.said, range_of(column.block)]
    said.append(f"{height} {TIMES} {width} cells" if height * width > 1 else "a single cell")
    if spec.cell is not None:
        y, x = spec.cell
        does = "lies" if shares(column.heat.tap, spec.cell) is None else "looks: its receptive field"
        said.append(f"box: where cell ({y}, {x}) {does}")
    return said


def _about_all(columns: Sequence[_Column], canvas: _Canvas, seen: Seen, spec: OverlaySpec) -> str:
    """Return how maps became colours, which is the same for all."""
    height, width = canvas.shape
    how = f"Maps resized first ({spec.resize}, to {height} {TIMES} {width} pixels)"
    if canvas.divisor > 1:
        how += f", averaged down with the picture ({canvas.divisor} {TIMES} {canvas.divisor})"
    share = f"{100 * spec.alpha:.3g} %"
    faded = {fades(spec, column.block.scale.diverging) for column in columns}
    if faded == {True}:
        share = f"0 to {share}, the more the larger the value,"
    elif len(faded) > 1:
        share = f"{share} (of signed maps 0 to {share}, the more the larger the value)"
    beneath = "the picture in grey" if spec.beneath == "grey" else "the picture"
    said = f"{how}, scaled then: {_scope(columns, spec)}."
    said += f" Colours at {share} over {beneath}; bars have them unblended."
    return f"{said} {seen.note[:1].upper()}{seen.note[1:]}." if seen.note else said


def _scope(columns: Sequence[_Column], spec: OverlaySpec) -> str:
    """Return what shares a scale."""
    if not isinstance(spec.scope, str):
        return "the scale was given"
    if spec.scope != "channel":
        return _SCOPES[spec.scope]
    units = sorted({column.heat.unit for column in columns} - {"map"})
    return f"a scale for each {' and '.join(units)}" if units else _SCOPES["layer"]


def _original(
    page: Page,
    row: RowView,
    picture: NDArray[np.uint8],
    columns: Sequence[_Column],
    canvas: _Canvas,
    y: int,
    width: int,
) -> int:
    """Put the picture as it is at the left; return where it ends."""
    y = row_name(page, row, MARGIN, y, width)
    page.photos.append(Photo(MARGIN, y, picture, canvas.factor))
    boxes = {column.box for column in columns if column.box is not None}
    if len(boxes) == 1:
        page.outlines += canvas.outlines(boxes.pop(), MARGIN, y)
    return row_words(page, row, MARGIN, y + canvas.size[1] + 4, width)
