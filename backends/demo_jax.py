"""The demonstration's network in Flax NNX: three convolutions with pooling between, as in PyTorch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray

EPOCHS, BATCH = 12, 64


class ThreeConvolutions(nnx.Module):
    """`conv1`, `conv2`, `conv3`: 16, 32 and 64 channels after a ReLU, at 32, 16 and 8 pixels a side."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Sequential(nnx.Conv(1, 16, (3, 3), rngs=rngs), nnx.relu)
        self.conv2 = nnx.Sequential(nnx.Conv(16, 32, (3, 3), rngs=rngs), nnx.relu)
        self.conv3 = nnx.Sequential(nnx.Conv(32, 64, (3, 3), rngs=rngs), nnx.relu)
        self.linear = nnx.Linear(64 * 4 * 4, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits of shape (rows, 10) for pictures of shape (rows, 1, 32, 32)."""
        x = jnp.moveaxis(x, 1, -1)
        for conv in (self.conv1, self.conv2, self.conv3):
            x = pooled(conv(x))
        return self.linear(x.reshape(len(x), -1))


def pooled(x: jax.Array) -> jax.Array:
    """Return the largest of each 2 x 2 pixels of (rows, y, x, channels)."""
    n_rows, height, width, n_channels = x.shape
    return x.reshape(n_rows, height // 2, 2, width // 2, 2, n_channels).max((2, 4))


def train(inputs: NDArray[Any], labels: NDArray[Any]) -> nnx.Module:
    """Return the network trained on `inputs` (rows, 1, 32, 32) and `labels`, the same each time."""
    model = ThreeConvolutions(nnx.Rngs(0))
    steps = EPOCHS * (len(inputs) // BATCH)
    optimizer = nnx.Optimizer(model, optax.adamw(optax.cosine_onecycle_schedule(steps, 4e-3)), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        def loss(model: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    order = np.random.default_rng(0)
    for _ in range(EPOCHS):
        rows = order.permutation(len(inputs))
        for i in range(0, len(inputs) - BATCH + 1, BATCH):
            chosen = rows[i : i + BATCH]
            step(model, optimizer, inputs[chosen], labels[chosen])
    return model
