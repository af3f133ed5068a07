"""Capture the activations of neural networks over whole test sets, and draw them again without the model.

    import layertap as lt

    run = lt.record_dataset(model, dataset, "run.zarr", layers=["conv1", "layer*.1"])
    run["layer1.1"][17, :9]
    lt.draw(run, "grid", rows=[17], layers=["conv1"], channels="top:9").save("frog.png")

Importing this loads no framework and no plotting library.
"""

from layertap.capture.data import ArraySource, Batch, PictureFolder, Preprocess, SampleSource, Source
from layertap.capture.errors import (
    CaptureError,
    ChecksumError,
    DataError,
    DrawError,
    FormatError,
    LayertapError,
    MissingPackageError,
    NoSpaceError,
    PlanError,
    SelectionError,
    StoreError,
    StoreExistsError,
    StoreNotFoundError,
)
from layertap.capture.reader import Array, Run, Tap
from layertap.capture.reader import open_run as open
from layertap.capture.record import record, record_dataset
from layertap.capture.recorder import Recorder
from layertap.render import draw

__version__ = "0.1.0"

__all__ = [
    "Array",
    "ArraySource",
    "Batch",
    "CaptureError",
    "ChecksumError",
    "DataError",
    "DrawError",
    "FormatError",
    "LayertapError",
    "MissingPackageError",
    "NoSpaceError",
    "PictureFolder",
    "PlanError",
    "Preprocess",
    "Recorder",
    "Run",
    "SampleSource",
    "SelectionError",
    "Source",
    "StoreError",
    "StoreExistsError",
    "StoreNotFoundError",
    "Tap",
    "draw",
    "open",
    "record",
    "record_dataset",
]
