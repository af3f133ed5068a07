"""Matrices as pictures: CKA between layers with its numbers, correlation between channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .blocks import listing
from .colormaps import Mark, palette
from .layout import (
    BAR_HEIGHT,
    HEAD_GAP,
    LINE_GAP,
    LONGEST_BAR,
    MARGIN,
    NOTE,
    NOTE_LINE,
    NUMBER,
    NUMBER_ROOM,
    SHORTEST_BAR,
    WIDTH_OF_WORDS,
    Page,
    put_title,
)
from .lettering import shorten, text_width, wrap
from .scale import Scale
from .sheet import Bar, Ink, Line, Panel, Sheet, Text
from .spec import Spec

Floats = NDArray[np.float64]

_NAMES_WIDTH = 240
_CELLS = ((12, 44), (40, 30), (100, 26), (200, NOTE_LINE))  # up to how many layers, and pixels of each
_NUMBERED, _NAMED = 26, NOTE_LINE  # the least that a number in a cell takes, and a name beside it
_SIDE = 640  # pixels that a matrix of channels has about


@dataclass(frozen=True, eq=False)
class Matrix:
    """The correlation of a layer's channels."""

    name: str
    type: str
    shape: tuple[int, ...]
    values: Floats
    """Shape (channels, channels), in the order in which they are drawn; NaN where a channel is constant."""
    order: NDArray[np.intp]
    """The channels in that order."""
    unit: str
    source: str
    """Of which rows it is, in words."""


