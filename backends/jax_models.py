"""What runs under JAX: Flax modules (NNX, and Linen with its variables), and functions that are traced.

Each kind of model says which arrays it holds, and how it is called with them under a trace. Layers mark what
they get and give while they are traced; nothing is left in the model or its classes afterwards.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from operator import is_
from typing import Any

import jax
import numpy as np

from ..capture.backend import Json
from ..capture.errors import PlanError
from ..capture.fingerprint import fingerprint
from ..capture.taps import OUTPUT, ROOT, Layer
from .jax_marks import marked, marked_arguments

#: What a layer of JAX's can be tapped for.
KINDS = ("input", OUTPUT)

#: The attribute by which a layer of a traced copy of a model knows its name.
_NAME = "_layertap_name"


class JaxModel(ABC):
    """One model, whatever library it is written with."""

    def layers(self) -> list[Layer]:
        """Return the layers that are known before the model runs, in its order."""
        return []

    @abstractmethod
    def state(self) -> tuple[list[Any], Hashable]:
        """Return the arrays that the model holds now, and all else that it is, as something to compare."""

    @abstractmethod
    def call(
        self,
        form: Any,
        arrays: Sequence[Any],
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        evaluating: bool,
    ) -> tuple[Any, Sequence[Any]]:
        """Run the model of `form` with `arrays` under a trace; return its result and the arrays after it."""

    def keep(self, form: Any, arrays: Sequence[Any]) -> None:  # noqa: B027 (most do not change)
        """Keep the arrays that the model holds after a run that changed them."""

    def named_arrays(self) -> dict[str, Any]:
        """Return the arrays that the model holds by their names."""
        return {}

    def dims(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Return the axes of what a layer gives, rows of `shape`: Flax's convolutions have channels last."""
        return ("y", "x", "feature") if len(shape) == 3 else ()

    @property
    def type(self) -> str:
        """The name of its class or function."""
        return type(self).__name__

    def describe(self) -> Json:
        """Return type, number of parameters, and a checksum of them."""
        arrays = self.named_arrays()
        return {
            "type": self.type,
            "parameters": sum(int(np.prod(array.shape)) for array in arrays.values()),
            "weights": fingerprint(
                (name, str(array.dtype), tuple(array.shape), np.asarray(array))
                for name, array in arrays.items()
            ),
        }


