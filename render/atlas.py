"""What the web page draws from a store: maps of layers as tiles, and their true values, in bounded memory.

A page scrolls, so no picture has rows of its own that could share a scale. What shares one is therefore said
by itself: a map, a row of a layer, a channel, a layer or the whole store (each over every captured row), or
limits that are given; percentiles may cut it as they cut a picture's. Where the range of all rows is not
known, because the store keeps no statistics, it is that of some rows; a value beyond the limits has a mark of
its own, whatever they come from, and is never clipped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError, SelectionError, closest
from .bounded import Bounded
from .colormaps import DIVERGING, WHITE, check_colormap, palette
from .page_layers import Layer, Shape
from .png import palette_png
from .ranges import Cuts, Ranges, cuts, maps_of, ranges
from .scale import Limits, Scale, TileFacts, blank, clipped, colormap_for, cut_of, entries, fit
from .view import axes_order

if TYPE_CHECKING:
    from ..capture.reader import Run

Values = NDArray[Any]

SCOPES = ("layer", "channel", "row", "map", "store")
#: Percentiles that may cut a scale, of any scope but the whole store and given limits.
CLIPS = (99.9, 99.0, 95.0)
#: Bytes of maps and of PNG files that are kept, and pixels that one sprite has at most.
MAP_BYTES, PNG_BYTES, MOST_PIXELS = 256 * 2**20, 64 * 2**20, 2**24
#: Bytes of one row's maps that are read and kept together.
PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Look:
    """How values become colours."""

    scope: str | tuple[float, float] = "layer"
    """What shares a scale, one of `SCOPES`, or limits."""
    colormap: str | None = None
    """Name of a colour map; None is what suits the sign."""
    clip: float | None = None
    """The percentile that cuts the scale, one of `CLIPS`; of sizes where it is symmetric around 0."""

    @classmethod
    def parse(cls, scope: str | None, colormap: str | None, clip: str | None) -> Look:
        """Read a scope's name or limits such as `-1:1`, a colour map's name or `auto`, and a percentile.

        Raises:
            DrawError: it is none of these.
        """
        if colormap not in (None, "auto"):
            check_colormap(colormap)
        name = None if colormap == "auto" else colormap
        if scope is None or scope in SCOPES:
            return cls(scope or "layer", name, _clip(clip, scope))
        try:
            low, high = (float(limit) for limit in scope.split(":"))
        except ValueError:
            raise DrawError(
                f"there is no scope {scope!r}: it is one of {', '.join(SCOPES)}, or limits such as -1:1"
            ) from None
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise DrawError(f"limits are finite, the low one below the high one, not {scope!r}")
        return cls((low, high), name, _clip(clip, scope))

    def symmetric(self, signed: bool) -> bool:
        """Return whether the scale is symmetric around 0, where any value is negative or none."""
        return (self.colormap or colormap_for("auto", signed)) in DIVERGING


def _clip(clip: str | None, scope: str | None) -> float | None:
    if clip is None:
        return None
    found = next((one for one in CLIPS if f"{one:g}" == clip), None)
    if found is None:
        raise DrawError(f"clip is one of {', '.join(f'{one:g}' for one in CLIPS)}, not {clip!r}")
    if scope not in (None, "layer", "channel", "row", "map"):
        raise DrawError(f"a percentile cuts the scale of a layer, channel, row or map, not of {scope!r}")
    return found


class Atlas:
    """Maps of a store, read once and kept as long as there is room.

    Args:
        run: the store.
        map_bytes: bytes of maps that are kept.
        png_bytes: bytes of PNG files that are kept.
    """

    def __init__(self, run: Run, map_bytes: int = MAP_BYTES, png_bytes: int = PNG_BYTES) -> None:
        self.run = run
        #: Tap name -> `Layer`, in the order of the model.
        self.layers = self._known()
        self._maps: Bounded[Values] = Bounded(map_bytes, lambda values: values.nbytes)
        self._pngs: Bounded[bytes] = Bounded(png_bytes, len)
        self._ranges: Bounded[Ranges] = Bounded(2**28, lambda one: 8 * 9 * len(one.low) + 200)
        self._cuts: Bounded[Cuts] = Bounded(2**26, lambda one: one.limits.nbytes + 200)
        self._limits: Bounded[Limits] = Bounded(2**22, lambda pair: 200)

    def forget(self) -> None:
        """Keep nothing of what depends on which rows are captured."""
        for cache in (self._maps, self._pngs, self._ranges, self._cuts, self._limits):
            cache.clear()
        self.layers = self._known()

    def _known(self) -> dict[str, Layer]:
        rows = np.flatnonzero(self.run.committed())
        return {name: Layer.of(tap, rows) for name, tap in self.run.taps.items()}

    def layer(self, name: str) -> Layer:
        """Return a layer that can be drawn.

        Raises:
            SelectionError: there is none of that name; the closest are named.
            DrawError: it cannot be drawn.
        """
        if name not in self.layers:
            raise SelectionError(f"the store holds no tap {name!r}. {closest(name, self.layers)}")
        layer = self.layers[name]
        if layer.refusal:
            raise DrawError(f"{name} cannot be drawn: {layer.refusal}")
        return layer

    def check(self, name: str, channel: int) -> None:
        """Refuse a layer or channel that is not there.

        Raises:
            SelectionError: there is none.
            DrawError: the layer cannot be drawn.
        """
        layer = self.layer(name)
        _check([channel], layer.n_channels, layer.unit)

    def ranges(self, name: str) -> Ranges:
        """Return what is known of all rows of a layer."""
        self.layer(name)
        return self._ranges.get(name, lambda: ranges(self.run, name))

    def cuts(self, name: str, clip: float, symmetric: bool, by_channel: bool) -> Cuts:
        """Return where a percentile cuts the scale of a layer, or those of its channels."""
        self.layer(name)
        key = name, clip, symmetric, by_channel
        return self._cuts.get(key, lambda: cuts(self.run, *key))

    def maps(self, name: str, rows: Sequence[int], channels: Sequence[int]) -> Values:
        """Return floats of shape (rows, channels, height, width); rows of one shape.

        Raises:
            SelectionError: a row or channel is not there.
            StoreError: a row is not captured, or the store cannot be read.
        """
        layer = self.layer(name)
        _check(rows, self.run.n_rows, "row")
        _check(channels, layer.n_channels, layer.unit)
        per_piece = max(1, PIECE_BYTES // max(1, 4 * layer.map.height * layer.map.width))
        pieces = sorted({channel // per_piece for channel in channels})
        found = {piece: self._piece(layer, rows, piece, per_piece) for piece in pieces}
        first = found[pieces[0]][0]
        out = np.empty((len(rows), len(channels), *first.shape[1:]), first.dtype)
        for i in range(len(rows)):
            for j, channel in enumerate(channels):
                out[i, j] = found[channel // per_piece][i][channel % per_piece]
        return out

    def _piece(self, layer: Layer, rows: Sequence[int], piece: int, n: int) -> list[Values]:
        """Return some channels of each row, shape (channels, height, width)."""
        held = {row: self._maps.find((layer.name, row, piece)) for row in rows}
        missing = [row for row, values in held.items() if values is None]
        if missing:
            channels = range(piece * n, min((piece + 1) * n, layer.n_channels))
            every = len(channels) == layer.n_channels
            found = maps_of(self.run, layer.name, missing, None if every else channels)
            for row, values in zip(missing, found.values, strict=True):
                held[row] = self._maps.keep((layer.name, row, piece), values.copy())
        return [values for row in rows if (values := held[row]) is not None]

    def tiles(self, name: str, rows: Sequence[int], channels: Sequence[int], look: Look) -> bytes:
        """Return a palette PNG of maps at one pixel a value: a line of channels for each row.

        Raises:
            DrawError: it would have too many pixels.
        """
        layer = self.layer(name)
        n_pixels = len(rows) * len(channels) * layer.map.height * layer.map.width
        if not n_pixels or n_pixels > MOST_PIXELS:
            raise DrawError(f"{n_pixels:,} pixels are asked for at once; there may be {MOST_PIXELS:,}")
        key = (name, tuple(rows), tuple(channels), look)
        return self._pngs.get(key, lambda: self._png(name, rows, channels, look))

    def _png(self, name: str, rows: Sequence[int], channels: Sequence[int], look: Look) -> bytes:
        tiles, colormap = self.entries(name, rows, channels, look)
        n_rows, n_channels, height, width = tiles.shape
        sprite = tiles.transpose(0, 2, 1, 3).reshape(n_rows * height, n_channels * width)
        return palette_png(np.ascontiguousarray(sprite), palette(colormap))

    def entries(
        self, name: str, rows: Sequence[int], channels: Sequence[int], look: Look
    ) -> tuple[NDArray[np.uint8], str]:
        """Return palette entries of shape (rows, channels, height, width), and the colour map's name."""
        shape, cells = self._shape(name, rows[0]), None
        if not shape.n_cells:  # a row without tokens, say
            return np.full((len(rows), len(channels), 1, 1), WHITE, np.uint8), look.colormap or "viridis"
        values = self.maps(name, rows, channels)
        if shape.n_cells < shape.height * shape.width:
            cells = (np.arange(shape.height * shape.width) < shape.n_cells).reshape(shape.height, -1)
        real = values if cells is None else values[:, :, cells][..., None]
        facts = TileFacts.of(real, shape.n_cells)
        scale = self._scale(name, rows, channels, real, facts, look)
        return blank(entries(values, scale, facts), cells), scale.colormap

    def _shape(self, name: str, row: int) -> Shape:
        layer = self.layers[name]
        return self.exact(name, row, [0])[1] if layer.is_ragged else layer.map

    def _scale(
        self,
        name: str,
        rows: Sequence[int],
        channels: Sequence[int],
        values: Values,
        facts: TileFacts,
        look: Look,
    ) -> Scale:
        """Return the scale of maps, as many limits as share one."""
        if not isinstance(look.scope, str):
            least, most = look.scope
            colormap = look.colormap or colormap_for("auto", least < 0)
            return Scale(colormap, np.asarray(least), np.asarray(most), given=True)
        known, store = self.ranges(name), self.store_limits() if look.scope == "store" else None
        if look.scope == "row":
            return self.row_scale(name, rows, look)
        at, symmetric = list(channels), look.symmetric(known.signed)
        cut: Values | None = None
        if look.scope == "map":
            low, high = facts.low, facts.high
            if look.clip is not None:
                cut = np.array([[cut_of(one, look.clip, symmetric) for one in maps] for maps in values])
        elif look.scope == "channel":
            low, high = known.low[at][None], known.high[at][None]
            if look.clip is not None:
                cut = self.cuts(name, look.clip, symmetric, True).limits[at][None]
        else:
            low, high = map(np.asarray, store or known.limits)
            if look.clip is not None:
                cut = self.cuts(name, look.clip, symmetric, False).limits
        return _scale(low, high, cut, look, known.signed if store is None else store[0] < 0)

    def row_scale(self, name: str, rows: Sequence[int], look: Look) -> Scale:
        """Return the scale of rows of a layer, each with limits of its own; NaN where none is finite."""
        signed = self.ranges(name).signed
        low, high = np.array([self.row_range(name, row) for row in rows]).T[..., None]
        cut = None
        if look.clip is not None:
            symmetric = look.symmetric(signed)
            cut = np.array([[self.row_cut(name, row, look.clip, symmetric)] for row in rows])
        return _scale(low, high, cut, look, signed)

    def row_range(self, name: str, row: int) -> Limits:
        """Return the least and greatest finite value of one row of a layer; NaN where there is none."""

        def find() -> Limits:
            values = self._row(name, row)
            return (float(values.min()), float(values.max())) if values.size else (math.nan, math.nan)

        return self._limits.get((name, row), find)

    def row_cut(self, name: str, row: int, clip: float, symmetric: bool) -> Limits:
        """Return where a percentile cuts the scale of one row of a layer."""
        key = name, row, clip, symmetric
        return self._limits.get(key, lambda: cut_of(self._row(name, row), clip, symmetric))

    def _row(self, name: str, row: int) -> Values:
        """Return the finite values of one row of a layer."""
        if not self._shape(name, row).n_cells:
            return np.empty(0)
        values = self.maps(name, [row], range(self.layers[name].n_channels))
        found: Values = values[np.isfinite(values)]
        return found

    def store_limits(self) -> Limits:
        """Return the least and greatest value of all layers that can be drawn."""

        def find() -> Limits:
            limits = [self.ranges(name).limits for name, layer in self.layers.items() if not layer.refusal]
            low, high = np.array([(math.nan, math.nan), *limits]).T
            return float(np.fmin.reduce(low)), float(np.fmax.reduce(high))

        return self._limits.get("store", find)

    def exact(self, name: str, row: int, channels: Sequence[int]) -> tuple[Values, Shape]:
        """Return the values of a row as they are, shape (channels, values), and how a map is made of them.

        Types that a browser does not know become the next larger one that holds each of their values.
        """
        layer = self.layer(name)
        _check([row], self.run.n_rows, "row")
        _check(channels, layer.n_channels, layer.unit)
        tap = self.run[name].of_one_shape([row])
        dims = tap.dims[1:]
        order = axes_order(dims)
        key: list[Any] = [[row], *[slice(None)] * len(order)]
        if order:
            key[1 + order[0]] = np.asarray(channels, np.intp)
        values = np.asarray(tap[tuple(key)])[0]
        if order:
            values = values.transpose(order)
        shape = Shape.of(dims, tuple(tap.shape[1:])) if layer.is_ragged else layer.map
        return _plain(values.reshape(len(channels), -1)), shape

    def wire(self, name: str) -> str:
        """Return the element type of what `exact` gives."""
        return str(_plain(np.empty((0, 0), self.run[name].dtype)).dtype)


def _scale(low: Values, high: Values, cut: Values | None, look: Look, signed: bool) -> Scale:
    """Return a scale whose limits count as given: values may lie outside them."""
    scale = fit(low, high, look.colormap, signed)
    if cut is not None and look.clip is not None:
        scale = clipped(scale, cut, look.clip)
    return replace(scale, given=True)


def _plain(values: Values) -> Values:
    """Return little-endian values of a type that a browser has an array for."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b":
        return np.ascontiguousarray(values, np.uint8)
    if kind in "iu" or (kind == "f" and size in (4, 8)):
        return np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return np.ascontiguousarray(values.astype("<f4"))


def _check(numbers: Sequence[int], n: int, what: str) -> None:
    if not len(numbers):
        raise SelectionError(f"no {what} is named")
    low, high = min(numbers), max(numbers)
    if low < 0 or high >= n:
        wrong = low if low < 0 else high
        raise SelectionError(f"{what} {wrong} is not there; there are {f'0 to {n - 1}' if n else 'none'}")
