"""The networks of other tests, exported from torch to ONNX."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import parity_transformer
import resnet20
import torch
from layertap.backends.onnx_model import OnnxModel


def exported(model: Any, example: Any, **options: Any) -> OnnxModel:
    """Return `model` as torch's exporter writes it, with an open batch axis."""
    inputs = (torch.from_numpy(example),)
    shapes = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            model.eval(), inputs, dynamo=True, dynamic_shapes=shapes, verbose=False, **options
        )
    assert made is not None
    return OnnxModel(made.model_proto)


def trained(**options: Any) -> OnnxModel:
    """Return the trained ResNet-20; without `optimize=False`, batch norms are folded into convolutions."""
    return exported(resnet20.trained(), np.zeros((2, 3, 32, 32), np.float32), **options)


def transformer() -> OnnxModel:
    """Return the transformer of `parity_transformer`."""
    return exported(parity_transformer.trained(), parity_transformer.inputs(2))
