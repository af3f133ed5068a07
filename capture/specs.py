"""What MODEL and DATA mean on the command line.

    MODEL   torchvision:resnet18[?weights=DEFAULT&num_classes=10]   file.onnx[?providers=NAME,NAME]
            timm:resnet18[?weights=true]   hf:REPO_OR_FOLDER[?class=NAME]   file.pt2   file.py:factory
            weights.safetensors?model=MODEL   weights.pt?model=MODEL
            keras:ResNet50[?weights=imagenet]   file.keras
    DATA    folder:PATH (or a folder's path)   torchvision:CIFAR10?root=PATH   file.npy   file.npz
            file.py:factory

A factory is called without arguments. One for a model returns it; one for data returns what
`record_dataset` takes.

Options follow a `?`, with `&` between them. Those of a MODEL inside a MODEL follow its own `?` or, as the
rest of them, an `&`: `weights.pt?model=timm:resnet18?num_classes=10&in_chans=1`.

A .npz file holds `x`, `inputs` or `images`, the model's one input, or else the model's arguments by name
(`input_ids`, `attention_mask`); `y`, `label` or `labels` is the label.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from .data import ArraySource, PictureFolder, Preprocess, Source
from .errors import (
    DataError,
    FormatError,
    LayertapError,
    MissingPackageError,
    PlanError,
    SelectionError,
    StoreNotFoundError,
)
from .named_arrays import NamedArrays

#: Prefix -> module with `load_model(name, options)`, and `load_data(name, options)` where it has data, and
#: its extra.
COLLECTIONS: dict[str, tuple[str, str]] = {
    "torchvision": ("layertap.backends.torchvision", "torch"),
    "keras": ("layertap.backends.keras_models", "keras"),
    "timm": ("layertap.backends.timm", "timm"),
    "hf": ("layertap.backends.hf", "hf"),
}

#: Suffix of a model's file -> module with `load_file(path, options)`, and its extra.
FILES: dict[str, tuple[str, str]] = {
    ".onnx": ("layertap.backends.onnx", "onnx"),
    ".keras": ("layertap.backends.keras_models", "keras"),
    ".pt2": ("layertap.backends.torch_export", "torch"),
    ".pt": ("layertap.backends.torch_files", "torch"),
    ".pth": ("layertap.backends.torch_files", "torch"),
    ".safetensors": ("layertap.backends.torch_files", "safetensors"),
}

#: Rows of a forward where nothing is said.
BATCH_ROWS = 64


#: What a .npz file may call the model's one input.
INPUTS = ("x", "inputs", "images", "input", "arr_0")


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it."""

    model: Any
    """The framework's own object."""
    name: str
    """What the user called it."""
    preprocess: Preprocess | None = None
    """What its weights were trained with."""
    classes: tuple[str, ...] | None = None
    """Names of the classes that it predicts."""
    batch_rows: int | None = None
    """The one number of rows that it takes in a forward; None for any."""

    def rows_of_a_step(self, asked: int | None, n_rows: int) -> int:
        """Return how many of `n_rows` rows go into a forward; `asked` is what the user said of it.

        Raises:
            PlanError: it takes other batches alone.
        """
        only = self.batch_rows
        if only is None:
            return BATCH_ROWS if asked is None else asked
        if asked not in (None, only):
            raise PlanError(f"{self.name} takes batches of exactly {only} rows: --batch-size {only}, or none")
        if n_rows % only:
            raise PlanError(
                f"{self.name} takes batches of exactly {only} rows, and the data has {n_rows:,}: "
                f"{n_rows % only} are left over. Give a multiple of {only} rows, or make it anew for any "
                "number of them (torch.export.export(..., dynamic_shapes=...))"
            )
        return only


def load_model(spec: str) -> LoadedModel:
    """Return the model that `spec` names.

    Raises:
        SelectionError: there is none of that name.
        StoreNotFoundError: there is no such file.
    """
    return replace(load_model_with(*split_options(spec)), name=_called(spec))


def load_model_with(name: str, options: dict[str, Any]) -> LoadedModel:
    """Return the model that `name` and its options, apart from each other, name; see `load_model`."""
    prefix, _, rest = name.partition(":")
    if prefix in COLLECTIONS:
        loaded: LoadedModel = _collection(prefix).load_model(rest, options)
        return loaded
    if (suffix := Path(name).suffix.lower()) in FILES:
        if not Path(name).is_file():
            raise StoreNotFoundError(f"there is no file {name}")
        read: LoadedModel = _module(f"a {suffix} file", *FILES[suffix]).load_file(Path(name), options)
        return read
    if (file := _factory_file(name)) is not None:
        if options:
            raise PlanError(f"{name} is called without arguments, and takes no option {min(options)!r}")
        return LoadedModel(_made(*file), name)
    raise SelectionError(
        f"{name!r} is no model; write {', '.join(f'{known}:NAME' for known in COLLECTIONS)}, a file "
        f"({', '.join(FILES)}) or file.py:factory (a function that returns it)"
    )


