"""One set of weights in five frameworks: five stores that agree, and that no picture tells apart."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.data import ArraySource

os.environ.setdefault("KERAS_BACKEND", "jax")
for package in ("torch", "onnxruntime", "onnxscript", "jax", "flax", "keras"):
    pytest.importorskip(package)

import parity_flax  # noqa: E402
import parity_keras  # noqa: E402
import parity_onnx  # noqa: E402
import parity_transformer  # noqa: E402
import resnet20  # noqa: E402

#: Of the largest value of a tap: sums are taken in another order, batch norms are folded in, and so on.
TOLERANCE = 1e-5

RESNETS: dict[str, Callable[[], Any]] = {
    "torch": resnet20.trained,
    "onnx": parity_onnx.trained,
    "nnx": parity_flax.resnet_nnx,
    "linen": parity_flax.resnet_linen,
    "keras": parity_keras.resnet,
}
TRANSFORMERS: dict[str, Callable[[], Any]] = {
    "torch": parity_transformer.trained,
    "onnx": parity_onnx.transformer,
    "nnx": parity_flax.transformer_nnx,
    "linen": parity_flax.transformer_linen,
    "keras": parity_keras.trained_transformer,
}
#: Taps that all of them have: an exported graph has folded its batch norms into the convolutions.
RESNET_LAYERS = ["bn1", "layer?.?", "layer?.?.bn?", "linear"]
TRANSFORMER_LAYERS = ["embed", "block?", "block?.*", "norm", "head"]


@pytest.fixture(scope="module")
def resnets(cifar, tmp_path_factory) -> dict[str, lt.Run]:
    preprocess = lt.Preprocess(resnet20.MEAN, resnet20.STD)
    columns = lt.PictureFolder(cifar, preprocess).batch(range(64)).columns
    source = ArraySource(columns["picture"], columns["label"], preprocess=preprocess)
    path = tmp_path_factory.mktemp("resnets")
    return {
        name: lt.record_dataset(
            build(), source, path / name, RESNET_LAYERS, reduce="channels_first", batch_size=16, name="one"
        )
        for name, build in RESNETS.items()
    }


@pytest.fixture(scope="module")
def transformers(tmp_path_factory) -> dict[str, lt.Run]:
    path, inputs = tmp_path_factory.mktemp("transformers"), parity_transformer.inputs(64)
    return {
        name: lt.record_dataset(build(), inputs, path / name, TRANSFORMER_LAYERS, batch_size=16, name="one")
        for name, build in TRANSFORMERS.items()
    }


def check_alike(run: lt.Run, reference: lt.Run, n_taps: int) -> None:
    assert len(reference.taps) == n_taps
    assert set(run.taps) == set(reference.taps)
    assert run.manifest.layout.block_rows == reference.manifest.layout.block_rows
    for name in reference.taps:
        got, expected = run[name], reference[name]
        assert (got.shape, got.dtype, got.dims) == (expected.shape, expected.dtype, expected.dims), name
        largest = np.abs(expected[...]).max()
        assert np.abs(got[...] - expected[...]).max() <= TOLERANCE * largest, name
    assert list(run.rows) == list(reference.rows)
    for name in reference.rows:
        assert np.array_equal(run.rows[name][...], reference.rows[name][...]), name


@pytest.mark.parametrize("framework", ["onnx", "nnx", "linen", "keras"])
def test_a_residual_network_gives_the_store_that_it_gives_in_torch(resnets, framework):
    check_alike(resnets[framework], resnets["torch"], 1 + 9 + 18 + 1)


@pytest.mark.parametrize("framework", ["onnx", "nnx", "linen", "keras"])
def test_a_transformer_gives_the_store_that_it_gives_in_torch(transformers, framework):
    check_alike(transformers[framework], transformers["torch"], 1 + 2 + 16 + 2)


@pytest.mark.parametrize("framework", ["onnx", "nnx", "linen", "keras"])
@pytest.mark.parametrize("kind", ["grid", "montage", "overlay", "layers", "statistics"])
def test_no_picture_tells_the_stores_apart(resnets, framework, kind):
    options: dict[str, Any] = {
        "grid": {"rows": [3], "layers": ["bn1", "layer2.1"], "channels": "top:9"},
        "montage": {"rows": 5, "layers": "layer3.0"},
        "overlay": {"rows": [1, 2], "layers": "layer2.1"},
        "layers": {"layers": ["bn1", "layer1.1", "layer3.2", "linear"]},  # a graph has an order of its own
        "statistics": {"layers": "layer3.1"},
    }[kind]
    ours, theirs = (lt.draw(run, kind, **options).sheet for run in (resnets[framework], resnets["torch"]))
    # Beside a layer's name stands its type, which each framework has its own word for.
    words, words_too = ([text.text.rpartition(" · ")[2] for text in one.texts] for one in (ours, theirs))
    assert words == words_too
    for (x, y, got), (x_too, y_too, expected) in zip(ours.pictures(), theirs.pictures(), strict=True):
        assert (x, y, got.shape) == (x_too, y_too, expected.shape)
        # A value on the edge between two shades may fall on either side.
        assert np.abs(got.astype(int) - expected.astype(int)).max() <= 8
