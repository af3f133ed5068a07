"""A network exported to ONNX unoptimised has its convolutions; `test_parity` holds the rest against torch."""

from __future__ import annotations

from typing import Any

import layertap as lt
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import parity_onnx
import resnet20

#: Of the largest value of a tap: sums are taken in another order, and batch norms are folded in.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pictures(cifar) -> Any:
    source = lt.PictureFolder(cifar, lt.Preprocess(resnet20.MEAN, resnet20.STD))
    batch = source.batch(range(64))
    return batch.inputs[0], batch.columns["label"]


def both(ours: Any, theirs: Any, data: Any, path: Any, layers: Any) -> tuple[lt.Run, lt.Run]:
    return (
        lt.record_dataset(ours, data, path / "onnx", layers, batch_size=16),
        lt.record_dataset(theirs, data, path / "torch", layers, batch_size=16),
    )


def check_alike(ours: lt.Run, theirs: lt.Run) -> None:
    # A graph has no containers: a module's output is where the last of its nodes is.
    assert set(ours.taps) == set(theirs.taps)
    for name in theirs.taps:
        got, expected = ours[name], theirs[name]
        assert (got.shape, got.dtype, got.dims) == (expected.shape, expected.dtype, expected.dims)
        largest = np.abs(expected[...]).max()
        assert np.abs(got[...] - expected[...]).max() <= TOLERANCE * largest, name


def test_convolutions_keep_their_names_where_batch_norms_are_not_folded_in(pictures, tmp_path):
    layers = ["conv1", "bn1", "layer*.?.conv?", "layer2"]
    ours, theirs = both(parity_onnx.trained(optimize=False), resnet20.trained(), pictures, tmp_path, layers)
    assert len(ours.taps) == 1 + 1 + 18 + 1
    check_alike(ours, theirs)


def test_a_folded_convolution_does_not_pass_for_the_modules_own(tmp_path):
    with pytest.raises(lt.SelectionError, match=r"no layer matches 'conv1'"):
        lt.record_dataset(
            parity_onnx.trained(), np.zeros((4, 3, 32, 32), np.float32), tmp_path / "s", "conv1"
        )
