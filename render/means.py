"""Means of maps over many rows, in one pass whose memory does not grow with their number.

A mean is over finite values, in float64. Where no row has a finite value, a cell is what its rows sum up to:
NaN, or an infinity; so the mean of a single row is that row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.trust import check_room
from .importance import check_ranks, rank
from .selection import ChannelChoice
from .view import LayerView, axes_order, check_can_draw, has_class_token, read_maps, wrap

if TYPE_CHECKING:
    from ..capture.reader import Run, Tap

Values = NDArray[Any]

PIECE_BYTES = 32 * 2**20  # of rows that are read together, as float64


@dataclass(frozen=True, eq=False)
class Means:
    """Mean maps of one layer."""

    layer: LayerView
    """With the mean of each group of rows where a row would be: (groups, channels, height, width)."""
    n_left_out: int
    """Values of these rows that are not finite, and in no mean."""


@dataclass(frozen=True, eq=False)
class Reading:
    """How rows of a tap are read as maps."""

    tap: Tap
    order: tuple[int, ...]
    """Its axes, the one of the channels first."""
    n_channels: int
    unit: str
    """What a tile is: channel, feature, head and so on."""
    class_token: bool
    """Whether the first position is left out."""

    @classmethod
    def of(cls, tap: Tap) -> Reading:
        """Look at a tap.

        Raises:
            DrawError: its values are no maps.

        """
        check_can_draw(tap)
        order = axes_order(tap.dims[1:])
        n, unit = (tap.shape[1 + order[0]], tap.dims[1 + order[0]]) if order else (1, "value")
        return cls(tap, order, n, unit, len(order) == 2 and has_class_token(tap.shape[1 + order[1]]))

    def channels(self, choice: ChannelChoice) -> Sequence[int]:
        """Return the channels that are read: all of them where they are to be ranked.

        Raises:
            SelectionError: one is not there.

        """
        if choice.how == "list":
            return choice.indices(self.n_channels, f"{self.unit} of {self.tap.name}:")
        if choice.how in ("top", "page"):
            window = choice.window(self.n_channels, f"the {self.unit}s of {self.tap.name}")
            return range(self.n_channels)[window if choice.by == "index" else slice(None)]
        first = choice.how == "first" or (choice.how == "auto" and len(self.order) > 1)
        return range(min(choice.n or 9, self.n_channels) if first else self.n_channels)

    def pieces(self, rows: Values, channels: Sequence[int]) -> Iterator[tuple[Values, Values]]:
        """Yield rows in their order and their values, (rows, channels, ...), so many at once as have room."""
        row_values = max(1, math.prod(self.tap.shape[1:]) // self.n_channels) * len(channels)
        n = max(1, PIECE_BYTES // (8 * row_values))
        for start in range(0, len(rows), n):
            some = rows[start : start + n]
            values = read_maps(self.tap, some, self.order, channels)
            yield some, values[:, :, 1:] if self.class_token else values

    def view(self, values: Values, channels: Sequence[int]) -> LayerView:
        """Return values, (rows, channels, ...), as maps."""
        maps, cells, note = wrap(values, len(self.order))
        if self.class_token:
            side = maps.shape[-1]
            note = f"class token left out, {side} \N{MULTIPLICATION SIGN} {side} patches"
        tap, n = self.tap, self.n_channels
        shape = tuple(tap.shape[1:])
        return LayerView(tap.name, tap.type, shape, tuple(channels), n, self.unit, None, maps, cells, note)


def mean_maps(run: Run, name: str, groups: Sequence[Values], choice: ChannelChoice) -> Means:
    """Return the mean maps of one layer over each group of rows.

    Args:
        run: the store.
        name: the tap.
        groups: row numbers, each group in rising order; none is empty, and they may overlap.
        choice: which channels; where they are ranked all are there, and `keep_top` chooses.

    Raises:
        SelectionError: a channel is not there.
        DrawError: the layer's values are no maps.

    """
    rows = np.unique(np.concatenate(groups))
    reading = Reading.of(run[name].of_one_shape(rows.tolist()))
    channels = reading.channels(choice)
    sums: _Sums | None = None
    for piece, values in reading.pieces(rows, channels):
        sums = sums or _Sums.of((len(groups), *values.shape[1:]), name)
        for i, group in enumerate(groups):
            sums.add(i, values[_members(group, piece)])
    assert sums is not None
    return Means(reading.view(sums.means(), channels), sums.n_left_out)


def keep_top(layers: Sequence[LayerView], choice: ChannelChoice) -> list[LayerView]:
    """Return views of the same channels with those that `choice` ranks first, by all views together."""
    if choice.how not in ("top", "page"):
        return list(layers)
    n = layers[0].n_channels
    page = (choice.page, -(-n // choice.n)) if choice.how == "page" else None
    if choice.by == "index":
        return [replace(one, page=page) for one in layers]
    joint = np.concatenate([one.values.reshape(*one.values.shape[:2], -1, 1) for one in layers])
    check_ranks(joint, choice.by, layers[0].name)
    kept = rank(joint, choice.by)[choice.window(n, f"the {layers[0].unit}s of {layers[0].name}")]
    return [
        replace(
            one,
            channels=tuple(one.channels[i] for i in kept),
            values=one.values[:, kept],
            ranked_by=choice.by,
            page=page,
        )
        for one in layers
    ]


def _members(group: Values, piece: Values) -> slice | Values:
    """Return where in `piece` the rows of `group` are; both rise, and `piece` has all of them in its span."""
    inside = group[np.searchsorted(group, piece[0]) : np.searchsorted(group, piece[-1], "right")]
    return slice(None) if np.array_equal(inside, piece) else np.searchsorted(piece, inside)


class _Sums:
    """Sums of finite values, and of those that are not, as soon as there is one."""

    def __init__(self, total: Values) -> None:
        self.total = total
        self.n_rows = np.zeros(len(total), np.int64)
        self.other: Values | None = None
        self.n_other: Values | None = None

    @classmethod
    def of(cls, shape: tuple[int, ...], name: str) -> _Sums:
        check_room(8 * math.prod(shape), f"the mean maps of {name}")
        return cls(np.zeros(shape))

    def add(self, i: int, values: Values) -> None:
        """Add rows, (rows, channels, ...), to group `i`."""
        self.n_rows[i] += len(values)
        finite = np.isfinite(values)
        if finite.all():
            self.total[i] += values.sum(axis=0, dtype=np.float64)
            return
        if self.other is None or self.n_other is None:
            self.other, self.n_other = np.zeros_like(self.total), np.zeros(self.total.shape, np.int64)
        with np.errstate(invalid="ignore"):  # of both infinities, which is NaN
            self.other[i] += np.where(finite, 0, values).sum(axis=0, dtype=np.float64)
        self.n_other[i] += (~finite).sum(axis=0)
        self.total[i] += np.where(finite, values, 0).sum(axis=0, dtype=np.float64)

    @property
    def n_left_out(self) -> int:
        """Values that are not finite."""
        return 0 if self.n_other is None else int(self.n_other.sum())

    def means(self) -> Values:
        """Return the mean of each group."""
        n = self.n_rows.reshape(-1, *[1] * (self.total.ndim - 1))
        if self.other is None or self.n_other is None:
            return self.total / n
        n = n - self.n_other
        return np.where(n > 0, self.total / np.maximum(n, 1), self.other)


def kept_class_maps(run: Run, name: str, labels: Sequence[int], choice: ChannelChoice) -> LayerView | None:
    """Return the mean maps of classes that the statistics of a store have, over all captured rows.

    Where a map is large, each of its cells is a mean of neighbours, which the note says. None: they have
    none that show what the values would.
    """
    stats = run.stats
    if not {"classes", "pooled"} & set(stats.names) or any(stats.not_finite(name)):
        return None
    its, reading = stats[name], Reading.of(run[name])
    if reading.unit != (its.axis or "value"):
        return None  # what is a tile is no channel of the statistics
    rest = tuple(reading.tap.shape[1 + axis] for axis in reading.order[1:])
    maps, note = its.class_maps, ""
    if maps is None and (not rest or not run.manifest.layout.values):
        maps, note = stats.class_means(name), "each the mean of a whole map" if rest else ""
    if maps is None or max(labels) >= len(maps):
        return None
    channels = reading.channels(choice)
    grid, values = maps.shape[2:], maps[list(labels)][:, list(channels)]
    if grid == rest:
        return reading.view(values[:, :, 1:] if reading.class_token else values, channels)
    if len(grid) == 1:
        return None  # means of neighbouring tokens are no map
    if grid:
        note = _of_neighbours(rest, grid)
    maps, unit = values if grid else values[..., None, None], reading.unit
    shape = tuple(reading.tap.shape[1:])
    return LayerView(
        name, reading.tap.type, shape, tuple(channels), reading.n_channels, unit, None, maps, None, note
    )


def _of_neighbours(whole: tuple[int, ...], grid: tuple[int, ...]) -> str:
    sizes = " \N{MULTIPLICATION SIGN} ".join(f"{n / m:.3g}" for n, m in zip(whole, grid, strict=True))
    about = "about " if any(n % m for n, m in zip(whole, grid, strict=True)) else ""
    return f"each cell a mean of {about}{sizes} values"
