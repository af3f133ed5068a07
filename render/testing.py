"""The contract of a painter, as tests: inherit `PainterContract`, return a painter, run pytest.

It ships with the package so that other people's painters can hold themselves to it. What a painter cannot do
is skipped, with a reason.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from ..capture.contract import ContractError, raises, require, skip
from ..capture.errors import DrawError
from . import testing_sheets
from .colormaps import COLORMAPS, Mark, palette
from .painters import Painter
from .sheet import Ink, Panel, Sheet, Text
from .testing_sheets import LABELS, Pixels, marks, pixels_of

__all__ = ["ContractError", "PainterContract"]

#: Formats that are pictures, which Pillow opens; of the first, pixels are what `array` gives.
LOSSLESS = ("png", "bmp", "tiff", "ppm", "apng")
PICTURES = (*LOSSLESS, "gif", "jpg", "jpeg", "webp")


class PainterContract(ABC):
    """What holds for every painter."""

    no_pixels: str | None = None
    """Why what is painted has no pixels to look at: the reason with which tests of them are skipped."""

    @abstractmethod
    def painter(self) -> Painter:
        """Return a fresh painter."""

    def sheets(self) -> Mapping[str, Sheet]:
        """Return what is painted, by its name; more may be added."""
        return testing_sheets.sheets()

    def check_opens(self, data: bytes, format: str, sheet: Sheet) -> None:
        """Require that a file is one of its format; override it for formats that are not known here."""
        if format in PICTURES:
            image = Image.open(io.BytesIO(data))
            size = (sheet.width, sheet.height)
            image.load()
            require(image.size == size, f"the {format} is {image.size}, and the sheet {size}")
            if format in LOSSLESS and self.no_pixels is None:
                same = np.array_equal(np.asarray(image.convert("RGB")), self.painter().array(sheet))
                require(same, f"the {format} has other pixels than the array")
        elif format == "svg":
            require(ElementTree.fromstring(data).tag.endswith("svg"), "the file is no SVG")
        elif format == "pdf":
            require(data.startswith(b"%PDF-") and b"%%EOF" in data[-16:], "the file is no whole PDF")
        elif format == "html":
            tags = set(_tags(data.decode()))
            require(
                "body" in tags and bool({"svg", "img", "canvas"} & tags), "the file is no page of a picture"
            )
        else:
            require(bool(data), f"the {format} is empty")

    def test_an_array_is_rgb_and_as_large_as_the_sheet(self) -> None:
        """Of uint8, (height, width, 3)."""
        for name, sheet in self.sheets().items():
            array = self._pixels(sheet)
            require(array.dtype == np.uint8, f"{name} is {array.dtype}")
            size = (sheet.height, sheet.width, 3)
            require(array.shape == size, f"{name} has shape {array.shape}, not {size}")

    def test_images_are_where_the_sheet_says_pixel_by_pixel(self) -> None:
        """So one specification gives the same pixels whichever painter draws it."""
        for name, sheet in self.sheets().items():
            got, expected = self._pixels(replace(sheet, texts=())), pixels_of(sheet)
            require(got.shape == expected.shape, f"{name} has shape {got.shape}")
            differs = np.argwhere((got != expected).any(axis=2))
            where = "" if not len(differs) else f": {len(differs)} pixels, the first at (y, x) {differs[0]}"
            require(not len(differs), f"{name} has other pixels than its sheet{where}")

    def test_dead_not_finite_and_clipped_values_have_their_marks(self) -> None:
        """Each mark in its own colour, with every colour map."""
        for colormap in COLORMAPS:
            array = self._pixels(marks(colormap))
            for i, mark in enumerate(Mark):
                value = array[4:10, 4 + 6 * i : 10 + 6 * i]
                wanted = palette(colormap)[mark]
                require(bool((value == wanted).all()), f"{mark.name} is not {wanted} with {colormap}")

    def test_text_touches_no_map(self) -> None:
        """Labels stand beside the values."""
        for name, sheet in self.sheets().items():
            got, expected = self._pixels(sheet), pixels_of(sheet)
            for panel in sheet.panels if not any(text.over for text in sheet.texts) else ():
                for part in _tiles_of(panel):
                    require(bool((got[part] == expected[part]).all()), f"text touches a map of {name}")

    def test_text_is_drawn_where_it_is_aligned(self) -> None:
        """From where it starts, about its middle or to where it ends; on its baseline."""
        for align, x0, x1 in (("left", 100, 150), ("center", 70, 130), ("right", 50, 100)):
            text: Any = Text(100, 30, "HHH", 16, align)  # type: ignore[arg-type]
            ys, xs = np.nonzero((self._pixels(Sheet(200, 60, texts=(text,))) < 200).any(axis=2))
            require(bool(len(xs)), "there is no text")
            left, right, top, bottom = xs.min(), xs.max(), ys.min(), ys.max() + 1
            require(x0 - 1 <= left and right <= x1 + 1, f"{align}: text at x=100 is from {left} to {right}")
            require(abs(bottom - 30) <= 1 and top >= 14, f"text on y=30 is from {top} to {bottom}")
            if align == "center":
                require(abs((left + right) / 2 - 100) <= 2, f"text about x=100 is from {left} to {right}")

    def test_text_has_the_colour_of_its_ink(self) -> None:
        """On the page, and dark or light on a map."""
        word = Text(5, 35, "M", 40, ink=Ink.WRONG, bold=True)
        array = self._pixels(Sheet(60, 40, texts=(word,)))
        require(bool((array == np.array(Ink.WRONG.value)).all(axis=2).any()), "no pixel has the ink's colour")
        panel = Panel(1, 1, np.array([[[0, 230]]], np.uint8), 1, 40, 2, 2, "viridis")
        texts = (Text(4, 35, "M", 40, ink=Ink.WHITE, over=True), Text(44, 35, "M", 40, over=True))
        array = self._pixels(Sheet(82, 42, (panel,), texts=texts))
        require((array[:, :41] == 255).all(axis=2).sum() > 100, "light text on a map is not light")
        dark = (array[:, 41:] == Ink.BLACK.value[0]).all(axis=2)
        require(dark.sum() > 100, "dark text on a map is not dark")
        shown = array[2, 2].tolist(), array[2, 79].tolist()
        colours = palette("viridis")[0].tolist(), palette("viridis")[230].tolist()
        require(shown == colours, "text changed the map that it stands on")

    def test_text_beyond_the_edge_is_cut_off(self) -> None:
        """The array keeps its size."""
        texts = tuple(Text(x, y, "conv1", 20) for x in (-20, 35, 200) for y in (-30, 3, 45, 90))
        with _no_error("text beyond the edge"):
            array = self._pixels(Sheet(40, 40, texts=texts))
        require(array.shape == (40, 40, 3), f"the array has shape {array.shape}, not (40, 40, 3)")

    def test_labels_of_any_script_are_painted(self) -> None:
        """In every format; a font that is not there is a warning, and nothing raises."""
        for label in LABELS:
            sheet = Sheet(
                200, 40, texts=(Text(3, 25, label, 12), Text(3, 38, label, 9, bold=True)), notes=(label,)
            )
            with _no_error(f"the label {label!r}"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self.no_pixels is None:
                    self.painter().array(sheet)
                for format in self.painter().formats:
                    self.painter().encode(sheet, format)

    def test_every_format_is_written_as_a_file_that_opens(self) -> None:
        """Of every sheet; see `check_opens`."""
        require(bool(self.painter().formats), "the painter has no formats")
        for format in self.painter().formats:
            for name, sheet in self.sheets().items():
                with _no_error(f"the {format} of {name}"):
                    data = self.painter().encode(sheet, format)
                    self.check_opens(data, format, sheet)

    def test_the_same_sheet_gives_the_same_bytes(self) -> None:
        """From one that has painted others, and from a fresh one."""
        painter = self.painter()
        for name, sheet in self.sheets().items():
            for format in painter.formats:
                same = painter.encode(sheet, format) == self.painter().encode(sheet, format)
                require(same, f"the {format} of {name} is never the same")

    def test_a_sheet_is_not_changed(self) -> None:
        """Other painters paint it too."""
        for name, sheet in self.sheets().items():
            before = copy.deepcopy(sheet)
            if self.no_pixels is None:
                array = self.painter().array(sheet)
                if array.flags.writeable:
                    array[...] = 0  # it is the caller's
            for format in self.painter().formats:
                self.painter().encode(sheet, format)
            require(_same(sheet, before), f"{name} is another sheet after it was painted")

    def test_painting_warns_of_nothing(self) -> None:
        """A user could do nothing about it."""
        for name, sheet in self.sheets().items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if self.no_pixels is None:
                    self.painter().array(sheet)
                for format in self.painter().formats:
                    self.painter().encode(sheet, format)
            require(not caught, f"{name}: " + "; ".join(str(one.message) for one in caught))

    def test_an_unknown_format_is_refused_with_those_that_there_are(self) -> None:
        """With a `DrawError` that names each."""
        for format in self.painter().formats:
            with raises(DrawError, format):
                self.painter().encode(Sheet(4, 4), "nosuch")

    def _pixels(self, sheet: Sheet) -> Pixels:
        """Return what is painted; skip the test where that has no pixels."""
        if self.no_pixels is not None:
            skip(self.no_pixels)
        return self.painter().array(sheet)


@contextlib.contextmanager
def _no_error(what: str) -> Iterator[None]:
    """Turn any exception into a breach of the contract that says of what."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(f"{what} raises {type(error).__name__}: {error}") from error


def _tiles_of(panel: Panel) -> Iterator[tuple[slice, slice]]:
    """Yield the part of the canvas that each tile of a panel takes."""
    width, height = panel.tile_size
    for x, y in map(panel.place, range(len(panel.tiles))):
        yield slice(y, y + height), slice(x, x + width)


def _tags(page: str) -> list[str]:
    """Return the names of the elements of a page."""
    found: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            found.append(tag)

    Tags().feed(page)
    return found


def _same(one: Any, other: Any) -> bool:
    """Return whether two values hold the same, arrays and parts included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())
    if is_dataclass(one):
        return all(_same(getattr(one, part.name), getattr(other, part.name)) for part in fields(one))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)
