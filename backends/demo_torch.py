"""The demonstration's network in PyTorch: three convolutions with pooling between."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

EPOCHS, BATCH = 12, 64


class ThreeConvolutions(nn.Module):
    """`conv1`, `conv2`, `conv3`: 16, 32 and 64 channels after a ReLU, at 32, 16 and 8 pixels a side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
        self.conv3 = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU())
        self.linear = nn.Linear(64 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (rows, 10) for pictures of shape (rows, 1, 32, 32)."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        x = F.max_pool2d(self.conv3(x), 2)
        logits: Tensor = self.linear(x.flatten(1))
        return logits


def train(inputs: NDArray[Any], labels: NDArray[Any]) -> nn.Module:
    """Return the network trained on `inputs` (rows, 1, 32, 32) and `labels`, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ThreeConvolutions()
        x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
        steps = EPOCHS * -(-len(x) // BATCH)
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(BATCH):  # type: ignore[no-untyped-call]
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return model.eval()
