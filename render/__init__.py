"""Draws from a store. It needs neither the model nor its framework."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classes import ClassesSpec, OutcomesSpec
    from .layers import LayersSpec
    from .overlay import OverlaySpec
    from .painters import Painter
    from .picture import Picture, draw, draw_many
    from .sheet import Sheet
    from .spec import GridSpec, MontageSpec
    from .stores import StoresSpec

_NAMES = {
    "ClassesSpec": ".classes",
    "GridSpec": ".spec",
    "LayersSpec": ".layers",
    "MontageSpec": ".spec",
    "OutcomesSpec": ".classes",
    "OverlaySpec": ".overlay",
    "Painter": ".painters",
    "Picture": ".picture",
    "Sheet": ".sheet",
    "StoresSpec": ".stores",
    "draw": ".picture",
    "draw_many": ".picture",
}

__all__ = [
    "ClassesSpec",
    "GridSpec",
    "LayersSpec",
    "MontageSpec",
    "OutcomesSpec",
    "OverlaySpec",
    "Painter",
    "Picture",
    "Sheet",
    "StoresSpec",
    "draw",
    "draw_many",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name], __name__), name)
    globals()[name] = value
    return value
