"""Programs that `torch.export.save` wrote (.pt2).

`ExportedProgram.module()` is flat: it has modules of the old names, and runs none of them. `unflatten` makes
modules that run, under the names of the model that was exported, and hooks see them. What remains different:

* They get tensors, and sizes, by position, in an order of the exporter's, so `layer:input[0]` may be another
  argument than in the model.
* A module gives the tensors that are used after it: of a dict or tuple, perhaps one of its parts alone.
* The mode is that of the export: dropout that was on then stays on.
* `torch.export.load` is not made for files from strangers. Tensors load as tensors alone here and files with
  other objects are refused, but the expressions of its shapes are evaluated: load those that you trust.
"""

from __future__ import annotations

import json
import logging
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, unflatten

from ..capture.data import Batch
from ..capture.errors import DataError, FormatError, PlanError
from ..capture.specs import LoadedModel
from .torch_data import EXAMPLES
from .torch_weights import brief, tensors_alone

#: The table of what a program holds beside its weights.
_CONSTANTS = "_constants_config.json"

#: Operators that do something else in training, and the place of the argument that says so.
_TRAINING = {"dropout": 2, "feature_dropout": 2, "alpha_dropout": 2, "batch_norm": 5}


def load_file(path: Path, options: dict[str, Any]) -> LoadedModel:
    """Return the program as modules under the names of the model that it was exported from.

    Raises:
        PlanError: an option is unknown: there are none.
        FormatError: the file cannot be read.
        DataError: it was exported in training mode, or its modules cannot be found.
    """
    if options:
        raise PlanError(f"a .pt2 file has no option {min(options)!r}; it has none")
    _check_objects(path)
    program = _read(path)
    _check_mode(path, program)
    try:
        model = unflatten(program)
    except Exception as error:
        raise DataError(f"the modules of {path} cannot be made: {brief(error)}. Export it anew") from error
    for module in model.modules():
        _call_by_type(module)
    batch_rows = _batch_rows(program)
    EXAMPLES[model] = lambda n_rows: _example(program, batch_rows or n_rows)
    return LoadedModel(model.eval(), path.name, batch_rows=batch_rows)


def _read(path: Path) -> ExportedProgram:
    # It logs an error that it will raise with its traceback, and warns of formats that it still reads.
    log = logging.getLogger("torch.export")
    before, log.disabled = log.disabled, True
    package = logging.getLogger("torch.export.pt2_archive._package")
    package_before, package.disabled = package.disabled, True
    try:
        with tensors_alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except Exception as error:
        raise FormatError(
            f"{path} cannot be read as an exported program: {brief(error)}. It is to be written by "
            f"torch.export.save, by this version of torch ({torch.__version__}) or an older one"
        ) from error
    finally:
        log.disabled, package.disabled = before, package_before


def _check_objects(path: Path) -> None:
    """Refuse constants that would be unpickled to something else than a tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            tables = [name for name in archive.namelist() if name.endswith(_CONSTANTS)]
            held = [json.loads(archive.read(name)).get("config", {}) for name in tables]
    except (zipfile.BadZipFile, ValueError, AttributeError) as error:
        raise FormatError(f"{path} cannot be read as an exported program: {brief(error)}") from error
    for name, about in (item for table in held for item in table.items()):
        if not str(about.get("path_name")).startswith("tensor_"):
            raise DataError(
                f"{path} holds {name}, which is no tensor, and is not loaded: that could run any code. "
                "Export a model of tensors alone, or load it in a file of yours: file.py:factory"
            )


def _check_mode(path: Path, program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        name = getattr(node.target, "__name__", "").partition(".")[0]
        at = _TRAINING.get(name)
        if at is not None and len(node.args) > at and node.args[at] is True:
            raise DataError(
                f"{path} was exported in training mode ({name} is on, for good). Export it anew: "
                "torch.export.export(model.eval(), ...)"
            )


def _call_by_type(module: nn.Module) -> None:
    """Give a module the name of the class that it was, so that `type:Conv2d` finds it."""
    tell = getattr(module, "type_name", None)
    said = (tell() if tell is not None else None) or ""
    if name := said.rpartition(".")[2]:
        module.__class__ = type(name, (type(module),), {"__module__": type(module).__module__})


def _batch_rows(program: ExportedProgram) -> int | None:
    """Return the one number of rows that the program takes, None for any."""
    inputs = frozenset(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in inputs and isinstance(node.meta.get("val"), Tensor):
            shape = node.meta["val"].shape
            return int(shape[0]) if shape and isinstance(shape[0], int) else None
    return None


def _example(program: ExportedProgram, n_rows: int) -> Batch | None:
    """Return the inputs that the program was exported with, again and again up to `n_rows` rows."""
    if program.example_inputs is None:
        return None
    args, kwargs = program.example_inputs
    if not all(isinstance(v, Tensor) and v.ndim and len(v) for v in (*args, *kwargs.values())):
        return None

    def rows(values: Tensor) -> Tensor:
        return values.detach()[torch.arange(n_rows) % len(values)]

    return Batch(range(n_rows), tuple(map(rows, args)), {key: rows(values) for key, values in kwargs.items()})
