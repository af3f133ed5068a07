"""nnsight: outputs saved in a trace of each batch, a file for each batch and layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnsight import NNsight
from numpy.typing import NDArray

from .extractor import load as load

NAME, NEEDS = "nnsight, np.save", "nnsight"


def store(model: Any, inputs: NDArray[Any], layers: Sequence[str], folder: Path, batch: int) -> None:
    wrapped = NNsight(model)
    with torch.no_grad():
        for start in range(0, len(inputs), batch):
            found = {}
            with wrapped.trace(torch.from_numpy(inputs[start : start + batch])):
                for name in layers:
                    found[name] = wrapped.get(name).output.save()
            for name, values in found.items():
                np.save(folder / f"{name}@{start:08}.npy", values.detach().numpy())
