"""Files of weights alone (.safetensors, .pt, .pth) with what builds their model.

    weights.safetensors?model=file.py:factory
    weights.pt?model=torchvision:resnet18&num_classes=10
    checkpoint.pt?key=ema&model=timm:resnet18

`model` is any MODEL that torch runs, `key` is what a checkpoint keeps the weights under, and all other
options are that model's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..capture.errors import DataError, PlanError
from ..capture.specs import LoadedModel, load_model_with, split_options
from .torch_weights import load_state, read_state

SUFFIXES = (".safetensors", ".pt", ".pth")


def load_file(path: Path, options: dict[str, Any]) -> LoadedModel:
    """Build the model that `model` names, and put the weights of `path` into it, all into all.

    Raises:
        PlanError: `model` is missing, or is another file of weights.
        DataError: the weights do not fit, or the file holds something else.
        FormatError: it cannot be read.
    """
    key = options.pop("key", None)
    state = read_state(path, None if key is None else str(key))
    spec = str(options.pop("model", "") or "")
    if not spec:
        raise PlanError(
            f"{path} holds weights alone; say what builds their model: '{path}?model=file.py:factory', "
            f"'{path}?model=torchvision:resnet18&num_classes=10' or '{path}?model=timm:NAME'. Of "
            f"{len(state)} weights, the first is {next(iter(state))}"
        )
    name, own = split_options(spec)
    if Path(name).suffix.lower() in SUFFIXES:
        raise PlanError(f"{path}?model={name}: {name} is a file, too; name what builds the model")
    built = load_model_with(name, own | options)
    if not isinstance(built.model, nn.Module):
        raise DataError(f"{name} gives a {type(built.model).__name__}, and weights go into a torch.nn.Module")
    load_state(built.model, state, path)
    return replace(built, model=built.model.eval(), name=path.name)
