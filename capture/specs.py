"""What MODEL and DATA mean on the command line.

    MODEL   torchvision:resnet18[?weights=DEFAULT&num_classes=10]   file.onnx[?providers=NAME,NAME]
            keras:ResNet50[?weights=imagenet]   file.keras   file.py:factory
    DATA    folder:PATH (or a folder's path)   torchvision:CIFAR10?root=PATH   file.npy   file.npz
            file.py:factory

A factory is called without arguments. One for a model returns it; one for data returns what
`record_dataset` takes.
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
    SelectionError,
    StoreNotFoundError,
)

#: Prefix -> module with `load_model(name, options)`, and `load_data(name, options)` where it has data, and
#: its extra.
COLLECTIONS: dict[str, tuple[str, str]] = {
    "torchvision": ("layertap.backends.torchvision", "torch"),
    "keras": ("layertap.backends.keras_models", "keras"),
}

#: Suffix of a model's file -> module with `load_file(path, options)`, and its extra.
FILES: dict[str, tuple[str, str]] = {
    ".onnx": ("layertap.backends.onnx", "onnx"),
    ".keras": ("layertap.backends.keras_models", "keras"),
}


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


def load_model(spec: str) -> LoadedModel:
    """Return the model that `spec` names.

    Raises:
        SelectionError: there is none of that name.
        StoreNotFoundError: there is no such file.
    """
    if (file := _factory_file(spec)) is not None:
        return LoadedModel(_made(*file), spec)
    path, options = _options(spec)
    if (suffix := Path(path).suffix.lower()) in FILES:
        if not Path(path).is_file():
            raise StoreNotFoundError(f"there is no file {path}")
        read: LoadedModel = _module(f"a {suffix} file", *FILES[suffix]).load_file(Path(path), options)
        return replace(read, name=Path(path).name)
    prefix, _, rest = spec.partition(":")
    if prefix not in COLLECTIONS:
        raise SelectionError(
            f"{spec!r} is no model; write torchvision:NAME, {', '.join(FILES)} or file.py:factory (a "
            "function that returns it)"
        )
    name, options = _options(rest)
    loaded: LoadedModel = _collection(prefix).load_model(name, options)
    return replace(loaded, name=spec)


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
    name, options = _options(rest)
    return _collection(prefix).load_data(name, options)


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
                values = _inputs_and_labels(path, file)
    except DataError:
        raise
    except (ValueError, OSError, EOFError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    return ArraySource(*values, name=path.name, preprocess=preprocess)


def _inputs_and_labels(path: Path, file: Any) -> tuple[Any, Any]:
    inputs = next((key for key in ("x", "inputs", "images", "input", "arr_0") if key in file), None)
    labels = next((key for key in ("y", "labels", "label", "arr_1") if key in file), None)
    if inputs is None:
        raise DataError(
            f"{path} holds {', '.join(file.files)}; the inputs are to be called x, inputs or images"
        )
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


def _options(text: str) -> tuple[str, dict[str, Any]]:
    name, _, query = text.partition("?")
    return name, {key: _literal(value) for key, value in parse_qsl(query, keep_blank_values=True)}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false", "none") else text)
    except (ValueError, SyntaxError):
        return text
