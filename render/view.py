"""What was picked from a store, as arrays in memory, before anything is laid out.

Every tap becomes maps of shape (rows, channels, height, width), whatever it was: a vector's features are
channels of one pixel; the tokens of a sequence are wrapped into a square, each feature a channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError
from .importance import candidates, check_ranks, rank
from .selection import ChannelChoice, can_draw, class_column, select_layers
from .spec import GridSpec, TilesSpec

if TYPE_CHECKING:
    from ..capture.reader import Run, Tap
    from ..capture.summary import RunStatistics

Values = NDArray[Any]

_ENDS = 200  # characters of a text that are kept at each end


@dataclass(frozen=True, eq=False)
class RowView:
    """One row of the data set, and what is known about it."""

    row: int
    """Its index."""
    name: str | None
    """Its id as text, where the store has one."""
    true: str | None
    """Its class name, or its label as text."""
    predicted: str | None
    """The class that the model predicted, likewise."""
    right: bool | None
    """Whether these are the same; None where either is unknown."""
    picture: NDArray[np.uint8] | None
    """Its picture, shape (height, width, 3), where the store has one and it is drawn."""


@dataclass(frozen=True, eq=False)
class LayerView:
    """The chosen channels of one tap."""

    name: str
    """The tap's name."""
    type: str
    """The layer's type, `Conv2d` for example."""
    shape: tuple[int, ...]
    """Shape of one row as captured."""
    channels: tuple[int, ...]
    """The chosen channels, in the order in which they are drawn."""
    n_channels: int
    """How many there are to choose from."""
    unit: str
    """What a tile is: channel, feature, head and so on."""
    ranked_by: str | None
    """The measure that chose and ordered them; None where the order is the layer's own."""
    values: Values
    """Floats of shape (rows, channels, height, width)."""
    cells: NDArray[np.bool_] | None
    """Which pixels of a map are values, shape (height, width), where a sequence was wrapped."""
    note: str = ""
    """How its values became maps, where that is not plain."""


@dataclass(frozen=True, eq=False)
class View:
    """Rows by layers by channels, read and ready to be laid out."""

    rows: tuple[RowView, ...]
    """The rows, in drawing order."""
    layers: tuple[LayerView, ...]
    """The layers, in drawing order; each holds all the rows."""


def take(run: Run, spec: TilesSpec) -> View:
    """Read what `spec` draws from `run`.

    Raises:
        SelectionError: a layer, row or channel is not there.
        DrawError: a layer has too many axes to be drawn.

    """
    names = select_layers(run, spec.layers)
    choice = ChannelChoice.parse(spec.channels, spec.by)
    layers = tuple(_layer(run[name].of_one_shape(spec.rows), spec, choice, run.stats) for name in names)
    return View(row_views(run, spec.rows, isinstance(spec, GridSpec) and spec.picture), layers)


def _layer(tap: Tap, spec: TilesSpec, choice: ChannelChoice, stats: RunStatistics) -> LayerView:
    if "rank" in tap.dims:
        raise DrawError(
            f"{tap.name} cannot be drawn: it holds the largest values of each place ({tap.reduction}), and "
            "no maps. Read them and their .positions, or capture the layer pooled"
        )
    if not can_draw(tap):
        dims = ", ".join(f"{dim}={n}" for dim, n in zip(tap.dims[1:], tap.shape[1:], strict=True))
        raise DrawError(
            f"{tap.name} cannot be drawn: a row of it is ({dims}) of {tap.dtype}; "
            "maps are real numbers on one to three axes, none of them empty"
        )
    order = axes_order(tap.dims[1:])
    n_channels = tap.shape[1 + order[0]] if order else 1
    unit = tap.dims[1 + order[0]] if order else "value"
    how = choice.how
    if how == "auto":
        how = "first" if isinstance(spec, GridSpec) and len(order) > 1 else "all"
    rows = np.array(spec.rows)
    channels: Sequence[int]  # a store may claim any number, so they are not listed before they are read
    if how == "list":
        channels = choice.indices(n_channels, f"{unit} of {tap.name}:")
    else:
        channels = range(n_channels if how != "first" else min(choice.n or 9, n_channels))
    class_token = len(order) == 2 and _has_class_token(tap.shape[1 + order[1]])
    if how == "top" and not class_token and choice.n is not None:
        some = candidates(stats, tap.name, rows, choice.by, choice.n)
        channels = channels if some is None else tuple(some.tolist())
    values = read_maps(tap, rows, order, channels)
    if class_token:
        values = values[:, :, 1:]
    if how == "top":
        ranked = values.reshape(*values.shape[:2], -1, 1)
        check_ranks(ranked, choice.by, tap.name)
        chosen = rank(ranked, choice.by)[: choice.n]
        channels, values = tuple(channels[i] for i in chosen), values[:, chosen]
    maps, cells, note = _wrap(values, len(order))
    if class_token:
        side = maps.shape[-1]
        note = f"class token left out, {side} \N{MULTIPLICATION SIGN} {side} patches"
    return LayerView(
        tap.name,
        tap.type,
        tuple(tap.shape[1:]),
        tuple(channels),
        n_channels,
        unit,
        choice.by if how == "top" and choice.by != "index" else None,
        maps,
        cells,
        note,
    )


