"""The networks of other tests in Flax, by NNX and by Linen, with the same weights and names of layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity_transformer as transformer
import resnet20
from flax import linen, nnx
from safetensors.numpy import load_file

PADDING = ((1, 1), (1, 1))
CHANNELS = (16, 32, 64)


def shortcut(x: Any, n_out: int, stride: int) -> Any:
    """Return every second pixel, with channels of zeros on both sides; or all of it."""
    if stride == 1:
        return x
    pad = (n_out - x.shape[-1]) // 2
    return jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (pad, pad)))


def resnet_weights() -> dict[str, Any]:
    """Return kernels, scales and statistics by their paths in Flax."""
    names = {"weight": "scale", "running_mean": "mean", "running_var": "var", "bias": "bias"}
    found = {}
    for name, values in load_file(resnet20.WEIGHTS).items():
        *path, last = name.split(".")
        if last == "num_batches_tracked":
            continue
        if values.ndim > 1:
            last, values = "kernel", values.T if values.ndim == 2 else values.transpose(2, 3, 1, 0)
        found["/".join([*path, names.get(last, last)])] = np.ascontiguousarray(values)
    return found


# NNX


class Block(nnx.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, rngs: Any) -> None:
        conv = {"padding": PADDING, "use_bias": False, "rngs": rngs}
        self.conv1 = nnx.Conv(n_in, n_out, (3, 3), stride, **conv)
        self.bn1 = nnx.BatchNorm(n_out, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(n_out, n_out, (3, 3), 1, **conv)
        self.bn2 = nnx.BatchNorm(n_out, use_running_average=True, rngs=rngs)
        self.n_out, self.stride = n_out, stride

    def __call__(self, x: Any) -> Any:
        y = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.bn2(self.conv2(y)) + shortcut(x, self.n_out, self.stride))


class ResNet20(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(3, 16, (3, 3), padding=PADDING, use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.layer1 = nnx.List([Block(16, 16, 1, rngs), *(Block(16, 16, 1, rngs) for _ in range(2))])
        self.layer2 = nnx.List([Block(16, 32, 2, rngs), *(Block(32, 32, 1, rngs) for _ in range(2))])
        self.layer3 = nnx.List([Block(32, 64, 2, rngs), *(Block(64, 64, 1, rngs) for _ in range(2))])
        self.linear = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.bn1(self.conv1(jnp.moveaxis(x, 1, -1))))
        for block in (*self.layer1, *self.layer2, *self.layer3):
            x = block(x)
        return self.linear(x.mean((1, 2)))


class Attention(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        width = transformer.WIDTH
        self.norm1 = nnx.LayerNorm(width, epsilon=transformer.EPSILON, rngs=rngs)
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))
        self.norm2 = nnx.LayerNorm(width, epsilon=transformer.EPSILON, rngs=rngs)
        self.mlp1 = nnx.Linear(width, transformer.HIDDEN, rngs=rngs)
        self.mlp2 = nnx.Linear(transformer.HIDDEN, width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        y = self.norm1(x)
        x = x + self.out(attended(self.query(y), self.key(y), self.value(y)))
        return x + self.mlp2(jax.nn.gelu(self.mlp1(self.norm2(x)), approximate=False))


class Transformer(nnx.Module):
    def __init__(self) -> None:
        rngs, width = nnx.Rngs(0), transformer.WIDTH
        self.embed = nnx.Linear(transformer.N_INPUTS, width, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((transformer.N_TOKENS, width)))
        self.block0, self.block1 = Attention(rngs), Attention(rngs)
        self.norm = nnx.LayerNorm(width, epsilon=transformer.EPSILON, rngs=rngs)
        self.head = nnx.Linear(width, transformer.N_CLASSES, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.norm(self.block1(self.block0(self.embed(x) + self.position[...])))
        return self.head(x.mean(1))


def attended(query: Any, key: Any, value: Any) -> Any:
    """Return what heads of attention make of queries, keys and values (rows, tokens, width)."""
    n_rows, n_tokens, width = query.shape
    heads = [
        part.reshape(n_rows, n_tokens, transformer.N_HEADS, -1).transpose(0, 2, 1, 3)
        for part in (query, key, value)
    ]
    scores = heads[0] @ heads[1].transpose(0, 1, 3, 2) * (width // transformer.N_HEADS) ** -0.5
    mixed = jax.nn.softmax(scores) @ heads[2]
    return mixed.transpose(0, 2, 1, 3).reshape(n_rows, n_tokens, width)


def resnet_nnx() -> Any:
    """Return the trained ResNet-20."""
    return _filled(ResNet20(), resnet_weights())


def transformer_nnx() -> Any:
    """Return the transformer of `parity_transformer`."""
    return _filled(Transformer(), transformer.weights())


def _filled(model: Any, weights: dict[str, Any]) -> Any:
    state = nnx.state(model)
    flat = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    assert flat.keys() == weights.keys()
    for name, variable in flat.items():
        assert variable.shape == weights[name].shape, name
        variable.set_value(jnp.asarray(weights[name]))
    nnx.update(model, state)
    return model


# Linen


class LinenBlock(linen.Module):
    n_out: int
    stride: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        conv = {"padding": PADDING, "use_bias": False}
        y = linen.Conv(self.n_out, (3, 3), self.stride, **conv, name="conv1")(x)
        y = linen.relu(linen.BatchNorm(use_running_average=True, name="bn1")(y))
        y = linen.Conv(self.n_out, (3, 3), 1, **conv, name="conv2")(y)
        y = linen.BatchNorm(use_running_average=True, name="bn2")(y)
        return linen.relu(y + shortcut(x, self.n_out, self.stride))


class LinenStage(linen.Module):
    n_out: int
    stride: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        for i in range(3):
            x = LinenBlock(self.n_out, self.stride if i == 0 else 1, name=str(i))(x)
        return x


class LinenResNet20(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = jnp.moveaxis(x, 1, -1)
        x = linen.Conv(16, (3, 3), padding=PADDING, use_bias=False, name="conv1")(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True, name="bn1")(x))
        for i, n_out in enumerate(CHANNELS, start=1):
            x = LinenStage(n_out, 1 if i == 1 else 2, name=f"layer{i}")(x)
        return linen.Dense(10, name="linear")(x.mean((1, 2)))


class LinenAttention(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        width = transformer.WIDTH
        y = linen.LayerNorm(epsilon=transformer.EPSILON, name="norm1")(x)
        parts = [linen.Dense(width, name=name)(y) for name in ("query", "key", "value")]
        x = x + linen.Dense(width, name="out")(attended(*parts))
        y = linen.Dense(transformer.HIDDEN, name="mlp1")(
            linen.LayerNorm(epsilon=transformer.EPSILON, name="norm2")(x)
        )
        return x + linen.Dense(width, name="mlp2")(jax.nn.gelu(y, approximate=False))


class LinenTransformer(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        width = transformer.WIDTH
        position = self.param("position", linen.initializers.zeros, (transformer.N_TOKENS, width))
        x = linen.Dense(width, name="embed")(x) + position
        for i in range(transformer.N_BLOCKS):
            x = LinenAttention(name=f"block{i}")(x)
        x = linen.LayerNorm(epsilon=transformer.EPSILON, name="norm")(x)
        return linen.Dense(transformer.N_CLASSES, name="head")(x.mean(1))


def resnet_linen() -> Any:
    """Return the trained ResNet-20 with its variables."""
    weights = resnet_weights()
    statistics = {name: weights.pop(name) for name in list(weights) if name.endswith(("mean", "var"))}
    return LinenResNet20(), {"params": _nested(weights), "batch_stats": _nested(statistics)}


def transformer_linen() -> Any:
    """Return the transformer of `parity_transformer` with its variables."""
    return LinenTransformer(), {"params": _nested(transformer.weights())}


def _nested(weights: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, values in weights.items():
        *path, last = name.split("/")
        inner = made
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = jnp.asarray(values)
    return made
