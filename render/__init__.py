"""Draws from a store. It needs neither the model nor its framework."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .overlay import OverlaySpec
    from .painters import Painter
    from .picture import Picture, draw, draw_many
    from .sheet import Sheet
    from .spec import GridSpec, MontageSpec
    from .top import TopSpec

_NAMES = {
    "GridSpec": ".spec",
    "MontageSpec": ".spec",
    "OverlaySpec": ".overlay",
    "Painter": ".painters",
    "Picture": ".picture",
    "Sheet": ".sheet",
    "TopSpec": ".top",
    "draw": ".picture",
    "draw_many": ".picture",
}

__all__ = [
    "GridSpec",
    "MontageSpec",
    "OverlaySpec",
    "Painter",
    "Picture",
    "Sheet",
    "TopSpec",
    "draw",
    "draw_many",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name], __name__), name)
    globals()[name] = value
    return value
