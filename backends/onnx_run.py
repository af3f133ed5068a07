"""Runs of a session, with inputs and results bound to memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..capture.returned import batch_rows
from .onnx_dtypes import dtype_of, element_of

if TYPE_CHECKING:
    from .onnx_model import OnnxModel

Values = NDArray[Any]
Named = Mapping[str, Values]

_NOTHING: Named = {}


class Foreign:
    """A result that is no array of a type that a store can hold."""

    def __init__(self, kind: str) -> None:
        #: What it is, in the words of ONNX: `tensor(string)`, `seq(tensor(float))`.
        self.kind = kind


class Runner:
    """A session of a model, without or with taps."""

    def __init__(self, model: OnnxModel, session: onnxruntime.InferenceSession) -> None:
        self._model, self._session = model, session
        #: Its results by name, with the shapes that the graph gives them: numbers, names of sizes, or None.
        self.shapes: dict[str, list[int | str | None]] = {
            output.name: output.shape for output in session.get_outputs()
        }

    def __call__(self, feeds: Named, into: Named = _NOTHING) -> dict[str, Any]:
        """Run and return the results by name: views of the runtime's own memory, or of `into`.

        Args:
            feeds: what goes in; a batch too short for the model is filled up, and the results are cut.
            into: memory in C order for some of the results, of their shape and type: they are written there.

        Raises:
            PlanError: the batch is larger than the model takes.
        """
        inputs, n_rows = self._model.inputs, batch_rows(list(feeds.values()))
        fed = inputs.filled_up(feeds, n_rows)
        binding = self._session.io_binding()
        for name, values in fed.items():
            _bind_input(binding, name, values)
        for name in self.shapes:
            if (view := into.get(name)) is None:
                binding.bind_output(name, "cpu")
            else:
                binding.bind_output(name, "cpu", 0, element_of(view.dtype), view.shape, view.ctypes.data)
        self._model.run(self._session, binding)
        found = dict(zip(self.shapes, map(_view, binding.get_outputs()), strict=True))
        if fed is feeds:
            return found
        return {name: _cut(value, inputs.batch_size, n_rows) for name, value in found.items()}


def result(model: OnnxModel, values: Mapping[str, Any]) -> Any:
    """Return what the model itself gives: its one result, or a dict of all by their names."""
    names = model.graph.outputs
    return values[names[0]] if len(names) == 1 else {name: values[name] for name in names}


def _cut(value: Any, size: int | None, n_rows: int) -> Any:
    return value[:n_rows] if isinstance(value, np.ndarray) and value.shape[:1] == (size,) else value


def _bind_input(binding: onnxruntime.IOBinding, name: str, values: Values) -> None:
    if values.dtype.kind in "OUST":  # texts do not lie in one piece of memory
        binding.bind_cpu_input(name, values.astype(object))
    else:
        binding.bind_input(name, "cpu", 0, element_of(values.dtype), values.shape, values.ctypes.data)


def _view(value: onnxruntime.OrtValue) -> Any:
    """Return a result without copying it."""
    dtype = dtype_of(value.element_type()) if value.is_tensor() else None
    if dtype is None:
        return Foreign(value.data_type())
    shape = tuple(value.shape())
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not n_bytes:
        return np.empty(shape, dtype)
    memory = (ctypes.c_uint8 * n_bytes).from_address(value.data_ptr())
    memory.owner = value  # type: ignore[attr-defined]  # the view keeps the runtime's memory alive
    return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
