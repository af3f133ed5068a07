"""torchvision's models and data sets by name."""

from __future__ import annotations

import pickle
from typing import Any
from urllib.error import URLError

import torch
import torchvision

from ..capture.data import Preprocess
from ..capture.errors import DataError, SelectionError, closest
from ..capture.specs import LoadedModel
from .torch_weights import seeded, tensors_alone


def load_model(name: str, options: dict[str, Any]) -> LoadedModel:
    """Build a model; without `weights` they are random, from a fixed seed: a rebuilt model is the same.

    Raises:
        SelectionError: torchvision has no such model or weights.
        DataError: the weights are not on this machine and cannot be downloaded.
    """
    known = torchvision.models.list_models()
    if name not in known:
        raise SelectionError(f"torchvision has no model {name!r}. {closest(name, known)}")
    weights = options.pop("weights", None)
    if weights is None:
        return LoadedModel(_build(name, None, options), name)
    choices = torchvision.models.get_model_weights(name)
    if weights not in choices.__members__:
        raise SelectionError(
            f"{name} has no weights {weights!r}. {closest(str(weights), choices.__members__)}"
        )
    chosen = choices[weights]
    model = _build(name, chosen, options)
    classes = chosen.meta.get("categories")
    return LoadedModel(model, name, _preprocess(chosen), None if classes is None else tuple(classes))


def load_data(name: str, options: dict[str, Any]) -> Any:
    """Build a data set, of its test part where it has one and nothing else is asked for.

    Raises:
        SelectionError: torchvision has no such data set.
        DataError: its files are not there.
    """
    known = torchvision.datasets.__all__
    if name not in known:
        raise SelectionError(f"torchvision has no data set {name!r}. {closest(name, known)}")
    make = getattr(torchvision.datasets, name)
    if "train" in make.__init__.__code__.co_varnames:
        options.setdefault("train", False)
    try:
        return make(**options)
    except TypeError as error:
        raise DataError(f"torchvision:{name} cannot be made: {error}") from error
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"torchvision:{name} is not at {options.get('root')!r}: {error}. Put its files there, or add "
            "&download=true"
        ) from error


def _build(name: str, weights: Any, options: dict[str, Any]) -> torch.nn.Module:
    try:
        with seeded(), tensors_alone():
            model: torch.nn.Module = torchvision.models.get_model(name, weights=weights, **options)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"the file of {name}'s weights in {torch.hub.get_dir()}/checkpoints holds more than weights, and "
            f"is not loaded: {str(error).splitlines()[0]}. Delete it, and it is downloaded anew"
        ) from error
    except (URLError, OSError) as error:
        file = weights.url.rpartition("/")[2] if weights is not None else name
        raise DataError(
            f"the weights of {name} cannot be downloaded ({error}). Put {file} into "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error
    except (TypeError, ValueError) as error:
        raise DataError(f"torchvision:{name} cannot be built: {error}") from error
    return model


def _preprocess(weights: Any) -> Preprocess | None:
    transforms = weights.transforms()
    if not hasattr(transforms, "mean"):
        return None
    resize, crop = getattr(transforms, "resize_size", [None]), getattr(transforms, "crop_size", [None])
    return Preprocess(tuple(transforms.mean), tuple(transforms.std), resize[0], crop[0])
