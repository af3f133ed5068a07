"""Weights: random from a fixed seed, or those of a file, as tensors alone and all of them."""

from __future__ import annotations

import difflib
import os
import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.errors import DataError, FormatError, SelectionError, closest

#: Under what a training loop keeps the state dict in its checkpoint, in the order in which they are tried.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "weights", "net")

#: What wrappers (DataParallel, torch.compile, Lightning) put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")

#: Packages whose errors say that a server was not reached, or did not give a file.
_CLIENTS = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")

_NAMED = 3


@contextmanager
def seeded() -> Iterator[None]:
    """Make what is random inside the same every time, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def variable(key: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(key)
    os.environ[key] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


@contextmanager
def tensors_alone() -> Iterator[None]:
    """Let files of weights give tensors alone, whoever loads them: pickles can run any code."""
    with variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"):
        yield


def unreachable(error: BaseException) -> bool:
    """Return whether `error` says that something is neither on this machine nor to be had from a server."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS


def brief(error: BaseException) -> str:
    """Return type and first words of an error whose text may be long."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300] + ' ...'}"


def read_state(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors, .pt or .pth file by their names; nothing is unpickled.

    Args:
        path: the file.
        key: under what a checkpoint holds them; None for one of `STATE_KEYS`, or the file itself.

    Raises:
        DataError: it holds something else.
        SelectionError: there is no such key.
        FormatError: it cannot be read.
    """
    held = _safetensors(path) if path.suffix.lower() == ".safetensors" else _unpickled(path)
    if not isinstance(held, Mapping):
        raise DataError(f"{path} holds a {type(held).__name__} and no weights by their names (state_dict())")
    if key is not None:
        if key not in held:
            raise SelectionError(f"{path} holds nothing called {key!r}. {closest(key, map(str, held))}")
        held = held[key]
    elif not _is_state(held):
        held = next((held[k] for k in STATE_KEYS if _is_state(held.get(k))), held)
    if not _is_state(held):
        names = ", ".join(map(str, list(held)[:10])) if isinstance(held, Mapping) else type(held).__name__
        raise DataError(f"{path} holds no weights but {names}; say where they are with key=NAME")
    return dict(held)


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: object) -> None:
    """Put all of `state` into all of `model`.

    A prefix that a wrapper put before every name is dropped where the names fit without it. Of tensors that
    the model knows by two names, one is enough.

    Raises:
        DataError: some are missing, unexpected or of another shape; with their names and the closest.
    """
    own = model.state_dict(keep_vars=True)
    for prefix in _PREFIXES:
        if not own.keys() & state.keys() and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    given = {id(own[name]) for name in state if name in own}
    missing = [name for name, tensor in own.items() if name not in state and id(tensor) not in given]
    extra = [name for name in state if name not in own]
    other = [n for n in own if n in state and _shape(own[n]) != _shape(state[n])]
    if missing or extra or other:
        parts = [
            _said(f"{len(missing)} missing", [f"{n}{_near(n, extra)}" for n in missing]),
            _said(f"{len(extra)} unexpected", [f"{n}{_near(n, missing or own)}" for n in extra]),
            _said(
                f"{len(other)} of another shape",
                [f"{n} is {_shape(state[n])} and the model's {_shape(own[n])}" for n in other],
            ),
        ]
        raise DataError(
            f"{where} does not fit {type(model).__name__}: {'; '.join(part for part in parts if part)}. Name "
            "the model, and its options (num_classes=10), that the weights are of"
        )
    model.load_state_dict(state, strict=False)


def _safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error


def _unpickled(path: Path) -> Any:
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds objects beside weights, such as a whole module, and is not loaded: that could run "
            f"any code ({_reason(error)}). Where you trust it, save its weights alone: "
            "torch.save(model.state_dict(), 'weights.pt'), and name what builds the model: "
            "weights.pt?model=file.py:factory"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise FormatError(f"{path} cannot be read: {brief(error)}") from error


def _check_archive(path: Path) -> None:
    """Refuse what torch writes under the same suffix, and is a whole model."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile:  # older files of torch are none
        return
    if "constants.pkl" in files:
        raise DataError(
            f"{path} is a TorchScript archive, whose layers no hook sees: save the weights of the model that "
            "it was made from (torch.save(model.state_dict(), ...)), or export that with torch.export.save"
        )
    if "models/model.json" in files:
        raise DataError(f"{path} is an exported program: call it {path.with_suffix('.pt2').name}")


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "GLOBAL" in line), lines[0])


def _is_state(held: Any) -> bool:
    return isinstance(held, Mapping) and any(isinstance(v, Tensor) for v in held.values()) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state"))
        for name, value in held.items()
    )  # fmt: skip


def _shape(value: Any) -> str:
    return " x ".join(map(str, value.shape)) or "1" if isinstance(value, Tensor) else type(value).__name__


def _near(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (the closest is {near[0]})" if near else ""


def _said(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{what}: {', '.join(names[:_NAMED])}{more}" if names else ""
