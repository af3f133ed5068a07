"""A picture as data: what stands where, to the pixel, before anything is painted.

A painter only has to put rectangles of palette entries or RGB, filled rectangles and lines of text, in this
order, at the places that a sheet gives. Nothing is interpolated: a value is a square of `factor` by `factor`
pixels. Coordinates are pixels from the top left; a text stands on its baseline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .colormaps import WHITE, palette

FRAME = WHITE - 3  # a light grey


class Ink(Enum):
    """Colours of text and of what is as dark, RGB."""

    # Greys are the palette's own, so that one of its entries shows them.
    BLACK = (17, 17, 17)
    GREY = (102, 102, 102)
    WHITE = (255, 255, 255)  # on pictures alone
    # A blue and a red that stay apart with any colour blindness; the words say it too.
    RIGHT = (33, 102, 172)
    WRONG = (178, 24, 43)

    @property
    def is_grey(self) -> bool:
        """Whether a grey of the palette can show it."""
        return _is_grey(self.value)


class Fill(Enum):
    """Colours of boxes and lines that no text has, RGB; lightness tells them apart."""

    PAGE = (255, 255, 255)
    RULE = (204, 204, 204)
    LIGHT = (209, 222, 236)
    MIDDLE = (125, 160, 199)
    DARK = (33, 84, 140)

    @property
    def is_grey(self) -> bool:
        """Whether a grey of the palette can show it."""
        return _is_grey(self.value)


def _is_grey(colour: tuple[int, int, int]) -> bool:
    return len(set(colour)) == 1


@dataclass(frozen=True)
class Text:
    """One line of text on its baseline."""

    x: float
    """Where it starts, is centred or ends, by `align`."""
    y: float
    """Its baseline."""
    text: str
    """What it says, in any script."""
    size: float
    """Pixels an em."""
    align: Literal["left", "center", "right"] = "left"
    ink: Ink = Ink.BLACK
    bold: bool = False
    over: bool = False
    """Whether it stands on a picture, so that its edges blend into colours and not into white."""


@dataclass(frozen=True)
class Box:
    """A filled rectangle of whole pixels."""

    x: int
    y: int
    """Its top left pixel."""
    width: int
    height: int
    """Pixels across and down; nothing is drawn where one is 0."""
    ink: Ink | Fill = Fill.MIDDLE

    def boxes(self) -> Iterator[Box]:
        """Yield itself, where there is anything to fill."""
        if self.width > 0 and self.height > 0:
            yield self


@dataclass(frozen=True)
class Line:
    """A line of whole pixels through points, each above, below or beside the one before.

    So it is a row of rectangles, which all painters fill alike; a curve is drawn as steps.
    """

    points: tuple[tuple[int, int], ...]
    """Pixels that it goes through, (x, y)."""
    ink: Ink | Fill = Ink.GREY
    width: int = 1
    """Pixels across; the pen's middle is on the points, and half a pixel to the right and below if even."""

    def __post_init__(self) -> None:
        for (x0, y0), (x1, y1) in pairwise(self.points):
            if x0 != x1 and y0 != y1:
                raise ValueError(f"a line goes across or down, not from {(x0, y0)} to {(x1, y1)}; draw steps")

    def boxes(self) -> Iterator[Box]:
        """Yield the rectangles that it is made of."""
        before = (self.width - 1) // 2
        for (x0, y0), (x1, y1) in pairwise(self.points):
            left, top = min(x0, x1) - before, min(y0, y1) - before
            yield Box(left, top, abs(x1 - x0) + self.width, abs(y1 - y0) + self.width, self.ink)


