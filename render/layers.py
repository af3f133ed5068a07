"""Layers side by side, at one size of tiles and under one scale, and what changes with depth beneath."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .blocks import Block, blocks_of, number, tile_columns, tile_factor
from .colormaps import BLACK, WHITE
from .compare import CompareSpec, amount, chosen_rows, heads_of, named_options
from .depth import MOST_CHANNELS, Depth, measure
from .kinds import Kind
from .layout import (
    COLUMN_GAP,
    HEAD_GAP,
    LINE_GAP,
    LONGEST_BAR,
    MARGIN,
    NARROWEST,
    NOTE,
    NUMBER_ROOM,
    SHORTEST_BAR,
    Page,
    check_size,
    numbering,
    panel_of,
    photo_at,
    put_photo,
    put_title,
    range_of,
)
from .lettering import wrap, wrap_even
from .means import keep_top, mean_maps
from .selection import ChannelChoice, select_layers, select_rows
from .sheet import Ink, Panel, Sheet, Text
from .sides import SideView, left_out
from .spec import Scope
from .view import LayerView, RowView, row_views

if TYPE_CHECKING:
    from ..capture.reader import Run

Values = NDArray[Any]

MEASURED_ROWS = 64  # over which layers are measured, where a single row is drawn

_WIDEST = 1700  # pixels of a line of layers
_LABELS = 168  # pixels of the column at the left, or more: the picture, and the names of the measures
_SMALLEST_TILE, _LARGEST_TILE = 40, 112
_BAR = 26, 34  # width and height of a measure's bar
_MEASURE = 46  # pixels from one measure to the next
_TRACK, _FILL = WHITE - 1, BLACK + 5


@dataclass(frozen=True, kw_only=True)
class LayersSpec(CompareSpec):
    """Layers side by side, for one row or the mean of several, and what changes with depth."""

    kind: ClassVar[str] = "layers"

    rows: tuple[int, ...] | None = None
    """The row that is drawn, or several, whose mean is; None is the mean of every captured row."""
    scope: Scope = "figure"
    """What shares one scale: the figure, each layer, a channel; or limits (low, high)."""
    columns: int | None = None
    """Tiles in a line of a layer; None is the square root of their number, rounded up."""
    magnification: int | None = None
    """Sheet pixels a value; None is for each layer what makes its tiles as large as those of the others."""
    measured: tuple[int, ...] | None = None
    """Rows over which layers are measured; None is those that are drawn, or for one 64 spread evenly."""
    picture: bool = True
    """Whether the row's picture stands at the left, where it is one row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measured is not None:
            object.__setattr__(self, "measured", tuple(int(row) for row in self.measured))


def _choose(run: Run, named: Mapping[str, Any]) -> LayersSpec:
    if named.get("layers") is None:
        # Weights of attention and gradients are of another scale than what layers give.
        outputs = [name for name, tap in run.taps.items() if tap.kind == "output"]
        named = {**named, "layers": outputs or None}
    values = named_options(run, named)
    if named.get("rows") is None:
        values["rows"] = select_rows(run)[:1]
    if named.get("measured") is not None:
        values["measured"] = select_rows(run, named["measured"])
    return LayersSpec.of(values)


def _sheet(run: Run, spec: LayersSpec) -> Sheet:
    rows = chosen_rows(run, spec.rows)
    measured = _measured(run, spec, rows)
    choice = ChannelChoice.parse(spec.channels, spec.by)
    columns, notes = [], []
    for name in select_layers(run, spec.layers):
        means = mean_maps(run, name, [rows], choice)
        (view,) = keep_top([means.layer], choice)
        columns.append((view, measure(run, name, measured)))
        notes += [f"{name}: {text}" for text in left_out(means.n_left_out if len(rows) > 1 else 0)]
    single = len(rows) == 1
    if single:
        (side,) = row_views(run, (int(rows[0]),), spec.picture)
    else:
        side = SideView.of(0, f"the mean of {amount(len(rows), 'row')}")
    return lay_out(side, columns, len(measured), spec, [*heads_of(run, ()), *notes])


