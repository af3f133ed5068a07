"""Sheets with one of everything, for the contract of painters, and the pixels that are right for them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .colormaps import COLORMAPS, N_COLOURS, Mark
from .sheet import Bar, Box, Fill, Ink, Line, Outline, Panel, Photo, Sheet, Text

Pixels = NDArray[np.uint8]

#: Labels in scripts that run to the left, join, stack, or that most fonts lack; markup; nothing at all.
LABELS = (
    "plain",
    "$x$ & <y> {z} \\alpha %s",
    "Ünïcödé · Ελληνικά · Кириллица",
    "猫 ねこ 고양이",
    "שלום עולם",
    "قطة 12 cat",
    "हिन्दी தமிழ் ไทย",
    "👩‍🔬 🐸 e\u0301",
    "\x00\x1b[2J\u202e turned\tand\nbroken",
    "\ud800",
    "",
)


def sheets() -> dict[str, Sheet]:
    """Return sheets by what is on them."""
    return {
        "maps": _maps(),
        "maps of one palette": _maps("viridis"),
        "marks": marks("RdBu_r"),
        "pictures": _pictures(),
        "shapes": Sheet(60, 50, photos=(_photo(5, 5),), shapes=shapes()),
        "grey shapes": Sheet(50, 40, shapes=shapes(Ink.GREY, Fill.RULE)),
        "nothing": Sheet(7, 5),
    }


def marks(colormap: str) -> Sheet:
    """Return a sheet of one tile that has every mark in a value of its own, at (4, 4) and from there on."""
    tile = np.array([[list(Mark)]], np.uint8)  # (tiles, height, width)
    return Sheet(8 + 6 * len(Mark), 14, (Panel(4, 4, tile, 1, 6, 2, 2, colormap),))


def shapes(*inks: Ink | Fill) -> tuple[Box | Line, ...]:
    """Return boxes and lines of some inks: side by side, over each other, empty, beyond the edges."""
    found: list[Box | Line] = []
    for i, ink in enumerate(inks or [*Ink, *Fill]):
        found += [Box(3 * i, 7, 3, 5 + i, ink), Box(-2, -3, 9, 5 + i, ink), Box(40, 20 + i, 400, 2, ink)]
        found += [Box(5, 5, 0, 9, ink), Box(20, 30, 8, 1, ink), Box(22, 29, 3, 3, ink)]
        steps = ((4, 38), (4 + i, 38), (4 + i, 20), (20, 20), (20, 20), (20, 25), (9, 25))
        found += [Line(steps, ink), Line(((30, 3), (30, 33), (-9, 33)), ink, width=1 + i % 4)]
    return tuple(found)


def pixels_of(sheet: Sheet) -> Pixels:
    """Return the pixels of all but the texts, shape (height, width, 3)."""
    canvas = np.full((sheet.height, sheet.width, 3), 255, np.uint8)
    for x, y, pixels in sheet.pictures():
        canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    for box in sheet.boxes():
        rows, columns = (slice(max(a, 0), max(b, 0)) for a, b in _edges(box))
        canvas[rows, columns] = box.ink.value
    return canvas


def _edges(box: Box) -> tuple[tuple[int, int], tuple[int, int]]:
    return (box.y, box.y + box.height), (box.x, box.x + box.width)


def _tiles(n: int, height: int, width: int) -> Pixels:
    """Return every mark and then every other colour, over and over."""
    entries = np.concatenate([list(Mark), np.arange(0, N_COLOURS, 2)]).astype(np.uint8)
    return np.resize(entries, (n, height, width))


def _maps(*colormaps: str) -> Sheet:
    """Return panels of each colour map below each other, with bars and labels between them."""
    panels, bars, texts = [], [], []
    for i, colormap in enumerate(colormaps or COLORMAPS):
        y = 20 + 100 * i
        cells = np.arange(30).reshape(5, 6) < 28
        panels.append(
            Panel(10, y, _tiles(5, 5, 6), 3, 4, 6, 4, colormap, bool(i % 2), cells if i % 2 else None)
        )
        texts.append(Text(10, y - 4, f"layer{i}.1", 12, bold=True))
        bars.append(Bar(10, y + 60, 6, np.arange(90, dtype=np.uint8), colormap, -1.0, 2.5))
        texts += [Text(10, y + 77, "-1", 9), Text(100, y + 77, "2.5", 9, "right", Ink.GREY)]
    return Sheet(
        110, 110 * len(panels), tuple(panels), bars=tuple(bars), texts=tuple(texts), notes=("a note",)
    )


def _photo(x: int, y: int) -> Photo:
    return Photo(x, y, np.arange(10 * 12 * 3, dtype=np.uint16).reshape(10, 12, 3).astype(np.uint8), 3)


def _pictures() -> Sheet:
    """Return a photo, a panel through which pictures show, and an outline over both."""
    beneath = np.arange(2 * 8 * 8 * 3, dtype=np.uint16).reshape(2, 8, 8, 3).astype(np.uint8)
    opacity = np.linspace(0, 1, 256, dtype=np.float32)
    panel = Panel(60, 20, _tiles(2, 8, 8), 2, 3, 4, 4, "magma", beneath=beneath, opacity=opacity)
    texts = (Text(20, 15, "right", 11, ink=Ink.RIGHT), Text(90, 15, "wrong", 11, "center", Ink.WRONG))
    outline = Outline(40, 25, 50, 15, (255, 0, 0))
    return Sheet(130, 60, (panel,), (_photo(10, 20),), texts=texts, outlines=(outline,))
