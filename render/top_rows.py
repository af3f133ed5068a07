"""The rows that excite each channel of a tap most: as a capture found them, or by one pass over the store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError
from .view import axes_order

if TYPE_CHECKING:
    from ..capture.reader import Run, Tap
    from ..capture.summary import TapStatistics

Values = NDArray[Any]

_AT_ONCE_BYTES = 64 * 1024 * 1024  # of values in float64, in the pass over the store


@dataclass(frozen=True, eq=False)
class TopRows:
    """Of some channels the rows with the greatest maxima, the greatest first, the earlier of equals."""

    rows: Values
    """Rows of the data set, (channels, k); -1: there is none."""
    values: Values
    """Their maxima over finite values, (channels, k)."""
    cells: Values
    """Where each lies, the first of equals: its index on each axis of places, (channels, k, axes)."""
    low: Values
    """Least finite value of each channel in the rows that were looked at, (channels,); NaN: none is."""
    high: Values
    """Greatest finite value, likewise."""
    n_not_finite: Values
    """Values that are NaN or infinite, likewise."""
    n_rows: int
    """Rows that were looked at."""
    n_places: int
    """Values of a channel in each row."""
    is_kept: bool
    """Whether the store kept them, so that none was read again."""

    def of(self, channels: Values) -> TopRows:
        """Return the same of some of the channels."""
        per_channel = ("rows", "values", "cells", "low", "high", "n_not_finite")
        return replace(self, **{name: getattr(self, name)[channels] for name in per_channel})


def top_rows(run: Run, tap: Tap, channels: Sequence[int], k: int, rows: Sequence[int] | None) -> TopRows:
    """Return the `k` rows that excite each of `channels` most, each row once.

    Args:
        run: the store.
        tap: one of its taps.
        channels: numbers of channels.
        k: how many rows.
        rows: among which; None is every captured row.

    Raises:
        DrawError: the store has no values to look at, and kept no such rows.
    """
    kept = _kept(run, tap, k) if rows is None else None
    if kept is not None:
        return _of_statistics(kept, np.array(channels), k, run.n_committed, math.prod(_places(tap)))
    if not run.manifest.layout.values:
        raise DrawError(
            f"{run.path} holds statistics alone, and not the {k} rows of each channel of {tap.name} among "
            f"those that were asked for: capture with stats='top:{k}' (--stats top:{k}) and draw all rows"
        )
    looked_at = np.flatnonzero(run.committed()) if rows is None else np.unique(np.asarray(rows, np.intp))
    return _of_pass(tap, np.array(channels), k, looked_at)


def _kept(run: Run, tap: Tap, k: int) -> TapStatistics | None:
    """Return the statistics of a tap where they have its `k` first rows."""
    if "top" not in run.stats.names or tap.is_ragged:
        return None
    its = run.stats[tap.name]
    assert its.top_rows is not None
    order = axes_order(tap.dims[1:])
    same_axis = its.axis == tap.dims[1 + order[0]] if order else len(its.top_rows) == 1
    enough = k <= its.top_rows.shape[1] or run.n_committed <= its.top_rows.shape[1]
    return its if same_axis and enough else None


def _of_statistics(its: TapStatistics, channels: Values, k: int, n_rows: int, n_places: int) -> TopRows:
    assert its.top_rows is not None
    assert its.top_values is not None
    assert its.top_positions is not None
    assert its.minimum is not None
    assert its.maximum is not None
    assert its.n_nan is not None
    assert its.n_inf is not None
    return TopRows(
        its.top_rows[channels, :k],
        its.top_values[channels, :k],
        its.top_positions[channels, :k],
        its.minimum[channels],
        its.maximum[channels],
        (its.n_nan + its.n_inf)[channels],
        n_rows,
        n_places,
        True,
    )


def _of_pass(tap: Tap, channels: Values, k: int, rows: Values) -> TopRows:
    """Read the rows once, some at a time; memory is that of these, whatever their number."""
    n = len(channels)
    order = axes_order(tap.dims[1:])
    places = _places(tap)
    best: dict[str, Values] = {
        "rows": np.full((0, n), -1, np.int64),
        "values": np.full((0, n), -np.inf),
        "places": np.full((0, n), -1, np.int64),
    }
    low, n_bad = np.full(n, np.inf), np.zeros(n, np.int64)
    for numbers, values in _read(tap, channels, order, rows):
        finite = np.isfinite(values)
        raised = np.where(finite, values, -np.inf)
        at = raised.argmax(2)
        new = {
            "rows": np.broadcast_to(numbers[:, None], at.shape),
            "values": np.take_along_axis(raised, at[..., None], 2)[..., 0],
            "places": at,
        }
        both = {name: np.concatenate([best[name], new[name]]) for name in best}
        first = np.argsort(-both["values"], axis=0, kind="stable")[:k]
        best = {name: np.take_along_axis(some, first, 0) for name, some in both.items()}
        low = np.fmin(low, np.where(finite, values, np.inf).min(axis=(0, 2)))
        n_bad += (~finite).sum(axis=(0, 2))
    there = np.isfinite(best["values"])
    cells = np.stack(np.unravel_index(best["places"], places), -1) if places else np.zeros((*there.shape, 0))
    found = {
        "rows": np.where(there, best["rows"], -1).T,
        "values": np.where(there, best["values"], np.nan).T,
        "cells": np.where(there[..., None], cells, -1).astype(np.int64).swapaxes(0, 1),
    }
    high = found["values"][:, 0] if len(rows) else np.full(n, np.nan)
    low = np.where(there.any(0), low, np.nan)
    return TopRows(
        **found,
        low=low,
        high=high,
        n_not_finite=n_bad,
        n_rows=len(rows),
        n_places=math.prod(places),
        is_kept=False,
    )


def _places(tap: Tap) -> tuple[int, ...]:
    """Return the sizes of the axes beside that of the channels."""
    return tuple(tap.shape[1 + axis] for axis in axes_order(tap.dims[1:])[1:])


def _read(
    tap: Tap, channels: Values, order: tuple[int, ...], rows: Values
) -> Iterator[tuple[Values, Values]]:
    """Yield rows, and their values as floats of shape (rows, channels, places)."""
    n_channels = tap.shape[1 + order[0]] if order else 1
    key: list[Any] = [slice(None)] * len(order)
    if len(channels) < n_channels:
        key[order[0]] = channels
    row_bytes = 8 * len(channels) * math.prod(_places(tap))
    n = max(1, _AT_ONCE_BYTES // row_bytes)
    for start in range(0, len(rows), n):
        some = rows[start : start + n]
        values = np.asarray(tap[(some, *key)])
        if order:
            values = values.transpose(0, *(1 + axis for axis in order))
            if len(channels) == n_channels:
                values = values[:, channels]
        exact = values.dtype.itemsize > 2 and values.dtype != np.float32
        yield some, values.astype(np.float64 if exact else np.float32).reshape(len(some), len(channels), -1)
