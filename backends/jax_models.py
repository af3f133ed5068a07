"""What runs under JAX: a model says which arrays it holds, and how it is called with them under a trace."""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np

from ..capture.axes import channels_last_dims
from ..capture.backend import Json
from ..capture.errors import PlanError
from ..capture.fingerprint import fingerprint
from ..capture.taps import OUTPUT, Layer
from .jax_marks import is_array, marked, marked_arguments

#: What a layer of JAX's can be tapped for.
KINDS = ("input", OUTPUT)


class JaxModel(ABC):
    """One model, whatever library it is written with."""

    #: Whether other names of a layer are the same in every process, so that a store may hold them.
    keeps_aliases = True

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

    def dims(self, shape: tuple[int, ...], types: Sequence[str]) -> tuple[str, ...]:
        """Return the axes of what a layer of such `types` gives, rows of `shape`."""
        return channels_last_dims(shape, types)

    @property
    def type(self) -> str:
        """The name of its class or function."""
        return type(self).__name__

    def describe(self) -> Json:
        """Return type, number of parameters, and a checksum of them."""
        arrays = {name: array for name, array in self.named_arrays().items() if _is_numeric(array)}
        return {
            "type": self.type,
            "parameters": sum(int(np.prod(array.shape)) for array in arrays.values()),
            "weights": fingerprint(
                (name, str(array.dtype), tuple(array.shape), np.asarray(array))
                for name, array in arrays.items()
            ),
        }


class FunctionModel(JaxModel):
    """A function of arrays, or a module that is a tree of arrays, as Equinox's are: tapped by `lt.tap`.

    Modules of Flax Linen that it applies are known by their paths.
    """

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
        with _linen_marks():
            return function(*inputs, **kwargs), ()

    def named_arrays(self) -> dict[str, Any]:
        """Return the arrays of the tree by their paths."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self._function)
        return {jax.tree_util.keystr(keys): leaf for keys, leaf in leaves if isinstance(leaf, jax.Array)}


class Held:
    """Something that is no array, compared by its value where that can be hashed, else by what it is.

    It is compared in every step, so its hash is worked out once.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        try:
            self._hash, self._by_value = hash(value), True
        except TypeError:
            self._hash, self._by_value = id(value), False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Held):
            return NotImplemented
        if self.value is other.value:
            return True
        alike = type(self.value) is type(other.value) and self._by_value and self._hash == other._hash
        return alike and bool(self.value == other.value)

    def __hash__(self) -> int:
        return self._hash


def model_of(model: Any) -> JaxModel:
    """Return what runs `model`.

    Raises:
        PlanError: it cannot be run.
    """
    if isinstance(model, JaxModel):
        return model
    if is_nnx(model):
        from .jax_nnx import NnxModel

        return NnxModel(model)
    if is_linen(model):
        from .jax_linen import LinenModel

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
    """Return whether `model` is JAX's own for sure: compiled, or a tree of arrays to be called.

    So is what `functools.partial`, `jax.vmap` and the like make of one.
    """
    if not callable(model):
        return False
    if hasattr(model, "lower") and hasattr(model, "trace"):
        return True
    if not jax.tree_util.treedef_is_leaf(jax.tree.structure(model)):
        return True
    inner = model.func if isinstance(model, functools.partial) else getattr(model, "__wrapped__", None)
    return inner is not None and is_function(inner)


def marking(name: str, of: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a layer, with marks on what it gets and on what it gives."""
    args, kwargs = marked_arguments(name, tuple(args), dict(kwargs), of)
    return marked(name, call(*args, **kwargs), of=of)


def _is_numeric(array: Any) -> bool:
    return isinstance(array, np.ndarray) or is_array(array)


def _linen_marks() -> Any:
    if "flax.linen" not in sys.modules:
        return nullcontext()
    from .jax_linen import linen_marks

    return linen_marks()
