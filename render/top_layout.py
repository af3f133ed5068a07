"""Where the rows that excite channels most stand on a sheet: a line of pictures for each channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .blocks import listing, number
from .colormaps import palette
from .fields import Box
from .layout import (
    HEAD_GAP,
    LINE_GAP,
    MARGIN,
    NAME,
    NAME_LINE,
    NOTE,
    NOTE_LINE,
    NUMBER,
    NUMBER_ROOM,
    WIDTH_OF_WORDS,
    Page,
    check_size,
    put_title,
)
from .lettering import shorten, text_width, wrap, wrap_name
from .sheet import FRAME, Ink, Photo, Sheet, Text
from .spec import Spec
from .view import RowView

Pixels = NDArray[np.uint8]

CUT, WHOLE = 96, 120  # pixels across that a picture should have, cut or whole
SLOT = 108  # the least room for a picture and the words below it
GAP_X, GAP_Y = 10, 20  # between pictures, and between channels


@dataclass(frozen=True, eq=False)
class Shot:
    """A row that excites a channel."""

    about: RowView
    """The row, without its picture."""
    value: float
    """The greatest value of the channel in it."""
    pixels: Pixels
    """Its picture at the size of the sheet, cut or outlined, shape (height, width, 3)."""


@dataclass(frozen=True, eq=False)
class Excited:
    """A channel with its rows."""

    channel: int
    """Its number."""
    shots: tuple[Shot, ...]
    """The rows, the greatest value first."""
    note: str
    """Why there are fewer than were asked for; empty where there are not."""


@dataclass(frozen=True, eq=False)
class TopLayer:
    """The chosen channels of one tap."""

    name: str
    """The tap's name."""
    about: str
    """The layer's type and the shape of a row."""
    unit: str
    """What a channel is: channel, feature, head and so on."""
    channels: tuple[Excited, ...]
    """The channels, in drawing order."""
    slot: int
    """Sheet pixels from side to side of the room for a picture."""
    said: tuple[str, ...]
    """What is shown, how it was found, and what pictures are cut to."""
    not_finite: tuple[int, ...]
    """Channels with values that are NaN or infinite, which were left out."""


def check_room(size: Size, shapes: Sequence[tuple[int, int]], k: int, n_channels: int) -> None:
    """Raise DrawError where pictures would be too large a sheet, before any of them is read."""
    highest = size.of_sheet(max((height for height, _ in shapes), default=0))
    check_size(k * (size.slot + GAP_X), n_channels * (highest + NUMBER_ROOM + 4 * NOTE_LINE + GAP_Y))


def laid_out(layers: Sequence[TopLayer], spec: Spec) -> Sheet:
    """Lay out the layers below each other.

    Raises:
        DrawError: the sheet would be too large.

    """
    page, right = Page(), 0
    bottom = put_title(page, spec, MARGIN)
    for i, layer in enumerate(layers):
        width, bottom = _layer(page, layer, bottom + (LINE_GAP if i else 0))
        right = max(right, width)
    return page.sheet(right + 2 * MARGIN, bottom + MARGIN, spec.title)


