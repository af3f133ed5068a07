"""What was picked from a store, as arrays in memory, before anything is laid out.

Every tap becomes maps of shape (rows, channels, height, width), whatever it was: a vector's features are
channels of one pixel; the tokens of a sequence are wrapped into a square, each feature a channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError
from .colormaps import DIVERGING
from .importance import F_RATIO, candidates, check_ranks, rank, ranked
from .scale import colormap_for
from .selection import ChannelChoice, can_draw, class_column, select_layers
from .spec import GridSpec, TilesSpec

if TYPE_CHECKING:
    from ..capture.reader import Run, Tap
    from .survey import Captured, DataLimits

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

    @property
    def label(self) -> str:
        """What a note calls it."""
        return f"row {self.row}"


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
    ranked_over: str = ""
    """Over which rows the measure is, in words."""
    page: tuple[int, int] | None = None
    """Which page of how many, where a page was asked for."""
    data: DataLimits | None = None
    """Its limits over all captured rows, where the scale takes them."""


@dataclass(frozen=True, eq=False)
class View:
    """Rows by layers by channels, read and ready to be laid out."""

    rows: tuple[RowView, ...]
    """The rows, in drawing order."""
    layers: tuple[LayerView, ...]
    """The layers, in drawing order; each holds all the rows."""
    unfinished: str | None = None
    """How far the capture is, where it did not end."""


class Shelf:
    """Rows that are drawn one after the other, each by itself, and read together.

    An inner chunk holds several rows: read for each of them, it would be read and checked as many times.
    """

    def __init__(self, run: Run, rows: Sequence[int]) -> None:
        self._run = run
        self._at = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        self._values: dict[tuple[Any, ...], Values] = {}
        self._views: dict[bool, tuple[RowView, ...]] = {}

    def maps(self, tap: Tap, rows: Values, order: tuple[int, ...], channels: Sequence[int]) -> Values:
        """Return what `read_maps` does; it is read for every row of the shelf, once."""
        if tap.is_ragged:
            return read_maps(tap, rows, order, channels)
        key = tap.name, channels if isinstance(channels, range) else tuple(channels)
        if key not in self._values:
            self._values[key] = read_maps(tap, np.array(list(self._at)), order, channels)
        return self._values[key][[self._at[row] for row in rows.tolist()]]

    def views(self, rows: Sequence[int], pictures: bool) -> tuple[RowView, ...]:
        """Return what is known of `rows`; it is read for every row of the shelf, once."""
        if pictures not in self._views:
            self._views[pictures] = row_views(self._run, tuple(self._at), pictures)
        return tuple(self._views[pictures][self._at[row]] for row in rows)


def take(run: Run, spec: TilesSpec, shelf: Shelf | None = None) -> View:
    """Read what `spec` draws from `run`.

    Args:
        run: the store.
        spec: what is drawn.
        shelf: rows among which those of `spec` are, where many are drawn one by one.

    Raises:
        SelectionError: a layer, row or channel is not there.
        DrawError: a layer has too many axes to be drawn.

    """
    names = select_layers(run, spec.layers)
    choice = ChannelChoice.parse(spec.channels, spec.by)
    layers = tuple(layer_view(run, run[name].of_one_shape(spec.rows), spec, choice, shelf) for name in names)
    pictures = isinstance(spec, GridSpec) and spec.picture
    rows = row_views(run, spec.rows, pictures) if shelf is None else shelf.views(spec.rows, pictures)
    return View(rows, layers, unfinished(run))


def unfinished(run: Run) -> str | None:
    """Return how far a capture is that did not end; None where it did."""
    if run.complete:
        return None
    n = run.n_committed
    rows = f"{n:,} of {run.n_rows:,} rows" if n < run.n_rows else f"{n:,} row{'s' if n > 1 else ''} so far"
    return f"the capture is not finished: {rows}"


def layer_view(
    run: Run, tap: Tap, spec: TilesSpec, choice: ChannelChoice, shelf: Shelf | None = None
) -> LayerView:
    """Return the chosen channels of `spec.rows` of a tap.

    Raises:
        SelectionError: a channel is not there.
        DrawError: the tap cannot be drawn.

    """
    check_can_draw(tap)
    order = axes_order(tap.dims[1:])
    n_channels = tap.shape[1 + order[0]] if order else 1
    unit = tap.dims[1 + order[0]] if order else "value"
    class_token = len(order) == 2 and has_class_token(tap.shape[1 + order[1]])
    how = choice.how
    if how == "auto":
        how = "first" if isinstance(spec, GridSpec) and len(order) > 1 else "all"
    source = _Source(run, tap, order, unit, n_channels, class_token, np.array(spec.rows), shelf)
    channels: Sequence[int]  # a store may claim any number, so they are not listed before they are read
    values, over, page = None, "", None
    if how in ("top", "page"):
        window = choice.window(n_channels, f"the {unit}s of {tap.name}")
        channels, values, over = _ranked(source, choice, window, spec)
        page = (choice.page, -(-n_channels // choice.n)) if how == "page" else None
    elif how == "list":
        channels = choice.indices(n_channels, f"{unit} of {tap.name}:")
    else:
        channels = range(n_channels if how == "all" else min(choice.n or 9, n_channels))
    maps, cells, note = wrap(source.read(channels) if values is None else values, len(order))
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
        choice.by if over else None,
        maps,
        cells,
        note,
        over,
        page,
        _data_limits(source.captured(), spec) if spec.scope == "data" else None,
    )


@dataclass(frozen=True, eq=False)
class _Source:
    """Where the values of a layer come from."""

    run: Run
    tap: Tap
    order: tuple[int, ...]
    """Its axes, the tiled one first."""
    unit: str
    n_channels: int
    class_token: bool
    """Whether its first position is left out."""
    rows: Values
    """What is drawn."""
    shelf: Shelf | None

    def read(self, channels: Sequence[int], *, by_itself: bool = False) -> Values:
        """Return what is drawn of `channels`, (rows, channels, ...)."""
        read = read_maps if by_itself or self.shelf is None else self.shelf.maps
        values = read(self.tap, self.rows, self.order, channels)
        return values[:, :, 1:] if self.class_token else values

    def captured(self) -> Captured:
        """Return all rows, as they would be drawn."""
        from .survey import Captured

        kind = float_type(self.tap.dtype)
        whole = not self.class_token
        return Captured(self.run, self.tap.name, self.unit, self.n_channels, kind, self._pieces, whole)

    def _pieces(self) -> Iterator[tuple[Values, Values]]:
        from .survey import PIECE_BYTES

        tap, channels = self.run[self.tap.name], range(self.n_channels)
        rows = np.flatnonzero(self.run.committed())
        n = 1 if tap.is_ragged else max(1, PIECE_BYTES // (8 * math.prod(tap.bound)))
        for start in range(0, len(rows), n):
            some = rows[start : start + n]
            of_some = tap.of_one_shape(some.tolist())
            values = read_maps(of_some, some, self.order, channels)
            first = int(self.class_token and has_class_token(of_some.shape[1 + self.order[1]]))
            yield some, values[:, :, first:] if first else values


def _ranked(
    source: _Source, choice: ChannelChoice, window: slice, spec: TilesSpec
) -> tuple[Sequence[int], Values | None, str]:
    """Return the channels in a window of a ranking, their values if it took them, and over which rows."""
    run, name = source.run, source.tap.name
    if choice.by == "index":
        return range(source.n_channels)[window], None, ""
    if spec.over == "data" or choice.by == F_RATIO:
        captured = source.captured()
        order, n = ranked(captured.importance(choice.by)), captured.n_ranked(choice.by)
        some_rows = f"all {n:,} rows" if n == run.n_committed else f"the {n:,} rows that have a class"
        return tuple(order[window].tolist()), None, f"over {some_rows}"
    some = None
    if not source.class_token:
        some = candidates(run.stats, name, source.rows, choice.by, window.stop)
    channels = range(source.n_channels) if some is None else tuple(some.tolist())
    values = source.read(channels, by_itself=some is not None)
    flat = values.reshape(*values.shape[:2], -1, 1)
    check_ranks(flat, choice.by, name)
    chosen = rank(flat, choice.by)[window]
    n = len(source.rows)
    over = "in this row" if n == 1 else f"over these {n} rows"
    return tuple(channels[i] for i in chosen), values[:, chosen], over


def _data_limits(captured: Captured, spec: TilesSpec) -> DataLimits:
    """Return the limits over all captured rows, and where the percentiles of `spec` cut them."""
    return captured.limits(
        spec.clip, lambda signed: (spec.colormap or colormap_for(spec.sign, signed)) in DIVERGING
    )


def check_can_draw(tap: Tap) -> None:
    """Raise DrawError where a tap's values are no maps."""
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


def axes_order(dims: tuple[str, ...]) -> tuple[int, ...]:
    """Return the order in which a row's axes are read: what is tiled first, then down, then across."""
    tiled = next((i for i, dim in enumerate(dims) if dim in ("channel", "component", "head")), None)
    if tiled is None:
        # Of (token, feature) or (y, x, feature) each feature is a map of what comes before.
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
    return np.ascontiguousarray(values, float_type(values.dtype))


def float_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that values of another are drawn from."""
    small = dtype.itemsize <= 2 or dtype == np.float32
    return np.dtype(np.float32 if small else np.float64)


def has_class_token(n: int) -> bool:
    """Return whether `n` positions are taken for a class token and a square of patches after it."""
    return n > 4 and math.isqrt(n - 1) ** 2 == n - 1


def wrap(values: Values, n_axes: int) -> tuple[Values, NDArray[np.bool_] | None, str]:
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
    """Read what is known of some rows, and their pictures if these are drawn."""
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
                None if shown is None else rgb(np.asarray(shown[i])),
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


def rgb(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture in RGB, shape (height, width, 3), from one with 1 or 3 channels."""
    if picture.ndim == 2:
        picture = picture[..., None]
    return np.ascontiguousarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))
