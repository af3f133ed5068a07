"""Hooks that assign into a Zarr array a layer, as `zarr.create_array` makes it if nothing is said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import zarr
from numpy.typing import NDArray

NAME, NEEDS = "zarr-python in hooks, defaults", "zarr"
OPTIONS: dict[str, Any] = {}


def store(
    model: Any,
    inputs: NDArray[Any],
    layers: Sequence[str],
    folder: Path,
    batch: int,
    options: Any = None,
) -> None:
    group = zarr.create_group(folder / "run.zarr", overwrite=True)
    arrays: dict[str, Any] = {}
    at = 0

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            values = output.detach().cpu().numpy()
            if name not in arrays:
                shape = (len(inputs), *values.shape[1:])
                more = {} if options is None else options(batch, values.shape[1:])
                arrays[name] = group.create_array(name, shape=shape, dtype=values.dtype, **more)
            arrays[name][at : at + len(values)] = values

        return hook

    for name, module in model.named_modules():
        if name in layers:
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        for at in range(0, len(inputs), batch):
            model(torch.from_numpy(inputs[at : at + batch]))


def load(folder: Path) -> dict[str, NDArray[Any]]:
    group = zarr.open_group(folder / "run.zarr", mode="r")
    return {name: array[...] for name, array in group.arrays()}
