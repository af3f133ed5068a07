"""Grids and montages: channels of layers as tiles, from a store to a sheet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .kinds import Kind
from .layout import grid, montage
from .selection import select_layers, select_rows
from .sheet import Sheet
from .spec import GridSpec, MontageSpec
from .view import take

if TYPE_CHECKING:
    from ..capture.reader import Run


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


GRID = Kind(GridSpec, _grid, _sheet_of_grid)
MONTAGE = Kind(MontageSpec, _montage, _sheet_of_montage)
