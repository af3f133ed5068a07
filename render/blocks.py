"""From a view to scaled tiles: one block for each layer, with what must be said about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError
from .colormaps import DIVERGING, Mark
from .scale import Scale, TileFacts, blank, clipped, colormap_for, cut_of, entries, fit
from .spec import TilesSpec
from .view import LayerView, RowView, View

_TILE = 64  # pixels across that a tile should have
_CELL = 28  # the same where it is a single value
_SMALL_CELL = 10  # the same where there are many of these
_LISTED = 12  # numbers of tiles that a caption names at most
_WIDEST = 1500  # pixels across that many tiles side by side should not exceed


@dataclass(frozen=True, eq=False)
class Remark:
    """What a mark in a block stands for, and where it is."""

    mark: Mark
    words: str
    """`NaN in`, `all zero:`, `37 over 0.5 in` and so on."""
    tiles: tuple[int | str, ...]
    """Channels with the mark; rows, where many rows of one channel are drawn."""
    unit: str
    """What a tile is: channel, feature, row and so on."""


@dataclass(frozen=True, eq=False)
class Block:
    """One layer's tiles."""

    layer: LayerView
    tiles: NDArray[np.uint8]
    """Palette entries, shape (rows, channels, height, width)."""
    scale: Scale
    """The scale of all of it; with more than one pair of limits where scope is row or channel."""
    remarks: tuple[Remark, ...]
    notes: tuple[str, ...]
    """Each remark by row, for the sheet's notes."""

    def row_scale(self, i: int) -> Scale | None:
        """Return the scale that is true of row `i`, or None where its tiles have several or no values."""
        scale = self.scale
        if scale.low.ndim == 2 and scale.low.shape[1] == 1 and scale.low.shape[0] > 1:
            scale = Scale(scale.colormap, scale.low[i : i + 1], scale.high[i : i + 1])
        return scale if scale.single else None


def scaled(view: View, spec: TilesSpec) -> tuple[Block, ...]:
    """Return a block for each layer of `view`, on the scale that `spec` asks for."""
    return blocks_of([(layer, view.rows) for layer in view.layers], spec)


def blocks_of(layers: Sequence[tuple[LayerView, Sequence[RowView]]], spec: TilesSpec) -> tuple[Block, ...]:
    """Return a block for each layer, with what its maps are of, on the scale that `spec` asks for."""
    facts = [TileFacts.of(*_cells(layer)) for layer, _ in layers]
    scales = _scales([layer for layer, _ in layers], facts, spec)
    return tuple(
        _block(layer, fact, scale, rows)
        for (layer, rows), fact, scale in zip(layers, facts, scales, strict=True)
    )


def _cells(layer: LayerView) -> tuple[NDArray[Any], int]:
    """Return the values that are in the data, as maps, and how many a map has."""
    values = layer.values if layer.cells is None else layer.values[:, :, layer.cells][..., None]
    return values, values.shape[2] * values.shape[3]


def _scales(layers: Sequence[LayerView], facts: Sequence[TileFacts], spec: TilesSpec) -> list[Scale]:
    if not isinstance(spec.scope, str):
        return [_given(spec.scope, spec)] * len(facts)
    if spec.scope == "figure":
        return [_shared(layers, facts, spec)] * len(facts)
    return [_shared([layer], [fact], spec) for layer, fact in zip(layers, facts, strict=True)]


def _given(limits: tuple[float, float], spec: TilesSpec) -> Scale:
    low, high = limits
    name = spec.colormap or colormap_for(spec.sign, low < 0)
    return Scale(name, np.asarray(low), np.asarray(high), given=True)


def _shared(layers: Sequence[LayerView], facts: Sequence[TileFacts], spec: TilesSpec) -> Scale:
    """Return the scale, with as many limits as `spec.scope` asks for, that all of these layers share."""
    axis = {"row": 1, "channel": 0}.get(str(spec.scope))
    if spec.scope == "data" and layers[0].data is None:
        raise DrawError(
            f"{layers[0].name} has no limits over the data set in a {spec.kind}, where it is computed; "
            "the scope can be layer, figure, row, channel, or limits (low, high)"
        )
    if layers[0].data is not None:
        low, high = np.asarray(layers[0].data.low), np.asarray(layers[0].data.high)
    elif axis is None:
        low = np.asarray(_least(np.array([_least(f.low) for f in facts])))
        high = np.asarray(_most(np.array([_most(f.high) for f in facts])))
    else:
        low = np.fmin.reduce(facts[0].low, axis, keepdims=True)
        high = np.fmax.reduce(facts[0].high, axis, keepdims=True)
    signed = bool((low < 0).any())
    name = spec.colormap or colormap_for(spec.sign, signed)
    scale = fit(low, high, name, signed)
    return scale if spec.clip is None else clipped(scale, _cuts(layers, axis, name, spec), spec.clip)


