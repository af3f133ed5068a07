"""Draws from a store. It needs neither the model nor its framework."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .animation import Animation, AnimationSpec, animate
    from .carried import read_spec
    from .classes import ClassesSpec, OutcomesSpec
    from .layers import LayersSpec
    from .overlay import OverlaySpec
    from .painters import Painter
    from .pca import PcaSpec
    from .picture import Picture, draw, draw_many
    from .sheet import Sheet
    from .spec import GridSpec, MontageSpec
    from .statistics import StatisticsSpec
    from .stores import StoresSpec
    from .top import TopSpec

_NAMES = {
    "Animation": ".animation",
    "AnimationSpec": ".animation",
    "ClassesSpec": ".classes",
    "GridSpec": ".spec",
    "LayersSpec": ".layers",
    "MontageSpec": ".spec",
    "OutcomesSpec": ".classes",
    "OverlaySpec": ".overlay",
    "Painter": ".painters",
    "PcaSpec": ".pca",
    "Picture": ".picture",
    "Sheet": ".sheet",
    "StatisticsSpec": ".statistics",
    "StoresSpec": ".stores",
    "TopSpec": ".top",
    "animate": ".animation",
    "draw": ".picture",
    "draw_many": ".picture",
    "read_spec": ".carried",
}

__all__ = [
    "Animation",
    "AnimationSpec",
    "ClassesSpec",
    "GridSpec",
    "LayersSpec",
    "MontageSpec",
    "OutcomesSpec",
    "OverlaySpec",
    "Painter",
    "PcaSpec",
    "Picture",
    "Sheet",
    "StatisticsSpec",
    "StoresSpec",
    "TopSpec",
    "animate",
    "draw",
    "draw_many",
    "read_spec",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name], __name__), name)
    globals()[name] = value
    return value
