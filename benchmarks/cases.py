"""What benchmarks capture: a model, its inputs, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import layertap as lt
import numpy as np
import torch
import torchvision


@dataclass(frozen=True)
class Case:
    """A model, what goes through it, and what is captured of it."""

    name: str
    """What it stands for."""
    model: Callable[[], Any]
    """Makes the model."""
    side: int
    """Height and width of an input of three channels."""
    batch: int
    """Rows of a forward."""
    n_rows: int
    """Rows in all."""
    layers: tuple[Any, ...]
    """What is captured."""
    dtype: str | None = None
    """Cast."""
    codec: str = "none"
    """Codec."""
    memory: str = "1GiB"
    """Host memory of the engine."""


class Held(torch.nn.Module):
    """A model that computes nothing and gives maps of 1 MiB a row."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = torch.nn.Parameter(torch.randn(16, 64, 64, 64).clamp(min=0))

    def forward(self, inputs: Any) -> Any:
        return self.maps[: len(inputs)]


def resnet18() -> Any:
    return torchvision.models.resnet18()


def is_leaf(name: str, module: Any) -> bool:
    return not list(module.children())


class Inputs(lt.Source):
    """Noise in memory."""

    name = "noise in memory"

    def __init__(self, case: Case) -> None:
        self.n_rows = case.n_rows
        shape = (case.n_rows, 3, case.side, case.side)
        self.values = np.random.default_rng(0).standard_normal(shape, np.float32)

    def batch(self, rows: range) -> lt.Batch:
        return lt.Batch(rows, (self.values[rows.start : rows.stop],), columns={})