def cka_sheet(names: Sequence[str], values: Floats, source: str, caution: str, spec: Spec) -> Sheet:
    """Lay out the CKA of each two layers as a matrix with its numbers."""
    page, n = Page(), len(names)
    y = put_title(page, spec, MARGIN)
    cell = next((size for most, size in _CELLS if n <= most), max(1, 4 * _SIDE // n))
    head = ["linear CKA of the means of rows", f"{n} layer{'s' if n > 1 else ''} · {source}", caution]
    y = page.lines(
        MARGIN, y, [line for text in head for line in wrap(text, max(n * cell, WIDTH_OF_WORDS), NOTE)]
    )
    labelled = cell >= _NAMED
    width = max(text_width(f"{i} {name}", NOTE) for i, name in enumerate(names)) if labelled else 0
    side = round(min(width, _NAMES_WIDTH)) + 10 if labelled else 0
    x, y = MARGIN + side, y + NUMBER_ROOM + HEAD_GAP
    scale = Scale("viridis", np.asarray(0.0), np.asarray(1.0))
    entries = _entries(values, scale)
    page.panels.append(Panel(x, y, entries[None], 1, cell, 2, 2, scale.colormap))
    step = _step(cell, text_width(str(n - 1), NUMBER) + 4)
    for i, name in enumerate(names if labelled else ()):
        middle = i * cell + cell // 2
        words = shorten(f"{i} {name}", _NAMES_WIDTH, NOTE)
        page.texts.append(Text(x - 8, y + middle + 4, words, NOTE, "right"))
        if i % step == 0:
            page.texts.append(Text(x + middle, y - 5, str(i), NUMBER, "center", Ink.GREY))
    if cell >= _NUMBERED:
        _numbers(page, values, entries, x, y, cell)
    y += n * cell + 12
    width = max(side + max(n * cell, SHORTEST_BAR), WIDTH_OF_WORDS)
    y = _bar(page, scale, x, y, min(max(n * cell, SHORTEST_BAR), LONGEST_BAR))
    constant = np.flatnonzero(~np.isfinite(np.diag(values)))
    y = _mark(page, "constant or not finite:", constant, "layer", Mark.CONSTANT, MARGIN, y, width)
    page.notes += [f"layer {i}: {name}" for i, name in enumerate(names)]
    return page.sheet(MARGIN + width + MARGIN, y + MARGIN, spec.title)


def _entries(values: Floats, scale: Scale) -> NDArray[np.uint8]:
    entries: NDArray[np.uint8] = scale.indices(np.nan_to_num(values)[None, None])[0, 0]
    entries[~np.isfinite(values)] = Mark.CONSTANT
    return entries


def _numbers(page: Page, values: Floats, entries: NDArray[np.uint8], x: int, y: int, cell: int) -> None:
    """Write each number on its cell, in the ink that stands out from it."""
    light = palette("viridis").astype(np.float64) @ (0.299, 0.587, 0.114) > 140
    for i, j in np.ndindex(*values.shape):
        if np.isfinite(values[i, j]):
            ink = Ink.BLACK if light[entries[i, j]] else Ink.WHITE
            place = x + j * cell + cell / 2, y + i * cell + cell // 2 + 3
            page.texts.append(Text(*place, f"{values[i, j]:.2f}", NUMBER, "center", ink, over=True))


def _bar(page: Page, scale: Scale, x: int, y: int, width: int) -> int:
    low, high = scale.limits
    page.bars.append(Bar(x, y, BAR_HEIGHT, scale.bar(width), scale.colormap, low, high))
    y += BAR_HEIGHT + 11
    ends = ((0.0, low, "left"), (0.5, (low + high) / 2, "center"), (1.0, high, "right"))
    for share, value, align in ends:
        page.texts.append(Text(x + share * width, y, f"{value:g}", NUMBER, align))  # type: ignore[arg-type]
    return y + 3


def _mark(
    page: Page, words: str, where: NDArray[np.intp], unit: str, mark: Mark, x: int, y: int, width: int
) -> int:
    """Write what a mark stands for behind a sample of it, where there is one."""
    if not where.size:
        return y
    y += NOTE_LINE
    colormap = page.panels[-1].colormap
    page.panels.append(Panel(x + 1, y - 11, np.full((1, 1, 1), mark, np.uint8), 1, 9, 2, 2, colormap))
    room = width - 16 - text_width(words + " ", NOTE)
    listed = listing(where.tolist(), unit, lambda text: text_width(text, NOTE) <= room)
    page.texts.append(Text(x + 16, y - 3, f"{words} {listed}", NOTE, ink=Ink.GREY))
    return y


def correlation_sheet(matrices: Sequence[Matrix], spec: Spec) -> Sheet:
    """Lay out the correlation of the channels of each layer, one below the other."""
    page = Page()
    right, y = WIDTH_OF_WORDS, put_title(page, spec, MARGIN)
    for i, one in enumerate(matrices):
        width, y = _correlation(page, one, y + (LINE_GAP if i else 0))
        right = max(right, width)
    return page.sheet(MARGIN + right + MARGIN, y + MARGIN, spec.title)


def _correlation(page: Page, one: Matrix, y: int) -> tuple[int, int]:
    """Put the matrix of one layer at `y`; return its width and where it ends."""
    n = len(one.values)
    factor = max(1, min(24, _SIDE // n))
    side = round(text_width(str(int(one.order.max())), NUMBER)) + 8
    width = max(side + n * factor, WIDTH_OF_WORDS)
    y = page.layer_head(MARGIN, y, width, one.name, one.type, one.shape)
    by_index = bool((one.order == np.arange(n)).all())
    how = "in their order" if by_index else "ordered so that those that are alike stand together"
    said = f"correlation of {n:,} {one.unit}s over all positions, {how} · {one.source}"
    y = page.lines(MARGIN, y, wrap(said, width, NOTE)) + NUMBER_ROOM + 4
    x = MARGIN + side
    scale = Scale("RdBu_r", np.asarray(-1.0), np.asarray(1.0))
    page.panels.append(Panel(x, y, _entries(one.values, scale)[None], 1, factor, 2, 2, scale.colormap, True))
    room = text_width(str(n - 1), NUMBER) + 6
    step = _step(factor, room) if by_index else 1 if factor >= NUMBER else 0
    for place in range(0, n, step) if step else ():
        middle = place * factor + factor // 2
        label = str(int(one.order[place]))
        page.texts.append(Text(x - 5, y + middle + 3, label, NUMBER, "right", Ink.GREY))
        page.shapes.append(Line(((x - 4, y + middle), (x - 2, y + middle)), Ink.GREY))
        if by_index or factor >= room:
            page.texts.append(Text(x + middle, y - 5, label, NUMBER, "center", Ink.GREY))
            page.shapes.append(Line(((x + middle, y - 4), (x + middle, y - 2)), Ink.GREY))
    y += n * factor + 12
    y = _bar(page, scale, x, y, min(max(n * factor, SHORTEST_BAR), LONGEST_BAR))
    known = np.isfinite(np.diag(one.values))
    apart = one.values[np.ix_(known, known)][~np.eye(int(known.sum()), dtype=np.bool_)]
    if apart.size:
        y = page.lines(x, y, [f"mean size between two {one.unit}s: {np.abs(apart).mean():.2f}"])
    constant = np.sort(one.order[~known])
    y = _mark(page, "constant:", constant, one.unit, Mark.CONSTANT, x, y, width - side)
    if constant.size:
        page.notes.append(f"{one.name}: constant: {', '.join(map(str, constant.tolist()))}")
    if not by_index:
        page.notes.append(f"{one.name}, {one.unit}s as drawn: {', '.join(map(str, one.order.tolist()))}")
    return width, y


def _step(factor: int, room: float) -> int:
    """Return the least round number of channels, of so many pixels each, that a number has room for."""
    steps = (first * int(10**power) for power in range(5) for first in (1, 2, 5))
    return next(step for step in steps if step * factor >= room)