def _cuts(layers: Sequence[LayerView], axis: int | None, name: str, spec: TilesSpec) -> NDArray[Any]:
    """Return the limits that the percentiles of what shares a scale give, shape (..., 2)."""
    assert spec.clip is not None
    if layers[0].data is not None:
        return np.array(layers[0].data.cut or (np.nan, np.nan))
    values = [_cells(layer)[0] for layer in layers]
    symmetric = name in DIVERGING
    if axis is None:
        both = np.concatenate([v.ravel() for v in values]) if len(values) > 1 else values[0]
        return np.array(cut_of(both, spec.clip, symmetric))
    lines = np.moveaxis(values[0], 1 - axis, 0)
    cuts = np.array([cut_of(line, spec.clip, symmetric) for line in lines])
    return np.expand_dims(cuts, axis)


def _least(values: NDArray[Any]) -> Any:
    return np.fmin.reduce(values, axis=None)  # NaN only where all are


def _most(values: NDArray[Any]) -> Any:
    return np.fmax.reduce(values, axis=None)


def _block(layer: LayerView, facts: TileFacts, scale: Scale, rows: Sequence[RowView]) -> Block:
    tiles = blank(entries(layer.values, scale, facts), layer.cells)
    by_row = len(rows) > 1 and len(layer.channels) == 1
    remarks, notes = [], []
    for mark in _found(facts, scale, tiles):
        names = [view.row for view in rows] if by_row else list(layer.channels)
        hit = np.flatnonzero(mark.there.any(axis=1 if by_row else 0))
        unit = "row" if by_row else layer.unit
        remarks.append(Remark(mark.mark, mark.said(slice(None)), tuple(names[i] for i in hit), unit))
        for i, (view, line) in enumerate(zip(rows, mark.there, strict=True)):
            channels = [str(c) for c, is_hit in zip(layer.channels, line, strict=True) if is_hit]
            if channels:
                notes.append(f"{layer.name}, {view.label}: {mark.said(i)} {', '.join(channels)}")
    return Block(layer, tiles, scale, tuple(remarks), (*notes, *_limits(layer, scale, rows)))


@dataclass(frozen=True, eq=False)
class _Found:
    """A mark that occurs."""

    mark: Mark
    words: str
    there: NDArray[np.bool_]
    """In which maps, shape (rows, channels)."""
    counts: NDArray[np.int64] | None = None
    """How many values of each have it, where that is said."""

    def said(self, rows: int | slice) -> str:
        """Return what it is called in some rows."""
        return self.words if self.counts is None else f"{self.counts[rows].sum():,} {self.words}"


def _limits(layer: LayerView, scale: Scale, rows: Sequence[RowView]) -> Iterator[str]:
    """Yield the limits of each row or channel that has its own."""
    if scale.low.ndim != 2:
        return
    by_row = scale.low.shape[1] == 1
    names = [view.label for view in rows] if by_row else [f"{layer.unit} {c}" for c in layer.channels]
    for name, low, high in zip(names, scale.low.flat, scale.high.flat, strict=True):
        said = f"from {number(low)} to {number(high)}" if np.isfinite(high) else "no finite value"
        yield f"{layer.name}, {name}: {said}"


def _found(facts: TileFacts, scale: Scale, tiles: NDArray[np.uint8]) -> list[_Found]:
    """Return the marks that occur."""
    candidates = [
        _Found(Mark.ZERO, "all zero:", facts.zero),
        _Found(Mark.CONSTANT, "constant:", facts.constant),
        _Found(Mark.NAN, "NaN in", facts.n_nan > 0),
        _Found(Mark.POSITIVE_INFINITY, "+inf in", facts.n_positive_infinity > 0),
        _Found(Mark.NEGATIVE_INFINITY, "-inf in", facts.n_negative_infinity > 0),
    ]
    if scale.open:
        low, high = map(number, scale.limits) if scale.single else ("its limits", "its limits")
        for mark, words in ((Mark.OVER, f"over {high} in"), (Mark.UNDER, f"under {low} in")):
            counts = (tiles == mark).sum(axis=(2, 3))
            candidates.append(_Found(mark, words, counts > 0, counts))
    return [candidate for candidate in candidates if candidate.there.any()]


