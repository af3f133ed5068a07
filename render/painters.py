"""Painters: what turns a sheet into an image or a file. Others may add their own.

A package announces a painter under the entry point group `layertap.painters`; the name is what a user
passes as `painter=`, the value is a class that is called without arguments and satisfies `Painter`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError, closest
from ..capture.plugins import announced, made
from .sheet import Sheet


class Painter(Protocol):
    """Paints any sheet. Images stand where the sheet says, pixel for pixel; text may differ in its font."""

    formats: tuple[str, ...]
    """File formats that `encode` writes, such as `png`."""

    def array(self, sheet: Sheet) -> NDArray[np.uint8]:
        """Return the sheet as RGB, shape (height, width, 3)."""
        ...

    def encode(self, sheet: Sheet, format: str) -> bytes:
        """Return the bytes of a file of one of `formats`."""
        ...


_PAINTERS = {
    "html": "paint_html:HtmlPainter",
    "matplotlib": "paint_matplotlib:MatplotlibPainter",
    "pillow": "paint_pillow:PillowPainter",
}


def painter(name: str) -> Painter:
    """Return the painter of that name.

    Raises:
        DrawError: there is none.
        MissingPackageError: the package that it paints with is not installed; the line that installs it.
        PluginError: it is another package's, and cannot be loaded.

    """
    if name in _PAINTERS:
        module, _, attribute = _PAINTERS[name].partition(":")
        ours: Painter = getattr(import_module(f".{module}", __package__), attribute)()
        return ours
    others = announced("painter")
    if name not in others:
        raise DrawError(f"there is no painter {name!r}. {closest(name, [*_PAINTERS, *others])}")
    other: Painter = made("painter", others[name])
    return other


def default_painter(kind: str, format: str | None = None) -> str:
    """Return the name of the painter for a kind of picture and a file format.

    A page is the html painter's. Pillow paints every array and PNG, in a fraction of matplotlib's time; that
    one writes SVG and PDF.
    """
    if format == "html":
        return "html"
    return "matplotlib" if format in ("svg", "pdf") else "pillow"
