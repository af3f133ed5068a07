"""timm's models by name."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from torch import nn

from ..capture.data import INTERPOLATIONS, Batch, Preprocess
from ..capture.errors import DataError, PlanError, SelectionError, StoreNotFoundError, closest
from ..capture.specs import LoadedModel
from .torch_data import EXAMPLES
from .torch_weights import brief, read_state, seeded, tensors_alone, unreachable

#: It tells no types.
_data: Any = timm.data

#: Options of `timm.create_model` that `weights` and `file` stand for.
_OURS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def load_model(name: str, options: dict[str, Any]) -> LoadedModel:
    """Build a model; without `weights` they are random, from a fixed seed: a rebuilt model is the same.

    `weights=true` takes the trained ones that are timm's default, `weights=TAG` (or `timm:NAME.TAG`) others;
    `file=PATH` takes a local .safetensors or .pth file. A new number of classes gives a random last layer.
    All other options are the model's. Class names come with weights.

    Preprocessing is timm's, to the bit, where `crop_mode` is `center` or `squash` and inputs are square;
    otherwise mean and standard deviation alone.

    Raises:
        SelectionError: timm has no such model or weights.
        PlanError: the model has no such option.
        StoreNotFoundError: there is no such file.
        DataError: the weights are not on this machine and cannot be downloaded, or do not fit.
    """
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise SelectionError(f"timm has no model {base!r}. {closest(base, timm.list_models())}")
    weights, file = options.pop("weights", None), options.pop("file", None)
    variant = _variant(base, tag, weights)
    trained = weights not in (None, False)
    overlay = None
    if file is not None:
        trained, overlay = True, {"state_dict": _state(Path(str(file)).expanduser()), "custom_load": False}
    for ours in _OURS:
        if ours in options:
            raise PlanError(f"timm:{name} takes no {ours}: write weights=true, weights=TAG or file=PATH")
    try:
        with seeded(), tensors_alone():
            model = timm.create_model(variant, pretrained=trained, pretrained_cfg_overlay=overlay, **options)
    except TypeError as error:
        raise PlanError(f"timm:{name} cannot be built: {brief(error)}. {_choices(variant)}") from error
    except Exception as error:
        if file is not None:
            raise DataError(f"{file} does not fit timm:{name}: {brief(error)}") from error
        if trained and unreachable(error):
            raise DataError(_put_where(variant, error)) from error
        raise DataError(f"timm:{name} cannot be built: {brief(error)}") from error
    model = model.eval()
    size = {"img_size": options["img_size"]} if isinstance(options.get("img_size"), int) else {}
    config = _data.resolve_model_data_config(model, args=size)
    channels = options.get("in_chans") or config["input_size"][0]
    shape = (channels, *config["input_size"][1:])
    EXAMPLES[model] = lambda n_rows: _noise(shape, n_rows)
    return LoadedModel(model, name, _preprocess(config), _classes(model) if trained else None)


def _variant(base: str, tag: str, weights: Any) -> str:
    """Return the name with the tag of its weights, where there is one."""
    wanted = weights if isinstance(weights, str) else ""
    if tag and wanted and tag != wanted:
        raise SelectionError(f"timm:{base}.{tag} has weights {tag!r}, and weights={wanted} asks for others")
    known = [one.partition(".")[2] for one in timm.list_pretrained(f"{base}.*") + timm.list_pretrained(base)]
    chosen = tag or wanted
    if weights not in (None, False) and not known:
        raise SelectionError(f"timm has no weights for {base}; leave weights= out, or give file=PATH")
    if chosen and chosen not in known:
        choice = f"{closest(chosen, known)} weights=true takes the default" if known else "There are none."
        raise SelectionError(f"timm has no weights {chosen!r} for {base}. {choice}")
    return f"{base}.{chosen}" if chosen else base


def _state(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise StoreNotFoundError(f"there is no file {file}")
    return read_state(file)


def _choices(variant: str) -> str:
    """Return a sentence on the options of a model."""
    try:
        with torch.device("meta"):
            kind = type(timm.create_model(variant))
    except Exception:  # only the sentence is lost
        return "Its options are those of timm.create_model"
    names = [name for name in inspect.signature(kind).parameters if name not in ("device", "dtype")]
    return f"There are weights, file, {', '.join(names)}"


def _put_where(variant: str, error: BaseException) -> str:
    config = timm.get_pretrained_cfg(variant)
    assert config is not None
    hub = f"{config.hf_hub_filename or 'model.safetensors'} of https://huggingface.co/{config.hf_hub_id}"
    source = hub if config.hf_hub_id else config.url
    return (
        f"the weights of timm:{variant} are not here and cannot be downloaded ({brief(error)}). Get {source} "
        f"on another machine, put it anywhere here, and add file=PATH: "
        f"'timm:{variant.partition('.')[0]}?file=PATH'"
    )


def _preprocess(config: dict[str, Any]) -> Preprocess:
    mean, std = tuple(map(float, config["mean"])), tuple(map(float, config["std"]))
    _, height, width = config["input_size"]
    mode, interpolation = config["crop_mode"], config["interpolation"]
    if height != width or mode not in ("center", "squash") or interpolation not in INTERPOLATIONS:
        return Preprocess(mean, std)
    resize = math.floor(height / config["crop_pct"])
    stretch = True if mode == "squash" else None
    how = None if interpolation == "bilinear" else interpolation
    return Preprocess(mean, std, resize, height, how, stretch)


def _classes(model: nn.Module) -> tuple[str, ...] | None:
    config: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    n_classes = getattr(model, "num_classes", None)
    if not n_classes or n_classes != config.get("num_classes"):
        return None
    if (names := config.get("label_names")) and len(names) == n_classes:
        told = config.get("label_descriptions") or {}
        return tuple(told.get(name, name) for name in names)
    subset = _data.infer_imagenet_subset(model)
    return tuple(_data.ImageNetInfo(subset).label_descriptions()) if subset else None


def _noise(shape: tuple[int, ...], n_rows: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(range(n_rows), (torch.randn(n_rows, *shape, generator=generator),))
