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
from ..capture.left_out import told
from ..capture.pipeline import Memory, Piece, Slab
from ..capture.ragged import Form, check_in_time, checked_mask, ways
from ..capture.ragged_arrays import Given, check_rows, put_mask, put_rows, reduced_rows
from ..capture.reduce import Chain, Rows
from ..capture.reduce_arrays import apply
from ..capture.taps import (
    OUTPUT,
    Choice,
    Layer,
    Path,
    Patterns,
    TapName,
    check_some,
    choose,
    flatten,
    follow,
    lists_of_rows,
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
        self.left_out: dict[str, str] = {}
        self._learned: dict[TapName, Given] = {}
        self._heard = _Heard(self)
        self._taps: list[TapName] = []
        self._types: dict[str, str] = {}
        self._shapes: list[tuple[int, ...]] = []
        self._reductions: Sequence[tuple[Chain, Rows]] = ()
        self._forms: Sequence[Form] = ()
        self._mask: Values | None = None
        self._pieces: Sequence[Piece] | None = ()
        #: Of taps whose rows may vary, the shape of the batch.
        self._batch_shapes: dict[int, tuple[int, ...]] = {}
        #: Of taps that are a list with one array for each row, the paths of the list and inside an entry.
        self._listed: dict[TapName, tuple[Path, Path]] = {}
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
        self._pieces = pieces
        self._batch_shapes.clear()
        mask = kwargs.get(self.varying.mask) if self.varying.mask is not None else None
        self._mask = None if mask is None else np.asarray(_to_numpy(mask))
        if pieces is None:
            self.n_tokens = self._mask.shape[1] if self._mask is not None and self._mask.ndim == 2 else None
        if pieces and self._mask is not None and any(form.minds_mask for form in self._forms):
            checked_mask(str(self.varying.mask), self._mask.shape, n_rows)
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
        self._shapes = [_shape_of(given) for given in self._learned.values()]
        return [
            Learned(tap, self._types[tap.layer], shape, given[0].dtype)
            for (tap, given), shape in zip(self._learned.items(), self._shapes, strict=True)
        ]

    def sample(self, i: int) -> Values:
        """Return tap `i` of the first call."""
        given = self._learned[self._taps[i]]
        return given if isinstance(given, np.ndarray) else given[0][None]

    def fit(self, forms: Sequence[Form]) -> None:
        """Know how the rows of each tap may vary.

        Raises:
            CaptureError: the first call's mask does not say which tokens are its rows' own.
        """
        self._forms = forms
        if self._mask is not None and any(form.minds_mask for form in forms):
            checked_mask(str(self.varying.mask), self._mask.shape, len(next(iter(self._learned.values()))))

    @property
    def lacks_mask(self) -> bool:
        """Whether rows may vary and the function got no mask."""
        return bool(self.varying.rules) and self._mask is None

    def mask(self, mask: Any) -> None:
        """Say which tokens of the step's rows are their own."""
        self._mask = array = np.asarray(_to_numpy(mask))
        if self._pieces is None:
            self.n_tokens = array.shape[1] if array.ndim == 2 else None
        elif self._pieces:
            assert self._layout is not None
            check_in_time(self._forms)
            checked_mask(str(self.varying.mask), array.shape, len(array))
            for i, shape in self._batch_shapes.items():
                for piece in self._pieces:
                    beside = array_view(self._layout, self._layout.numbers[i][1], piece.slab.memory)
                    put_mask(self._forms[i], beside, piece.start, shape, array[piece.batch])

    def reduced(self, i: int, chain: Chain, rows: Rows) -> tuple[Values, ...]:
        """Return what `chain` makes of tap `i` of the first call."""
        return apply(chain, self.sample(i), rows, self._mask)

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
            gave = [TapName(name, 1, path) for path, _ in flatten(value, _is_array)]
            for wanted in (choice.only | (choice.named or frozenset())) or {TapName(name)}:
                if not any(Choice(choice.layer, frozenset((wanted,))).takes(tap) for tap in gave):
                    self._leave_out(choice, wanted, "gives no array")
            self._learned |= found
        self._learned |= self._heard.learned
        if not self._learned:
            raise CaptureError("nothing that was chosen can be captured. " + "; ".join(told(self.left_out)))

    def _leave_out(self, choice: Choice, tap: TapName, reason: str) -> None:
        if choice.insists(tap):
            raise CaptureError(f"{tap} {reason}")
        self.left_out[str(tap)] = reason

    def leaves(self, choice: Choice, call: int, value: Any, n_rows: int) -> dict[TapName, Given]:
        """Return copies of the chosen arrays in what a layer gave.

        Raises:
            CaptureError: one that was asked for by name cannot be stored.
        """
        found: dict[TapName, Given] = {}
        rows: set[Path] = set()
        for path, inside, arrays in _row_arrays(value, n_rows) if self.varying.rules else ():
            tap = TapName(choice.layer.name, call, (*path, *inside))
            if choice.takes(tap) and self.varying.rule(tap, choice.layer.type) is not None:
                rows |= {(*path, i, *inside) for i in range(n_rows)}
                self._listed[tap] = path, inside
                found[tap] = [_of_kind(tap, array, arrays[0]).copy() for array in arrays]
        for path, leaf in flatten(value, _is_array):
            tap = TapName(choice.layer.name, call, path)
            if tap in found:
                raise CaptureError(f"two arrays are called {tap}; give them different keys")
            if path not in rows and choice.takes(tap):
                array = _to_numpy(leaf)
                if (reason := _refusal(array, n_rows)) is None:
                    found[tap] = array.copy()
                else:
                    self._leave_out(choice, tap, reason)
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
                    leaf = self._follow(value, (), tap)
                except (LookupError, TypeError):
                    continue
                self._copy(i, leaf, n_rows, pieces)
                found.add(tap)
        return found

    def _find(self, output: dict[Any, Any], tap: TapName) -> Any:
        try:
            return self._follow(output, (tap.layer,), tap)
        except (LookupError, TypeError):
            raise CaptureError(f"the function returned no {tap} this time") from None

    def _follow(self, value: Any, before: Path, tap: TapName) -> Any:
        path, inside = self._listed.get(tap, (tap.path, None))
        found = follow(value, (*before, *path))
        return found if inside is None else [follow(row, inside) for row in found]

    def _copy(self, i: int, value: Any, n_rows: int, pieces: Sequence[Piece]) -> None:
        assert self._layout is not None
        form = self._forms[i] if self._forms else None
        if form is not None and form.rule is not None:
            self._put(i, form, value, n_rows, pieces)
            return
        array = _to_numpy(value)
        expected, bound = (n_rows, *self._shapes[i]), self._reductions[i] if self._reductions else None
        if array.shape != expected:
            alike = form is not None and array.shape[:1] == (n_rows,)
            bound = form.bound_to(array.shape[1:]) if form is not None and alike else None
            if bound is None:
                raise CaptureError(
                    f"{self._taps[i]} has shape {array.shape}; {expected} follows from the first batch. "
                    + ways(str(self._taps[i]), array.shape[1:], self._shapes[i])
                )
        parts = (array,) if bound is None else apply(bound[0], array, bound[1], self._mask)
        self._put_alike(i, parts, pieces)

    def _put_alike(self, i: int, parts: Sequence[Values], pieces: Sequence[Piece]) -> None:
        """Put rows of one shape where they belong."""
        assert self._layout is not None
        for piece in pieces:
            for number, part in zip(self._layout.numbers[i], parts, strict=True):
                view = array_view(self._layout, number, piece.slab.memory)
                np.copyto(view[piece.rows], part[piece.batch], casting="unsafe")

    def _put(self, i: int, form: Form, value: Any, n_rows: int, pieces: Sequence[Piece]) -> None:
        """Put rows that may differ in shape from those of other batches where they belong."""
        assert self._layout is not None
        given = [_to_numpy(row) for row in value] if isinstance(value, list) else _to_numpy(value)
        if len(given) != n_rows:
            raise CaptureError(f"{form.name} has {len(given)} rows this time, and the batch has {n_rows}")
        for piece in pieces:
            check_rows(form, piece.row, given[piece.batch])
        made, *more = reduced_rows(form, given, self._mask)
        if not form.varies:
            self._put_alike(i, [np.asarray(part) for part in (made, *more)], pieces)
            return
        if isinstance(made, np.ndarray):
            self._batch_shapes[i] = made.shape
        for piece in pieces:
            views = [array_view(self._layout, n, piece.slab.memory) for n in self._layout.numbers[i]]
            mask = None if self._mask is None else self._mask[piece.batch]
            put_rows(form, views, piece.start, made[piece.batch], mask)


class _Heard:
    """What `lt.tap` gets while the function runs, copied at once."""

    def __init__(self, session: ArraysSession) -> None:
        self._session = session
        self.layers: list[Layer] = []
        self.learned: dict[TapName, Given] = {}
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


def _shape_of(given: Given) -> tuple[int, ...]:
    """Return the shape of a row; of rows that differ, the greatest size of each axis."""
    if isinstance(given, np.ndarray):
        return given.shape[1:]
    return tuple(map(max, *(row.shape for row in given), given[0].shape))


def _row_arrays(value: Any, n_rows: int) -> list[tuple[Path, Path, list[Values]]]:
    """Return the arrays inside lists with one entry a row: the list's path, the path inside, one a row."""
    found = []
    for path, items in lists_of_rows(value, n_rows):
        for inside, _ in flatten(items[0], _is_array):
            try:
                found.append((path, inside, [_to_numpy(follow(item, inside)) for item in items]))
            except (LookupError, TypeError):
                continue
    return found


def _of_kind(tap: TapName, array: Values, first: Values) -> Values:
    if (array.dtype, array.ndim) != (first.dtype, first.ndim):
        raise CaptureError(f"{tap} has rows of different types or numbers of axes")
    if (reason := _refusal(array[None], 1, empty=True)) is not None:
        raise CaptureError(f"{tap} {reason}")
    return array


def _refusal(array: Values, n_rows: int, empty: bool = False) -> str | None:
    """Return why `array` cannot be captured, as the end of a sentence; None where it can."""
    if array.dtype not in DTYPES.values():
        return f"holds {array.dtype}, which a store cannot hold"
    if array.ndim == 0 or len(array) != n_rows:
        return (
            f"has no rows on its first axis: it has shape {array.shape}, the batch has {n_rows} rows, and "
            "rows come first"
        )
    if array.size == 0 and not empty:
        return f"gives no values: the shape of one row is {array.shape[1:]}"
    return None


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