@dataclass(frozen=True)
class Size:
    """How large the pictures of a layer are drawn, all alike."""

    factor: int
    """Sheet pixels a pixel."""
    divisor: int
    """Pixels whose mean is one pixel of the sheet, in each direction."""
    slot: int
    """Sheet pixels from side to side of the room for one."""

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int]], side: int, magnification: int | None) -> Size:
        """Return the size at which the largest of some pictures has about `side` pixels."""
        largest = max(map(max, shapes), default=side)
        factor, divisor = magnification or max(1, round(side / largest)), 1
        if magnification is None and largest > side * 3 // 2:
            divisor = -(-largest // (side * 3 // 2))
        size = cls(factor, divisor, SLOT)
        widest = max((width for _, width in shapes), default=0)
        return replace(size, slot=max(SLOT, size.of_sheet(widest) + 2))

    def of_sheet(self, n_pixels: int) -> int:
        """Return how many pixels of the sheet so many pixels take."""
        return -(-n_pixels // self.divisor) * self.factor

    def drawn(self, picture: Pixels, seen: Box, *, crop: bool) -> Pixels:
        """Return a picture at the size of the sheet, cut to a box, or with the box outlined."""
        top, left, bottom, right = seen
        pixels = picture[top:bottom, left:right] if crop else picture
        if self.divisor > 1:
            pixels = _averaged(pixels, self.divisor)
        pixels = pixels.repeat(self.factor, axis=0).repeat(self.factor, axis=1)
        if not crop:
            scale = self.factor / self.divisor
            ends = round(bottom * scale), round(right * scale)
            outline(pixels, (int(top * scale), int(left * scale), *ends))
        return pixels


def _averaged(pixels: Pixels, divisor: int) -> Pixels:
    """Return means of squares of pixels; those at the right and at the bottom may be of fewer."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).reduce(divisor))


def outline(pixels: Pixels, box: Box) -> None:
    """Draw the edge of a box on pixels: dark outside and light inside, so that it shows on any picture."""
    height, width = pixels.shape[:2]
    top, left, bottom, right = box
    bottom, right = min(max(bottom, top + 1), height), min(max(right, left + 1), width)
    for inset, grey in ((0, 17), (1, 255)):
        lines, columns = slice(top + inset, bottom - inset), slice(left + inset, right - inset)
        if lines.start < lines.stop and columns.start < columns.stop:
            pixels[[lines.start, lines.stop - 1], columns] = grey
            pixels[lines, [columns.start, columns.stop - 1]] = grey


def _framed(pixels: Pixels) -> Pixels:
    """Return pixels in a grey frame of one, so that a picture on white has an edge."""
    height, width = pixels.shape[:2]
    framed = np.full((height + 2, width + 2, 3), palette("gray")[FRAME], np.uint8)
    framed[1:-1, 1:-1] = pixels
    return framed


def _layer(page: Page, layer: TopLayer, y: int) -> tuple[int, int]:
    """Put one layer at `y`; return how wide it is, and where it ends."""
    k = max((len(one.shots) for one in layer.channels), default=0)
    width = max(k * (layer.slot + GAP_X) - GAP_X, WIDTH_OF_WORDS)
    for line in wrap_name(layer.name, width, NAME):
        page.texts.append(Text(MARGIN, y + 12, line, NAME, bold=True))
        y += NAME_LINE
    said = [layer.about, *layer.said]
    if layer.not_finite:
        words = "NaN or infinite values, left out, in "
        said.append(words + listing(layer.not_finite, layer.unit, partial(_fits, words, width)))
    y = page.lines(MARGIN, y, [line for text in said for line in wrap(text, width, NOTE)]) + HEAD_GAP
    for one in layer.channels:
        y = _channel(page, one, layer.unit, layer.slot, y)
        if one.note:
            page.notes.append(f"{layer.name}, {layer.unit} {one.channel}: {one.note}")
    if layer.not_finite:
        numbers = ", ".join(map(str, layer.not_finite))
        page.notes.append(f"{layer.name}: NaN or infinite values, left out, in {numbers}")
    return width, y - GAP_Y


def _fits(words: str, width: float, text: str) -> bool:
    return text_width(words + text, NOTE) <= width


def _channel(page: Page, one: Excited, unit: str, slot: int, y: int) -> int:
    """Put one channel's pictures at `y`; return where the next one begins."""
    name = f"{unit} {one.channel}"
    y += NOTE_LINE
    page.texts.append(Text(MARGIN, y - 3, name, NOTE, bold=True))
    if one.note:
        x = MARGIN + text_width(name, NOTE, bold=True) + 8
        page.texts.append(Text(x, y - 3, one.note, NOTE, ink=Ink.GREY))
    if not one.shots:
        return y + GAP_Y
    y += NUMBER_ROOM
    below = y + max(len(shot.pixels) for shot in one.shots) + 2
    ends = [below]
    for i, shot in enumerate(one.shots):
        x = MARGIN + i * (slot + GAP_X)
        page.texts.append(Text(x, y - 3, f"row {shot.about.row}", NUMBER, ink=Ink.GREY))
        page.photos.append(Photo(x, y, _framed(shot.pixels), 1))
        ends.append(_words(page, shot, x, below, slot))
    return max(ends) + GAP_Y


def _words(page: Page, shot: Shot, x: int, y: int, width: int) -> int:
    """Write the value, the class and whether it was predicted below a picture; return where they end."""
    about = shot.about
    lines: list[tuple[str, Ink, bool]] = [(number(shot.value), Ink.BLACK, True)]
    if about.true:
        lines.append((about.true, Ink.BLACK, False))
    if about.right:
        lines.append(("right", Ink.RIGHT, False))
    elif about.predicted:
        wrong = about.right is not None
        said = f"{'wrong' if wrong else 'predicted'}: {about.predicted}"
        lines.append((said, Ink.WRONG if wrong else Ink.BLACK, False))
    for text, ink, bold in lines:
        y += NOTE_LINE
        page.texts.append(Text(x, y - 2, shorten(text, width, NOTE, bold), NOTE, ink=ink, bold=bold))
    return y
