"""The models of the questions that every way is asked, and what the true values are."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor, nn


class InPlace(nn.Module):
    """A convolution whose output the next layer overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x)).mean((2, 3))


class Reused(nn.Module):
    """A layer that is called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).tanh()).mean((2, 3))


class Dies(nn.Module):
    """Its process is killed in the forward of a batch, where the environment says so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_counted(x)).mean((2, 3))


class _Counts:
    n = 0


counts = _Counts()


def _counted(x: Tensor) -> Tensor:
    """Count a forward, and end the process in the one that the environment names."""
    counts.n += 1
    if os.environ.get("DIE_AT") == str(counts.n):
        os.kill(os.getpid(), signal.SIGKILL)
    return x


torch.fx.wrap("_counted")  # a tracer leaves the call as it is


def made(kind: type[nn.Module]) -> Any:
    """Return a model with weights from a fixed seed."""
    torch.manual_seed(0)
    return kind().eval()


def outputs(model: nn.Module, layer: str, inputs: Any, batch: int) -> list[Any]:
    """Return what each call of a layer gives over all inputs, cloned at once."""
    calls: list[list[Tensor]] = []
    step: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: step.append(output.detach().clone())
    )
    with torch.no_grad():
        for start in range(0, len(inputs), batch):
            step.clear()
            model(torch.from_numpy(inputs[start : start + batch]))
            calls = calls or [[] for _ in step]
            for call, value in zip(calls, step, strict=True):
                call.append(value)
    handle.remove()
    return [torch.cat(call).numpy() for call in calls]
