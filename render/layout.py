"""From a view to a sheet: where everything stands. Pure functions; nothing here paints or reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError
from .blocks import Block, Remark, listing, number, scaled, tile_columns, tile_factor
from .lettering import shorten, text_width, wrap, wrap_even, wrap_name
from .sheet import Bar, Box, Ink, Line, Outline, Panel, Photo, Sheet, Text
from .spec import GridSpec, MontageSpec, Spec, TilesSpec
from .view import RowView, View

MARGIN = 18
COLUMN_GAP = 30  # between the blocks of two layers
LINE_GAP = 26  # between the lines of two rows
TILE_GAP = 5
CELL_GAP = 3  # the same for tiles of few pixels
NUMBER_ROOM = 12  # above each tile, where it is numbered
NAME_LINE = 16  # pixels from one line of a layer's name to the next
HEAD_GAP = 8  # below a layer's name, type and shape
WIDEST_MONTAGE = 1960  # pixels across the tiles of a montage, unless columns are given
BAR_HEIGHT = 9
NARROWEST = 148  # a block's width, so that its name can be read

TITLE, NAME, CLASS, NOTE, NUMBER = 15.0, 13.0, 13.0, 10.0, 9.0  # text sizes
NOTE_LINE = 14  # pixels from one line of notes to the next
PHOTO_SIDE = 160
ALIGNED = 48  # blocks whose heights differ by no more have their bars in one line
SHORTEST_BAR, LONGEST_BAR = 100, 320
ROW_GAP = 14  # between the rows of a table, each of several lines
WIDTH_OF_WORDS = 300  # the least that a montage leaves for its words
LARGEST = 200_000_000  # pixels of a sheet


SCOPES = {
    "layer": "one scale for the layer",
    "figure": "one scale for the figure",
    "row": "a scale for each row",
    "channel": "each channel by itself",
}
_MEASURES = {"f_ratio": "class F-ratio"}  # what is not said as it is written


class Page:
    """What has been put on a sheet so far."""

    def __init__(self) -> None:
        self.panels: list[Panel] = []
        self.photos: list[Photo] = []
        self.bars: list[Bar] = []
        self.texts: list[Text] = []
        self.notes: list[str] = []
        self.outlines: list[Outline] = []
        self.least_width = 0.0  # of what stands above all else
        self.shapes: list[Box | Line] = []

    def sheet(self, width: int, height: int, title: str | None) -> Sheet:
        """Return the sheet, wide enough for its title."""
        title_width = text_width(title, TITLE, bold=True) if title else 0
        return Sheet(
            max(width, round(max(title_width, self.least_width)) + 2 * MARGIN),
            height,
            tuple(self.panels),
            tuple(self.photos),
            tuple(self.bars),
            tuple(self.texts),
            tuple(self.notes),
            outlines=tuple(self.outlines),
            shapes=tuple(self.shapes),
        )

    def lines(self, x: int, y: int, lines: list[str], ink: Ink = Ink.GREY) -> int:
        """Write lines of notes below `y`, and return where they end."""
        for line in lines:
            y += NOTE_LINE
            self.texts.append(Text(x, y - 3, line, NOTE, ink=ink))
        return y

    def unfinished(self, view: View, y: int) -> int:
        """Write below `y` how far a capture is that did not end; return where that ends."""
        if view.unfinished is None:
            return y
        self.least_width = text_width(view.unfinished, NOTE)
        self.notes.append(view.unfinished)
        return self.lines(MARGIN, y - 4, [view.unfinished], Ink.BLACK) + 8

    def head(self, x: int, y: int, width: int, block: Block) -> int:
        """Write a layer's name, type and shape; return where they end."""
        return self.layer_head(x, y, width, block.layer.name, block.layer.type, block.layer.shape)

    def layer_head(self, x: int, y: int, width: int, name: str, type: str, shape: tuple[int, ...]) -> int:
        """Write a layer's name, type and shape; return where they end."""
        for line in wrap_name(name, width, NAME):
            self.texts.append(Text(x, y + 12, line, NAME, bold=True))
            y += NAME_LINE
        return self.lines(x, y, _about(type, shape, width))

    def bar(self, x: int, y: int, width: int, block: Block, row: int) -> int:
        """Draw the bar of a row of `block`, or say why there is none; return where it ends."""
        scale = block.row_scale(row)
        if scale is None:
            finite = bool(np.isfinite(block.scale.high).any())
            return self.lines(x, y, ["no bar: the scales differ" if finite else "no finite value"])
        low, high = scale.limits
        if low == high:
            return self.lines(x, y, [f"no bar: every value is {number(low)}"])
        self.bars.append(Bar(x, y, BAR_HEIGHT, scale.bar(width), scale.colormap, low, high))
        y += BAR_HEIGHT + 11
        ends = number(low), number(high)
        self.texts.append(Text(x, y, ends[0], NUMBER))
        self.texts.append(Text(x + width, y, ends[1], NUMBER, "right"))
        zero = x + width * (0 - low) / (high - low) if low < 0 < high else None
        if zero is not None and _clear(zero, x, width, ends):
            self.texts.append(Text(zero, y, "0", NUMBER, "center"))
        return y + 3

    def numbers(self, panel: Panel, labels: Sequence[str]) -> None:
        """Write a label above each tile, as far as there are labels."""
        for i, label in enumerate(labels):
            x, y = panel.place(i)
            self.texts.append(Text(x, y - 3, label, NUMBER, ink=Ink.GREY))

    def caption(self, x: int, y: int, width: int, block: Block, spec: TilesSpec) -> int:
        """Write what is shown, on which scale, and what the marks are."""
        said = [shown_of(block), block.layer.note, _scope(block, spec), range_of(block)]
        y = self.lines(x, y, [line for text in said for line in wrap_even(text, width, NOTE)])
        return self.remarks(x, y, width, block)

    def shown(self, x: int, y: int, width: int, block: Block) -> int:
        """Write which channels are shown and what the marks are, of a scale that stands elsewhere."""
        said = [shown_of(block), block.layer.note]
        y = self.lines(x, y, [line for text in said for line in wrap_even(text, width, NOTE)])
        return self.remarks(x, y, width, block)

    def remarks(self, x: int, y: int, width: int, block: Block) -> int:
        """Write what each mark in a block stands for behind a sample of it."""
        for remark in block.remarks:
            y += NOTE_LINE
            swatch = np.full((1, 1, 1), remark.mark, np.uint8)
            self.panels.append(Panel(x + 1, y - 11, swatch, 1, 9, 2, 2, block.scale.colormap, framed=True))
            self.texts.append(Text(x + 16, y - 3, _remark(remark, width - 16), NOTE, ink=Ink.GREY))
        self.notes += block.notes
        return y