def axes_order(dims: tuple[str, ...]) -> tuple[int, ...]:
    """Return the order in which a row's axes are read: what is tiled first, then down, then across."""
    tiled = next((i for i, dim in enumerate(dims) if dim in ("channel", "component", "head")), None)
    if tiled is None and len(dims) == 2:
        # Of (token, feature) each feature is a map of the tokens.
        tiled = next((i for i, dim in enumerate(dims) if dim == "feature"), 0)
    tiled = tiled or 0
    return tuple(([tiled] if dims else []) + [i for i in range(len(dims)) if i != tiled])


def read_maps(tap: Tap, rows: Values, order: tuple[int, ...], channels: Sequence[int]) -> Values:
    """Return floats of shape (rows, channels, ...), the tiled axis second."""
    if not order:
        return floats(np.asarray(tap[rows]).reshape(-1, 1))
    n = tap.shape[1 + order[0]]
    every = channels == range(n) or (len(channels) == n and tuple(channels) == tuple(range(n)))
    key: list[Any] = [rows, *[slice(None)] * len(order)]
    if not every:
        key[1 + order[0]] = np.array(channels)
    values = np.asarray(tap[tuple(key)])
    return floats(values.transpose(0, *(1 + axis for axis in order)))


def floats(values: Values) -> Values:
    """Return `values` in float32 where that holds every value, else in float64."""
    small = values.dtype.itemsize <= 2 or values.dtype == np.float32
    return np.ascontiguousarray(values, np.float32 if small else np.float64)


def _has_class_token(n: int) -> bool:
    """Return whether `n` positions are taken for a class token and a square of patches after it."""
    return n > 4 and math.isqrt(n - 1) ** 2 == n - 1


def _wrap(values: Values, n_axes: int) -> tuple[Values, NDArray[np.bool_] | None, str]:
    """Return maps of shape (rows, channels, height, width), which of their pixels are values, and a note.

    A sequence of k * k is a square; another is wrapped into lines, of which the last is not full.
    """
    if n_axes != 2:
        return values.reshape(*values.shape[:2], *(values.shape[2:] or (1, 1))), None, ""
    n = values.shape[2]
    side = math.isqrt(n)
    if side * side == n:
        return values.reshape(*values.shape[:2], side, side), None, f"{n} positions as {side} x {side}"
    width = side + 1
    height = -(-n // width)
    note = f"{n} positions wrapped"
    if height * width == n:
        return values.reshape(*values.shape[:2], height, width), None, note
    maps = np.zeros((*values.shape[:2], height * width), values.dtype)
    maps[..., :n] = values
    cells = (np.arange(height * width) < n).reshape(height, width)
    return maps.reshape(*values.shape[:2], height, width), cells, note


def row_views(run: Run, rows: tuple[int, ...], pictures: bool) -> tuple[RowView, ...]:
    """Return what is known of each of `rows`, with its picture where these are wanted and there."""
    indices = np.array(rows)
    ids = run.rows["id"][indices] if "id" in run.rows else None
    labels, predictions = (class_column(run, name, indices) for name in ("label", "prediction"))
    shown = run.rows["picture"][indices] if pictures and has_pictures(run) else None
    views = []
    for i, row in enumerate(rows):
        label, prediction = (None if c is None else c[i].item() for c in (labels, predictions))
        true, predicted = class_name(run.classes, label), class_name(run.classes, prediction)
        known = true is not None and predicted is not None and type(label) is type(prediction)
        views.append(
            RowView(
                row,
                None if ids is None else _brief(str(ids[i])),
                true,
                predicted,
                label == prediction if known else None,
                None if shown is None else _rgb(np.asarray(shown[i])),
            )
        )
    return tuple(views)


def class_name(classes: tuple[str, ...] | None, label: int | str | None) -> str | None:
    """Return the name of class `label`, its number where it has none, or None where it is unknown (< 0).

    A label that is text is the name itself, and unknown where it is empty.
    """
    if isinstance(label, str):
        return _brief(label) or None
    if label is None or label < 0:
        return None
    return _brief(classes[label]) if classes and label < len(classes) else f"class {label}"


def _brief(text: str) -> str:
    """Return a text of a store without the middle of one that nobody would read."""
    return text if len(text) <= 2 * _ENDS else f"{text[:_ENDS]}…{text[-_ENDS:]}"


def has_pictures(run: Run) -> bool:
    """Return whether the store has pictures; another's may hold something else under the name."""
    column = run.rows.get("picture")
    if column is None or column.dtype != np.uint8:
        return False
    return len(column.shape) >= 3 and column.shape[3:] in ((), (1,), (3,))


def _rgb(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if picture.ndim == 2:
        picture = picture[..., None]
    return np.ascontiguousarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))
