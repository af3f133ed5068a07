"""The layout of a comparison: for each layer, its sides below each other and their channels across.

So a channel is followed down a column, from one side to the next and to their difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .blocks import Block, Remark, blocks_of
from .compare import MINUS, CompareSpec, amount
from .layout import (
    CLASS,
    COLUMN_GAP,
    LINE_GAP,
    LONGEST_BAR,
    MARGIN,
    NARROWEST,
    NOTE,
    NUMBER_ROOM,
    SCOPES,
    Page,
    check_size,
    montage_columns,
    panel_of,
    photo_at,
    put_title,
    range_of,
    shown_of,
)
from .lettering import text_width, wrap, wrap_even
from .sheet import Ink, Panel, Photo, Sheet, Text
from .view import LayerView, RowView

_LABEL = 170  # the most pixels that the names of sides take beside their tiles
_SIDE_GAP = 9  # between the sides of a group
_NAME_LINE = 15


@dataclass(frozen=True, eq=False)
class SideView(RowView):
    """What stands where a row would: the mean of a class, a row of another store, and so on."""

    @property
    def label(self) -> str:
        """What a note calls it."""
        return self.name or super().label

    @classmethod
    def of(cls, i: int, name: str) -> SideView:
        """Return side `i` with its name."""
        return cls(i, name, None, None, None, None)


@dataclass(frozen=True)
class Line:
    """One side, or a difference of two, as it is labelled."""

    name: str
    about: str = ""
    """How many rows it is of, for example."""
    few: bool = False
    """Whether these are so few that it must be said."""
    side: int | None = None
    """Which side of the comparison it is."""
    difference: int | None = None
    """Which difference it is, where it is one."""
    absent: str = ""
    """What is said in the place of tiles, where it is neither."""


@dataclass(frozen=True, eq=False)
class Group:
    """Sides that are compared with each other."""

    lines: tuple[Line, ...]
    title: str = ""
    """What they have in common: a row or a class."""
    picture: RowView | None = None
    """The row whose picture stands beside them, in the first layer."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some sides of a layer whose maps have one shape."""

    layer: LayerView
    """The maps of each of its sides, where rows would be."""
    sides: tuple[int, ...]
    """Which sides of the comparison these are."""
    name: str = ""
    """What they are called, where there are others."""


@dataclass(frozen=True, eq=False)
class ComparedLayer:
    """All sides of one layer."""

    name: str
    parts: tuple[Part, ...]
    """One, unless sides differ in shape."""
    difference: LayerView | None = None
    """The maps of each difference; None where there is none."""
    notes: tuple[str, ...] = ()
    """What must be said of it: why there is no difference, what was left out."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What is compared, ready to be laid out."""

    heads: tuple[str, ...]
    """What stands at the top: of which rows it is, and what a difference is."""
    groups: tuple[Group, ...]
    sides: tuple[SideView, ...]
    differences: tuple[SideView, ...]
    layers: tuple[ComparedLayer, ...]
    bar: str = "means"
    """What the colour bar of the sides is called; that of the differences is `differences`."""


def differences(layer: LayerView, pairs: Sequence[tuple[int, int]]) -> LayerView | None:
    """Return the difference of each two sides of a layer, the second taken from the first."""
    if not pairs:
        return None
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN
        return replace(layer, values=layer.values[first] - layer.values[second])


def difference_head(a: str, b: str) -> str:
    """Return what a difference is and how its colours read."""
    return f"{a} {MINUS} {b}: red where {a} is greater, blue where {b} is."


def left_out(n: int) -> tuple[str, ...]:
    """Return what is said of values that are in no mean."""
    return (f"{amount(n, 'value')} not finite, left out of the means",) if n else ()


@dataclass(frozen=True, eq=False)
class _Table:
    """A block of a layer, and how the tiles of each of its sides stand."""

    block: Block
    n_columns: int
    factor: int
    gap: int
    numbered: bool

    @classmethod
    def of(cls, block: Block, spec: CompareSpec) -> _Table:
        """Tile a block as one of its sides takes it."""
        labels = [str(channel) for channel in block.layer.channels]
        one = replace(block, tiles=block.tiles[:1])
        return cls(block, *montage_columns(one, labels, spec.tiles((0,)), table=True))

    @property
    def apart(self) -> bool:
        """Whether a side takes several lines of tiles."""
        return self.n_columns < len(self.block.layer.channels)

    def panel(self, i: int, x: int, y: int) -> Panel:
        """Return the tiles of side `i` of the block."""
        roomy = self.numbered and self.apart
        tiles = self.block.tiles[i]
        return panel_of(self.block, tiles, x, y, self.n_columns, self.factor, self.gap, roomy)

    @property
    def width(self) -> int:
        return self.panel(0, 0, 0).size[0]