def _clear(zero: float, x: int, width: int, ends: tuple[str, str]) -> bool:
    """Return whether a 0 below a bar keeps clear of the numbers at its ends."""
    room = text_width("0", NUMBER) / 2 + 4
    left, right = (text_width(end, NUMBER) for end in ends)
    return x + left + room < zero < x + width - right - room


def shown_of(block: Block) -> str:
    """Return how many channels are drawn, and how they were chosen."""
    layer = block.layer
    n = len(layer.channels)
    units = layer.unit if layer.n_channels == 1 else f"{layer.unit}s"
    amount = f"all {n} {units}" if n == layer.n_channels > 1 else f"{n} of {layer.n_channels} {units}"
    shown = amount if n == layer.n_channels else f"{amount} shown"
    page = ", page {} of {}".format(*layer.page) if layer.page else ""
    if not layer.ranked_by:
        return shown + page
    return f"{shown}{page}, by {_MEASURES.get(layer.ranked_by, layer.ranked_by)} {layer.ranked_over}".rstrip()


def _scope(block: Block, spec: TilesSpec) -> str:
    """Return what shares a scale."""
    if not isinstance(spec.scope, str):
        return "the scale was given"
    if block.layer.data is not None:
        return f"one scale for the layer over all {block.layer.data.n_rows:,} rows"
    return SCOPES[spec.scope]


def range_of(block: Block) -> str:
    """Return from where a scale runs, and whether and where it is clipped."""
    scale = block.scale
    ranges = scale.low < scale.high
    if not ranges.any():
        return ""
    if scale.diverging:
        even = bool((scale.low == -scale.high)[ranges].all())
        said = "symmetric around 0" if even else "colours symmetric around 0"
    else:
        said = "from 0" if bool((scale.low[ranges] == 0).all()) else ""
    return ", ".join(part for part in (said, _clip(block)) if part)


def _clip(block: Block) -> str:
    scale, data = block.scale, block.layer.data
    if scale.clip is None or scale.cut is None:
        return ""
    both = [f"{percentile:g}" for percentile in np.atleast_1d(scale.clip)]
    where = f"percentile{'s' if len(both) > 1 else ''} {' and '.join(both)}"
    if not scale.cut.any():
        return f"not clipped: {where} would leave no range"
    about = "about " if data is not None and data.about else ""
    return f"clipped at {about}{where}" + ("" if scale.cut.all() else " where that leaves a range")


