"""Plain arrays: any function that turns a batch into a dict of arrays.

The reference backend, and the way in for what has no backend of its own. It needs numpy alone. Values may
be numpy arrays or anything that speaks DLPack and lies in host memory; dicts, tuples and lists inside the
dict are addressed by path. A function has no layers to look at, so they are found at its first call, and so
is what it gives to `lt.tap`; where that is all that is captured, it may return anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..capture import tapping
from ..capture.backend import Backend, Learned, Session, Sink, Surveyed
from ..capture.data import Batch
from ..capture.dtypes import DTYPES
from ..capture.errors import CaptureError, SelectionError
from ..capture.layout import Layout, array_view
from ..capture.pipeline import Memory, Piece, Slab
from ..capture.reduce import Chain, Rows
from ..capture.reduce_arrays import apply
from ..capture.taps import (
    OUTPUT,
    Choice,
    Layer,
    Patterns,
    TapName,
    check_some,
    choose,
    flatten,
    follow,
    no_match,
)

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
        heard: dict[str, list[Any]] = {}
        with tapping.heard_by(lambda name, value: _append(heard, name, value)):
            output = model(*batch.inputs, **batch.kwargs)
        there = [(_layer(str(key)), [value]) for key, value in _checked(output, bool(heard)).items()]
        there += [(_layer(name, "tap"), values) for name, values in heard.items()]
        return [_surveyed(layer, values) for layer, values in there]


class ArraysSession(Session):
    """A function whose results are captured."""

    def __init__(self, function: Any, layers: Patterns) -> None:
        self._function, self._patterns = function, layers
        self._sink: Sink | None = None
        self._learned: dict[TapName, Values] = {}
        self._heard = _Heard(self)
        self._taps: list[TapName] = []
        self._types: dict[str, str] = {}
        self._shapes: list[tuple[int, ...]] = []
        self._reductions: Sequence[tuple[Chain, Rows]] = ()
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
        self._heard.begin(n_rows, pieces)
        with tapping.heard_by(self._heard):
            output = self._function(*inputs, **kwargs)
        returned = _checked(output, self._heard.chosen)
        if pieces is None:
            self._learn(returned, n_rows)
        elif pieces:
            self._heard.check(self._taps)
            for i, tap in enumerate(self._taps):
                if self._types[tap.layer] != _TAP:
                    self._copy(i, self._find(returned, tap), n_rows, pieces)
        self._sink.done()
        return output

    def learned(self) -> list[Learned]:
        """Return what the first call gave."""
        self._taps = list(self._learned)
        self._shapes = [array.shape[1:] for array in self._learned.values()]
        return [Learned(t, self._types[t.layer], a.shape[1:], a.dtype) for t, a in self._learned.items()]

    def sample(self, i: int) -> Values:
        """Return tap `i` of the first call."""
        return self._learned[self._taps[i]]

    def reduce(self, reductions: Sequence[tuple[Chain, Rows]]) -> None:
        """Keep what is done to each tap."""
        self._reductions = reductions

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
        layers = [_layer(str(key)) for key in output]
        choices, misses = choose(layers, self._patterns)
        there = [*layers, *self._heard.layers]
        for pattern in misses:
            if choose(self._heard.layers, pattern)[1]:
                raise SelectionError(no_match(there, pattern))
        if not self._heard.learned:
            check_some(choices)
        twice = {layer.name for layer in layers} & {tap.layer for tap in self._heard.learned}
        if twice:
            raise CaptureError(f"lt.tap({min(twice)!r}, ...) has the name of a result; give it another")
        self._types = {layer.name: layer.type for layer in there}
        self._learned = {}
        for choice in choices:
            name = choice.layer.name
            value = follow(output, (name,)) if name in output else output[int(name)]
            found = self.leaves(choice, 1, value, n_rows)
            if not found:
                raise CaptureError(f"{name} gives no array")
            self._learned |= found
        self._learned |= self._heard.learned

    def leaves(self, choice: Choice, call: int, value: Any, n_rows: int) -> dict[TapName, Values]:
        """Return copies of the chosen arrays in what a layer gave.

        Raises:
            CaptureError: one of them cannot be stored.
        """
        found: dict[TapName, Values] = {}
        for path, leaf in flatten(value, _is_array):
            tap = TapName(choice.layer.name, call, path)
            if tap in found:
                raise CaptureError(f"two arrays are called {tap}; give them different keys")
            if choice.takes(tap):
                found[tap] = _storable(tap, _to_numpy(leaf), n_rows).copy()
        return found

    def choose(self, layer: Layer) -> list[Choice]:
        """Return what is chosen of one layer."""
        return choose([layer], self._patterns)[0]

    def copy_heard(
        self, call: int, name: str, value: Any, n_rows: int, pieces: Sequence[Piece]
    ) -> set[TapName]:
        """Copy what `lt.tap` got to where it belongs; return which taps that was."""
        found = set()
        for i, tap in enumerate(self._taps):
            if tap.layer == name and tap.call == call:
                try:
                    leaf = follow(value, tap.path)
                except (LookupError, TypeError):
                    continue
                self._copy(i, leaf, n_rows, pieces)
                found.add(tap)
        return found

    def _find(self, output: dict[Any, Any], tap: TapName) -> Any:
        try:
            return follow(output, (tap.layer, *tap.path))
        except (LookupError, TypeError):
            raise CaptureError(f"the function returned no {tap} this time") from None

    def _copy(self, i: int, value: Any, n_rows: int, pieces: Sequence[Piece]) -> None:
        assert self._layout is not None
        array = _to_numpy(value)
        expected = (n_rows, *self._shapes[i])
        if array.shape != expected:
            raise CaptureError(
                f"{self._taps[i]} has shape {array.shape}; {expected} follows from the first batch. "
                "A tap keeps the shape of its rows: give inputs of one size"
            )
        parts = apply(self._reductions[i][0], array, self._reductions[i][1]) if self._reductions else (array,)
        for piece in pieces:
            for number, part in zip(self._layout.numbers[i], parts, strict=True):
                view = array_view(self._layout, number, piece.slab.memory)
                np.copyto(view[piece.rows], part[piece.batch], casting="unsafe")


class _Heard:
    """What `lt.tap` gets while the function runs, copied at once."""

    def __init__(self, session: ArraysSession) -> None:
        self._session = session
        self.layers: list[Layer] = []
        self.learned: dict[TapName, Values] = {}
        self._fired: set[TapName] = set()
        self._calls: dict[str, int] = {}
        self._n_rows = 0
        self._pieces: Sequence[Piece] | None = ()

    @property
    def chosen(self) -> bool:
        """Whether anything that was heard is captured."""
        return bool(self.learned or self._fired) or self._pieces == []

    def begin(self, n_rows: int, pieces: Sequence[Piece] | None) -> None:
        """Open a step."""
        self._n_rows, self._pieces = n_rows, pieces
        self._calls.clear()
        self._fired.clear()
        if pieces is None:
            self.layers.clear()
        self.learned.clear()

    def __call__(self, name: str, value: Any) -> Any:
        call = self._calls[name] = self._calls.get(name, 0) + 1
        if self._pieces is None:
            self._learn(name, call, value)
        elif self._pieces:
            self._fired |= self._session.copy_heard(call, name, value, self._n_rows, self._pieces)
        return value

    def check(self, taps: Sequence[TapName]) -> None:
        """Refuse a step in which a tap did not fire.

        Raises:
            CaptureError: with its name.
        """
        names = {layer.name for layer in self.layers}
        missing = [tap for tap in taps if tap.layer in names and tap not in self._fired]
        if missing:
            raise CaptureError(f"lt.tap gave {missing[0]} in the first call and not in this one")

    def _learn(self, name: str, call: int, value: Any) -> None:
        layer = _layer(name, _TAP)
        if layer not in self.layers:
            self.layers.append(layer)
        for choice in self._session.choose(layer):
            self.learned |= self._session.leaves(choice, call, value, self._n_rows)


_TAP = "tap"


def _layer(name: str, kind: str = "array") -> Layer:
    return Layer(name, (kind,), kinds=(OUTPUT,))


def _append(heard: dict[str, list[Any]], name: str, value: Any) -> Any:
    heard.setdefault(name, []).append(value)
    return value


def _surveyed(layer: Layer, values: Sequence[Any]) -> Surveyed:
    outputs = tuple(
        (TapName(layer.name, call, path), array.shape, str(array.dtype))
        for call, value in enumerate(values, start=1)
        for path, leaf in flatten(value, _is_array)
        for array in [_to_numpy(leaf)]
    )
    return Surveyed(layer, len(values), outputs)


def _storable(tap: TapName, array: Values, n_rows: int) -> Values:
    if array.ndim == 0 or len(array) != n_rows:
        raise CaptureError(f"{tap} has shape {array.shape}; the batch has {n_rows} rows, and rows come first")
    if array.dtype not in DTYPES.values():
        raise CaptureError(f"{tap} holds {array.dtype}, which a store cannot hold")
    return array


def _checked(output: Any, tapped: bool) -> dict[Any, Any]:
    """Return the layers that a function's result is; a function that is tapped inside may return anything."""
    if tapped and not isinstance(output, dict):
        return {}
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
