"""captum's AV: `generate_dataset_activations`, a file for each batch and layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from captum._utils.av import AV
from numpy.typing import NDArray
from torch.utils.data import DataLoader, TensorDataset

NAME, NEEDS = "captum's AV", "captum"
_MODEL = "model"


def store(model: Any, inputs: NDArray[Any], layers: Sequence[str], folder: Path, batch: int) -> None:
    loader: Any = DataLoader(TensorDataset(torch.from_numpy(inputs)), batch_size=batch)
    (folder / "layers").write_text("\n".join(layers))
    with torch.no_grad():
        AV.generate_dataset_activations(str(folder), model, _MODEL, list(layers), loader)


def load(folder: Path) -> dict[str, NDArray[Any]]:
    found = {}
    for name in (folder / "layers").read_text().split("\n"):
        kept = AV.load(str(folder), _MODEL, "default", name)
        parts = [kept[i] for i in range(len(kept))]
        found[name] = torch.cat(parts).detach().numpy()
    return found
