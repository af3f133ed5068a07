"""What all comparisons are told: the layers and channels whose maps stand side by side, and their scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError
from .importance import MEASURES
from .scale import Clip
from .selection import ChannelChoice, select_layers, select_rows
from .spec import MontageSpec, Scope, Spec
from .view import unfinished

if TYPE_CHECKING:
    from ..capture.reader import Run

Values = NDArray[Any]

MINUS = "\N{MINUS SIGN}"
FEW_ROWS = 10  # a mean of fewer rows is marked: it shows these rows more than what they have in common
_SCOPES = ("layer", "figure", "channel")


@dataclass(frozen=True, kw_only=True)
class CompareSpec(Spec):
    """What every comparison is told."""

    rows: tuple[int, ...] | None = None
    """Rows of the data set; None is every captured row."""
    layers: tuple[str, ...] | None = None
    """Names of taps, in the order in which they are drawn; None is every tap that can be drawn."""
    channels: str | tuple[int, ...] = "auto"
    """`all`, `first:9`, `top:9`, `top:9:variance`, `0,3,5:8`, or numbers; `auto` is the first nine maps.

    What ranks first does so by all that is compared.
    """
    by: str | None = None
    """What `top` ranks by: index, mean, maximum, variance, l1, l2 or sparsity.

    None is what `channels` says, or else mean.
    """
    scope: Scope = "layer"
    """What shares one scale: all that is compared of a layer, the figure, a channel; or limits (low, high).

    Differences have a scale of their own, symmetric around 0, of the layer, the figure or the channel.
    """
    clip: Clip | None = None
    """Percentiles of what shares a scale beyond which values are marked as over and under; see `GridSpec`."""
    sign: str = "auto"
    """`sequential` from 0, `diverging` around it, or `auto`: by the data; differences are diverging."""
    columns: int | None = None
    """Tiles in a line; None is as many as a page is wide, in lines alike."""
    colormap: str | None = None
    """viridis, magma, gray or RdBu_r; None is viridis for values >= 0 and RdBu_r for signed ones."""
    magnification: int | None = None
    """Sheet pixels a value, in each direction; None makes tiles of about 64 pixels."""
    numbers: bool | None = None
    """Whether each tile is numbered, further apart if need be; None is where there is room."""

    def __post_init__(self) -> None:
        if self.rows is not None:
            object.__setattr__(self, "rows", tuple(int(row) for row in self.rows))
            if not self.rows:
                raise DrawError("there is no row to draw")
        if self.scope in ("row", "data"):
            raise DrawError(
                "what is compared has one scale: scope is one of " + ", ".join(_SCOPES) + ", or limits"
            )
        choice = ChannelChoice.parse(self.channels, self.by)
        if choice.by not in ("index", *MEASURES):
            raise DrawError(f"what is compared is ranked by one of {', '.join(MEASURES)}, not by {choice.by}")
        checked = self.tiles((0,))
        for name in _shared(self):
            object.__setattr__(self, name, getattr(checked, name))

    def tiles(self, sides: Sequence[int]) -> MontageSpec:
        """Return how the maps are tiled: as a montage whose rows are what stands side by side."""
        return MontageSpec(rows=tuple(sides), **{name: getattr(self, name) for name in _shared(self)})


def _shared(spec: CompareSpec) -> list[str]:
    """Return the options that a comparison and a montage have alike."""
    of_tiles = {field.name for field in fields(MontageSpec)} - {"rows", "title"}
    return [field.name for field in fields(spec) if field.name in of_tiles]


def named_options(run: Run, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the rows, layers and channels that they name as numbers and names that are there.

    Every captured row is None, as is no row at all.

    Raises:
        SelectionError: one is not there; the closest are named.

    """
    values = dict(named, layers=select_layers(run, named.get("layers")))
    if named.get("rows") is not None:
        rows = select_rows(run, named["rows"])
        values["rows"] = None if len(set(rows)) == run.n_committed else rows
    channels = named.get("channels")
    if channels is None:
        values.pop("channels", None)
    elif not isinstance(channels, str):
        values["channels"] = np.atleast_1d(channels).tolist()
    return values


def chosen_rows(run: Run, rows: Sequence[int] | None) -> Values:
    """Return the rows of a specification in rising order, each once."""
    return np.unique(np.asarray(select_rows(run, rows), np.intp))


def amount(n: int, unit: str) -> str:
    """Return `1 row`, `1,000 rows`."""
    return f"{n:,} {unit}{'' if n == 1 else 's'}"


def heads_of(run: Run, heads: Sequence[str]) -> tuple[str, ...]:
    """Return what stands at the top: first how far the capture is, where it did not end."""
    so_far = unfinished(run)
    return tuple(heads) if so_far is None else (f"{so_far[0].upper()}{so_far[1:]}.", *heads)
