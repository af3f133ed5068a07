"""One run of a session: inputs and outputs bound to memory, a short batch filled up and cut again."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..capture.errors import PlanError
from ..capture.returned import batch_rows

if TYPE_CHECKING:
    from .onnx_model import OnnxModel

Values = NDArray[Any]
Named = Mapping[str, Values]


def run(
    model: OnnxModel, session: onnxruntime.InferenceSession, feeds: Named, into: Named | None = None
) -> dict[str, Any]:
    """Run `session` and return its results by name, which are views of the runtime's own memory.

    A model whose batches have a fixed size gets its last row again for those that lack, and they are cut
    from the results.

    Args:
        model: whose session it is.
        session: without or with taps.
        feeds: what goes in.
        into: memory of the right size for some of the results, in C order; they are written there.

    Raises:
        PlanError: the batch is larger than the model takes.
    """
    n_rows = batch_rows(list(feeds.values()))
    fed = filled_up(model, feeds, n_rows)
    names = [output.name for output in session.get_outputs()]
    binding = session.io_binding()
    for name, values in fed.items():
        _bind_input(binding, name, values)
    for name in names:
        if into and name in into:
            view = into[name]
            element = _element(view)
            binding.bind_output(name, "cpu", 0, element, view.shape, view.ctypes.data)
        else:
            binding.bind_output(name, "cpu")
    model.run(session, binding)
    found = {name: _view(value) for name, value in zip(names, binding.get_outputs(), strict=True)}
    if fed is feeds:
        return found
    size = model.batch_size
    return {name: cut(value, size, n_rows) for name, value in found.items()}


def result(model: OnnxModel, values: Mapping[str, Any]) -> Any:
    """Return what the model itself gives: its one result, or a dict of all by their names."""
    outputs = model.graph.outputs
    return values[outputs[0]] if len(outputs) == 1 else {name: values[name] for name in outputs}


def filled_up(model: OnnxModel, feeds: Named, n_rows: int) -> Named:
    """Return `feeds` with as many rows as the model takes; themselves where they have them.

    Raises:
        PlanError: they have more.
    """
    size = model.batch_size
    if size is None or n_rows == size:
        return feeds
    if n_rows > size:
        raise PlanError(
            f"{model.name} takes batches of {size} rows, and {n_rows} were given: use batch_size={size} "
            "(--batch-size), or export the model with an open batch axis"
        )
    return {
        name: np.concatenate([values, np.repeat(values[-1:], size - n_rows, 0)])
        if values.shape[:1] == (n_rows,)
        else values
        for name, values in feeds.items()
    }


def cut(value: Any, size: int | None, n_rows: int) -> Any:
    """Return the first `n_rows` rows of what has `size` of them."""
    return value[:n_rows] if isinstance(value, np.ndarray) and value.shape[:1] == (size,) else value


def _bind_input(binding: onnxruntime.IOBinding, name: str, values: Values) -> None:
    if values.dtype.kind in "OUS":  # texts have no memory to point to
        binding.bind_cpu_input(name, values)
    else:
        binding.bind_input(name, "cpu", 0, _element(values), values.shape, values.ctypes.data)


def _element(values: Values) -> int:
    from .onnx_model import element_of

    return element_of(values.dtype)


def _view(value: Any) -> Any:
    """Return the values of a result without a copy; None for a sequence, or a type that numpy has not."""
    from .onnx_model import dtype_of

    if not value.is_tensor():
        return None
    if value.data_type() == "tensor(string)":
        return value.numpy()
    dtype = dtype_of(value.element_type())
    if dtype is None:
        return None
    shape = tuple(value.shape())
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not n_bytes:
        return np.empty(shape, dtype)
    memory = (ctypes.c_char * n_bytes).from_address(value.data_ptr())
    memory.owner = value  # type: ignore[attr-defined]
    return np.frombuffer(memory, dtype).reshape(shape)
