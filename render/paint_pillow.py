"""Paints with numpy and Pillow: fast, and a palette PNG wherever one palette can show the sheet.

The image is filled by assignment; only text is rasterised, each string once, and numbers from ten digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from ..capture.errors import DrawError
from . import bidi, carried, fonts
from .colormaps import BLACK, WHITE, palette
from .png import palette_png, rgb_png, with_text
from .sheet import Box, Fill, Ink, Sheet, Text


class PillowPainter:
    """Paints a sheet as PNG; see `Painter`."""

    formats = ("png",)

    def array(self, sheet: Sheet) -> NDArray[np.uint8]:
        """Return the sheet as RGB, shape (height, width, 3)."""
        colormap = sheet.colormap
        return _rgb(sheet) if colormap is None else palette(colormap).take(entries(sheet), axis=0)

    def encode(self, sheet: Sheet, format: str) -> bytes:
        """Return the bytes of a PNG: 8-bit palette where one palette is enough, RGB otherwise.

        Raises:
            DrawError: `format` is not `png`.

        """
        if format not in self.formats:
            raise DrawError(f"the pillow painter writes png, not {format}; painter='matplotlib' does")
        png = self._png(sheet)
        return with_text(png, carried.KEYWORD, carried.text_of(sheet.spec)) if sheet.spec else png

    def _png(self, sheet: Sheet) -> bytes:
        if sheet.colormap is not None:
            return palette_png(entries(sheet), palette(sheet.colormap))
        return rgb_png(_rgb(sheet))


def entries(sheet: Sheet) -> NDArray[np.uint8]:
    """Return a sheet of one palette in the entries of that, shape (height, width)."""
    canvas = np.full((sheet.height, sheet.width), WHITE, np.uint8)
    for x, y, part, _ in sheet.coloured():
        canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
    for box in sheet.boxes():
        canvas[_within(box)] = _greys(box.ink)[-1]
    for text in sheet.texts:
        place, cover = _placed(text, sheet)
        under = canvas[place]
        np.minimum(under, _greys(text.ink)[cover], out=under)
    return canvas


@lru_cache(maxsize=len(Ink) + len(Fill))
def _greys(ink: Ink | Fill) -> NDArray[np.uint8]:
    """Return the palette's grey for each coverage of white by `ink`, shape (256,)."""
    darkest = BLACK + round(ink.value[0] / 255 * (WHITE - BLACK))
    return np.rint(np.linspace(WHITE, darkest, 256)).astype(np.uint8)


def _rgb(sheet: Sheet) -> NDArray[np.uint8]:
    """Return the sheet in RGB, shape (height, width, 3)."""
    canvas = np.full((sheet.height, sheet.width, 3), 255, np.uint8)
    for x, y, pixels in sheet.pictures():
        canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    for box in sheet.boxes():
        canvas[_within(box)] = box.ink.value
    for text in sheet.texts:
        place, cover = _placed(text, sheet)
        share = cover[..., None] / np.float32(255)
        canvas[place] = np.rint(canvas[place] * (1 - share) + np.array(text.ink.value) * share)
    return canvas


def _within(box: Box) -> tuple[slice, slice]:
    """Return the part of a canvas that a box covers; what lies beyond its end, a slice leaves out."""
    return (
        slice(max(box.y, 0), max(box.y + box.height, 0)),
        slice(max(box.x, 0), max(box.x + box.width, 0)),
    )


@dataclass(frozen=True, eq=False)
class _Lettering:
    """A line of text as coverage, and where its baseline's start is within."""

    cover: NDArray[np.uint8]
    """How much ink each pixel has, 0 to 255, shape (height, width)."""
    left: int
    """Pixels from the start of the text to the left edge."""
    top: int
    """Pixels from the baseline to the top edge; negative is above."""
    advance: float
    """Pixels from the start of the text to where a next one would start."""


