"""The demonstration's network as an ONNX model: trained in PyTorch, then exported."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from numpy.typing import NDArray

from .demo_torch import train as train_in_torch
from .onnx_model import OnnxModel


def train(inputs: NDArray[Any], labels: NDArray[Any]) -> OnnxModel:
    """Return the network trained on `inputs` (rows, 1, 32, 32) and `labels`, for any number of rows."""
    network = train_in_torch(inputs, labels)
    rows = torch.export.Dim("rows")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own insides
        exported = torch.onnx.export(
            network, (torch.from_numpy(inputs[:2]),), dynamo=True, dynamic_shapes=({0: rows},), verbose=False
        )
    assert exported is not None
    return OnnxModel(exported.model_proto)
