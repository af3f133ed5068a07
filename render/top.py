"""The rows that excite channels most: each picture cut to where it does, from a store to a sheet."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError
from .blocks import number
from .fields import Box, box, told
from .importance import check_measure
from .kinds import Kind
from .selection import ChannelChoice, select_layers, select_rows
from .sheet import Sheet
from .spec import Spec
from .top_layout import CUT, WHOLE, Excited, Shot, Size, TopLayer, check_room, laid_out
from .top_rows import TopRows, top_rows
from .view import axes_order, check_can_draw, has_pictures, rgb, row_views

if TYPE_CHECKING:
    from ..capture.reader import Run, Tap

Values = NDArray[Any]

MOST_ROWS, MOST_MAGNIFIED = 1024, 64
_LEAST_CUT = 4  # pixels from side to side
_AT_ONCE_BYTES = 256 * 1024 * 1024  # of whole pictures


@dataclass(frozen=True, kw_only=True)
class TopSpec(Spec):
    """For each channel the rows that excite it most, their pictures cut to where they do."""

    kind: ClassVar[str] = "top"

    layers: tuple[str, ...]
    """Names of taps, in the order in which they are drawn."""
    channels: str | tuple[int, ...] = "first:9"
    """`all`, `first:9`, `top:9`, `top:9:mean`, `page:2:64`, `0,3,5:8`, or numbers."""
    by: str | None = None
    """What `top` and `page` rank channels by: index, maximum; or, where the store keeps statistics, mean,
    variance or sparsity.

    None is what `channels` says, or else maximum for `top` and index for `page`.
    """
    k: int = 9
    """Rows for each channel."""
    rows: tuple[int, ...] | None = None
    """Rows among which they are looked for; None is every captured row."""
    crop: bool | None = None
    """Whether pictures are cut to what the cell of the greatest value sees; else it is outlined.

    None cuts where that leaves a picture to look at: 4 pixels from side to side, of the largest.
    """
    magnification: int | None = None
    """Sheet pixels a pixel of the picture, in each direction; None is by size."""

    def __post_init__(self) -> None:
        layers = (self.layers,) if isinstance(self.layers, str) else self.layers
        object.__setattr__(self, "layers", tuple(str(layer) for layer in layers))
        if not isinstance(self.channels, str):
            object.__setattr__(self, "channels", tuple(int(c) for c in self.channels))
        if self.rows is not None:
            object.__setattr__(self, "rows", tuple(int(row) for row in self.rows))
            if not self.rows:
                raise DrawError("there is no row to look at")
        if not self.layers:
            raise DrawError("there is no layer to draw")
        _choice(self)
        for name, most in (("k", MOST_ROWS), ("magnification", MOST_MAGNIFIED)):
            value = getattr(self, name)
            if value is None and name != "k":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise DrawError(f"{name} must be a whole number from 1 to {most}, not {value!r}")


_RANKS = ("index", "maximum", "mean", "variance", "sparsity")


def _choice(spec: TopSpec) -> ChannelChoice:
    """Return which channels are drawn.

    Raises:
        DrawError: they cannot be read, or ranked so over many rows.
    """
    if spec.by is not None:
        check_measure(spec.by)
    top_alone = isinstance(spec.channels, str) and re.fullmatch(r"\s*top:[0-9]+\s*", spec.channels)
    choice = ChannelChoice.parse(spec.channels, spec.by or ("maximum" if top_alone else None))
    if choice.how in ("top", "page") and choice.by not in _RANKS:
        raise DrawError(f"channels are ranked over all rows by {', '.join(_RANKS)}, not by {choice.by}")
    return choice if choice.how != "auto" else ChannelChoice("first", 9)


def _choose(run: Run, named: Mapping[str, Any]) -> TopSpec:
    """Return the specification of what a user names; without layers, of the first that can be drawn."""
    values = dict(named)
    layers = select_layers(run, values.get("layers"))
    values["layers"] = layers if values.get("layers") is not None else layers[:1]
    if values.get("rows") is None:
        values.pop("rows", None)
    else:
        values["rows"] = tuple(dict.fromkeys(select_rows(run, values["rows"])))
    if values.get("channels") is None:
        values.pop("channels", None)
    elif not isinstance(values["channels"], str):
        values["channels"] = np.atleast_1d(values["channels"]).tolist()
    return TopSpec.of(values)


def _sheet(run: Run, spec: TopSpec) -> Sheet:
    select_rows(run, spec.rows)
    if not has_pictures(run):
        raise DrawError(
            f"{run.path} has no pictures of its rows to show where channels are excited: record_dataset "
            "keeps them, and in a loop of your own annotate(input=...), or annotate(picture=...)"
        )
    return laid_out(
        [_layer(run, run[name], spec) for name in select_layers(run, spec.layers)],
        spec,
    )


def _layer(run: Run, tap: Tap, spec: TopSpec) -> TopLayer:
    """Find the rows of one layer and read their pictures."""
    check_can_draw(tap)
    tap = tap.of_one_shape(spec.rows or tuple(np.flatnonzero(run.committed()).tolist()))
    order = axes_order(tap.dims[1:])
    n_channels = tap.shape[1 + order[0]] if order else 1
    unit = tap.dims[1 + order[0]] if order else "value"
    choice = _choice(spec)
    channels, found = _found(run, tap, choice, n_channels, unit, spec)
    boxes = _boxes(run, tap, found)
    height, width = run.rows["picture"].shape[1:3]
    cuts = [(b - t, r - x) for one in boxes for t, x, b, r in one]
    crop = max(map(max, cuts), default=_LEAST_CUT) >= _LEAST_CUT if spec.crop is None else spec.crop
    shown = cuts if crop else [(height, width)] * len(cuts)
    size = Size.of(shown, CUT if crop else WHOLE, spec.magnification)
    check_room(size, shown, spec.k, len(channels))
    shots = _shots(run, found, boxes, size, spec.k, crop=crop)
    excited = [
        Excited(channel, its, _why_fewer(found, i, spec.k))
        for i, (channel, its) in enumerate(zip(channels, shots, strict=True))
    ]
    shape = " \N{MULTIPLICATION SIGN} ".join(map(str, tap.shape[1:]))
    return TopLayer(
        tap.name,
        " · ".join(part for part in (tap.type, shape) if part),
        unit,
        tuple(excited),
        size.slot,
        (
            _amount(len(channels), n_channels, unit, choice),
            _searched(run, found, spec),
            told(tap, run.rows["picture"].shape[1:], "cut to" if crop else "outlined is", cuts),
        ),
        tuple(channel for channel, n in zip(channels, found.n_not_finite.tolist(), strict=True) if n),
    )


def _found(
    run: Run, tap: Tap, choice: ChannelChoice, n_channels: int, unit: str, spec: TopSpec
) -> tuple[tuple[int, ...], TopRows]:
    """Return the chosen channels, and the rows that excite them."""
    every = range(n_channels)
    ranked = choice.how in ("top", "page")
    window = choice.window(n_channels, f"the {unit}s of {tap.name}") if ranked else slice(None)
    if not ranked or choice.by == "index":
        listed = choice.indices(n_channels, f"{unit} of {tap.name}:") if choice.how == "list" else None
        first = every[: choice.n] if choice.how == "first" else every[window]
        channels = tuple(first) if listed is None else listed
        return channels, top_rows(run, tap, channels, spec.k, spec.rows)
    if choice.by == "maximum":
        found = top_rows(run, tap, every, spec.k, spec.rows)
        order = _falling(found.high)[window]
        return tuple(order.tolist()), found.of(order)
    order = _falling(_measure(run, tap, choice.by, spec))[window]
    return tuple(order.tolist()), top_rows(run, tap, order.tolist(), spec.k, spec.rows)


def _falling(measure: Values) -> Values:
    return np.argsort(-np.where(np.isnan(measure), -np.inf, measure), kind="stable")


def _measure(run: Run, tap: Tap, by: str, spec: TopSpec) -> Values:
    """Return a measure of each channel over all rows, larger for what comes first.

    Raises:
        DrawError: the store keeps no statistics, or only some rows are looked at.
    """
    its = run.stats[tap.name]
    zero, mean, variance = its.zero_fraction, its.mean, its.variance
    if spec.rows is not None or zero is None or mean is None or variance is None:
        raise DrawError(
            f"{by} ranks the channels of {tap.name} by statistics of all captured rows, "
            + ("and some rows were asked for" if spec.rows is not None else "which the store does not keep")
            + ": rank by maximum, or capture with stats='cheap' (--stats cheap)"
        )
    return {"mean": mean, "variance": variance, "sparsity": 1 - zero}[by]


def _boxes(run: Run, tap: Tap, found: TopRows) -> list[list[Box]]:
    """Return for each row that excites each channel what the greatest value sees of its picture."""
    shape = run.rows["picture"].shape[1:]
    return [
        [box(tap, cell, shape) for cell in cells[: _n_excited(found, i)].tolist()]
        for i, cells in enumerate(found.cells)
    ]


def _shots(
    run: Run, found: TopRows, boxes: Sequence[Sequence[Box]], size: Size, k: int, *, crop: bool
) -> Iterator[tuple[Shot, ...]]:
    """Yield the rows of each channel with their pictures, which are read for some channels at a time."""
    column = run.rows["picture"]
    at_once = max(1, _AT_ONCE_BYTES // math.prod(column.shape[1:]) // k)
    for start in range(0, len(boxes), at_once):
        some = range(start, min(start + at_once, len(boxes)))
        rows = np.unique([row for i in some for row in found.rows[i, : len(boxes[i])]]).astype(np.intp)
        pictures = dict(zip(rows.tolist(), column[rows], strict=True)) if rows.size else {}
        views = row_views(run, tuple(rows.tolist()), False) if rows.size else ()
        about = {view.row: view for view in views}
        for i in some:
            yield tuple(
                Shot(about[row], value, size.drawn(rgb(np.asarray(pictures[row])), seen, crop=crop))
                for row, value, seen in zip(
                    found.rows[i].tolist(), found.values[i].tolist(), boxes[i], strict=False
                )
            )


def _n_excited(found: TopRows, i: int) -> int:
    """Return how many rows excite a channel: a constant one none; where nothing is negative, 0 does not."""
    low, high = found.low[i], found.high[i]
    if np.isnan(high) or (low == high and found.n_rows * found.n_places > 1):
        return 0
    values = found.values[i]
    return int((values > 0).sum() if low >= 0 else np.isfinite(values).sum())


def _why_fewer(found: TopRows, i: int, k: int) -> str:
    """Return why a channel has fewer rows than were asked for."""
    low, high, n = found.low[i], found.high[i], _n_excited(found, i)
    if np.isnan(high):
        return "no finite value"
    if low == high and found.n_rows * found.n_places > 1:
        return "all zero" if low == 0 else f"constant: {number(low)} everywhere"
    if n == min(k, found.n_rows):
        return ""
    if low >= 0 and (found.values[i] == 0).any():
        return f"{n} of {found.n_rows:,} rows excite{'s' if n == 1 else ''} it"
    return f"{n} of {found.n_rows:,} rows have a finite value"


def _amount(n: int, n_channels: int, unit: str, choice: ChannelChoice) -> str:
    units = unit if n_channels == 1 else f"{unit}s"
    amount = f"all {n} {units}" if n == n_channels > 1 else f"{n} of {n_channels} {units}"
    if choice.how == "page":
        amount += f", page {choice.page} of {-(-n_channels // choice.n)}"
    return amount + (f", by {choice.by}" if choice.by != "index" else "")


def _searched(run: Run, found: TopRows, spec: TopSpec) -> str:
    """Return among which rows was looked, and how they were found."""
    if spec.rows is not None:
        among = f"among {found.n_rows:,} chosen rows"
    elif run.complete:
        among = f"among all {found.n_rows:,} rows"
    else:
        among = f"among the {found.n_rows:,} rows that are captured so far"
    return f"the rows with the greatest values {among}" + (", as captured" if found.is_kept else "")


TOP = Kind(TopSpec, _choose, _sheet)
