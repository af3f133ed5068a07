"""What goes into an ONNX model: inputs by position or name, in the types and the batch size that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ValueInfoProto

from ..capture.dtypes import DType
from ..capture.errors import DataError, PlanError
from ..capture.returned import to_numpy
from .onnx_dtypes import dtype_of

Values = NDArray[Any]
Named = Mapping[str, Values]


class Inputs:
    """The inputs of a graph."""

    def __init__(self, graph: GraphProto) -> None:
        weights = {tensor.name for tensor in graph.initializer}
        #: All that may be given; those that are also weights have a value already.
        self.optional = {value.name: value for value in graph.input}
        self.needed = [value for value in graph.input if value.name not in weights]
        #: The first input that has axes: its first one is that of the rows.
        self._rows = next((value for value in self.needed if value.type.tensor_type.shape.dim), None)
        #: How many rows a batch has; None where the model leaves that open.
        self.batch_size = None if self._rows is None else _size(self._rows, 0)

    @property
    def has_rows(self) -> bool:
        """Whether the graph says of some input that it has axes, and so rows."""
        return self._rows is not None

    @property
    def names(self) -> list[str]:
        """The names of those that must be given."""
        return [value.name for value in self.needed]

    def taken(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Values]:
        """Return what was given for each input, cast to its type.

        Floating-point values are cast to another floating-point type, and whole numbers and truth values to
        another type of whole numbers if all of them fit; nothing else is.

        Raises:
            DataError: an input is missing, unknown, or of a type that is not cast.
        """
        given: dict[str, Any] = {}
        if len(inputs) == 1 and isinstance(inputs[0], dict):
            given, inputs = dict(inputs[0]), ()
        there = f"the model's inputs are {', '.join(self.names)}"
        if len(inputs) > len(self.names):
            raise DataError(f"{there}, and {len(inputs)} were given")
        given |= zip(self.names, inputs, strict=False)
        for name, value in kwargs.items():
            if name in given:
                raise DataError(f"the input {name!r} was given twice")
            given[name] = value
        if unknown := [name for name in given if name not in self.optional]:
            raise DataError(f"there is no input {unknown[0]!r}; {there}")
        if missing := [name for name in self.names if name not in given]:
            raise DataError(f"the input {missing[0]!r} is missing; {there}")
        return {name: _cast(self.optional[name], value) for name, value in given.items()}

    def filled_up(self, feeds: Named, n_rows: int) -> Named:
        """Return `feeds` with as many rows as the model takes, the last one again for those that lack.

        Raises:
            PlanError: they have more.
        """
        size = self.batch_size
        if size is None or n_rows == size:
            return feeds
        if n_rows > size:
            raise PlanError(
                f"the model takes batches of {size} rows, and {n_rows} were given: use batch_size={size} "
                "(--batch-size), or export it with an open batch axis"
            )
        return {
            name: np.concatenate([values, np.repeat(values[-1:], size - n_rows, axis=0)])
            if values.shape[:1] == (n_rows,)
            else values
            for name, values in feeds.items()
        }

    def noise(self, n_rows: int) -> dict[str, Values] | None:
        """Return noise for every input; None where a shape or type is left open.

        Whole numbers are zeros: as places in a table, others may not be there.
        """
        rng = np.random.default_rng(0)
        found = {}
        for value in self.needed:
            dtype = dtype_of(value.type.tensor_type.elem_type)
            sizes = [_size(value, i) for i in range(1, len(value.type.tensor_type.shape.dim))]
            shape = [size for size in sizes if size is not None]
            if dtype is None or len(shape) < len(sizes) or not value.type.tensor_type.shape.dim:
                return None
            noise = rng.standard_normal((n_rows, *shape))
            found[value.name] = (noise if _is_float(dtype) else 0 * noise).astype(dtype)
        return found


def _size(value: ValueInfoProto, axis: int) -> int | None:
    dims = value.type.tensor_type.shape.dim
    return dims[axis].dim_value if axis < len(dims) and dims[axis].HasField("dim_value") else None


def _cast(to: ValueInfoProto, value: Any) -> Values:
    values, wanted = to_numpy(value), dtype_of(to.type.tensor_type.elem_type)
    if wanted is None or values.dtype == wanted:
        return np.ascontiguousarray(values)
    if values.size and not _fits(values, wanted):
        raise DataError(
            f"the input {to.name!r} takes {wanted} and got {values.dtype}, which is not cast: give it "
            "values of its type"
        )
    return np.ascontiguousarray(values.astype(wanted))


def _fits(values: Values, wanted: DType) -> bool:
    if _is_float(values.dtype) and _is_float(wanted):
        return True
    if values.dtype.kind not in "iub" or wanted.kind not in "iu":
        return False
    limits = np.iinfo(wanted)
    return int(values.min()) >= limits.min and int(values.max()) <= limits.max


def _is_float(dtype: DType) -> bool:
    return "float" in dtype.name