@dataclass(frozen=True, eq=False)
class Panel:
    """Maps of one size, tiled line by line."""

    x: int
    y: int
    """Where the first tile's top left pixel is; the panel has one pixel more on each side."""
    tiles: NDArray[np.uint8]
    """Palette entries, shape (tiles, height, width)."""
    columns: int
    """Tiles in a line."""
    factor: int
    """Pixels a value, in each direction."""
    gap_x: int
    """White pixels between tiles of a line, at least 2."""
    gap_y: int
    """White pixels between lines of tiles, at least 2."""
    colormap: str
    """Whose palette the entries are of."""
    framed: bool = False
    """Whether each tile has a frame of one grey pixel, for maps whose colours reach white."""
    cells: NDArray[np.bool_] | None = None
    """Which pixels of a map are values, shape (height, width), where not all are; the rest is page."""
    beneath: NDArray[np.uint8] | None = None
    """RGB pictures that show through the tiles, shape (tiles, height, width, 3), where some do."""
    opacity: NDArray[np.float32] | None = None
    """With `beneath`: how opaque each palette entry is, 0 to 1, shape (256,)."""

    @property
    def n_lines(self) -> int:
        """Lines of tiles; the last may not be full."""
        return -(-len(self.tiles) // self.columns)

    @property
    def tile_size(self) -> tuple[int, int]:
        """Width and height of a tile in pixels."""
        _, height, width = self.tiles.shape
        return width * self.factor, height * self.factor

    @property
    def size(self) -> tuple[int, int]:
        """Width and height from the first tile's left top to the last one's right bottom."""
        width, height = self.tile_size
        return (
            self.columns * (width + self.gap_x) - self.gap_x,
            self.n_lines * (height + self.gap_y) - self.gap_y,
        )

    def place(self, i: int) -> tuple[int, int]:
        """Return where the top left pixel of tile `i` is on the sheet."""
        width, height = self.tile_size
        line, column = divmod(i, self.columns)
        return self.x + column * (width + self.gap_x), self.y + line * (height + self.gap_y)

    def entries(self) -> NDArray[np.uint8]:
        """Return the palette entries of the whole panel; its top left pixel is at (x - 1, y - 1)."""
        (width, height), (whole_width, whole_height) = self.tile_size, self.size
        pitches = (self.n_lines, height + self.gap_y, self.columns, width + self.gap_x)
        canvas = np.full(pitches, WHITE, np.uint8)
        cells = canvas.transpose(0, 2, 1, 3)  # (lines, columns, height, width)
        large = self.tiles.repeat(self.factor, axis=1).repeat(self.factor, axis=2)
        n_full, n_rest = divmod(len(large), self.columns)
        n_even = n_full * self.columns
        if self.framed:
            frame = self._frame()
            if self.cells is not None:
                none = ~self.cells.repeat(self.factor, axis=0).repeat(self.factor, axis=1)
                large[:, none] = frame[1:-1, 1:-1][none]
            cells[:n_full, :, : height + 2, : width + 2] = frame
            cells[n_full:, :n_rest, : height + 2, : width + 2] = frame
        cells[:n_full, :, 1 : height + 1, 1 : width + 1] = large[:n_even].reshape(
            n_full, self.columns, height, width
        )
        cells[n_full:, :n_rest, 1 : height + 1, 1 : width + 1] = large[n_even:]
        return canvas.reshape(-1, self.columns * pitches[3])[: whole_height + 2, : whole_width + 2]

    def rgb(self) -> NDArray[np.uint8]:
        """Return the colours of the whole panel, blended with what is beneath; placed as `entries`."""
        entries = self.entries()
        colours = palette(self.colormap).take(entries, axis=0)
        if self.beneath is None or self.opacity is None:
            return colours
        width, height = self.tile_size
        for i, picture in enumerate(self.beneath):
            x, y = self.place(i)
            part = (
                slice(y - self.y + 1, y - self.y + 1 + height),
                slice(x - self.x + 1, x - self.x + 1 + width),
            )
            large = picture.repeat(self.factor, axis=0).repeat(self.factor, axis=1)
            share = self.opacity[entries[part]][..., None]
            colours[part] = np.rint(large * (1 - share) + colours[part] * share)
        return colours

    def _frame(self) -> NDArray[np.uint8]:
        """Return a tile's frame and what is within: around its values alone, white where there is none."""
        width, height = self.tile_size
        if self.cells is None:
            return np.full((height + 2, width + 2), FRAME, np.uint8)
        large = self.cells.repeat(self.factor, axis=0).repeat(self.factor, axis=1)
        near = np.zeros((height + 2, width + 2), np.bool_)
        for dy in range(3):
            for dx in range(3):
                near[dy : dy + height, dx : dx + width] |= large
        return np.where(near, FRAME, WHITE).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Photo:
    """A picture in its own colours."""

    x: int
    y: int
    """Where its top left pixel is."""
    pixels: NDArray[np.uint8]
    """RGB, shape (height, width, 3)."""
    factor: int
    """Sheet pixels a pixel, in each direction."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the sheet."""
        height, width = self.pixels.shape[:2]
        return width * self.factor, height * self.factor

    def rgb(self) -> NDArray[np.uint8]:
        """Return its pixels at the size of the sheet."""
        return self.pixels.repeat(self.factor, axis=0).repeat(self.factor, axis=1)


@dataclass(frozen=True, eq=False)
class Bar:
    """A colour bar, from left to right, for all of the panels that it stands below."""

    x: int
    y: int
    height: int
    line: NDArray[np.uint8]
    """Palette entries from its low end to its high end, shape (width,)."""
    colormap: str
    low: float
    """The value at its left end."""
    high: float
    """The value at its right end."""

    def entries(self) -> NDArray[np.uint8]:
        """Return its palette entries in a grey frame; the top left pixel is at (x - 1, y - 1)."""
        canvas = np.full((self.height + 2, len(self.line) + 2), FRAME, np.uint8)
        canvas[1:-1, 1:-1] = self.line
        return canvas


@dataclass(frozen=True)
class Outline:
    """A rectangle of lines of one pixel, on top of every picture."""

    x: int
    y: int
    """Its top left pixel."""
    width: int
    height: int
    """Its size, the lines included."""
    colour: tuple[int, int, int]
    """RGB."""

    def sides(self) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
        """Yield x, y and RGB pixels of each of its lines."""
        across = np.full((1, self.width, 3), self.colour, np.uint8)
        down = np.full((self.height, 1, 3), self.colour, np.uint8)
        yield self.x, self.y, across
        yield self.x, self.y + self.height - 1, across
        yield self.x, self.y, down
        yield self.x + self.width - 1, self.y, down


@dataclass(frozen=True, eq=False)
class Sheet:
    """A laid out picture on white."""

    width: int
    height: int
    panels: tuple[Panel, ...] = ()
    photos: tuple[Photo, ...] = ()
    bars: tuple[Bar, ...] = ()
    texts: tuple[Text, ...] = ()
    notes: tuple[str, ...] = ()
    """What should be known about the picture, in full, where the sheet itself shortens it."""
    outlines: tuple[Outline, ...] = ()
    shapes: tuple[Box | Line, ...] = ()
    """What is drawn over pictures and below texts, each over those before it."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """What it was drawn from, as `Spec.to_json` gives it, for files to carry; empty where that is unknown."""

    @property
    def colormap(self) -> str | None:
        """The one palette that shows all of it, or None where it takes RGB."""
        names = {part.colormap for part in self._coloured_parts()}
        inks: set[Ink | Fill] = {part.ink for part in (*self.texts, *self.shapes)}
        grey = all(ink.is_grey for ink in inks) and not any(text.over for text in self.texts)
        blended = any(panel.beneath is not None for panel in self.panels)
        if self.photos or self.outlines or blended or len(names) > 1 or not grey:
            return None
        return names.pop() if names else "gray"

    def coloured(self) -> Iterator[tuple[int, int, NDArray[np.uint8], str]]:
        """Yield x, y, palette entries and colour map of everything that is drawn in palette entries."""
        for part in self._coloured_parts():
            yield part.x - 1, part.y - 1, part.entries(), part.colormap

    def in_rgb(self) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
        """Yield x, y and pixels of everything that is not, from the lowest to the one on top."""
        for panel in self.panels:
            if panel.beneath is not None:
                yield panel.x - 1, panel.y - 1, panel.rgb()
        for photo in self.photos:
            yield photo.x, photo.y, photo.rgb()
        for outline in self.outlines:
            yield from outline.sides()

    def _coloured_parts(self) -> list[Panel | Bar]:
        return [*(panel for panel in self.panels if panel.beneath is None), *self.bars]

    def pictures(self) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
        """Yield x, y and RGB pixels of every image on the sheet."""
        for x, y, entries, colormap in self.coloured():
            yield x, y, palette(colormap).take(entries, axis=0)
        yield from self.in_rgb()

    def moved(self, x: int, y: int) -> Sheet:
        """Return the same parts further right and down, on a sheet that is so much larger."""
        parts: dict[str, Any] = {
            name: tuple(_moved(part, x, y) for part in there) for name, there in self._parts().items()
        }
        return replace(self, width=self.width + x, height=self.height + y, **parts)

    def joined(self, others: Iterable[Sheet]) -> Sheet:
        """Return this sheet with the parts of others on it, where they stand."""
        every = [sheet._parts() for sheet in (self, *others)]
        parts: dict[str, Any] = {
            name: tuple(part for sheet in every for part in sheet[name]) for name in every[0]
        }
        return replace(self, **parts)

    def _parts(self) -> dict[str, tuple[Any, ...]]:
        """Return all that is drawn, by the names of the fields."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("width", "height", "notes", "spec")
        }

    def boxes(self) -> Iterator[Box]:
        """Yield the rectangles that all shapes are made of, in the order in which they are filled."""
        for shape in self.shapes:
            yield from shape.boxes()


def _moved(part: Any, x: int, y: int) -> Any:
    if isinstance(part, Line):
        return replace(part, points=tuple((left + x, top + y) for left, top in part.points))
    return replace(part, x=part.x + x, y=part.y + y)
