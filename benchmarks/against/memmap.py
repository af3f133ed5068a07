"""Hooks that write into a memory-mapped file a layer, made by the first batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

NAME, NEEDS = "np.memmap in hooks", "torch"


def store(model: Any, inputs: NDArray[Any], layers: Sequence[str], folder: Path, batch: int) -> None:
    files: dict[str, Any] = {}
    at = 0

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            values = output.detach().cpu().numpy()
            if name not in files:
                shape = (len(inputs), *values.shape[1:])
                files[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", values.dtype, shape)
            files[name][at : at + len(values)] = values

        return hook

    for name, module in model.named_modules():
        if name in layers:
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        for at in range(0, len(inputs), batch):
            model(torch.from_numpy(inputs[at : at + batch]))
    for file in files.values():
        file.flush()


def load(folder: Path) -> dict[str, NDArray[Any]]:
    return {file.stem: np.load(file) for file in sorted(folder.glob("*.npy"))}
