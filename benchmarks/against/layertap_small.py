"""layertap in less memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import layertap as lt
from numpy.typing import NDArray

from .layertap_way import Inputs
from .layertap_way import load as load

NAME, NEEDS = "layertap, memory='64MiB'", "layertap"


def store(model: Any, inputs: NDArray[Any], layers: Sequence[str], folder: Path, batch: int) -> None:
    path = folder / "run.zarr"
    lt.record_dataset(model, Inputs(inputs), path, list(layers), batch_size=batch, memory="64MiB")
