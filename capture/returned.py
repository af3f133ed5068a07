"""Sessions of models whose taps come back with their result: no hook, one call that gives all.

What a call gives is keyed by layer and call; tuples, lists and dicts inside are addressed by path. The values
are copied to where they belong as soon as the call ends, or later by `transfer`, where a framework's arrays
never change and come to the host by themselves.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backend import Learned, Session, Sink, Surveyed
from .dtypes import DTYPES
from .errors import CaptureError
from .layout import Layout, array_view
from .left_out import told
from .pipeline import Memory, Piece, Slab
from .ragged import Form, check_in_time, checked_mask, ways
from .ragged_arrays import Given, check_rows, put_mask, put_rows, reduced_rows
from .reduce import Chain, Rows
from .reduce_arrays import apply
from .taps import Choice, Layer, Path, TapName, flatten, follow, lists_of_rows

Values = NDArray[Any]

#: What one call of a model gave: for each layer, call and kind (a name without a path), its value.
Returned = Mapping[TapName, Any]


class ReturnedSession(Session):
    """One model that gives what its layers gave, each time it is called."""

    def __init__(self, choices: Sequence[Choice] = ()) -> None:
        """Take what was chosen; where layers show themselves in the first call, that is known there."""
        self.left_out: dict[str, str] = {}
        self.taps: list[TapName] = []
        self.types: dict[str, str] = {choice.layer.name: choice.layer.type for choice in choices}
        self._choices = choices
        self._sink: Sink | None = None
        self._learned: dict[TapName, Given] = {}
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

    @abstractmethod
    def plain(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model without taps and return what it returns."""

    @abstractmethod
    def tapped(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Returned]:
        """Run the model and return what it returns, and what its chosen layers gave."""

    def n_rows(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return the rows of a batch: the length of the first array that it holds, or of a list of rows.

        Raises:
            CaptureError: it holds none.
        """
        return batch_rows((*inputs, *kwargs.values()))

    def dims(self, tap: TapName, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Return the names of the axes of a row, where the framework tells; else nothing."""
        return ()

    def is_array(self, value: Any) -> bool:
        """Return whether `value` is an array of the framework."""
        return is_array(value)

    def to_numpy(self, values: Any) -> Values:
        """Return `values` as a numpy array, by DLPack where it speaks that."""
        return to_numpy(values)

    def attach(self, sink: Sink) -> None:
        """Remember whom to tell; there is nothing to attach to."""
        self._sink = sink

    def detach(self) -> None:
        """Forget it."""
        self._sink = None
        self._learned.clear()

    def forward(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model and copy what its layers gave.

        Raises:
            CaptureError: they gave arrays of other shapes than before, or none.
        """
        if self._sink is None:
            return self.plain(inputs, kwargs)
        n_rows = self.n_rows(inputs, kwargs)
        self._pieces = pieces = self._sink.begin(n_rows)
        self._batch_shapes.clear()
        mask = kwargs.get(self.varying.mask) if self.varying.mask is not None else None
        self._mask = None if mask is None else np.asarray(self.to_numpy(mask))
        if pieces is None:
            self.n_tokens = self._mask.shape[1] if self._mask is not None and self._mask.ndim == 2 else None
        if pieces and self._mask is not None and any(form.minds_mask for form in self._forms):
            checked_mask(str(self.varying.mask), self._mask.shape, n_rows)
        output = self.step(inputs, kwargs, n_rows, pieces)
        self._sink.done()
        return output

    def step(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any], n_rows: int, pieces: Sequence[Piece] | None
    ) -> Any:
        """Run the model on `n_rows` rows that go to `pieces`, and return what it returns."""
        if pieces is not None and not pieces:
            return self.plain(inputs, kwargs)
        output, returned = self.tapped(inputs, kwargs)
        if pieces is None:
            self.learn(returned, n_rows)
        else:
            for i, tap in enumerate(self.taps):
                self.capture(i, self.find(returned, tap), n_rows, pieces)
        return output

    def learned(self) -> list[Learned]:
        """Return what the first call gave."""
        self.taps = list(self._learned)
        self._shapes = [_shape_of(given) for given in self._learned.values()]
        return [
            Learned(tap, self.types[tap.layer], shape, given[0].dtype, dims=self.dims(tap, shape))
            for (tap, given), shape in zip(self._learned.items(), self._shapes, strict=True)
        ]

    def sample(self, i: int) -> Values:
        """Return tap `i` of the first call."""
        given = self._learned[self.taps[i]]
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
        """Whether rows may vary and the model got no mask."""
        return bool(self.varying.rules) and self._mask is None

    def mask(self, mask: Any) -> None:
        """Say which tokens of the step's rows are their own."""
        self._mask = array = np.asarray(self.to_numpy(mask))
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
        for i, tap in enumerate(self.taps):
            values = self._learned[tap]
            self.copy(i, values, len(values), pieces)
        self._learned.clear()

    def learn(self, returned: Returned, n_rows: int) -> None:
        """Keep copies of what was chosen of the first call.

        Raises:
            CaptureError: what was asked for by name cannot be captured, or nothing is left.
        """
        for choice in self._choices:
            self._learned |= self.learn_choice(choice, returned, n_rows)
        self.check_learned()

    def learn_choice(self, choice: Choice, returned: Returned, n_rows: int) -> dict[TapName, Given]:
        """Return copies of what was chosen of one layer.

        Raises:
            CaptureError: what was asked for by name is not there or cannot be captured.
        """
        name, found, gave = choice.layer.name, dict[TapName, Given](), list[TapName]()
        calls = [tap for tap in returned if tap.layer == name and tap.kind == choice.kind]
        for tap in calls:
            gave += [TapName(name, tap.call, path, tap.kind) for path, _ in self.flat(returned[tap])]
            found |= self.leaves(choice, tap.call, returned[tap], n_rows)
        for wanted in (choice.only | (choice.named or frozenset())) or {TapName(name, 1, (), choice.kind)}:
            if not any(Choice(choice.layer, frozenset((wanted,)), choice.kind).takes(tap) for tap in gave):
                self.leave_out(
                    choice, wanted, "gives no array" if calls else "did not run in the first batch"
                )
        return found

    def check_learned(self) -> None:
        """Refuse that nothing can be captured.

        Raises:
            CaptureError: with the reasons.
        """
        if not self._learned:
            raise CaptureError("nothing that was chosen can be captured. " + "; ".join(told(self.left_out)))

    def leave_out(self, choice: Choice, tap: TapName, reason: str) -> None:
        """Note that a tap is left out.

        Raises:
            CaptureError: it was asked for by name.
        """
        if choice.insists(tap):
            raise CaptureError(f"{tap} {reason}")
        self.left_out[str(tap)] = reason

    def flat(self, value: Any) -> Iterable[tuple[Path, Any]]:
        """Return the path and value of every array in what a layer gave."""
        return flatten(value, self.is_array)

    def leaves(self, choice: Choice, call: int, value: Any, n_rows: int) -> dict[TapName, Given]:
        """Return copies of the chosen arrays in what a layer gave.

        Raises:
            CaptureError: one that was asked for by name cannot be stored.
        """
        found: dict[TapName, Given] = {}
        rows: set[Path] = set()
        name, kind = choice.layer.name, choice.kind
        for path, inside, arrays in self._row_arrays(value, n_rows) if self.varying.rules else ():
            tap = TapName(name, call, (*path, *inside), kind)
            if choice.takes(tap) and self.varying.rule(tap, choice.layer.type) is not None:
                rows |= {(*path, i, *inside) for i in range(n_rows)}
                self._listed[tap] = path, inside
                found[tap] = [_of_kind(tap, array, arrays[0]).copy() for array in arrays]
        for path, leaf in self.flat(value):
            tap = TapName(name, call, path, kind)
            if tap in found:
                raise CaptureError(f"two arrays are called {tap}; give them different keys")
            if path not in rows and choice.takes(tap):
                array = self.to_numpy(leaf)
                if (reason := _refusal(array, n_rows)) is None:
                    found[tap] = array.copy()
                else:
                    self.leave_out(choice, tap, reason)
        return found

    def find(self, returned: Returned, tap: TapName) -> Any:
        """Return the value of `tap` in what a call gave.

        Raises:
            CaptureError: it is not there.
        """
        try:
            return self.follow(returned[TapName(tap.layer, tap.call, (), tap.kind)], tap)
        except (LookupError, TypeError):
            raise CaptureError(f"the model gave no {tap} this time, and did in the first batch") from None

    def follow(self, value: Any, tap: TapName) -> Any:
        """Return the value of `tap` inside what its layer gave.

        Raises:
            LookupError: it is not there.
            TypeError: likewise.
        """
        path, inside = self._listed.get(tap, (tap.path, None))
        found = follow(value, path)
        return found if inside is None else [follow(row, inside) for row in found]

    def capture(self, i: int, value: Any, n_rows: int, pieces: Sequence[Piece]) -> None:
        """Copy as `copy` does, and tell of it where spans are kept."""
        start_s = time.perf_counter() if self.spans is not None else 0.0
        self.copy(i, value, n_rows, pieces)
        if self.spans is not None:
            self.spans.add(f"copy {self.taps[i]}", start_s, time.perf_counter())

    def copy(self, i: int, value: Any, n_rows: int, pieces: Sequence[Piece]) -> None:
        """Copy the rows of tap `i` of a batch to where they belong.

        Raises:
            CaptureError: their shape is not that of the first batch.
        """
        form = self._forms[i] if self._forms else None
        if form is not None and form.rule is not None:
            self._copy_varying(i, form, value, n_rows, pieces)
            return
        values = self.to_numpy(value)
        bound = self.bound(i, values.shape, n_rows)
        parts = (values,) if bound is None else apply(bound[0], values, bound[1], self._mask)
        self.copy_parts(i, parts, pieces)

    def bound(self, i: int, shape: tuple[int, ...], n_rows: int) -> tuple[Chain, Rows] | None:
        """Return what is done to tap `i` of a batch, whose shape is held to that of the first.

        Raises:
            CaptureError: it is another.
        """
        if shape == (n_rows, *self._shapes[i]):
            return self._reductions[i] if self._reductions else None
        form = self._forms[i] if self._forms else None
        bound = form.bound_to(shape[1:]) if form is not None and shape[:1] == (n_rows,) else None
        if bound is None:
            raise CaptureError(
                f"{self.taps[i]} has shape {shape}; {(n_rows, *self._shapes[i])} follows from the first "
                f"batch. {ways(str(self.taps[i]), shape[1:], self._shapes[i])}"
            )
        return bound

    def copy_parts(self, i: int, parts: Sequence[Values], pieces: Sequence[Piece]) -> None:
        """Copy rows of one shape, and what a reduction made beside them, to where they belong."""
        assert self._layout is not None
        for piece in pieces:
            for number, part in zip(self._layout.numbers[i], parts, strict=True):
                view = array_view(self._layout, number, piece.slab.memory)
                np.copyto(view[piece.rows], part[piece.batch], casting="unsafe")

    def _copy_varying(self, i: int, form: Form, value: Any, n_rows: int, pieces: Sequence[Piece]) -> None:
        """Copy rows that may differ in shape from those of other batches to where they belong."""
        assert self._layout is not None
        given = [self.to_numpy(row) for row in value] if isinstance(value, list) else self.to_numpy(value)
        if len(given) != n_rows:
            raise CaptureError(f"{form.name} has {len(given)} rows this time, and the batch has {n_rows}")
        for piece in pieces:
            check_rows(form, piece.row, given[piece.batch])
        made, *more = reduced_rows(form, given, self._mask)
        if not form.varies:
            self.copy_parts(i, [np.asarray(part) for part in (made, *more)], pieces)
            return
        if isinstance(made, np.ndarray):
            self._batch_shapes[i] = made.shape
        for piece in pieces:
            views = [array_view(self._layout, n, piece.slab.memory) for n in self._layout.numbers[i]]
            mask = None if self._mask is None else self._mask[piece.batch]
            put_rows(form, views, piece.start, made[piece.batch], mask)

    def _row_arrays(self, value: Any, n_rows: int) -> list[tuple[Path, Path, list[Values]]]:
        """Return the arrays inside lists with one entry a row: path of the list, path inside, entries."""
        found = []
        for path, items in lists_of_rows(value, n_rows):
            for inside, _ in self.flat(items[0]):
                try:
                    found.append((path, inside, [self.to_numpy(follow(item, inside)) for item in items]))
                except (LookupError, TypeError):
                    continue
        return found


def surveyed(layer: Layer, values: Sequence[Any], session: ReturnedSession) -> Surveyed:
    """Return what one forward showed of a layer that gave `values`, one for each call."""
    outputs = tuple(
        (TapName(layer.name, call, path), tuple(leaf.shape), str(session.to_numpy(leaf).dtype))
        for call, value in enumerate(values, start=1)
        for path, leaf in session.flat(value)
    )
    return Surveyed(layer, len(values), outputs)


def is_array(value: Any) -> bool:
    """Return whether `value` is an array of numpy, or of whatever speaks DLPack."""
    return isinstance(value, np.ndarray) or hasattr(value, "__dlpack__")


def to_numpy(values: Any) -> Values:
    """Return `values` as a numpy array of native byte order, without a copy where DLPack or numpy can."""
    if isinstance(values, np.ndarray) or not hasattr(values, "__dlpack__"):
        array = np.asarray(values)
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    if "Tracer" in type(values).__name__:
        raise CaptureError(
            "lt.tap got a value that JAX only traces: the function, or a part of it, is compiled by JAX. "
            "Give backend='jax'"
        )
    try:
        return np.from_dlpack(values)
    except (BufferError, RuntimeError, TypeError):
        # numpy's DLPack takes host memory of types that it has itself; __array__ may do more.
        return np.asarray(values)


def batch_rows(values: Sequence[Any]) -> int:
    """Return the rows of a batch: the first axis of the first array in it.

    Raises:
        CaptureError: it has none.
    """
    for value in values:
        shape = getattr(value, "shape", None)
        if shape:
            return int(shape[0])
        if isinstance(value, tuple) and value:
            return batch_rows(value)
        if isinstance(value, list):
            return len(value)
        if isinstance(value, dict) and value:
            return batch_rows(list(value.values()))
    raise CaptureError("the batch has no array whose first axis would count its rows")


def _shape_of(given: Given) -> tuple[int, ...]:
    """Return the shape of a row; of rows that differ, the greatest size of each axis."""
    if isinstance(given, np.ndarray):
        return given.shape[1:]
    return tuple(map(max, *(row.shape for row in given), given[0].shape))


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
            f"has no rows on its first axis: it has shape {array.shape}, the batch has {n_rows} rows (the "
            "length of the first array that the model got), and rows come first"
        )
    if array.size == 0 and not empty:
        return f"gives no values: the shape of one row is {array.shape[1:]}"
    return None