def _measured(run: Run, spec: LayersSpec, rows: Values) -> Values:
    """Return the rows over which layers are measured, in rising order."""
    if spec.measured is not None:
        return chosen_rows(run, spec.measured)
    if len(rows) > 1:
        return rows
    every = chosen_rows(run, None)
    n = min(MEASURED_ROWS, len(every))
    spread: Values = every[np.arange(n) * len(every) // n]
    return spread


@dataclass(frozen=True)
class _Measure:
    """One line of numbers below the layers."""

    name: str
    about: str
    words: Callable[[Depth], str]
    """What is written of a layer."""
    share: Callable[[Depth, Sequence[Depth]], float]
    """How full the bar of a layer is, among all; NaN where there is none."""


_MEASURES = (
    _Measure(
        "resolution",
        "values of a channel",
        lambda d: (
            ("up to " if d.varies else "") + (" \N{MULTIPLICATION SIGN} ".join(map(str, d.resolution)) or "1")
        ),
        lambda d, every: _side(d) / max(map(_side, every)),
    ),
    _Measure("zeros", "share of all values", lambda d: _words(d.zeros, percent=True), lambda d, _: d.zeros),
    _Measure(
        "correlation",
        "of two channels, mean |r|",
        lambda d: _words(d.correlation),
        lambda d, _: d.correlation,
    ),
    _Measure(
        "effective rank",
        "of the channels",
        lambda d: f"{_words(d.rank)} of {d.n_channels}",
        lambda d, _: d.rank / d.n_channels,
    ),
)


def _side(depth: Depth) -> float:
    """Return how long a channel's map is on average in each direction."""
    return math.sqrt(math.prod(depth.resolution))


def _words(value: float, *, percent: bool = False) -> str:
    if math.isnan(value):
        return "\N{EN DASH}"
    if not percent:
        return number(value)
    # What is not quite none or all is not said to be.
    rounded = f"{100 * value:.1f}"
    if rounded in ("0.0", "100.0") and 0 < value < 1:
        return "< 0.1 %" if value < 0.5 else "> 99.9 %"
    return f"{rounded.removesuffix('.0')} %"


@dataclass(frozen=True, eq=False)
class _Column:
    """A layer, and how its tiles stand."""

    block: Block
    depth: Depth
    n_columns: int
    factor: int
    gap: int
    numbered: bool

    @classmethod
    def of(cls, block: Block, depth: Depth, side: int, spec: LayersSpec) -> _Column:
        _, n, height, width = block.tiles.shape
        tiles = spec.tiles((0,))
        n_columns = tile_columns(n, tiles)
        single = max(height, width) == 1 or spec.magnification is not None
        shape = (height, width)
        factor = tile_factor(shape, n, n_columns, tiles) if single else max(1, round(side / max(shape)))
        return cls(block, depth, n_columns, factor, *numbering(block.layer.channels, width * factor, tiles))

    def panel(self, x: int, y: int) -> Panel:
        tiles = self.block.tiles[0]
        return panel_of(self.block, tiles, x, y, self.n_columns, self.factor, self.gap, self.numbered)

    @property
    def tile(self) -> int:
        """Pixels of the longer side of a tile."""
        return max(self.panel(0, 0).tile_size)

    @property
    def width(self) -> int:
        return max(self.panel(0, 0).size[0], NARROWEST)

    @property
    def height(self) -> int:
        return self.panel(0, 0).size[1]


def lay_out(
    side: RowView,
    layers: Sequence[tuple[LayerView, Depth]],
    n_measured: int,
    spec: LayersSpec,
    notes: Sequence[str] = (),
) -> Sheet:
    """Lay out layers side by side, in as many lines as they take.

    Args:
        side: the row, or what stands for several.
        layers: the maps of each layer, and what was measured of it.
        n_measured: over how many rows.
        spec: what is drawn.
        notes: what must be said besides.

    Raises:
        DrawError: the sheet would be too large.

    """
    blocks = blocks_of([(view, [side]) for view, _ in layers], spec.tiles((0,)))
    tile = common_side([max(block.tiles.shape[2:]) for block in blocks])
    columns = [_Column.of(block, depth, tile, spec) for block, (_, depth) in zip(blocks, layers, strict=True)]
    lines = _lines(columns)
    labels = _label_width(side)
    x0 = MARGIN + labels + COLUMN_GAP
    width = max(sum(c.width + COLUMN_GAP for c in line) for line in lines) - COLUMN_GAP
    check_size(x0 + width, sum(max(c.height for c in line) + 4 * _MEASURE for line in lines))
    page = Page()
    y = put_title(page, spec, MARGIN)
    said = _heads(side, columns, n_measured)
    y = page.lines(MARGIN, y, [part for text in said for part in wrap(text, x0 + width - MARGIN, NOTE)])
    shared = spec.scope == "figure" or not isinstance(spec.scope, str)
    for i, line in enumerate(lines):
        left = y + (LINE_GAP if i else HEAD_GAP)
        y = _layers(page, line, spec, x0, left, shared=shared)
        if i == 0:
            y = max(y, _left(page, side, columns, left, labels, shared=shared))
        y = _measures(page, line, columns, x0, y + 10)
    every = [*_footnotes(columns), *notes]
    y = page.lines(MARGIN, y + 4, [part for text in every for part in wrap(text, x0 + width - MARGIN, NOTE)])
    return page.sheet(x0 + width + MARGIN, y + MARGIN, spec.title)


def common_side(sizes: Sequence[int]) -> int:
    """Return the pixels of a tile's side that whole multiples of `sizes` come nearest to.

    A map is magnified by whole numbers alone, so that tiles may differ by less than the largest map's half.
    """
    maps = [size for size in sizes if size > 1]
    if not maps:
        return _SMALLEST_TILE
    sides = range(max(_SMALLEST_TILE, *maps), max(_LARGEST_TILE, *maps) + 1)

    def off(side: int) -> float:
        tiles = [max(1, round(side / size)) * size for size in maps]
        return (max(tiles) - min(tiles)) / side

    return min(sides, key=lambda side: (round(off(side), 9), abs(side - 64)))


def _lines(columns: Sequence[_Column]) -> list[list[_Column]]:
    """Return layers in lines that are as long as a page is wide at most."""
    lines: list[list[_Column]] = [[]]
    for column in columns:
        used = sum(other.width + COLUMN_GAP for other in lines[-1])
        if lines[-1] and used + column.width > _WIDEST:
            lines.append([])
        lines[-1].append(column)
    return lines


def _layers(page: Page, line: Sequence[_Column], spec: LayersSpec, x: int, y: int, *, shared: bool) -> int:
    """Put a line of layers with their names and captions; return where it ends."""
    starts = [x + sum(c.width + COLUMN_GAP for c in line[:i]) for i in range(len(line))]
    y = max(page.head(at, y, c.width, c.block) for at, c in zip(starts, line, strict=True)) + HEAD_GAP
    for at, column in zip(starts, line, strict=True):
        panel = column.panel(at, y + NUMBER_ROOM)
        page.panels.append(panel)
        if column.numbered:
            page.numbers(panel, [str(channel) for channel in column.block.layer.channels])
    y += NUMBER_ROOM + max(column.height for column in line)
    ends = []
    for at, column in zip(starts, line, strict=True):
        if shared:
            ends.append(page.shown(at, y + 2, column.width, column.block))
        else:
            bar = page.bar(at, y + 12, max(column.panel(0, 0).size[0], SHORTEST_BAR), column.block, 0)
            ends.append(page.caption(at, bar, column.width, column.block, spec.tiles((0,))))
    return max(ends)


def _label_width(side: RowView) -> int:
    """Return the width of the column at the left, which holds the whole picture."""
    picture = None if isinstance(side, SideView) else side.picture
    return _LABELS if picture is None else max(_LABELS, photo_at(picture, 0, 0).size[0])


def _left(page: Page, side: RowView, columns: Sequence[_Column], y: int, labels: int, *, shared: bool) -> int:
    """Put what the row is, and the bar where all layers share one; return where that ends."""
    if isinstance(side, SideView):
        y = page.lines(MARGIN, y, wrap(side.label, labels, NOTE), Ink.BLACK)
    else:
        y = put_photo(page, side, MARGIN, y, labels)
    if not shared:
        return y
    given = columns[0].block.scale.given
    y = page.lines(MARGIN, y + 10, ["the scale was given" if given else "one scale for all layers"]) + 3
    y = page.bar(MARGIN, y, min(labels, LONGEST_BAR), columns[0].block, 0)
    return page.lines(MARGIN, y, list(wrap_even(range_of(columns[0].block), labels, NOTE)))


def _measures(page: Page, line: Sequence[_Column], every: Sequence[_Column], x: int, y: int) -> int:
    """Put what was measured below each layer of a line; return where it ends."""
    depths = [column.depth for column in every]
    for measured in _MEASURES:
        page.texts.append(Text(MARGIN, y + 16, measured.name, NOTE, bold=True))
        page.lines(MARGIN, y + 17, [measured.about])
        at = x
        for column in line:
            share = measured.share(column.depth, depths)
            _bar(page, at, y, share, column.block.scale.colormap)
            words = measured.words(column.depth)
            page.texts.append(Text(at + _BAR[0] + 10, y + _BAR[1] // 2 + 5, words, NOTE))
            at += column.width + COLUMN_GAP
        y += _MEASURE
    return y


def _bar(page: Page, x: int, y: int, share: float, colormap: str) -> None:
    """Draw how full a bar is, from its foot; none where that is not known."""
    if math.isnan(share):
        return
    width, height = _BAR
    entries = np.full((1, height, width), _TRACK, np.uint8)
    entries[:, height - round(min(max(share, 0.0), 1.0) * height) :] = _FILL
    page.panels.append(Panel(x + 1, y + 1, entries, 1, 1, 2, 2, colormap, framed=True))


def _heads(side: RowView, columns: Sequence[_Column], n_measured: int) -> list[str]:
    tiles = sorted({column.tile for column in columns if max(column.block.tiles.shape[2:]) > 1})
    what = f"Maps of {side.label}"
    if len(tiles) == 1:
        what += f", each {tiles[0]} pixels long"
    elif tiles:
        what += f", {tiles[0]} to {tiles[-1]} pixels long: a value is a square of whole pixels"
    return [f"{what}. Measured over {amount(n_measured, 'row')}."]


def _footnotes(columns: Sequence[_Column]) -> list[str]:
    """Return what the measures are, and of which channels they are not."""
    notes = [
        "zeros: values that are exactly zero · correlation: mean absolute Pearson correlation of two "
        "channels, each position of each row a sample · effective rank: exp of the entropy of the "
        "eigenvalues of the channels' covariance (Roy and Vetterli 2007) · a full bar is the largest map, "
        "all values, 1, or all channels"
    ]
    for column in columns:
        name, depth = column.block.layer.name, column.depth
        if depth.n_left_out:
            held = amount(depth.n_left_out, "channel")
            notes.append(f"{name}: {held} with values not finite, left out of correlation and rank")
        if depth.n_samples <= depth.n_channels <= MOST_CHANNELS:
            samples = amount(depth.n_samples, "sample")
            notes.append(
                f"{name}: {samples} of {depth.n_channels} channels have a rank below {depth.n_samples}"
            )
        if depth.n_channels > MOST_CHANNELS:
            notes.append(f"{name}: no correlation and rank, which take {MOST_CHANNELS:,} channels at most")
    return notes


LAYERS = Kind(LayersSpec, _choose, _sheet)
