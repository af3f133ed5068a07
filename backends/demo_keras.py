"""The demonstration's network in Keras: three convolutions with pooling between, as in PyTorch."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from .keras_framework import keras

EPOCHS, BATCH = 12, 64


def train(inputs: NDArray[Any], labels: NDArray[Any]) -> Any:
    """Return the network trained on `inputs` (rows, 1, 32, 32) and `labels`.

    `conv1`, `conv2` and `conv3` give 16, 32 and 64 channels after a ReLU, at 32, 16 and 8 pixels a side.
    """
    layers = keras.layers
    keras.utils.set_random_seed(0)
    parts: list[Any] = [keras.Input((1, 32, 32)), layers.Permute((2, 3, 1))]
    for i, n_channels in enumerate((16, 32, 64), start=1):
        parts.append(layers.Conv2D(n_channels, 3, padding="same", activation="relu", name=f"conv{i}"))
        parts.append(layers.MaxPooling2D())
    model = keras.Sequential([*parts, layers.Flatten(), layers.Dense(10, name="linear")])
    steps = EPOCHS * -(-len(inputs) // BATCH)
    model.compile(
        keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(4e-3, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(inputs, labels, BATCH, EPOCHS, verbose=0)
    return model
