"""Plain arrays: any function that turns a batch into a dict of arrays.

The reference backend, and the way in for what has no backend of its own. It needs numpy alone. Values may
be numpy arrays or anything that speaks DLPack and lies in host memory; dicts, tuples and lists inside the
dict are addressed by path. A function has no layers to look at, so they are found at its first call, and so
is what it gives to `lt.tap`; where that is all that is captured, it may return anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..capture import tapping
from ..capture.backend import Backend, Session, Surveyed
from ..capture.data import Batch
from ..capture.errors import CaptureError, SelectionError
from ..capture.pipeline import Piece
from ..capture.ragged_arrays import Given
from ..capture.returned import Returned, ReturnedSession, surveyed
from ..capture.taps import OUTPUT, Layer, Patterns, TapName, check_some, choose, no_match


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
        there = [(_layer(key), [value]) for key, value in _checked(output, bool(heard)).items()]
        there += [(_layer(name, _TAP), values) for name, values in heard.items()]
        session = ArraysSession(model, ())
        return [surveyed(layer, values, session) for layer, values in there]


class ArraysSession(ReturnedSession):
    """A function whose results are captured."""

    def __init__(self, function: Any, layers: Patterns) -> None:
        super().__init__()
        self._function, self._patterns = function, layers
        self._heard = _Heard(self)

    def plain(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function."""
        return self._function(*inputs, **kwargs)

    def tapped(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Returned]:
        """Call the function, and hear what it gives to `lt.tap`."""
        with tapping.heard_by(self._heard):
            output = self._function(*inputs, **kwargs)
        returned = _checked(output, self._heard.chosen)
        return output, {TapName(name): value for name, value in returned.items()}

    def step(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any], n_rows: int, pieces: Sequence[Piece] | None
    ) -> Any:
        """Call the function; what it gives to `lt.tap` is copied at once, what it returns at the end."""
        self._heard.begin(n_rows, pieces)
        output, returned = self.tapped(inputs, kwargs)
        if pieces is None:
            self.learn(returned, n_rows)
        elif pieces:
            self._heard.check(self.taps)
            for i, tap in enumerate(self.taps):
                if self.types[tap.layer] != _TAP:
                    self.capture(i, self.find(returned, tap), n_rows, pieces)
        return output

    def learn(self, returned: Returned, n_rows: int) -> None:
        """Choose among what the first call returned, and keep copies of it beside what was heard."""
        layers = [_layer(tap.layer) for tap in returned]
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
        self.types = {layer.name: layer.type for layer in there}
        self._learned = {}
        for choice in choices:
            self._learned |= self.learn_choice(choice, returned, n_rows)
        self._learned |= self._heard.learned
        self.check_learned()

    def hear(self, call: int, layer: Layer, value: Any, n_rows: int) -> dict[TapName, Given]:
        """Return copies of what is chosen of what `lt.tap` got in the first call."""
        found: dict[TapName, Given] = {}
        for choice in choose([layer], self._patterns)[0]:
            found |= self.leaves(choice, call, value, n_rows)
        return found

    def copy_heard(
        self, call: int, name: str, value: Any, n_rows: int, pieces: Sequence[Piece]
    ) -> set[TapName]:
        """Copy what `lt.tap` got to where it belongs; return which taps that was."""
        found = set()
        for i, tap in enumerate(self.taps):
            if tap.layer == name and tap.call == call:
                try:
                    leaf = self.follow(value, tap)
                except (LookupError, TypeError):
                    continue
                self.capture(i, leaf, n_rows, pieces)
                found.add(tap)
        return found


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
        self.learned |= self._session.hear(call, layer, value, self._n_rows)


_TAP = "tap"


def _layer(name: str, kind: str = "array") -> Layer:
    return Layer(name, (kind,), kinds=(OUTPUT,))


def _append(heard: dict[str, list[Any]], name: str, value: Any) -> Any:
    heard.setdefault(name, []).append(value)
    return value


def _checked(output: Any, tapped: bool) -> Mapping[str, Any]:
    """Return the layers that a function's result is; a function that is tapped inside may return anything."""
    if not isinstance(output, dict):
        if tapped:
            return {}
        hint = ". Give backend='jax' to a function of JAX's" if "jax" in type(output).__module__ else ""
        raise CaptureError(f"the function returned a {type(output).__name__}, not a dict of arrays{hint}")
    named = {str(key): value for key, value in output.items()}
    if len(named) < len(output):
        raise CaptureError(
            "two keys of the dict that the function returned read alike; give them other names"
        )
    return named