@dataclass(frozen=True, eq=False)
class _Section:
    """All tables of a layer."""

    layer: ComparedLayer
    sides: dict[int, tuple[_Table, int]]
    """For each side its table, and which of its sides it is there."""
    difference: _Table | None
    scope: str
    """On which scale the sides are, in words."""

    @property
    def tables(self) -> list[_Table]:
        """The tables of sides, each once."""
        return list({id(table): table for table, _ in self.sides.values()}.values())

    def place(self, line: Line) -> tuple[_Table, int] | None:
        """Return where the tiles of a line are; None where there are none."""
        if line.side is not None:
            return self.sides[line.side]
        if line.difference is not None and self.difference is not None:
            return self.difference, line.difference
        return None


def lay_out(compared: Comparison, spec: CompareSpec) -> Sheet:
    """Lay out a comparison.

    Raises:
        DrawError: the sheet would be too large.

    """
    page = Page()
    sections = _sections(compared, spec)
    photos = [_photo(group) for group in compared.groups]
    photo_width = max((photo.size[0] for photo in photos if photo is not None), default=0)
    left = MARGIN + (photo_width + COLUMN_GAP // 2 if photo_width else 0)
    x = left + _label_width(compared)
    width = max(2 * NARROWEST, *(table.width for section in sections for table in section.tables))
    check_size(x + width, sum(_height(section, compared) for section in sections))
    y = put_title(page, spec, MARGIN)
    for head in compared.heads:
        y = page.lines(MARGIN, y, wrap(head, x + width - MARGIN, NOTE), Ink.BLACK)
    for i, section in enumerate(sections):
        y += LINE_GAP if i else LINE_GAP // 2 if compared.heads else 0
        y = page.head(MARGIN, y, x + width - MARGIN, section.tables[0].block)
        for k, group in enumerate(compared.groups):
            photo = photos[k] if i == 0 else None
            y = _group(page, section, group, photo, left, x, y + (LINE_GAP if k else 4), first=k == 0)
        y = _bars(page, section, compared, x, y + 14, width)
        y = _caption(page, section, compared, x, y + 2, width)
    return page.sheet(x + width + MARGIN, y + MARGIN, spec.title)


def _sections(compared: Comparison, spec: CompareSpec) -> list[_Section]:
    """Scale what is compared and tile it."""
    values, scopes = _value_blocks(compared, spec)
    differences = _difference_blocks(compared, spec)
    sections = []
    for i, layer in enumerate(compared.layers):
        tables = [_Table.of(block, spec) for block in values[i]]
        sides = {
            side: (table, k)
            for table, part in zip(tables, layer.parts, strict=True)
            for k, side in enumerate(part.sides)
        }
        block = differences.get(i)
        difference = None if block is None else replace(tables[0], block=block)
        sections.append(_Section(layer, sides, difference, scopes[i]))
    return sections


def _value_blocks(compared: Comparison, spec: CompareSpec) -> tuple[list[list[Block]], list[str]]:
    """Return a block for each part of each layer, and on which scale it is, in words."""
    tiles = spec.tiles((0,))
    parts = [[(p.layer, [compared.sides[i] for i in p.sides]) for p in one.parts] for one in compared.layers]
    if spec.scope == "figure" or not isinstance(spec.scope, str):
        made = iter(blocks_of([part for layer in parts for part in layer], tiles))
        scope = SCOPES["figure"] if isinstance(spec.scope, str) else "the scale was given"
        return [[next(made) for _ in layer] for layer in parts], [scope] * len(parts)
    blocks, scopes = [], []
    for layer in parts:
        # Sides of different shapes have no channels in common, but one scale.
        scope = spec.scope if len(layer) == 1 else "figure"
        blocks.append(list(blocks_of(layer, replace(tiles, scope=scope))))
        scopes.append(SCOPES[spec.scope if len(layer) == 1 else "layer"])
    return blocks, scopes


def _difference_blocks(compared: Comparison, spec: CompareSpec) -> dict[int, Block]:
    """Return the block of differences of each layer that has one, by the layer's place."""
    scope = spec.scope if isinstance(spec.scope, str) else "layer"
    tiles = replace(spec.tiles((0,)), scope=scope, colormap="RdBu_r", sign="auto")
    layers = {
        i: (one.difference, compared.differences)
        for i, one in enumerate(compared.layers)
        if one.difference is not None
    }
    if scope == "figure":
        return dict(zip(layers, blocks_of(list(layers.values()), tiles), strict=True))
    return {i: blocks_of([layer], tiles)[0] for i, layer in layers.items()}


def _height(section: _Section, compared: Comparison) -> int:
    """Return about how high a section is."""
    lines = [section.place(line) for group in compared.groups for line in group.lines]
    return sum(place[0].panel(place[1], 0, 0).size[1] for place in lines if place is not None)


def _label_width(compared: Comparison) -> int:
    """Return how many pixels the names of sides take beside the tiles."""
    lines = [line for group in compared.groups for line in group.lines]
    names = [text_width(line.name, CLASS, bold=True) for line in lines]
    about = [text_width(line.about, NOTE) for line in lines]
    return math.ceil(min(max([*names, *about, 40.0]), _LABEL)) + 13


def _group(
    page: Page,
    section: _Section,
    group: Group,
    photo: Photo | None,
    left: int,
    x: int,
    y: int,
    *,
    first: bool,
) -> int:
    """Put the sides of a group below each other, beside its picture; return where they end."""
    if group.title:
        y = page.lines(MARGIN, y, [group.title], Ink.BLACK) + 4
    bottom = y
    if photo is not None:
        page.photos.append(replace(photo, x=MARGIN, y=y + NUMBER_ROOM))
        bottom = y + NUMBER_ROOM + photo.size[1]
    new = first
    for line in group.lines:
        place = section.place(line)
        if place is None and not line.absent:
            continue  # there is no such difference, which the caption tells
        end = y
        if place is None:
            end = page.lines(x, y, [line.absent])
        else:
            table, side = place
            # Below each other are the same channels, unless sides differ or take several lines.
            numbered = table.numbered and (new or table.apart or len(section.tables) > 1)
            y += NUMBER_ROOM if numbered else 0
            panel = table.panel(side, x, y)
            page.panels.append(panel)
            if numbered:
                page.numbers(panel, [str(channel) for channel in table.block.layer.channels])
            end, new = y + panel.size[1], False
        end = max(end, _label(page, line, left, y, x - left - 12))
        bottom = max(bottom, end)
        y = end + (2 * _SIDE_GAP if place is not None and place[0].apart else _SIDE_GAP)
    return bottom


def _label(page: Page, line: Line, x: int, y: int, width: int) -> int:
    """Write what a side is; return where that ends."""
    for words in wrap(line.name, width / 1.12, CLASS):
        page.texts.append(Text(x, y + 11, words, CLASS, bold=True))
        y += _NAME_LINE
    y = page.lines(x, y, wrap(line.about, width, NOTE))
    return page.lines(x, y, ["few rows"], Ink.WRONG) if line.few else y


def _photo(group: Group) -> Photo | None:
    row = group.picture
    return None if row is None or row.picture is None else photo_at(row.picture, 0, 0)


def _bars(page: Page, section: _Section, compared: Comparison, x: int, y: int, width: int) -> int:
    """Draw the bar of the sides and beside it that of the differences, each with its name."""
    room = (width - COLUMN_GAP) // 2 if section.difference is not None else width
    length = max(min(room, LONGEST_BAR), NARROWEST - COLUMN_GAP // 2)
    named = [(compared.bar, next((t for t in section.tables if _has_bar(t.block)), section.tables[0]))]
    if section.difference is not None:
        named.append(("differences", section.difference))
    ends = []
    for i, (name, table) in enumerate(named):
        at = x + i * (length + COLUMN_GAP)
        ends.append(page.bar(at, page.lines(at, y, [name]) + 3, length, table.block, 0))
    return max(ends)


def _has_bar(block: Block) -> bool:
    scale = block.row_scale(0)
    return scale is not None and scale.limits[0] < scale.limits[1]


def _caption(page: Page, section: _Section, compared: Comparison, x: int, y: int, width: int) -> int:
    """Write which channels these are, on which scale, and what the marks are."""
    said = []
    for table, part in zip(section.tables, section.layer.parts, strict=True):
        said += [_named(part.name, shown_of(table.block)), table.block.layer.note]
    said += [section.scope, range_of(section.tables[0].block)]
    if section.difference is not None:
        own = f"differences have a scale of their own, {range_of(section.difference.block)}"
        said.append(own.removesuffix(", "))
    said += section.layer.notes
    y = page.lines(x, y, [line for text in said for line in wrap_even(text, width, NOTE)])
    for table, part in zip(section.tables, section.layer.parts, strict=True):
        y = page.remarks(x, y, width, _of_sides(table.block, compared.sides, part.name))
    if section.difference is not None:
        y = page.remarks(
            x, y, width, _of_sides(section.difference.block, compared.differences, "differences")
        )
    return y


def _named(name: str, words: str) -> str:
    return f"{name}: {words}" if name else words


def _of_sides(block: Block, sides: Sequence[RowView], name: str) -> Block:
    """Return a block whose remarks name sides where they would name rows."""
    labels = {side.row: side.label for side in sides}
    remarks = []
    for remark in block.remarks:
        of_sides = remark.unit == "row"
        tiles = tuple(labels[int(i)] for i in remark.tiles) if of_sides else remark.tiles
        unit = "side" if of_sides else remark.unit
        remarks.append(Remark(remark.mark, _named(name, remark.words), tiles, unit))
    return replace(block, remarks=tuple(remarks))
