"""From a view to a sheet: where everything stands. Pure functions; nothing here paints or reads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError
from .blocks import Block, Remark, listing, number, scaled, tile_columns, tile_factor
from .colormaps import palette
from .lettering import shorten, text_width, wrap
from .sheet import Bar, Ink, Panel, Photo, Sheet, Text
from .spec import GridSpec, MontageSpec
from .view import RowView, View

MARGIN = 18
COLUMN_GAP = 30  # between the blocks of two layers
LINE_GAP = 26  # between the lines of two rows
TILE_GAP = 5
NUMBER_ROOM = 12  # above each tile, where it is numbered
HEAD_ROOM = 38  # a layer's name, type and shape
BAR_HEIGHT = 9
NARROWEST = 132  # a block's width, so that its name can be read

TITLE, NAME, CLASS, NOTE, NUMBER = 15.0, 13.0, 13.0, 10.0, 9.0  # text sizes
NOTE_LINE = 14  # pixels from one line of notes to the next
PHOTO_SIDE = 144
LARGEST = 200_000_000  # pixels of a sheet


class _Page:
    """What has been put on a sheet so far."""

    def __init__(self) -> None:
        self.panels: list[Panel] = []
        self.photos: list[Photo] = []
        self.bars: list[Bar] = []
        self.texts: list[Text] = []
        self.notes: list[str] = []

    def sheet(self, width: float, height: float) -> Sheet:
        return Sheet(
            int(width),
            int(height),
            tuple(self.panels),
            tuple(self.photos),
            tuple(self.bars),
            tuple(self.texts),
            tuple(self.notes),
        )

    def lines(self, x: int, y: int, lines: list[str], ink: Ink = Ink.GREY) -> int:
        """Write lines of notes below `y`, and return where they end."""
        for line in lines:
            y += NOTE_LINE
            self.texts.append(Text(x, y - 3, line, NOTE, ink=ink))
        return y

    def head(self, x: int, y: int, width: int, name: str, about: str) -> None:
        self.texts.append(Text(x, y + 12, shorten(name, width, NAME, bold=True), NAME, bold=True))
        self.texts.append(Text(x, y + 27, shorten(about, width, NOTE), NOTE, ink=Ink.GREY))

    def bar(self, x: int, y: int, width: int, block: Block, row: int) -> int:
        """Draw the bar of a row of `block`, or say why there is none; return where it ends."""
        scale = block.row_scale(row)
        if scale is None:
            several = block.scale.low.size > 1
            return self.lines(x, y, ["a scale for each channel" if several else "no finite value"])
        low, high = scale.limits
        self.bars.append(Bar(x, y, BAR_HEIGHT, scale.bar(width), scale.colormap, low, high))
        y += BAR_HEIGHT + 11
        ends = number(low), number(high)
        self.texts.append(Text(x, y, ends[0], NUMBER))
        self.texts.append(Text(x + width, y, ends[1], NUMBER, "right"))
        zero = x + width * (0 - low) / (high - low) if low < 0 < high else None
        if zero is not None and _clear(zero, x, width, ends):
            self.texts.append(Text(zero, y, "0", NUMBER, "center"))
        return y + 3

    def remarks(self, x: int, y: int, width: int, block: Block) -> int:
        """Write what each mark stands for behind a sample of it; return where they end."""
        for remark in block.remarks:
            y += NOTE_LINE
            swatch = np.full((1, 1, 1), remark.mark, np.uint8)
            self.panels.append(Panel(x + 1, y - 11, swatch, 1, 9, 1, 1, block.scale.colormap, framed=True))
            self.texts.append(Text(x + 16, y - 3, _remark(remark, width - 16), NOTE, ink=Ink.GREY))
        self.notes += block.notes
        return y


def grid(view: View, spec: GridSpec) -> Sheet:
    """Lay out each row's picture and, beside it, a block of channels for every layer.

    Raises:
        DrawError: the sheet would be too large.

    """
    page, blocks = _Page(), scaled(view, spec)
    left, y = MARGIN, MARGIN
    if spec.title:
        page.texts.append(Text(left, y + 14, spec.title, TITLE, bold=True))
        y += 30
    photo_width = _photo_column(view)
    x = left + (photo_width + COLUMN_GAP if photo_width else 0)
    columns = []
    for block in blocks:
        placed = _Column.of(block, spec, x)
        about = _about(block)
        page.head(x, y, placed.width, block.layer.name, about)
        columns.append(placed)
        x += placed.width + COLUMN_GAP
    _check_size(x, sum(c.height for c in columns[:1]) * len(view.rows))
    y += HEAD_ROOM
    ends = [y]
    for i, row in enumerate(view.rows):
        last = i == len(view.rows) - 1
        below = [_row_of_blocks(page, c, i, y, columns, spec, last) for c in columns]
        if photo_width:
            below.append(_photo(page, row, left, y, photo_width))
        ends.append(max(below))
        y = ends[-1] + LINE_GAP
    return _finish(page, x - COLUMN_GAP + MARGIN, ends[-1] + MARGIN, spec.title)


def montage(view: View, spec: MontageSpec) -> Sheet:
    """Lay out all channels of a row, one channel of all rows, or channels (across) by rows (down).

    Raises:
        DrawError: the sheet would be too large.

    """
    page = _Page()
    x, y, right = MARGIN, MARGIN, 0
    if spec.title:
        page.texts.append(Text(x, y + 14, spec.title, TITLE, bold=True))
        y += 30
    for block in scaled(view, spec):
        width, y = _montage_block(page, view, block, spec, x, y)
        right = max(right, x + width)
        y += LINE_GAP
    return _finish(page, right + MARGIN, y - LINE_GAP + MARGIN, spec.title)


class _Column:
    """A layer's place in a grid: its tiles' size, and how wide it is."""

    def __init__(self, block: Block, factor: int, n_columns: int, numbered: bool, x: int) -> None:
        self.block, self.factor, self.n_columns, self.numbered, self.x = block, factor, n_columns, numbered, x
        self.panel = self.place(0, 0)
        self.tiles_width, self.height = self.panel.size
        self.width = max(self.tiles_width, NARROWEST)

    @classmethod
    def of(cls, block: Block, spec: GridSpec, x: int) -> _Column:
        _, n, height, width = block.tiles.shape
        n_columns = tile_columns(n, spec)
        factor = tile_factor((height, width), n, n_columns, spec)
        _check_size(n_columns * width * factor, -(-n // n_columns) * height * factor)
        return cls(block, factor, n_columns, _numbered(block.layer.channels, width * factor, spec), x)

    def place(self, row: int, y: int) -> Panel:
        gap_y = TILE_GAP + (NUMBER_ROOM if self.numbered else 0)
        return Panel(
            self.x,
            y,
            self.block.tiles[row],
            self.n_columns,
            self.factor,
            TILE_GAP,
            gap_y,
            self.block.scale.colormap,
            framed=self.block.scale.diverging,
        )


def _row_of_blocks(
    page: _Page, column: _Column, row: int, y: int, columns: list[_Column], spec: GridSpec, last: bool
) -> int:
    """Put the tiles of one row of one layer at `y`, with its bar where that is due; return the end."""
    panel = column.place(row, y + NUMBER_ROOM)
    page.panels.append(panel)
    if column.numbered:
        _numbers(page, panel, [str(c) for c in column.block.layer.channels])
    end = panel.y + column.height
    if not last and spec.scope != "row":
        return end
    # Bars of blocks of nearly the same height stand in one line.
    tallest = max(c.height for c in columns)
    end += (tallest - column.height if tallest - column.height <= 48 else 0) + 12
    end = page.bar(column.x, end, column.tiles_width_or_more(), column.block, row)
    return _caption(page, column, end, row) if last else end


def _photo_column(view: View) -> int:
    """Return the width of the column that shows and names the rows; 0 where nothing is known of them."""
    widths = [_photo_pixels(row).size[0] for row in view.rows if row.picture is not None]
    named = any(row.true or row.predicted for row in view.rows)
    return max([NARROWEST, *widths]) if widths or named or len(view.rows) > 1 else 0