def grid(view: View, spec: GridSpec, blocks: Sequence[Block] | None = None) -> Sheet:
    """Lay out each row's picture and, beside it, a block of channels for every layer.

    `blocks` are those of `view`, where their scale is of more than the view.

    Raises:
        DrawError: the sheet would be too large.

    """
    page = Page()
    y = page.unfinished(view, put_title(page, spec, MARGIN))
    photo_width = _photo_width(view) if spec.picture else 0
    columns: list[_Column] = []
    x = MARGIN + (photo_width + COLUMN_GAP if photo_width else 0)
    for block in scaled(view, spec) if blocks is None else blocks:
        columns.append(_column(block, spec, x))
        x += columns[-1].width + COLUMN_GAP
    check_size(x, max(c.height for c in columns) * len(view.rows))
    bottom = max(page.head(c.x, y, c.width, c.block) for c in columns) + HEAD_GAP
    words_width = max(x - COLUMN_GAP - MARGIN, NARROWEST)
    for i, row in enumerate(view.rows):
        y = bottom + (LINE_GAP if i else 0)
        if not spec.picture:
            y = (
                page.lines(MARGIN, y - (NOTE_LINE // 2 if i else 2), wrap(row_about(row), words_width, NOTE))
                + 2
            )
        ends = [_tiles_of_row(page, columns, c, i, y, spec, last=row is view.rows[-1]) for c in columns]
        if photo_width:
            ends.append(put_photo(page, row, MARGIN, y, photo_width))
        bottom = max(ends)
    return page.sheet(x - COLUMN_GAP + MARGIN, bottom + MARGIN, spec.title)


@dataclass(frozen=True, eq=False)
class _Column:
    """A layer's place in a grid: how its tiles stand, and how wide it is."""

    block: Block
    x: int
    factor: int
    n_columns: int
    gap: int
    numbered: bool

    @property
    def width(self) -> int:
        return max(self.panel(0, 0).size[0], NARROWEST)

    @property
    def height(self) -> int:
        return self.panel(0, 0).size[1]

    def panel(self, row: int, y: int) -> Panel:
        tiles = self.block.tiles[row]
        return panel_of(self.block, tiles, self.x, y, self.n_columns, self.factor, self.gap, self.numbered)


def _column(block: Block, spec: GridSpec, x: int) -> _Column:
    _, n, height, width = block.tiles.shape
    n_columns = tile_columns(n, spec)
    factor = tile_factor((height, width), n, n_columns, spec)
    gap, numbered = numbering(block.layer.channels, width * factor, spec)
    check_size(n_columns * (width * factor + gap), -(-n // n_columns) * height * factor)
    return _Column(block, x, factor, n_columns, gap, numbered)


def panel_of(
    block: Block,
    tiles: NDArray[np.uint8],
    x: int,
    y: int,
    n_columns: int,
    factor: int,
    gap: int,
    numbered: bool,
) -> Panel:
    """Return tiles of a block, with room for a number above each line of them where these are numbered."""
    gap_y = gap_of(tiles.shape[2] * factor) + (NUMBER_ROOM if numbered else 0)
    cells = block.layer.cells
    framed = block.scale.diverging or cells is not None
    return Panel(x, y, tiles, n_columns, factor, gap, gap_y, block.scale.colormap, framed, cells)


def gap_of(width: int) -> int:
    """Return the gap between tiles of a width."""
    return TILE_GAP if width > 16 else CELL_GAP


def numbering(labels: Iterable[int | str], width: int, spec: TilesSpec) -> tuple[int, bool]:
    """Return the gap between tiles of a width, and whether they are numbered.

    Where numbers were asked for, the gap makes room for them; else they are left out where there is none.
    """
    gap, room = gap_of(width), math.ceil(_number_width(labels)) + 3
    if spec.numbers:
        return max(gap, room - width), True
    return gap, spec.numbers is None and room <= width + TILE_GAP


def _tiles_of_row(
    page: Page, columns: list[_Column], column: _Column, i: int, y: int, spec: GridSpec, *, last: bool
) -> int:
    """Put the tiles of row `i` of one layer at `y`, with bar and caption where they are due."""
    panel = column.panel(i, y + NUMBER_ROOM)
    page.panels.append(panel)
    if column.numbered:
        page.numbers(panel, [str(channel) for channel in column.block.layer.channels])
    y = panel.y + column.height
    if not last and spec.scope != "row":
        return y
    # The bars of blocks that are nearly as high as each other stand in one line.
    short = max(c.height for c in columns) - column.height
    y += (short if short <= ALIGNED else 0) + 12
    width = max(panel.size[0], SHORTEST_BAR)
    y = page.bar(column.x, y, width, column.block, i)
    return page.caption(column.x, y, column.width, column.block, spec) if last else y


def _photo_width(view: View) -> int:
    """Return the width of the column that shows and names the rows; 0 where there is nothing to show."""
    sizes = [photo_at(row.picture, 0, 0).size[0] for row in view.rows if row.picture is not None]
    known = any(row.true or row.predicted for row in view.rows)
    return max([NARROWEST, *sizes]) if sizes or known or len(view.rows) > 1 else 0


def photo_at(picture: NDArray[np.uint8], x: int, y: int) -> Photo:
    """Place a picture, magnified by a whole number; a large one is averaged down by one."""
    largest = max(picture.shape[:2])
    divisor = max(1, round(largest / PHOTO_SIDE)) if largest > 2 * PHOTO_SIDE else 1
    if divisor > 1:
        height, width = (n // divisor for n in picture.shape[:2])
        whole = picture[: height * divisor, : width * divisor].astype(np.float32)
        means = whole.reshape(height, divisor, width, divisor, 3).mean(axis=(1, 3))
        picture, largest = np.rint(means).astype(np.uint8), max(height, width)
    return Photo(x, y, picture, max(1, round(PHOTO_SIDE / largest)))


def put_photo(page: Page, row: RowView, x: int, y: int, width: int) -> int:
    """Put a row's name, picture and classes; return where they end."""
    y = row_name(page, row, x, y, width)
    if row.picture is not None:
        page.photos.append(photo_at(row.picture, x, y))
        y += page.photos[-1].size[1] + 4
    return row_words(page, row, x, y, width)


def row_name(page: Page, row: RowView, x: int, y: int, width: int) -> int:
    """Write a row's number and id, above what is drawn of it; return where they end."""
    name = f"row {row.row}" + (f" · {row.name}" if row.name and row.name != str(row.row) else "")
    page.texts.append(Text(x, y + NUMBER_ROOM - 3, shorten(name, width, NUMBER), NUMBER, ink=Ink.GREY))
    return y + NUMBER_ROOM


def row_words(page: Page, row: RowView, x: int, y: int, width: int) -> int:
    """Write a row's class and the predicted one; return where they end."""
    if row.true:
        y += 17
        page.texts.append(Text(x, y - 3, shorten(row.true, width, CLASS, bold=True), CLASS, bold=True))
    if row.predicted:
        words = shorten(f"predicted {row.predicted}", width, NOTE)
        y = page.lines(x, y, [words], Ink.BLACK)
    if row.right is not None:
        outcome, ink = ("right", Ink.RIGHT) if row.right else ("wrong", Ink.WRONG)
        y += NOTE_LINE
        page.texts.append(Text(x, y - 3, outcome, NOTE, ink=ink, bold=True))
    return y


def montage(view: View, spec: MontageSpec, blocks: Sequence[Block] | None = None) -> Sheet:
    """Lay out all channels of a row, one channel of all rows, or channels (across) by rows (down).

    `blocks` are as for a grid.

    Raises:
        DrawError: the sheet would be too large.

    """
    page, right = Page(), 0
    bottom = page.unfinished(view, put_title(page, spec, MARGIN))
    for i, block in enumerate(scaled(view, spec) if blocks is None else blocks):
        width, bottom = _montage_of_layer(page, view, block, spec, bottom + (LINE_GAP if i else 0))
        right = max(right, MARGIN + width)
    return page.sheet(right + MARGIN, bottom + MARGIN, spec.title)


def _montage_of_layer(page: Page, view: View, block: Block, spec: MontageSpec, y: int) -> tuple[int, int]:
    """Put one layer's tiles at `y`; return its width and where it ends."""
    n_rows, n_channels, height, width = block.tiles.shape
    table = n_rows > 1 and n_channels > 1
    channels = [str(channel) for channel in block.layer.channels]
    rows = [str(row.row) for row in view.rows]
    labels = channels if n_channels > 1 or n_rows == 1 else rows
    n_columns, factor, gap, numbered = montage_columns(block, labels, spec, table=table)
    row_names = [f"row {row}" for row in rows]
    side = round(_number_width(row_names)) + 6 if table else 0
    # A row of one line needs no numbers of its own: those above the first row are for all.
    apart = table and n_columns < n_channels
    groups = list(block.tiles) if apart else [block.tiles.reshape(-1, height, width)]
    roomy = numbered and (apart or not table)
    panels = [panel_of(block, g, MARGIN + side, 0, n_columns, factor, gap, roomy) for g in groups]
    total = sum(panel.size[1] + NUMBER_ROOM for panel in panels)
    check_size(panels[0].size[0], total)
    whole = max(side + panels[0].size[0], WIDTH_OF_WORDS)
    y = page.head(MARGIN, y, whole, block)
    y = page.lines(MARGIN, y, wrap(_rows_about(view, block, numbered), whole, NOTE)) + 4
    for i, panel in enumerate(panels):
        y += (NUMBER_ROOM if numbered else 0) + (ROW_GAP if i else 0)
        panel = replace(panel, y=y)
        page.panels.append(panel)
        if numbered:
            page.numbers(panel, labels)
        for k, name in enumerate(row_names[i : i + 1] if apart else row_names if table else ()):
            left, top = panel.place(k * n_columns)
            middle = top + panel.tile_size[1] // 2 + 3
            page.texts.append(Text(left - 6, middle, name, NUMBER, "right", Ink.GREY))
        y += panel.size[1]
    x, y = MARGIN + side, y + 12
    bar_width = min(max(panels[0].size[0], SHORTEST_BAR), LONGEST_BAR)
    if spec.scope == "row" and n_rows > 1:
        y = page.lines(x, y, ["no bar: the scales differ"])
    else:
        y = page.bar(x, y, bar_width, block, 0)
    return whole, page.caption(x, y, whole - side, block, spec)


def montage_columns(
    block: Block, labels: Sequence[str], spec: MontageSpec, *, table: bool
) -> tuple[int, int, int, bool]:
    """Return tiles in a line, pixels a value, the gap between tiles, and whether they are numbered.

    A table has a line for each row where that is readable. Otherwise, and in any other montage, lines are as
    long as the page is wide at most, unless columns are given.
    """
    n_rows, n_channels, height, width = block.tiles.shape
    n = n_rows * n_channels
    in_a_line = n_channels if table else n
    n_columns = in_a_line if table and spec.columns is None else tile_columns(in_a_line, spec)
    factor = tile_factor((height, width), n, n_columns, spec)
    if table and spec.columns is None:
        large = tile_factor((height, width), n, 1, spec)
        factor = factor if 2 * factor >= large else large
    gap, numbered = numbering(labels, width * factor, spec)
    if spec.columns is None:
        most = max(1, (WIDEST_MONTAGE + gap) // (width * factor + gap))
        if n_columns > most:
            n_columns = -(-in_a_line // -(-in_a_line // most))  # lines alike in length
    return n_columns, factor, gap, numbered


def _rows_about(view: View, block: Block, numbered: bool) -> str:
    """Return which rows a montage shows, and for one row what it is."""
    if len(view.rows) == 1:
        return row_about(view.rows[0])
    if len(block.layer.channels) > 1:
        return f"{len(view.rows)} rows"
    numbers = " · the numbers are rows" if numbered else ""
    return f"{block.layer.unit} {block.layer.channels[0]} · {len(view.rows)} rows{numbers}"


def row_about(row: RowView) -> str:
    """Return a row's number, id and classes on one line."""
    true = row.true if row.true is None or row.true.startswith("class ") else f"class {row.true}"
    outcome = "" if row.right is None else " (right)" if row.right else " (wrong)"
    predicted = f"predicted {row.predicted}{outcome}" if row.predicted else None
    name = row.name if row.name != str(row.row) else None
    return " · ".join(fact for fact in (f"row {row.row}", name, true, predicted) if fact)


def _about(type: str, shape: tuple[int, ...], width: float) -> list[str]:
    """Return a layer's type and shape, on one line or two; a shape is never cut, as it would read wrongly."""
    size = " \N{MULTIPLICATION SIGN} ".join(map(str, shape))
    both = " · ".join(part for part in (type, size) if part)
    if text_width(both, NOTE) <= width:
        return [both]
    return [shorten(type, width, NOTE), *wrap(size, width, NOTE)]


def _remark(remark: Remark, width: float) -> str:
    words = remark.words + " "
    return words + listing(remark.tiles, remark.unit, lambda text: text_width(words + text, NOTE) <= width)


def put_title(page: Page, spec: Spec, y: int) -> int:
    """Write the title, if there is one; return where it ends."""
    if not spec.title:
        return y
    page.texts.append(Text(MARGIN, y + 14, spec.title, TITLE, bold=True))
    return y + 32


def _number_width(numbers: Iterable[int | str]) -> float:
    return max(text_width(str(n), NUMBER) for n in numbers)


def check_size(width: float, height: float) -> None:
    """Raise DrawError where a sheet would have too many pixels."""
    if width * height > LARGEST:
        raise DrawError(
            f"the picture would have {width:.0f} x {height:.0f} pixels; draw fewer channels or rows, "
            "or give a smaller magnification"
        )
