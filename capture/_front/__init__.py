"""Capture the activations of neural networks over whole test sets, and draw them again without the model.

    import layertap as lt

    run = lt.record_dataset(model, dataset, "run.zarr", layers=["conv1", "layer*.1"])
    run["layer1.1"][17, :9]
    lt.draw(run, "grid", rows=[17], layers=["conv1"], channels="top:9").save("frog.png")

Importing this loads nothing else: each name but `tap` brings its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from layertap.capture.tapping import tap

if TYPE_CHECKING:
    from layertap.capture import reduce
    from layertap.capture.data import ArraySource, Batch, PictureFolder, Preprocess, SampleSource, Source
    from layertap.capture.errors import (
        CaptureError,
        ChecksumError,
        DataError,
        DrawError,
        FormatError,
        LayertapError,
        LeftOutWarning,
        MissingPackageError,
        NoSpaceError,
        PlanError,
        PluginError,
        SelectionError,
        StoreError,
        StoreExistsError,
        StoreNotFoundError,
    )
    from layertap.capture.forecast import Forecast, plan
    from layertap.capture.pca import fit_pca
    from layertap.capture.profile import Profile, profile
    from layertap.capture.reader import Array, Run, Tap
    from layertap.capture.reader import open_run as open
    from layertap.capture.record import record, record_dataset
    from layertap.capture.recorder import Recorder
    from layertap.capture.zipped import pack
    from layertap.render import Animation, Picture, animate, draw, draw_many, read_spec
    from layertap.render.offline import export_html
    from layertap.render.serve import view

__version__ = "0.1.0"

_NAMES = {
    "layertap.capture.data": (
        *("ArraySource", "Batch", "PictureFolder", "Preprocess", "SampleSource", "Source"),
    ),
    "layertap.capture.errors": (
        *("CaptureError", "ChecksumError", "DataError", "DrawError", "FormatError", "LayertapError"),
        *(
            "LeftOutWarning",
            "MissingPackageError",
            "NoSpaceError",
            "PlanError",
            "PluginError",
            "SelectionError",
        ),
        *("StoreError", "StoreExistsError", "StoreNotFoundError"),
    ),
    "layertap.capture.forecast": ("Forecast", "plan"),
    "layertap.capture.pca": ("fit_pca",),
    "layertap.capture.profile": ("Profile", "profile"),
    "layertap.capture.reader": ("Array", "Run", "Tap", "open"),
    "layertap.capture.record": ("record", "record_dataset"),
    "layertap.capture.recorder": ("Recorder",),
    "layertap.capture.zipped": ("pack",),
    "layertap.render": ("Animation", "Picture", "animate", "draw", "draw_many", "read_spec"),
    "layertap.render.offline": ("export_html",),
    "layertap.render.serve": ("view",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
_SUBMODULES = {"reduce": "layertap.capture.reduce"}

__all__ = [
    "Animation",
    "Array",
    "ArraySource",
    "Batch",
    "CaptureError",
    "ChecksumError",
    "DataError",
    "DrawError",
    "Forecast",
    "FormatError",
    "LayertapError",
    "LeftOutWarning",
    "MissingPackageError",
    "NoSpaceError",
    "Picture",
    "PictureFolder",
    "PlanError",
    "PluginError",
    "Preprocess",
    "Profile",
    "Recorder",
    "Run",
    "SampleSource",
    "SelectionError",
    "Source",
    "StoreError",
    "StoreExistsError",
    "StoreNotFoundError",
    "Tap",
    "animate",
    "draw",
    "draw_many",
    "export_html",
    "fit_pca",
    "open",
    "pack",
    "plan",
    "profile",
    "read_spec",
    "record",
    "record_dataset",
    "reduce",
    "tap",
    "view",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        globals()[name] = import_module(_SUBMODULES[name])
        return globals()[name]
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'layertap' has no attribute {name!r}")
    value = getattr(import_module(module), {"open": "open_run"}.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
