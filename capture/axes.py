"""What the axes of a tap's rows mean, by their number and their lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .taps import ATTENTION, OUTPUT

#: Names of the axes that are places.
PLACES = ("token", "t", "z", "y", "x")


def channels_last(shape: Sequence[int]) -> bool:
    """Return whether rows of `shape` are maps whose channels are the last axis, as those of Swin are.

    Nothing else tells: of three axes, the first two are as long as each other, more than 1, and the third is
    half as long again, or more. As (channel, y, x) that were a map of 3:2 or wider with as many channels as
    lines.
    """
    return len(shape) == 3 and 1 < shape[0] == shape[1] and 2 * shape[2] >= 3 * shape[0]


def dims_of(shape: Sequence[int], kind: str = OUTPUT) -> tuple[str, ...]:
    """Return names for the axes of a tap whose rows have `shape`, by the usual meaning of their number."""
    if kind == ATTENTION and len(shape) == 3:
        return ("row", "head", "query", "key")
    if channels_last(shape):
        return ("row", "y", "x", "feature")
    names = {
        0: (),
        1: ("feature",),
        2: ("token", "feature"),
        3: ("channel", "y", "x"),
        4: ("channel", "t", "y", "x"),
    }
    return ("row", *names.get(len(shape), tuple(f"axis_{i + 1}" for i in range(len(shape)))))


def places_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of the axes of places of a layer's row: tokens, or y and x; empty where none."""
    if channels_last(shape):
        return tuple(shape[:2])
    return {2: tuple(shape[:1]), 3: tuple(shape[1:])}.get(len(shape), ())


#: Types of layers, of any library, that give (token, head, size) or (head, query, key), and no maps.
_NO_MAPS = frozenset(
    (
        *("LinearGeneral", "DenseGeneral", "Einsum", "EinsumDense", "Softmax", "MultiHeadAttention"),
        *("MultiHeadDotProductAttention", "SelfAttention", "GroupedQueryAttention", "GroupQueryAttention"),
    )
)


def channels_last_dims(shape: Sequence[int], types: Sequence[str]) -> tuple[str, ...]:
    """Return the axes of maps of a library that puts channels last; empty where rows of `shape` are none.

    Args:
        shape: of a row.
        types: of the layer, and of those that it lies in; see `types_above`.
    """
    if not _NO_MAPS.isdisjoint(types):
        return ()
    return {3: ("y", "x", "feature"), 4: ("t", "y", "x", "feature")}.get(len(shape), ())


def types_above(layer: str, types: Mapping[str, str]) -> list[str]:
    """Return the types of the layers that `layer` lies in and of itself, by dotted names."""
    parts = layer.split(".")
    return [types.get(".".join(parts[:n]), "") for n in range(1, len(parts) + 1)]
