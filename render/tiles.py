"""Grids and montages: channels of layers as tiles, from a store to a sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .kinds import Kind
from .layout import grid, montage
from .selection import select_layers, select_rows
from .sheet import Sheet
from .spec import GridSpec, MontageSpec, TilesSpec
from .view import Shelf, View, float_type, take

if TYPE_CHECKING:
    from ..capture.reader import Run

#: Bytes of the values that are read together for pictures that follow each other.
SHELF_BYTES = 64 * 2**20


def _grid(run: Run, named: Mapping[str, Any]) -> GridSpec:
    return GridSpec.of(chosen(run, named))


def _montage(run: Run, named: Mapping[str, Any]) -> MontageSpec:
    values = chosen(run, named)
    if named.get("layers") is None:
        values["layers"] = values["layers"][:1]
    return MontageSpec.of(values)


def chosen(run: Run, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the rows, layers and channels that they name as numbers and names that are there.

    Without rows it is the first captured one; without layers all that can be drawn.

    Raises:
        SelectionError: one is not there; the closest are named.
    """
    rows, layers, channels = (named.get(name) for name in ("rows", "layers", "channels"))
    selected = select_rows(run, rows)
    values = dict(named, rows=selected[:1] if rows is None else selected, layers=select_layers(run, layers))
    if channels is None:
        values.pop("channels", None)
    elif not isinstance(channels, str):
        values["channels"] = np.atleast_1d(channels).tolist()
    return values


def _sheet_of_grid(run: Run, spec: GridSpec) -> Sheet:
    select_rows(run, spec.rows)
    return grid(take(run, spec), spec)


def _sheet_of_montage(run: Run, spec: MontageSpec) -> Sheet:
    select_rows(run, spec.rows)
    return montage(take(run, spec), spec)


def _many(lay_out: Callable[[View, Any], Sheet]) -> Callable[[Run, Sequence[TilesSpec]], Iterator[Sheet]]:
    """Return what reads the rows of many specifications together and lays out one sheet after the other."""

    def sheets(run: Run, specs: Sequence[TilesSpec]) -> Iterator[Sheet]:
        for some in _shelves(run, specs):
            shelf = Shelf(run, [row for spec in some for row in spec.rows])
            for spec in some:
                select_rows(run, spec.rows)
                yield lay_out(take(run, spec, shelf), spec)

    return sheets


def _shelves(run: Run, specs: Sequence[TilesSpec]) -> Iterator[list[TilesSpec]]:
    """Yield specifications that follow each other and differ in their rows, as many as fit in memory."""
    some: list[TilesSpec] = []
    n_bytes = 0
    for spec in specs:
        its = len(spec.rows) * _row_bytes(run, spec)
        alike = not some or replace(some[0], rows=spec.rows) == spec
        if some and (not alike or n_bytes + its > SHELF_BYTES):
            yield some
            some, n_bytes = [], 0
        some.append(spec)
        n_bytes += its
    if some:
        yield some


def _row_bytes(run: Run, spec: TilesSpec) -> int:
    """Return the most bytes that a row of `spec` takes in memory."""
    names = select_layers(run, spec.layers)
    return sum(math.prod(run[name].bound) * float_type(run[name].dtype).itemsize for name in names)


GRID = Kind(GridSpec, _grid, _sheet_of_grid, _many(grid))
MONTAGE = Kind(MontageSpec, _montage, _sheet_of_montage, _many(montage))
