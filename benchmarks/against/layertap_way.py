"""layertap: `record_dataset` into a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import layertap as lt
from numpy.typing import NDArray

NAME, NEEDS = "layertap", "layertap"


class Inputs(lt.Source):
    """Inputs in memory, ready for the model."""

    name = "inputs"

    def __init__(self, inputs: NDArray[Any]) -> None:
        self.inputs, self.n_rows = inputs, len(inputs)

    def batch(self, rows: range) -> lt.Batch:
        return lt.Batch(rows, (self.inputs[rows.start : rows.stop],))


def store(model: Any, inputs: NDArray[Any], layers: Sequence[str], folder: Path, batch: int) -> None:
    lt.record_dataset(model, Inputs(inputs), folder / "run.zarr", list(layers), batch_size=batch)


def load(folder: Path) -> dict[str, NDArray[Any]]:
    run = lt.open(folder / "run.zarr")
    return {name: run[name][...] for name in run.taps}