def load_data(spec: str, preprocess: Preprocess | None, *, skip_bad: bool = False) -> Any:
    """Return the data set that `spec` names, as `record_dataset` takes it.

    Args:
        spec: see above.
        preprocess: how the pictures of a folder or an array become inputs.
        skip_bad: leave out pictures that do not decode.

    Raises:
        SelectionError: there is none of that name.
        DataError: it cannot be used.
    """
    if (file := _factory_file(spec)) is not None:
        return _made(*file)
    if spec.startswith("folder:") or Path(spec).is_dir():
        return PictureFolder(spec.removeprefix("folder:"), preprocess, skip_bad)
    if spec.endswith((".npy", ".npz")):
        return _load_arrays(Path(spec), preprocess)
    prefix, _, rest = spec.partition(":")
    if prefix not in COLLECTIONS:
        raise SelectionError(
            f"{spec!r} is no data set; write folder:PATH, torchvision:NAME?root=PATH, a .npy or .npz file, "
            "or file.py:factory (a function that returns it)"
        )
    if not hasattr(module := _collection(prefix), "load_data"):
        raise SelectionError(f"{spec!r} is no data set: {prefix} has models alone")
    return module.load_data(*split_options(rest))


def load_function(spec: str) -> Callable[[Any], Any]:
    """Return the function that `file.py:function` names, without calling it.

    Raises:
        SelectionError: there is none of that name.
        StoreNotFoundError: there is no such file.
    """
    file = _factory_file(spec)
    assert file is not None
    function: Callable[..., Any] = _factory(*file)
    return function


def load_basis(spec: str) -> tuple[Any, Any]:
    """Return basis and mean of a .npy file (the basis alone) or a .npz file (`basis`, and `mean` if there).

    Raises:
        StoreNotFoundError: there is no such file.
        DataError: it holds no basis.
    """
    path = Path(spec)
    if not path.is_file():
        raise StoreNotFoundError(f"there is no file {path}; pca:16 fits 16 components to the first rows")
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found, None
        with found:
            return found["basis"], found.get("mean")
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} holds no basis (an array, or basis and mean): {error}") from error


def _load_arrays(path: Path, preprocess: Preprocess | None) -> Source:
    if not path.is_file():
        raise StoreNotFoundError(f"there is no file {path}")
    try:
        if path.suffix == ".npy":
            values = np.load(path, mmap_mode="r", allow_pickle=False), None
        else:
            with np.load(path, allow_pickle=False) as file:
                if not any(key in file for key in INPUTS):
                    return NamedArrays({key: file[key] for key in file.files}, name=path.name)
                values = _inputs_and_labels(file)
    except DataError:
        raise
    except (ValueError, OSError, EOFError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    return ArraySource(*values, name=path.name, preprocess=preprocess)


def _inputs_and_labels(file: Any) -> tuple[Any, Any]:
    inputs = next(key for key in INPUTS if key in file)
    labels = next((key for key in ("y", "labels", "label", "arr_1") if key in file), None)
    return file[inputs], None if labels is None else file[labels]


def _factory_file(spec: str) -> tuple[Path, str] | None:
    path, colon, name = spec.rpartition(":")
    return (Path(path), name) if colon and path.endswith(".py") else None


def _made(path: Path, name: str) -> Any:
    factory = _factory(path, name)
    try:
        return factory()
    except LayertapError:
        raise
    except Exception as error:
        raise DataError(
            f"{path}:{name}() failed: {type(error).__name__}: {error}. A factory is called without "
            "arguments and returns the model, or the data"
        ) from error


def _factory(path: Path, name: str) -> Callable[[], Any]:
    if not path.is_file():
        raise StoreNotFoundError(f"there is no file {path}")
    module_name = f"layertap_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # so that data loader workers can unpickle what it defines
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent.resolve()))
    factory = getattr(module, name, None)
    if not callable(factory):
        functions = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise SelectionError(f"{path} has no function {name!r}; it has {', '.join(functions)}")
    made: Callable[[], Any] = factory
    return made


def _collection(prefix: str) -> Any:
    return _module(f"{prefix}:", *COLLECTIONS[prefix])


def _module(what: str, name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("layertap"):
            raise
        raise MissingPackageError(
            f"{what} needs {error.name}; install it with: pip install 'layertap[{extra}]'"
        ) from error


def _called(spec: str) -> str:
    path = spec.partition("?")[0]
    prefix = path.partition(":")[0]
    return Path(path).name if prefix not in COLLECTIONS and Path(path).suffix.lower() in FILES else spec


def split_options(text: str) -> tuple[str, dict[str, Any]]:
    """Return what stands before the `?`, and the options behind it; a `+` is one, as in names of files."""
    name, _, query = text.partition("?")
    pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True)
    return name, {key: _literal(value) for key, value in pairs}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false", "none") else text)
    except (ValueError, SyntaxError):
        return text
