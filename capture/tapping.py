"""`tap`: a place in the user's own forward that can be captured, where there is no layer.

It is called in every forward of a model for ever, and recorded in few: while nothing records, it looks at
one empty tuple and returns what it got. This module imports no other, so that `import layertap` stays light.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Value = TypeVar("Value")
Listener = Callable[[str, Any], Any]

_listeners: tuple[Listener, ...] = ()


def tap(name: str, value: Value) -> Value:
    """Return `value`; while a recording chooses `name` among its layers, capture it there.

    A second call with the same name in one forward is `name#2`. It works in any function that the forward
    calls, also in one that `torch.compile` compiles.

    Args:
        name: what the tap is called; no layer of the model may have that name.
        value: a tensor or array whose first axis is the rows of the batch, or a tuple or dict of them.
    """
    if _listeners:
        for listener in _listeners:
            value = listener(name, value)
    return value


def listen(listener: Listener) -> None:
    """Let `listener` have what `tap` gets, until `leave`; what it returns goes on in the forward."""
    global _listeners
    _listeners = (*_listeners, listener)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Let `listener` listen for a while."""
    listen(listener)
    try:
        yield
    finally:
        leave(listener)


def leave(listener: Listener) -> None:
    """Undo `listen`."""
    global _listeners
    _listeners = tuple(other for other in _listeners if other != listener)
