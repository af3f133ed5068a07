"""torchvision's feature extractor: the model traced by torch.fx, a file for each batch and layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.models.feature_extraction import create_feature_extractor

NAME, NEEDS = "torchvision's feature extractor, np.save", "torchvision"


def store(model: Any, inputs: NDArray[Any], layers: Sequence[str], folder: Path, batch: int) -> None:
    extractor = create_feature_extractor(model, return_nodes={name: name for name in layers})
    with torch.no_grad():
        for start in range(0, len(inputs), batch):
            for name, values in extractor(torch.from_numpy(inputs[start : start + batch])).items():
                np.save(folder / f"{name}@{start:08}.npy", values.numpy())


def load(folder: Path) -> dict[str, NDArray[Any]]:
    parts: dict[str, list[NDArray[Any]]] = {}
    for file in sorted(folder.glob("*.npy")):
        parts.setdefault(file.stem.partition("@")[0], []).append(np.load(file))
    return {name: np.concatenate(found) for name, found in parts.items()}
