"""Plain arrays: any function that turns a batch into a dict of arrays.

The reference backend, and the way in for what has no backend of its own. It needs numpy alone. Values may
be numpy arrays or anything that speaks DLPack and lies in host memory; dicts, tuples and lists inside the
dict are addressed by path. A function has no layers to look at, so they are found at its first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..capture.backend import Backend, Learned, Session, Sink, Surveyed
from ..capture.data import Batch
from ..capture.dtypes import DTYPES
from ..capture.errors import CaptureError
from ..capture.layout import Layout, array_view
from ..capture.pipeline import Memory, Piece, Slab
from ..capture.taps import Choice, Layer, Patterns, TapName, flatten, follow, select

Values = NDArray[Any]


class ArraysBackend(Backend):
    """Functions from a batch to a dict of arrays."""

    name = "arrays"

    def accepts(self, model: Any) -> bool:
        """Return whether `model` can be called."""
        return callable(model)

    def layers(self, model: Any) -> list[Layer]:
        """Return nothing: a function shows its layers when it is called."""
        return []

    def session(self, model: Any, layers: Patterns) -> Session:
        """Choose among the keys of the dict that `model` will return."""
        return ArraysSession(model, layers)

    def survey(self, model: Any, batch: Batch) -> list[Surveyed]:
        """Call the function once."""
        output = model(*batch.inputs, **batch.kwargs)
        found = []
        for key, value in _checked(output).items():
            leaves = [(TapName(str(key), 1, p), _to_numpy(leaf)) for p, leaf in flatten(value, _is_array)]
            outputs = tuple((tap, array.shape, str(array.dtype)) for tap, array in leaves)
            found.append(Surveyed(Layer(str(key), ("array",)), 1, outputs))
        return found


class ArraysSession(Session):
    """A function whose results are captured."""

    def __init__(self, function: Any, layers: Patterns) -> None:
        self._function, self._patterns = function, layers
        self._sink: Sink | None = None
        self._learned: dict[TapName, Values] = {}
        self._taps: list[TapName] = []
        self._layout: Layout | None = None

    def attach(self, sink: Sink) -> None:
        """Remember whom to tell; there is nothing to attach to."""
        self._sink = sink

    def detach(self) -> None:
        """Forget it."""
        self._sink = None
        self._learned.clear()

    def forward(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function and copy what it returned.

        Raises:
            CaptureError: it returned no dict, or arrays of other shapes than before.
        """
        if self._sink is None:
            return self._function(*inputs, **kwargs)
        n_rows = _batch_rows((*inputs, *kwargs.values()))
        pieces = self._sink.begin(n_rows)
        output = _checked(self._function(*inputs, **kwargs))
        if pieces is None:
            self._learn(output, n_rows)
        elif pieces:
            for i, tap in enumerate(self._taps):
                self._copy(i, self._find(output, tap), n_rows, pieces)
        self._sink.done()
        return output

    def learned(self) -> list[Learned]:
        """Return what the first call gave."""
        self._taps = list(self._learned)
        return [Learned(tap, "array", a.shape[1:], a.dtype) for tap, a in self._learned.items()]

    def sample(self, i: int) -> Values:
        """Return tap `i` of the first call."""
        return self._learned[self._taps[i]]

    def prepare(self, layout: Layout, memory: Memory, slabs: Sequence[Slab]) -> None:
        """Keep the layout."""
        self._layout = layout

    def replay(self, pieces: Sequence[Piece]) -> None:
        """Copy the first call's arrays to where they belong."""
        for i, tap in enumerate(self._taps):
            values = self._learned[tap]
            self._copy(i, values, len(values), pieces)
        self._learned.clear()

    def to_numpy(self, values: Any) -> Values:
        """Return `values` as a numpy array, by DLPack where it speaks that."""
        return _to_numpy(values)

    def _learn(self, output: dict[Any, Any], n_rows: int) -> None:
        layers = [Layer(str(key), ("array",)) for key in output]
        for choice in select(layers, self._patterns):
            found = self._leaves(choice, output)
            if not found:
                raise CaptureError(f"{choice.layer.name} gives no array")
            for tap, value in found.items():
                array = _to_numpy(value)
                if array.ndim == 0 or len(array) != n_rows:
                    raise CaptureError(
                        f"{tap} has shape {array.shape}; the batch has {n_rows} rows, and rows come first"
                    )
                if array.dtype not in DTYPES.values():
                    raise CaptureError(f"{tap} holds {array.dtype}, which a store cannot hold")
                self._learned[tap] = array.copy()

    def _leaves(self, choice: Choice, output: dict[Any, Any]) -> dict[TapName, Any]:
        name = choice.layer.name
        value = follow(output, (name,)) if name in output else output[int(name)]
        found: dict[TapName, Any] = {}
        for path, leaf in flatten(value, _is_array):
            tap = TapName(name, 1, path)
            if tap in found:
                raise CaptureError(f"two arrays are called {tap}; give them different keys")
            if choice.takes(tap):
                found[tap] = leaf
        return found

    def _find(self, output: dict[Any, Any], tap: TapName) -> Any:
        try:
            return follow(output, (tap.layer, *tap.path))
        except (LookupError, TypeError):
            raise CaptureError(f"the function returned no {tap} this time") from None

    def _copy(self, i: int, value: Any, n_rows: int, pieces: Sequence[Piece]) -> None:
        assert self._layout is not None
        array = _to_numpy(value)
        expected = (n_rows, *self._layout.taps[i].shape)
        if array.shape != expected:
            raise CaptureError(
                f"{self._taps[i]} has shape {array.shape}; {expected} follows from the first batch. "
                "A tap keeps the shape of its rows: give inputs of one size"
            )
        for piece in pieces:
            view = array_view(self._layout, i, piece.slab.memory)
            with np.errstate(over="ignore"):  # a cast that overflows stores an infinity, which is counted
                np.copyto(view[piece.rows], array[piece.batch], casting="unsafe")


def _checked(output: Any) -> dict[Any, Any]:
    if not isinstance(output, dict):
        raise CaptureError(f"the function returned a {type(output).__name__}, not a dict of arrays")
    return output


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "__dlpack__")


def _to_numpy(values: Any) -> Values:
    if isinstance(values, np.ndarray) or not hasattr(values, "__dlpack__"):
        array = np.asarray(values)
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    try:
        return np.from_dlpack(values)
    except (BufferError, RuntimeError, TypeError):
        # numpy's DLPack takes host memory of types that it has itself; __array__ may do more.
        return np.asarray(values)


def _batch_rows(values: Sequence[Any]) -> int:
    for value in values:
        shape = getattr(value, "shape", None)
        if shape:
            return int(shape[0])
        if isinstance(value, list | tuple):
            return len(value)
        if isinstance(value, dict) and value:
            return _batch_rows(list(value.values()))
    raise CaptureError("the batch has no array whose first axis would count its rows")