class FunctionModel(JaxModel):
    """A function of arrays, or a module that is a tree of arrays, as Equinox's are: tapped by `lt.tap`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @property
    def type(self) -> str:
        """The name of the function, or of the module's class."""
        return str(getattr(self._function, "__name__", type(self._function).__name__))

    def state(self) -> tuple[list[Any], Hashable]:
        """Return the arrays of the tree; a plain function is a tree without any."""
        leaves, structure = jax.tree.flatten(self._function)
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        held = tuple(None if isinstance(leaf, jax.Array) else Held(leaf) for leaf in leaves)
        return arrays, (structure, held)

    def call(
        self,
        form: Any,
        arrays: Sequence[Any],
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        evaluating: bool,
    ) -> tuple[Any, Sequence[Any]]:
        """Call it."""
        structure, held = form
        rest = iter(arrays)
        function = structure.unflatten([next(rest) if one is None else one.value for one in held])
        return function(*inputs, **kwargs), ()

    def named_arrays(self) -> dict[str, Any]:
        """Return the arrays of the tree by their paths."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self._function)
        return {jax.tree_util.keystr(keys): leaf for keys, leaf in leaves if isinstance(leaf, jax.Array)}


class LinenModel(JaxModel):
    """A Flax Linen module with its variables: `(module, variables)`, or `module.bind(variables)`."""

    def __init__(self, model: Any) -> None:
        module, self._variables = model if isinstance(model, tuple) else model.unbind()
        #: A copy of no other's, so that what a trace leaves in it is nobody's.
        self._module = module.clone(parent=None) if module.parent is None else module

    @property
    def type(self) -> str:
        """The name of the module's class."""
        return type(self._module).__name__

    def state(self) -> tuple[list[Any], Hashable]:
        """Return the arrays of the variables."""
        arrays, structure = jax.tree.flatten(self._variables)
        return arrays, structure

    def call(
        self,
        form: Any,
        arrays: Sequence[Any],
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        evaluating: bool,
    ) -> tuple[Any, Sequence[Any]]:
        """Apply the module; each of its modules marks what it gives."""
        from flax import linen

        def marking(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            module = context.module
            return _marking(".".join(module.path) or ROOT, type(module).__name__, call, args, kwargs)

        with linen.intercept_methods(marking):
            return self._module.apply(jax.tree.unflatten(form, arrays), *inputs, **kwargs), ()

    def named_arrays(self) -> dict[str, Any]:
        """Return the variables by their paths."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self._variables)
        return {"/".join(str(getattr(key, "key", key)) for key in keys): leaf for keys, leaf in leaves}


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
        from flax import nnx

        if self._seen is not None and self._seen.holds():
            return self._seen.arrays(), self._seen.form
        graph, state = nnx.split(self._model)
        arrays, structure = jax.tree.flatten(state)
        form = Fixed((graph, structure))
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
        from flax import nnx

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
        after, made = jax.tree.flatten(nnx.state(copy))
        # Variables that a run adds (what nnx.sow keeps) are its own.
        return output, after if made == structure else arrays

    def keep(self, form: Any, arrays: Sequence[Any]) -> None:
        """Keep what the run changed: statistics of a batch, counters of random numbers."""
        from flax import nnx

        nnx.update(self._model, jax.tree.unflatten(form.value[1], arrays))

    def named_arrays(self) -> dict[str, Any]:
        """Return the module's variables by their paths; random numbers are no weights."""
        from flax import nnx

        flat = nnx.to_flat_state(nnx.state(self._model, nnx.Not(nnx.RngState)))
        return {".".join(map(str, path)): variable[...] for path, variable in flat}


class Fixed:
    """What a model is beside its arrays; compared in every step, so its hash is worked out once."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._hash = hash(value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fixed):
            return NotImplemented
        return self is other or (self._hash == other._hash and bool(self.value == other.value))

    def __hash__(self) -> int:
        return self._hash


class _Seen:
    """An NNX module as it was split, and what tells that it has not changed since."""

    def __init__(
        self, form: Fixed, variables: Sequence[Any], parts: Sequence[tuple[Any, tuple[Any, ...]]]
    ) -> None:
        self.form, self._variables, self._parts = form, variables, parts

    @classmethod
    def of(cls, model: Any, state: Any, form: Fixed) -> _Seen | None:
        """Look at `model`; None where its variables are not found by the paths of its state."""
        from flax import nnx

        variables = []
        for keys, array in jax.tree_util.tree_flatten_with_path(state)[0]:
            found = model
            for key in keys[:-1]:
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


class Held:
    """Something that is no array, compared by what it is."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Held):
            return NotImplemented
        mine, theirs = self.value, other.value
        return mine is theirs or (type(mine) is type(theirs) and isinstance(mine, _PLAIN) and mine == theirs)

    def __hash__(self) -> int:
        return hash(self.value) if isinstance(self.value, _PLAIN) else id(self.value)


_PLAIN = (str, bytes, int, float, complex, bool, type(None))


def model_of(model: Any) -> JaxModel:
    """Return what runs `model`.

    Raises:
        PlanError: it cannot be run.
    """
    if isinstance(model, JaxModel):
        return model
    if is_nnx(model):
        return NnxModel(model)
    if is_linen(model):
        if not isinstance(model, tuple) and model.scope is None:
            raise PlanError(
                f"a {type(model).__name__} of Flax Linen has no weights of its own: give "
                "(module, variables), or module.bind(variables)"
            )
        return LinenModel(model)
    if callable(model):
        return FunctionModel(model)
    raise PlanError(f"a {type(model).__name__} is no model of JAX's: it cannot be called")


def is_nnx(model: Any) -> bool:
    """Return whether `model` is a Flax NNX module."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


def is_linen(model: Any) -> bool:
    """Return whether `model` is a Flax Linen module, alone or with its variables."""
    linen = sys.modules.get("flax.linen")
    if linen is None:
        return False
    if isinstance(model, tuple):
        return len(model) == 2 and isinstance(model[0], linen.Module) and isinstance(model[1], Mapping)
    return isinstance(model, linen.Module)


def is_function(model: Any) -> bool:
    """Return whether `model` is JAX's own for sure: a compiled function, or a tree of arrays to be called."""
    if not callable(model):
        return False
    if hasattr(model, "lower") and hasattr(model, "trace"):
        return True
    return not jax.tree_util.treedef_is_leaf(jax.tree.structure(model))


def _marking(name: str, of: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a layer, with marks on what it gets and on what it gives."""
    args, kwargs = marked_arguments(name, tuple(args), dict(kwargs), of)
    return marked(name, call(*args, **kwargs), of=of)


@contextmanager
def _marking_calls(classes: set[type]) -> Iterator[None]:
    """Let modules of these classes that know their names mark what they get and give, for a while."""
    put: list[tuple[type, Any]] = []
    inside: set[int] = set()

    def marking(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def marked_call(self: Any, *args: Any, **kwargs: Any) -> Any:
            name = vars(self).get(_NAME)
            # A class that calls its parent's is one layer.
            if name is None or id(self) in inside:
                return call(self, *args, **kwargs)
            inside.add(id(self))
            try:
                bound = partial(call, self)
                return _marking(name, type(self).__name__, bound, args, kwargs)
            finally:
                inside.discard(id(self))

        return marked_call

    try:
        for one in {base for kind in classes for base in kind.__mro__ if "__call__" in vars(base)} - {object}:
            put.append((one, vars(one)["__call__"]))
            setattr(one, "__call__", marking(vars(one)["__call__"]))  # noqa: B010 (a class, whose call it is)
        yield
    finally:
        for one, call in put:
            setattr(one, "__call__", call)  # noqa: B010


def _modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the modules of `model` by their dotted names, in the order in which they were given to it."""
    from flax import nnx

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
