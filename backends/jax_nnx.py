"""Flax NNX under JAX: a copy of the module runs, and its modules mark what they get and give.

Classes of layers are changed while a model is traced, and by one thread at a time; no module is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from operator import is_
from typing import Any

import jax
from flax import nnx

from ..capture.taps import ROOT, Layer
from .jax_models import KINDS, Held, JaxModel, marking

#: The attribute by which a layer of a traced copy of a model knows its name; Flax takes such for its own.
_NAME = "_pytree__layertap_name"


class NnxModel(JaxModel):
    """A Flax NNX module."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._names = {layer.name for layer in self.layers()}
        #: Splitting a module takes milliseconds: it is done again when something in it has changed.
        self._seen: _Seen | None = None

    @property
    def type(self) -> str:
        """The name of the module's class."""
        return type(self._model).__name__

    def layers(self) -> list[Layer]:
        """Return the modules that can be called, in the order in which they were given to the model."""
        found: dict[int, Layer] = {}
        for name, module in _modules(self._model):
            if id(module) in found:
                known = found[id(module)]
                found[id(module)] = Layer(known.name, known.types, module, (*known.aliases, name), KINDS)
            elif _is_called(type(module)):
                found[id(module)] = Layer(name, _types(module), module, kinds=KINDS)
        return list(found.values())

    def state(self) -> tuple[list[Any], Hashable]:
        """Return the arrays of the module's variables."""
        if self._seen is not None and self._seen.holds():
            return self._seen.arrays(), self._seen.form
        graph, state = nnx.split(self._model)
        arrays, structure = jax.tree.flatten(state)
        form = Held((graph, structure))
        self._seen = _Seen.of(self._model, state, form)
        return arrays, form

    def call(
        self,
        form: Any,
        arrays: Sequence[Any],
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        evaluating: bool,
    ) -> tuple[Any, Sequence[Any]]:
        """Call a copy of the module; each of its modules marks what it gives."""
        graph, structure = form.value
        copy = nnx.merge(graph, jax.tree.unflatten(structure, arrays))
        if evaluating:
            copy.eval()
        modules = list(_modules(copy))
        for name, module in modules:
            if name in self._names:
                # A part that is traced apart (nnx.remat, nnx.scan) is copied again, and this with it.
                setattr(module, _NAME, name)
        with _marking_calls({type(module) for _, module in modules}):
            output = copy(*inputs, **kwargs)
        # Variables that a run adds (what nnx.sow keeps) are its own.
        made = dict(nnx.to_flat_state(nnx.state(copy)))
        before = nnx.to_flat_state(jax.tree.unflatten(structure, arrays))
        return output, [
            leaf for path, variable in before for leaf in jax.tree.leaves(_alike(made.get(path), variable))
        ]

    def keep(self, form: Any, arrays: Sequence[Any]) -> None:
        """Keep what the run changed: statistics of a batch, counters of random numbers."""
        nnx.update(self._model, jax.tree.unflatten(form.value[1], arrays))

    def named_arrays(self) -> dict[str, Any]:
        """Return the module's variables by their paths; random numbers are no weights."""
        kept = nnx.Not(nnx.Any(nnx.RngState, nnx.Intermediate))
        return {
            ".".join(map(str, path)): leaf
            for path, variable in nnx.to_flat_state(nnx.state(self._model, kept))
            for leaf in jax.tree.leaves(variable)
        }


class _Seen:
    """An NNX module as it was split, and what tells that it has not changed since."""

    def __init__(
        self, form: Held, variables: Sequence[Any], parts: Sequence[tuple[Any, tuple[Any, ...]]]
    ) -> None:
        self.form, self._variables, self._parts = form, variables, parts

    @classmethod
    def of(cls, model: Any, state: Any, form: Held) -> _Seen | None:
        """Look at `model`; None where its variables are not found by the paths of its state."""
        variables = []
        for keys, array in jax.tree_util.tree_flatten_with_path(state)[0]:
            found = model
            for key in keys[:-1]:
                if not isinstance(key, jax.tree_util.DictKey):
                    return None
                inside = isinstance(found, list | tuple | dict | nnx.List | nnx.Dict)
                found = found[key.key] if inside else getattr(found, str(key.key), None)
            if not isinstance(found, nnx.Variable) or found.get_raw_value() is not array:
                return None
            variables.append(found)
        parts: list[tuple[Any, tuple[Any, ...]]] = []
        seen: set[int] = set()
        waiting = [model]
        while waiting:
            one = waiting.pop()
            held = vars(one) if isinstance(one, nnx.Pytree) else one
            if id(one) in seen or not isinstance(held, dict | list | tuple):
                continue
            seen.add(id(one))
            values = tuple(held.values() if isinstance(held, dict) else held)
            parts.append((held, values))
            waiting += values
        return cls(form, variables, parts)

    def holds(self) -> bool:
        """Return whether every part of the module still has what it had."""
        return all(
            len(held) == len(values)
            and all(map(is_, held.values() if isinstance(held, dict) else held, values))
            for held, values in self._parts
        )

    def arrays(self) -> list[Any]:
        """Return the arrays of the variables as they are now."""
        return [variable.get_raw_value() for variable in self._variables]


@contextmanager
def _marking_calls(classes: set[type]) -> Iterator[None]:
    """Let modules of these classes that know their names mark what they get and give, for a while."""
    put: list[tuple[type, Any]] = []
    inside: set[int] = set()

    def marked_by(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def marked_call(self: Any, *args: Any, **kwargs: Any) -> Any:
            name = vars(self).get(_NAME)
            # A class that calls its parent's is one layer.
            if name is None or id(self) in inside:
                return call(self, *args, **kwargs)
            inside.add(id(self))
            try:
                bound = partial(call, self)
                return marking(name, type(self).__name__, bound, args, kwargs)
            finally:
                inside.discard(id(self))

        return marked_call

    try:
        for one in {base for kind in classes for base in kind.__mro__ if "__call__" in vars(base)} - {object}:
            put.append((one, vars(one)["__call__"]))
            setattr(one, "__call__", marked_by(vars(one)["__call__"]))  # noqa: B010 (a class, whose call it is)
        yield
    finally:
        for one, call in put:
            setattr(one, "__call__", call)  # noqa: B010


def _alike(made: Any, before: Any) -> Any:
    """Return what a variable became, or what it was where it is gone or of another structure."""
    same: bool = jax.tree.structure(made) == jax.tree.structure(before)  # type: ignore[operator]
    return made if same else before


def _modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the modules of `model` by their dotted names, in the order in which they were given to it."""
    within: set[int] = set()

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, nnx.Module):
            if id(value) in within:
                return
            within.add(id(value))
            yield path or ROOT, value
            parts = enumerate(value) if isinstance(value, nnx.List) else vars(value).items()
            for key, part in parts:
                yield from walk(part, f"{path}.{key}" if path else str(key))
            within.discard(id(value))
        elif isinstance(value, list | tuple):
            for i, part in enumerate(value):
                yield from walk(part, f"{path}.{i}")
        elif isinstance(value, dict):
            for key, part in value.items():
                yield from walk(part, f"{path}.{key}")

    yield from walk(model, "")


def _is_called(kind: type) -> bool:
    return any("__call__" in vars(base) for base in kind.__mro__)


def _types(module: Any) -> tuple[str, ...]:
    return tuple(base.__name__ for base in type(module).__mro__)