def _placed(text: Text, sheet: Sheet) -> tuple[tuple[slice, slice], NDArray[np.uint8]]:
    """Return the part of the canvas that a text takes, clipped to the sheet, and its coverage there."""
    drawn = _lettering(text.text, text.size, text.bold)
    start = {"left": 0.0, "center": -drawn.advance / 2, "right": -drawn.advance}[text.align]
    left, top = round(text.x + start) + drawn.left, round(text.y) + drawn.top
    height, width = drawn.cover.shape
    y0, y1 = max(top, 0), max(min(top + height, sheet.height), 0)
    x0, x1 = max(left, 0), max(min(left + width, sheet.width), 0)
    return (slice(y0, y1), slice(x0, x1)), drawn.cover[y0 - top : y1 - top, x0 - left : x1 - left]


@lru_cache(maxsize=4096)
def _lettering(text: str, size: float, bold: bool) -> _Lettering:
    if len(text) > 1 and text.isascii() and text.isdigit():
        pieces = [_lettering(digit, size, bold) for digit in text]
    else:
        pieces = list(_pieces(text, size, bold))
    return pieces[0] if len(pieces) == 1 else _joined(pieces)


def _pieces(text: str, size: float, bold: bool) -> Iterator[_Lettering]:
    """Yield the pieces of a line from left to right, each in its font."""
    if not _shapes():
        text = bidi.turned(fonts.on_one_line(text))
    runs = fonts.runs(text, bold=bold, joiners=_shapes())
    if _shapes() and len(runs) > 1 and bidi.runs_right(text):
        yield from _turned_pieces(text, size, bold)
        return
    for path, piece in runs:
        yield _raster(piece, _font(path, size))


def _turned_pieces(text: str, size: float, bold: bool) -> Iterator[_Lettering]:
    """Yield the pieces of a line that takes several fonts and holds letters that run to the left."""
    for part, right in bidi.parts(fonts.on_one_line(text, joiners=True)):
        runs = fonts.runs(part, bold=bold, joiners=True)
        for path, piece in reversed(runs) if right else runs:
            yield _raster(piece, _font(path, size), "rtl" if right else "ltr")


def _joined(pieces: list[_Lettering]) -> _Lettering:
    """Return pieces of text set one after the other on one baseline."""
    if not pieces:
        return _Lettering(np.zeros((0, 0), np.uint8), 0, 0, 0.0)
    starts = [0.0]
    for piece in pieces:
        starts.append(starts[-1] + piece.advance)
    lefts = [round(s) + p.left for s, p in zip(starts, pieces, strict=False)]
    left, top = min(lefts), min(p.top for p in pieces)
    right = max(x + p.cover.shape[1] for x, p in zip(lefts, pieces, strict=True))
    bottom = max(p.top + p.cover.shape[0] for p in pieces)
    cover = np.zeros((bottom - top, right - left), np.uint8)
    for x, piece in zip(lefts, pieces, strict=True):
        height, width = piece.cover.shape
        part = cover[piece.top - top :, x - left :][:height, :width]
        np.maximum(part, piece.cover, out=part)
    return _Lettering(cover, left, top, starts[-1])


def _raster(
    text: str, font: ImageFont.FreeTypeFont, direction: Literal["ltr", "rtl"] | None = None
) -> _Lettering:
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text, direction=direction, anchor="ls"))
    image = Image.new("L", (max(right - left, 0) + 1, max(bottom - top, 0) + 1))
    ImageDraw.Draw(image).text((-left, -top), text, 255, font, direction=direction, anchor="ls")
    return _Lettering(np.asarray(image), left, top, font.getlength(text, direction=direction))


@lru_cache(maxsize=64)
def _font(path: str | None, size: float) -> ImageFont.FreeTypeFont:
    if path is None:
        built_in = ImageFont.load_default(size)
        if not isinstance(built_in, ImageFont.FreeTypeFont):
            raise DrawError("this Pillow was built without FreeType and cannot set text; reinstall pillow")
        return built_in
    engine = ImageFont.Layout.RAQM if _shapes() else ImageFont.Layout.BASIC
    return ImageFont.truetype(path, size, layout_engine=engine)


@lru_cache(maxsize=1)
def _shapes() -> bool:
    """Return whether this Pillow shapes text: joins Arabic letters, and puts Indic ones in their places."""
    return bool(features.check("raqm"))