@dataclass(frozen=True)
class Cut:
    """Some of a view: the rows, layers and channels, by their places in it."""

    rows: tuple[int, ...]
    layers: tuple[int, ...]
    channels: tuple[int, ...] | None = None
    """None is all."""


class Scaling:
    """The scales of a view, for all of it or for some: what is cut out of it keeps the scale of the whole."""

    def __init__(self, view: View, spec: TilesSpec) -> None:
        self._view = view
        self._facts = [TileFacts.of(*_cells(layer)) for layer in view.layers]
        self._scales = _scales(view.layers, self._facts, spec)

    def of(self, cut: Cut) -> tuple[View, tuple[Block, ...]]:
        """Return some of the view, and a block for each of its layers."""
        rows = tuple(self._view.rows[i] for i in cut.rows)
        layers, blocks = [], []
        for i in cut.layers:
            layer, facts, scale = self._view.layers[i], self._facts[i], self._scales[i]
            channels = range(len(layer.channels)) if cut.channels is None else cut.channels
            at = np.ix_(cut.rows, channels)
            layers.append(
                replace(layer, channels=tuple(layer.channels[c] for c in channels), values=layer.values[at])
            )
            facts = TileFacts(*(getattr(facts, field.name)[at] for field in fields(facts)))
            blocks.append(_block(layers[-1], facts, _cut_scale(scale, cut.rows, channels), rows))
        return replace(self._view, rows=rows, layers=tuple(layers)), tuple(blocks)


def _cut_scale(scale: Scale, rows: Sequence[int], channels: Sequence[int]) -> Scale:
    """Return the limits of some rows and channels, where these have their own."""
    if scale.low.ndim != 2:
        return scale
    n_rows, n_channels = scale.low.shape
    at = np.ix_(rows if n_rows > 1 else (0,), channels if n_channels > 1 else (0,))
    whole = {field.name: getattr(scale, field.name) for field in fields(scale)}
    some = {name: value[at] for name, value in whole.items() if np.shape(value) == scale.low.shape}
    return replace(scale, **some)


def number(value: float) -> str:
    """Return `value` in three significant digits, short: 0, 1.25, 3.1e-5."""
    mantissa, e, exponent = f"{value:.3g}".partition("e")
    if e:
        return f"{mantissa}e{int(exponent)}"
    return "0" if mantissa == "-0" else mantissa


def listing(tiles: Sequence[int | str], unit: str, fits: Callable[[str], bool]) -> str:
    """Return the numbers of `tiles`: `3, 7` or `rows 3, 7`; where these do not fit, how many there are.

    That is `40 channels (3, 7, …)`, with as many numbers as fit, or `40 channels`.
    """
    text = ", ".join(map(str, tiles))
    if unit == "row":
        text = f"row{'s' if len(tiles) > 1 else ''} {text}"
    if len(tiles) <= _LISTED and fits(text):
        return text
    amount = f"{len(tiles)} {unit if len(tiles) == 1 else unit + 's'}"
    for kept in range(min(len(tiles) - 1, _LISTED), 0, -1):
        text = f"{amount} ({', '.join(map(str, tiles[:kept]))}, …)"
        if fits(text):
            return text
    return amount


def tile_columns(n: int, spec: TilesSpec) -> int:
    """Return how many of `n` tiles stand in a line, so that none is lost."""
    return min(spec.columns or math.isqrt(max(n - 1, 0)) + 1, n)


def tile_factor(shape: tuple[int, int], n: int, columns: int, spec: TilesSpec) -> int:
    """Return the whole number of pixels that a value takes in each direction."""
    if spec.magnification is not None:
        return spec.magnification
    largest = max(shape)
    wanted = _TILE if largest > 1 else _CELL if n <= 25 else _SMALL_CELL
    factor = max(1, round(wanted / largest))
    while factor > 1 and columns * (shape[1] * factor + 5) > _WIDEST:
        factor -= 1
    return factor
