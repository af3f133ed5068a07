"""Weights of a small transformer, as plain arrays, so that every framework builds the same one.

Two blocks of width 64 with four heads over 16 tokens, normalised before each part (Xiong et al. 2020):

    x = input @ embed + position                   input (rows, 16, 48), x (rows, 16, 64)
    x = x + out(attention(norm1(x)))               queries, keys and values split into 4 heads of 16
    x = x + mlp2(gelu(mlp1(norm2(x))))             GELU by the error function, 64 -> 128 -> 64
    logits = head(norm(x).mean over tokens)        (rows, 10)

    embed/kernel (48, 64), embed/bias (64,), position (16, 64)
    block{0,1}/norm1/{scale,bias}, block{0,1}/norm2/{scale,bias}            (64,)
    block{0,1}/{query,key,value,out}/kernel (64, 64), .../bias (64,)
    block{0,1}/mlp1/kernel (64, 128), .../bias (128,), block{0,1}/mlp2/kernel (128, 64), .../bias (64,)
    norm/{scale,bias} (64,), head/kernel (64, 10), head/bias (10,)

Kernels are (in, out), all is float32, and layer normalisation adds `EPSILON` to the variance. Scores of
attention are divided by the square root of 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

N_TOKENS, N_INPUTS, WIDTH, HIDDEN, N_CLASSES = 16, 48, 64, 128, 10
N_BLOCKS, N_HEADS = 2, 4
EPSILON = 1e-6


def weights(seed: int = 0) -> dict[str, Array]:
    """Return the weights by their names; scales and biases are such that each makes a difference."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float, about: float = 0.0) -> Array:
        return (about + scale * rng.standard_normal(shape)).astype(np.float32)

    def dense(name: str, n_in: int, n_out: int) -> dict[str, Array]:
        kernel = normal(n_in, n_out, scale=n_in**-0.5)
        return {f"{name}/kernel": kernel, f"{name}/bias": normal(n_out, scale=0.1)}

    def norm(name: str) -> dict[str, Array]:
        return {
            f"{name}/scale": normal(WIDTH, scale=0.1, about=1.0),
            f"{name}/bias": normal(WIDTH, scale=0.1),
        }

    made = dense("embed", N_INPUTS, WIDTH)
    made["position"] = normal(N_TOKENS, WIDTH, scale=0.5)
    for i in range(N_BLOCKS):
        made |= norm(f"block{i}/norm1") | norm(f"block{i}/norm2")
        for part in ("query", "key", "value", "out"):
            made |= dense(f"block{i}/{part}", WIDTH, WIDTH)
        made |= dense(f"block{i}/mlp1", WIDTH, HIDDEN) | dense(f"block{i}/mlp2", HIDDEN, WIDTH)
    return made | norm("norm") | dense("head", WIDTH, N_CLASSES)


def inputs(n_rows: int, seed: int = 1) -> Array:
    """Return noise of shape (n_rows, 16, 48)."""
    return np.random.default_rng(seed).standard_normal((n_rows, N_TOKENS, N_INPUTS), np.float32)


def trained(seed: int = 0) -> Any:
    """Return the network in torch: layers `embed`, `block0`, `block0.norm1` and so on, `norm`, `head`."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = nn.LayerNorm(WIDTH, eps=EPSILON)
            self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.norm2 = nn.LayerNorm(WIDTH, eps=EPSILON)
            self.mlp1, self.mlp2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm1(x)
            query, key, value = (
                part(y).unflatten(2, (N_HEADS, -1)).transpose(1, 2)
                for part in (self.query, self.key, self.value)
            )
            scores = (query @ key.transpose(2, 3)) * (WIDTH // N_HEADS) ** -0.5
            x = x + self.out((scores.softmax(3) @ value).transpose(1, 2).flatten(2))
            return x + self.mlp2(F.gelu(self.mlp1(self.norm2(x))))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(N_INPUTS, WIDTH)
            self.position = nn.Parameter(torch.empty(N_TOKENS, WIDTH))
            self.block0, self.block1 = Block(), Block()
            self.norm = nn.LayerNorm(WIDTH, eps=EPSILON)
            self.head = nn.Linear(WIDTH, N_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.block1(self.block0(self.embed(x) + self.position)))
            return self.head(x.mean(1))

    model = Transformer()
    model.load_state_dict({_torch_name(name): _torch_value(name, w) for name, w in weights(seed).items()})
    return model.eval()


def _torch_name(name: str) -> str:
    return name.replace("/", ".").replace("kernel", "weight").replace("scale", "weight")


def _torch_value(name: str, values: Array) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values.T if name.endswith("kernel") else values))
