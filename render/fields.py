"""Where on a row's picture a cell of a tap looks: its receptive field, through what the tap was reduced by.

The store has the fields of a layer where the capture was asked for them (`fields=True`, `--fields`), in
pixels of the model's input. The picture of a row is that input before normalisation, resized and cropped
already. Where it has another size, because the user gave it, it is taken for the whole input at that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..capture.fields import ReceptiveField
from ..capture.taps import TapName
from .view import axes_order

if TYPE_CHECKING:
    from ..capture.reader import Tap

Box = tuple[int, int, int, int]


def field_of(tap: Tap) -> ReceptiveField | None:
    """Return the receptive field of a tap's layer, where the store has it; of a gradient, the output's."""
    if tap.field is not None or tap.kind != "grad":
        return tap.field
    name = TapName.parse(tap.name)
    output = str(TapName(name.layer, name.call, name.path))
    return tap.run[output].field if output in tap.run else None


def box(tap: Tap, cell: Sequence[int], picture_shape: Sequence[int]) -> Box:
    """Return what a cell sees of a picture: top, left, bottom, right in its pixels, inside of it.

    Without a receptive field it is the cell's share of the picture. It is all of it where the cell is no
    place (of a vector, or of what a function of the user's made), or sees nothing, like a class token.

    Args:
        tap: the tap.
        cell: the cell's index on each axis of the tap's row but the channels': (y, x), (token,) or nothing.
        picture_shape: height and width of the picture, and anything behind.
    """
    height, width = picture_shape[:2]
    windows = _source_windows(tap, cell)
    field = field_of(tap)
    if windows is None:
        return 0, 0, height, width
    if field is not None:
        seen = field.box(windows[0], windows[-1])
        if seen is None:
            return 0, 0, height, width
        (top, left, bottom, right), (rows, columns) = seen, field.input
    elif len(windows) == 2:
        (top, bottom), (left, right) = ((window.start, window.stop) for window in windows)
        rows, columns = tap.source_places
    else:
        return 0, 0, height, width
    return (
        top * height // rows,
        left * width // columns,
        -(-bottom * height // rows),
        -(-right * width // columns),
    )


def shares(tap: Tap, cell: Sequence[int]) -> tuple[float, float, float, float] | None:
    """Return top, left, bottom and right of what a cell sees, as shares of the model's input.

    None where the store has no receptive field of the tap's layer, or the cell sees nothing.
    """
    windows, field = _source_windows(tap, cell), field_of(tap)
    seen = None if windows is None or field is None else field.box(windows[0], windows[-1])
    if seen is None or field is None:
        return None
    (top, left, bottom, right), (height, width) = seen, field.input
    return top / height, left / width, bottom / height, right / width


def told(tap: Tap, picture_shape: Sequence[int], what: str, seen: Sequence[tuple[int, int]]) -> str:
    """Return in words what the boxes of a tap's cells are.

    Args:
        tap: the tap.
        picture_shape: height and width of the picture, and anything behind.
        what: what is done to the picture: `cut to`, say.
        seen: height and width of each box.
    """
    size = tuple(picture_shape[:2])
    field = field_of(tap)
    n_axes = len(tap.dims) - 2
    if n_axes < 1 or _source_windows(tap, (0,) * n_axes) is None:
        return "whole pictures: a value has no place in them"
    if field is None:
        ask = "the store has no receptive field of this layer (capture with fields=True, --fields)"
        return f"{what} the cell's share of the picture: {ask}" if n_axes == 2 else f"whole pictures: {ask}"
    (rows, columns), (height, width) = field.input, size
    if seen and all(one == size for one in seen):
        return "whole pictures: the receptive field of the value is all of the input"
    if field.input == size:
        return f"{what} the receptive field of the value"
    return (
        f"{what} the receptive field of the value, of an input of {columns} \N{MULTIPLICATION SIGN} {rows} "
        f"brought to the picture's {width} \N{MULTIPLICATION SIGN} {height}"
    )


def _source_windows(tap: Tap, cell: Sequence[int]) -> tuple[slice, ...] | None:
    """Return the cells of the layer that a cell of the tap is made of, on each axis of places.

    None where the layer has no places, or nobody knows what was made of them.
    """
    sizes = tap.source_places
    if not sizes or tap.kind == "attention":
        return None
    # Sizes of the places' axes before each step, None once they are gone.
    steps, at = [], [*sizes]
    for step in tap.reduction.to_json():
        if step["kind"] in ("own", "topk"):
            return None
        steps.append((step, tuple(at)))
        if step["kind"] in ("pool", "crop") and at:
            at = list(step["size"] or ())
        elif step["kind"] == "tokens":
            at = []
    if len(cell) != len(at) or at != [tap.bound[axis] for axis in axes_order(tap.dims[1:])[1:]]:
        return None
    windows = [slice(i, i + 1) for i in cell]
    for step, before in reversed(steps):
        windows = _undone(step, before, windows)
    return tuple(windows)


def _undone(step: dict[str, object], sizes: tuple[int, ...], windows: list[slice]) -> list[slice]:
    """Return the windows before a step, on axes of these sizes then."""
    kind = step["kind"]
    if kind == "tokens":
        n = sizes[0]
        return [{"first": slice(0, 1), "last": slice(n - 1, n)}.get(str(step["which"]), slice(0, n))]
    if kind == "pool" and not step["size"]:
        return [slice(0, n) for n in sizes]
    if kind == "pool":
        made = step["size"]
        assert isinstance(made, list)
        return [
            slice(window.start * n // m, -(-window.stop * n // m))
            for window, n, m in zip(windows, sizes, made, strict=True)
        ]
    if kind == "crop":
        at = step["at"]
        assert isinstance(at, list)
        return [slice(w.start + a, w.stop + a) for w, a in zip(windows, at, strict=True)]
    return windows
