"""The networks of other tests in Keras, with the same weights and names of layers."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import parity_transformer as transformer
import resnet20
from keras import layers, ops
from safetensors.numpy import load_file


class Block(layers.Layer):
    def __init__(self, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layers.Conv2D(n_out, 3, stride, use_bias=False)
        self.bn1 = layers.BatchNormalization(epsilon=1e-5)
        self.conv2 = layers.Conv2D(n_out, 3, use_bias=False)
        self.bn2 = layers.BatchNormalization(epsilon=1e-5)
        self.n_out, self.stride = n_out, stride

    def call(self, x: Any) -> Any:
        y = ops.relu(self.bn1(self.conv1(padded(x))))
        y = self.bn2(self.conv2(padded(y)))
        if self.stride > 1:
            pad = (self.n_out - x.shape[-1]) // 2
            x = ops.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (pad, pad)))
        return ops.relu(y + x)


class ResNet20(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = layers.Conv2D(16, 3, use_bias=False)
        self.bn1 = layers.BatchNormalization(epsilon=1e-5)
        self.layer1 = [Block(16, 1), Block(16, 1), Block(16, 1)]
        self.layer2 = [Block(32, 2), Block(32, 1), Block(32, 1)]
        self.layer3 = [Block(64, 2), Block(64, 1), Block(64, 1)]
        self.linear = layers.Dense(10)

    def call(self, x: Any) -> Any:
        x = ops.relu(self.bn1(self.conv1(padded(ops.transpose(x, (0, 2, 3, 1))))))
        for block in (*self.layer1, *self.layer2, *self.layer3):
            x = block(x)
        return self.linear(ops.mean(x, (1, 2)))


class Attention(layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = layers.LayerNormalization(epsilon=transformer.EPSILON)
        self.query, self.key = layers.Dense(transformer.WIDTH), layers.Dense(transformer.WIDTH)
        self.value, self.out = layers.Dense(transformer.WIDTH), layers.Dense(transformer.WIDTH)
        self.norm2 = layers.LayerNormalization(epsilon=transformer.EPSILON)
        self.mlp1, self.mlp2 = layers.Dense(transformer.HIDDEN), layers.Dense(transformer.WIDTH)

    def call(self, x: Any) -> Any:
        y = self.norm1(x)
        heads = [
            ops.transpose(
                ops.reshape(part(y), (-1, transformer.N_TOKENS, transformer.N_HEADS, 16)), (0, 2, 1, 3)
            )
            for part in (self.query, self.key, self.value)
        ]
        scores = ops.softmax(ops.matmul(heads[0], ops.transpose(heads[1], (0, 1, 3, 2))) * 16**-0.5)
        mixed = ops.transpose(ops.matmul(scores, heads[2]), (0, 2, 1, 3))
        x = x + self.out(ops.reshape(mixed, (-1, transformer.N_TOKENS, transformer.WIDTH)))
        return x + self.mlp2(ops.gelu(self.mlp1(self.norm2(x)), approximate=False))


class Transformer(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.embed = layers.Dense(transformer.WIDTH)
        self.position = self.add_weight(
            shape=(transformer.N_TOKENS, transformer.WIDTH), initializer="zeros", name="position"
        )
        self.block0, self.block1 = Attention(), Attention()
        self.norm = layers.LayerNormalization(epsilon=transformer.EPSILON)
        self.head = layers.Dense(transformer.N_CLASSES)

    def call(self, x: Any) -> Any:
        x = self.norm(self.block1(self.block0(self.embed(x) + self.position)))
        return self.head(ops.mean(x, 1))


def padded(x: Any) -> Any:
    """Return `x` with a pixel of zeros around: a stride of 2 begins elsewhere with Keras's own padding."""
    return ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def resnet() -> Any:
    """Return the trained ResNet-20."""
    model = ResNet20()
    model(np.zeros((1, 3, 32, 32), np.float32))
    weights = load_file(resnet20.WEIGHTS)

    def of(name: str) -> list[Any]:
        if "bn" in name:
            parts = ("weight", "bias", "running_mean", "running_var")
            return [weights[f"{name}.{part}"] for part in parts]
        kernel = weights[f"{name}.weight"]
        if kernel.ndim == 2:
            return [kernel.T, weights[f"{name}.bias"]]
        return [kernel.transpose(2, 3, 1, 0)]

    for name in ("conv1", "bn1", "linear"):
        getattr(model, name).set_weights(of(name))
    for stage in ("layer1", "layer2", "layer3"):
        for i, block in enumerate(getattr(model, stage)):
            for name in ("conv1", "bn1", "conv2", "bn2"):
                getattr(block, name).set_weights(of(f"{stage}.{i}.{name}"))
    return model


def trained_transformer() -> Any:
    """Return the transformer of `parity_transformer`."""
    model = Transformer()
    model(transformer.inputs(1))
    weights = transformer.weights()
    for name in ("embed", "norm", "head"):
        _fill(getattr(model, name), weights, name)
    for block in ("block0", "block1"):
        for name in ("norm1", "query", "key", "value", "out", "norm2", "mlp1", "mlp2"):
            _fill(getattr(getattr(model, block), name), weights, f"{block}/{name}")
    model.position.assign(weights["position"])
    return model


def _fill(layer: Any, weights: dict[str, Any], name: str) -> None:
    first = "kernel" if f"{name}/kernel" in weights else "scale"
    layer.set_weights([weights[f"{name}/{first}"], weights[f"{name}/bias"]])
