"""Paints with matplotlib: PNG, SVG and PDF. Images are put pixel for pixel and never resampled.

A figure at 72 dots an inch has one pixel a point in every format, so the sheet's numbers hold as they are.
One image a panel and plain text artists take a tenth of the time that axes for each channel would; pyplot,
whose figures stay in memory until they are closed, is never used. The user's matplotlib settings do not
change the picture.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError, MissingPackageError
from . import bidi, carried, fonts
from .png import rgb_png, with_text
from .sheet import Box, Fill, Ink, Sheet, Text
from .webfonts import family_name, web_fonts

try:
    import matplotlib as mpl
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
    from matplotlib.transforms import IdentityTransform
except ImportError as error:
    raise MissingPackageError(
        "drawing this takes matplotlib, which is not installed: pip install 'layertap[matplotlib]'"
    ) from error

_DPI = 72
_SHAPES = mpl.__version_info__ >= (3, 11)  # from then on it joins Arabic letters, and so on


class MatplotlibPainter:
    """Paints a sheet as PNG, SVG or PDF; see `Painter`."""

    formats = ("png", "svg", "pdf")

    def array(self, sheet: Sheet) -> NDArray[np.uint8]:
        """Return the sheet as RGB, shape (height, width, 3)."""
        with mpl.rc_context(_settings()):
            canvas: Any = FigureCanvasAgg(_figure(sheet))
            canvas.draw()
            return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def encode(self, sheet: Sheet, format: str) -> bytes:
        """Return the bytes of a file, the same for the same sheet.

        Raises:
            DrawError: `format` is none of png, svg and pdf.

        """
        if format == "png":
            png = rgb_png(self.array(sheet))
            return with_text(png, carried.KEYWORD, carried.text_of(sheet.spec)) if sheet.spec else png
        if format not in self.formats:
            raise DrawError(f"the matplotlib painter writes png, svg and pdf, not {format}")
        out = io.BytesIO()
        with mpl.rc_context(_settings()):
            figure = _figure(sheet)
            figure.savefig(out, format=format, dpi=_DPI, metadata=_metadata(sheet, format))
        return _for_browsers(out.getvalue(), sheet) if format == "svg" else out.getvalue()


# What could change the picture, kept as it is laid out for.
_SETTINGS = (
    *("savefig.bbox", "savefig.transparent", "savefig.facecolor", "path.effects", "path.sketch"),
    *("text.hinting", "text.hinting_factor", "text.antialiased", "text.kerning_factor"),
    "svg.image_inline",
)


def _settings() -> dict[Any, Any]:
    defaults: dict[Any, Any] = dict(mpl.rcParamsDefault)
    kept = {name: defaults[name] for name in _SETTINGS if name in defaults}
    text_stays_text = {"pdf.fonttype": 42, "svg.fonttype": "none"}
    return kept | text_stays_text | {"svg.hashsalt": "layertap", "image.composite_image": False}


def _metadata(sheet: Sheet, format: str) -> dict[str, Any]:
    """Return what a file says of itself: the specification, and no date, so that its bytes are the same."""
    date, about = ("Date", "Description") if format == "svg" else ("CreationDate", "Subject")
    return {date: None} | ({about: carried.marked(sheet.spec)} if sheet.spec else {})


def _figure(sheet: Sheet) -> Figure:
    figure = Figure(figsize=(sheet.width / _DPI, sheet.height / _DPI), dpi=_DPI, facecolor="white")
    for x, y, pixels in sheet.pictures():
        image = figure.figimage(pixels, x, sheet.height - y - pixels.shape[0], origin="upper")
        image.set_interpolation("nearest")
    for ink, boxes in groupby(sheet.boxes(), lambda box: box.ink):
        figure.add_artist(_filled(boxes, ink, sheet.height))
    for text in sheet.texts:
        _write(figure, text, sheet.height)
    return figure


def _filled(boxes: Iterable[Box], ink: Ink | Fill, height: int) -> PathPatch:
    """Return boxes of one ink as one path, which takes a fraction of the time of an artist for each."""
    corners = np.array([(b.x, height - b.y - b.height, b.x + b.width, height - b.y) for b in boxes])
    # Round each box alike, so that boxes which overlap leave no hole, and back to where it began.
    vertices = corners[:, [0, 1, 2, 1, 2, 3, 0, 3, 0, 1]].reshape(-1, 2)
    codes = np.tile([Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY], len(corners))
    patch = PathPatch(Path(vertices, codes), facecolor=_rgb(ink), linewidth=0, edgecolor="none")
    patch.set_transform(IdentityTransform())
    patch.set_antialiased(False)
    return patch


def _rgb(ink: Ink | Fill) -> tuple[float, float, float]:
    red, green, blue = ink.value
    return red / 255, green / 255, blue / 255


def _write(figure: Figure, text: Text, height: int) -> None:
    figure.text(
        text.x,
        height - text.y,
        _as_set(text),
        transform=IdentityTransform(),
        fontproperties=_font(text),
        color=_rgb(text.ink),
        horizontalalignment=text.align,
        verticalalignment="baseline",
        parse_math=False,
        usetex=False,
    )


def _as_set(text: Text) -> str:
    """Return what is drawn of a text; before matplotlib turns letters around itself, it is turned here."""
    drawn = fonts.drawable(text.text, bold=text.bold, joiners=_SHAPES)
    return drawn if _SHAPES else bidi.turned(drawn)


def _font(text: Text) -> FontProperties:
    """Return the families that together have all of the text's characters, the plain one first."""
    used = (path for path, _ in fonts.runs(text.text, bold=text.bold, joiners=_SHAPES))
    paths = dict.fromkeys([fonts.bold_font() if text.bold else fonts.base_font(), *used])
    families = [_family(path) for path in paths if path is not None]
    weight = "bold" if text.bold else "normal"
    return FontProperties(family=families or ["DejaVu Sans"], size=text.size, weight=weight)


@lru_cache(maxsize=256)
def _family(path: str) -> str:
    """Return a family of our own for the font at `path`, whatever weight is asked for.

    Its real family could have matplotlib find another file, or complain of a weight that it lacks.
    """
    family = f"layertap font {len(_PATHS)}"
    _PATHS[family] = path
    for weight in (400, 700):
        entry = font_manager.FontEntry(
            fname=path,
            name=family,
            style="normal",
            variant="normal",
            weight=weight,
            stretch="normal",
            size="scalable",
        )
        font_manager.fontManager.ttflist.append(entry)
    return family


_PATHS: dict[str, str] = {}  # of fonts, by the families of our own


def _for_browsers(svg: bytes, sheet: Sheet) -> bytes:
    """Return an SVG whose text names the fonts' real families, and which brings what they need of them.

    A line of text runs in the direction of its first letter, as in the other formats.
    """

    def real(match: re.Match[str]) -> str:
        return f"'{family_name(_PATHS[match[1]])}'"

    text = re.sub(r"'(layertap font \d+)'", real, svg.decode())
    faces = web_fonts((text.text, text.bold) for text in sheet.texts).css
    look = "text { white-space: pre; unicode-bidi: plaintext; font-synthesis: none }"
    style = f"<style>\n{faces}\n{look}\n</style>\n"
    at = text.index("<defs>") if "<defs>" in text else text.rindex("</svg>")
    return (text[:at] + style + text[at:]).encode()
