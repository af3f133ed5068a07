"""Draws from a store. It needs neither the model nor its framework."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .overlay import OverlaySpec
    from .painters import Painter
    from .pca import PcaSpec
    from .picture import Picture, draw, draw_many
    from .sheet import Sheet
    from .spec import GridSpec, MontageSpec
    from .statistics import StatisticsSpec

_NAMES = {
    "GridSpec": ".spec",
    "MontageSpec": ".spec",
    "OverlaySpec": ".overlay",
    "Painter": ".painters",
    "PcaSpec": ".pca",
    "Picture": ".picture",
    "Sheet": ".sheet",
    "StatisticsSpec": ".statistics",
    "draw": ".picture",
    "draw_many": ".picture",
}

__all__ = [
    "GridSpec",
    "MontageSpec",
    "OverlaySpec",
    "Painter",
    "PcaSpec",
    "Picture",
    "Sheet",
    "StatisticsSpec",
    "draw",
    "draw_many",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name], __name__), name)
    globals()[name] = value
    return value
