"""torchlens: `extract_dataset`, a shard a batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchlens
from numpy.typing import NDArray

NAME, NEEDS = "torchlens", "torchlens"


def store(model: Any, inputs: NDArray[Any], layers: Sequence[str], folder: Path, batch: int) -> None:
    target = folder / "run"
    with torch.no_grad():
        torchlens.extract_dataset(
            model,
            torch.from_numpy(inputs),
            list(layers),
            batch_size=batch,
            output_dir=target,
            progress=False,
            resume=target.exists(),
        )


def load(folder: Path) -> dict[str, NDArray[Any]]:
    found = torchlens.load_extraction(folder / "run", max_bytes=2**33).activations
    return {name: torch.as_tensor(values).numpy() for name, values in found.items()}
