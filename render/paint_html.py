"""Writes a sheet as a page of one file, without anything from elsewhere.

Images and text stand where the sheet says, as in every other format: each image is a PNG of palette entries,
magnified in whole pixels by the browser too, and text is text, to be searched and copied. The page holds its
fonts, the sheet's notes, and the specification. It runs no script and fetches nothing, which its own policy
(`Content-Security-Policy`) holds it to, whatever a store has for names.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from dataclasses import replace
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..capture.errors import DrawError
from ..capture.printable import printable
from . import carried, fonts
from .colormaps import palette
from .paint_pillow import PillowPainter
from .png import palette_png
from .sheet import Sheet, Text
from .webfonts import WebFonts, web_fonts

_ANCHOR = {"left": "start", "center": "middle", "right": "end"}

_HEAD = """<!DOCTYPE html>
<html lang="">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; font-src data:; \
style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<meta name="generator" content="layertap">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{faces}
:root {{ color-scheme: only light; background: #fff; color: #111; print-color-adjust: exact }}
body {{ margin: 0; font-family: {families}; font-synthesis: none }}
svg, img {{ display: block }}
image, img {{ image-rendering: pixelated }}
text {{ white-space: pre; unicode-bidi: plaintext }}
ul {{ margin: 0; padding: 0 18px 18px; list-style: none; columns: 24em }}
li {{ font-size: 11px; line-height: 16px; color: #666; overflow-wrap: anywhere }}
</style>
</head>
<body>
"""


class HtmlPainter:
    """Paints a sheet as a page; see `Painter`. Where no page is asked for, its pixels are Pillow's."""

    formats = ("html", "png")

    def array(self, sheet: Sheet) -> NDArray[np.uint8]:
        """Return the sheet as RGB, shape (height, width, 3)."""
        return PillowPainter().array(sheet)

    def encode(self, sheet: Sheet, format: str) -> bytes:
        """Return the bytes of a page, the same for the same sheet and fonts.

        Raises:
            DrawError: `format` is neither `html` nor `png`.
            MissingPackageError: fontTools is not installed.

        """
        if format == "png":
            return PillowPainter().encode(sheet, format)
        if format not in self.formats:
            raise DrawError(
                f"the html painter writes html and png, not {format}; leave painter out for {format}"
            )
        return page(sheet, "".join(_svg(sheet)), [(text.text, text.bold) for text in sheet.texts])


def page(sheet: Sheet, body: str, labels: list[tuple[str, bool]]) -> bytes:
    """Return a page that shows `body`, whose text is `labels`, above the notes of `sheet`."""
    used: WebFonts = web_fonts([*labels, *((note, False) for note in sheet.notes)])
    parts = [_HEAD.format(title=_escaped(_title(sheet)), faces=used.css, families=used.families), body]
    if sheet.notes:
        parts += ["<ul>\n", *(f'<li dir="auto">{_escaped(note)}</li>\n' for note in sheet.notes), "</ul>\n"]
    if sheet.spec:
        spec = carried.in_script(sheet.spec)
        parts.append(f'<script type="application/json" id="{carried.HTML_ID}">{spec}</script>\n')
    return "".join([*parts, "</body>\n</html>\n"]).encode()


def _svg(sheet: Sheet) -> Iterator[str]:
    size = f'width="{sheet.width}" height="{sheet.height}"'
    yield f'<svg {size} viewBox="0 0 {sheet.width} {sheet.height}">\n'
    yield from _images(sheet)
    for text in sheet.texts:
        yield _text(text)
    yield "</svg>\n"


def _images(sheet: Sheet) -> Iterator[str]:
    """Yield panels, bars and photos, each as an image of its own, and over them whatever else is drawn."""
    shown = np.full((sheet.height, sheet.width, 3), 255, np.uint8)
    for x, y, entries, colormap in sheet.coloured():
        height, width = entries.shape
        shown[y : y + height, x : x + width] = palette(colormap)[entries]
        yield _image(x, y, width, height, palette_png(entries, palette(colormap)))
    for photo in sheet.photos:
        width, height = photo.size
        shown[photo.y : photo.y + height, photo.x : photo.x + width] = photo.rgb()
        yield _image(photo.x, photo.y, width, height, _png(photo.pixels))
    whole = PillowPainter().array(replace(sheet, texts=()))
    differs = (whole != shown).any(axis=2)
    if differs.any():
        ys, xs = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
        part = (slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1))
        rest = np.dstack([whole[part], np.where(differs[part], 255, 0).astype(np.uint8)])
        rest[~differs[part]] = 0
        yield _image(int(xs[0]), int(ys[0]), rest.shape[1], rest.shape[0], _png(rest))


def _image(x: int, y: int, width: int, height: int, png: bytes) -> str:
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return f'<image {place} preserveAspectRatio="none" href="{data_uri("image/png", png)}"/>\n'


def _text(text: Text) -> str:
    red, green, blue = text.ink.value
    look = f'font-size="{text.size:g}" fill="#{red:02x}{green:02x}{blue:02x}"'
    if text.bold:
        look += ' font-weight="700"'
    if text.align != "left":
        look += f' text-anchor="{_ANCHOR[text.align]}"'
    return f'<text x="{text.x:g}" y="{text.y:g}" {look}>{_escaped(text.text, text.bold)}</text>\n'


def data_uri(type: str, data: bytes) -> str:
    """Return bytes as an address that holds them."""
    return f"data:{type};base64,{base64.b64encode(data).decode('ascii')}"


def image_element(type: str, data: bytes, width: int, height: int, name: str, notes: Iterable[str]) -> str:
    """Return an image as an element of a notebook's page, in its own size, above its notes."""
    look = "max-width: none; image-rendering: pixelated"
    size = f'width="{width}" height="{height}"'
    image = f'<img src="{data_uri(type, data)}" {size} style="{look}" alt="{escape(name)}">'
    listed = "".join(f"<li>{escape(printable(note))}</li>" for note in notes)
    under = f"<details><summary>notes</summary><ul>{listed}</ul></details>" if listed else ""
    return f'<div style="overflow-x: auto">{image}</div>{under}'


def _escaped(text: str, bold: bool = False) -> str:
    """Return a text as the other painters set it, on one line, escaped for a page."""
    return escape(fonts.drawable(text, bold=bold, joiners=True))


def _title(sheet: Sheet) -> str:
    """Return the name of the page: the figure's title, or the kind of picture and what it is of."""
    spec = sheet.spec
    if spec.get("title"):
        return str(spec["title"])
    return " · ".join([str(spec.get("kind", "layertap")), *map(str, spec.get("layers") or ())])


def _png(pixels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
