"""Marks: an operation that changes nothing and stays visible where JAX traces a model.

A traced model is a graph in which layers are gone. So that a tap can be found in it again, what a layer
gives passes through a primitive of our own: an identity with the tap's name as its parameter, which costs
nothing once compiled. Marks are set while `hearing` alone, in a context that is part of the key of JAX's
caches: what is traced then is never what a later call without taps gets, and what was traced before has no
say here.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ..capture import tapping
from ..capture.taps import OUTPUT, Path, key_of


class Mark(NamedTuple):
    """What a mark says of the value that passes it."""

    layer: str
    """Name of the layer."""
    type: str
    """Its type; empty where it is a module that is known by its name."""
    kind: str
    """What of the layer it is."""
    path: Path
    """Where the value lies in what the layer gave."""
    call: int
    """A number that the marks of one call have in common, in the trace that set them."""


#: The type of what `lt.tap` marks.
TAP = "tap"

mark_p = Primitive("layertap")


def _impl(value: Any, *, mark: Mark) -> Any:
    return value


def _batched(args: tuple[Any], axes: tuple[int], *, mark: Mark) -> tuple[Any, int]:
    # Rows come first, wherever `vmap` has put them.
    return mark_p.bind(jax.numpy.moveaxis(args[0], axes[0], 0), mark=mark), 0


def _jvp(primals: tuple[Any], tangents: tuple[Any], *, mark: Mark) -> tuple[Any, Any]:
    return mark_p.bind(primals[0], mark=mark), tangents[0]


def _lower(context: Any, value: Any, *, mark: Mark) -> list[Any]:
    return [value]


mark_p.def_impl(_impl)
mark_p.def_abstract_eval(_impl)
mlir.register_lowering(mark_p, _lower)
batching.primitive_batchers[mark_p] = _batched
ad.primitive_jvps[mark_p] = _jvp

_tracing = jax.make_user_context(default_value=None)
_HEARD = "layertap"
#: Classes of layers are changed while a model is traced: by one thread at a time.
_TURN = threading.RLock()
_calls = itertools.count()


@contextmanager
def hearing() -> Iterator[None]:
    """Mark what `lt.tap` gets, and trace what was traced without marks before."""
    with _TURN, _tracing(_HEARD), tapping.heard_by(_heard):
        yield


def marked(layer: str, value: Any, kind: str = OUTPUT, of: str = "") -> Any:
    """Return `value` with a mark on each array inside it."""
    return _marked(value, (), Mark(layer, of, kind, (), next(_calls)))


def marked_arguments(
    layer: str, args: tuple[Any, ...], kwargs: dict[str, Any], of: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with marks: one alone as it is, several by position and name."""
    if len(args) == 1 and not any(map(is_array, jax.tree.leaves(kwargs))):
        return (marked(layer, args[0], "input", of),), kwargs
    mark = Mark(layer, of, "input", (), next(_calls))
    given = [_marked(value, (key_of(key),), mark) for key, value in (*enumerate(args), *kwargs.items())]
    return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))


def _marked(value: Any, path: Path, mark: Mark) -> Any:
    leaves, structure = jax.tree_util.tree_flatten_with_path(value)
    made = [
        mark_p.bind(leaf, mark=mark._replace(path=(*path, *map(_key, keys)))) if is_array(leaf) else leaf
        for keys, leaf in leaves
    ]
    return jax.tree_util.tree_unflatten(structure, made)


def is_array(value: Any) -> bool:
    """Return whether `value` is an array of numbers; keys of random numbers are none."""
    return isinstance(value, jax.Array) and not jax.numpy.issubdtype(value.dtype, jax.dtypes.extended)


def _heard(name: str, value: Any) -> Any:
    if _tracing.value != _HEARD:  # the forward of another thread
        return value
    return marked(name, value, of=TAP)


def _key(entry: Any) -> int | str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return key_of(getattr(entry, attribute))
    return str(entry)
