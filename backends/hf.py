"""Models of Hugging Face transformers, from a folder or the hub.

    hf:FOLDER_OR_REPO[?class=AutoModelForImageClassification&random=true&dtype=float32&revision=main]

A folder is what `save_pretrained` writes: config.json, model.safetensors (or its shards), and for models of
pictures preprocessor_config.json. The class is the one that the config names, or `class=`. Code that comes
with a repository is never run, and weights load as tensors alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..capture.data import Batch
from ..capture.errors import DataError, PlanError, SelectionError, StoreNotFoundError, closest
from ..capture.specs import LoadedModel
from .hf_pictures import preprocess_of
from .torch_data import EXAMPLES
from .torch_weights import brief, seeded, tensors_alone, unreachable, variable

OPTIONS = ("class", "random", "dtype", "revision", "missing")

#: It tells no types.
_hub: Any = transformers.utils

_DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")
_FILES = "config.json, model.safetensors (or its shards and their index)"
_TOKENS = 8


def load_model(name: str, options: dict[str, Any]) -> LoadedModel:
    """Load a model, in evaluation mode.

    Options: `class`, a class of transformers; `random=true` for random weights, from a fixed seed; `dtype`;
    `revision` of a repository; `missing=random` where weights that the folder lacks may be random.

    Raises:
        SelectionError: there is no such class, or this version of transformers has no such model.
        PlanError: an option is unknown.
        StoreNotFoundError: there is no such folder.
        DataError: files are missing and cannot be downloaded, hold other weights, or need code of their own.
    """
    for key in options:
        if key not in OPTIONS:
            raise PlanError(f"hf:{name} has no option {key!r}. {closest(key, OPTIONS)}")
    dtype = options.get("dtype", "auto")
    if dtype not in _DTYPES:
        raise PlanError(f"hf:{name} has no dtype {dtype!r}. {closest(str(dtype), _DTYPES)}")
    missing = options.get("missing")
    if missing not in (None, "random"):
        raise PlanError(f"missing={missing} is unknown; missing=random lets what the weights lack be random")
    where = _Place(name, options.get("revision"))
    with _quiet():
        config = where.config()
        kind = _kind(name, config, options.get("class"))
        if options.get("random"):
            model = _random(name, kind, config, dtype)
        else:
            model = where.weights(kind, config, dtype, missing == "random")
        preprocess = None
        if getattr(model, "main_input_name", "") == "pixel_values":
            preprocess = preprocess_of(where.source, where.options, where.has)
    model = model.eval()
    EXAMPLES[model] = lambda n_rows: _example(kind, config, n_rows)
    return LoadedModel(model, name, preprocess, _classes(model, config))


class _Place:
    """A folder, or a repository of the hub.

    Raises:
        StoreNotFoundError: it is meant for a folder, and there is none.
        DataError: a folder without config.json.
    """

    def __init__(self, name: str, revision: Any) -> None:
        folder = Path(name).expanduser()
        self.name = name
        self.local = folder.is_dir()
        self.source = str(folder) if self.local else name
        self.options: dict[str, Any] = {"trust_remote_code": False}
        if revision is not None and not self.local:
            self.options["revision"] = str(revision)
        if not self.local and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
            raise StoreNotFoundError(f"there is no folder {folder}")
        if self.local and not self.has("config.json"):
            raise DataError(f"{self.source} has no config.json; put {_FILES} there")

    def has(self, file: str) -> bool:
        """Return whether there is such a file."""
        if self.local:
            return (Path(self.source) / file).is_file()
        try:
            found = _hub.cached_file(self.source, file, revision=self.options.get("revision"))
        except Exception as error:
            if not unreachable(error):
                raise
            return False
        return found is not None

    def config(self) -> Any:
        """Return the model's config.

        Raises:
            DataError: it cannot be had, or is one of code that comes with it.
            SelectionError: transformers does not know its type.
        """
        try:
            said, _ = transformers.PretrainedConfig.get_config_dict(self.source, **self.options)
        except Exception as error:
            raise self._not_there(error, "config.json") from error
        kind = said.get("model_type")
        if kind not in transformers.CONFIG_MAPPING:
            if said.get("auto_map"):
                raise DataError(
                    f"hf:{self.name} needs code that comes with it, which is not run. Once you have read and "
                    "trust it, build the model in a file of yours (file.py:factory, trust_remote_code=True)"
                )
            raise SelectionError(
                f"transformers {transformers.__version__} has no models of the type {kind!r}, which "
                f"config.json of hf:{self.name} gives as model_type. "
                + closest(str(kind), list(transformers.CONFIG_MAPPING))
            )
        try:
            return transformers.AutoConfig.from_pretrained(self.source, **self.options)
        except Exception as error:
            raise self._not_there(error, "config.json") from error

    def weights(self, kind: Any, config: Any, dtype: str, may_miss: bool) -> nn.Module:
        """Return the model with its weights.

        Raises:
            DataError: they cannot be had, or some are missing.
        """
        try:
            with seeded(), tensors_alone(), variable("DISABLE_SAFETENSORS_CONVERSION", "1"):
                model, info = kind.from_pretrained(
                    self.source, config=config, dtype=dtype, output_loading_info=True, **self.options
                )
        except Exception as error:
            raise self._not_there(error, "model.safetensors") from error
        if (lacks := sorted(info["missing_keys"])) and not may_miss:
            raise DataError(
                f"the weights of hf:{self.name} lack {len(lacks)} of {type(model).__name__}: "
                f"{', '.join(lacks[:3])}{', ...' if len(lacks) > 3 else ''}. Name the class that they are of "
                f"(class={(config.architectures or ['AutoModel'])[0]}), or add missing=random for random ones"
            )
        loaded: nn.Module = model
        return loaded

    def _not_there(self, error: Exception, file: str) -> DataError:
        if self.local:
            if unreachable(error) and not isinstance(error, PermissionError):
                return DataError(
                    f"{self.source} has no {file} that can be loaded: {brief(error)}. Put {_FILES} there"
                    + (", or add random=true" if file != "config.json" else "")
                )
            return DataError(f"hf:{self.name} cannot be loaded: {brief(error)}")
        if not unreachable(error):
            return DataError(f"hf:{self.name} cannot be loaded: {brief(error)}")
        return DataError(
            f"hf:{self.name} is no folder here, and cannot be downloaded: {brief(error)}. Get {_FILES} and, "
            f"for a model of pictures, preprocessor_config.json of https://huggingface.co/{self.name} on "
            "another machine, put them into a folder, and write hf:FOLDER"
        )


def _kind(name: str, config: Any, wanted: Any) -> Any:
    """Return the class: the one asked for, or the first that the config names."""
    named = config.architectures or ()
    chosen = str(wanted) if wanted is not None else next(iter(named), "AutoModel")
    kind = getattr(transformers, chosen, None)
    if isinstance(kind, type) and (issubclass(kind, transformers.PreTrainedModel) or _is_auto(kind)):
        return kind
    known = [*named, *(one for one in dir(transformers) if one.startswith("AutoModel"))]
    what = f"no model class {chosen!r}"
    if wanted is None:
        what += f", which hf:{name} names; add class="
    raise SelectionError(f"transformers {transformers.__version__} has {what}. {closest(chosen, known)}")


def _is_auto(kind: type) -> bool:
    return kind.__name__.startswith("AutoModel") and hasattr(kind, "from_config")


def _random(name: str, kind: Any, config: Any, dtype: str) -> nn.Module:
    try:
        with seeded():
            made: nn.Module = kind.from_config(config) if _is_auto(kind) else kind(config)
    except Exception as error:
        raise DataError(f"hf:{name} cannot be built: {brief(error)}") from error
    return made.to(torch.float32 if dtype == "auto" else getattr(torch, dtype))


def _classes(model: nn.Module, config: Any) -> tuple[str, ...] | None:
    labels = getattr(config, "id2label", None) or {}
    names = tuple(str(labels[i]) for i in sorted(labels))
    made_up = all(text == f"LABEL_{i}" for i, text in enumerate(names))
    return None if made_up or "Classification" not in type(model).__name__ else names


def _example(kind: Any, config: Any, n_rows: int) -> Batch | None:
    """Return noise, or tokens at random, where the config tells enough."""
    generator = torch.Generator().manual_seed(0)
    size, text = getattr(config, "image_size", None), getattr(config, "vocab_size", None)
    if isinstance(size, int) and text is None:
        shape = (n_rows, getattr(config, "num_channels", 3), size, size)
        return Batch(range(n_rows), (), {"pixel_values": torch.randn(shape, generator=generator)})
    if isinstance(text, int) and size is None:
        inputs = {"input_ids": torch.randint(text, (n_rows, _TOKENS), generator=generator)}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"]
        return Batch(range(n_rows), (), inputs)
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting what is reported here, and from drawing bars."""
    log = _hub.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()
