"""Overlays: heat maps of layers over the picture of each row, from a store to a sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..capture.errors import DrawError, closest
from .heat import HEATS, OF_ATTENTION
from .heat_maps import heats, layers_of, seen_by
from .importance import F_RATIO
from .kinds import Kind
from .overlay_layout import overlay
from .resize import check_resize
from .selection import ChannelChoice, select_layers, select_rows
from .sheet import Sheet
from .spec import TilesSpec
from .tiles import chosen
from .view import has_pictures, row_views, unfinished

if TYPE_CHECKING:
    from ..capture.reader import Run

BENEATH = ("grey", "colour")
QUERIES = ("class", "mean")


@dataclass(frozen=True, kw_only=True)
class OverlaySpec(TilesSpec):
    """The pictures of some rows, and beside each the same with a heat map over it for every layer."""

    kind: ClassVar[str] = "overlay"

    heat: str = "mean"
    """What maps show: mean, maximum or l2 of the channels, channel (each by itself), gradcam, head, rollout.

    `channels` says which channels (heads) that is; `auto` is all of them, for channel the one of the highest
    mean. `layertap.render.heat` has the formulas.
    """
    alpha: float = 0.6
    """How opaque the colours are, above 0 up to 1."""
    fade: bool | None = None
    """Whether colours fade to nothing towards 0; None is where the map has both signs."""
    beneath: str = "grey"
    """The picture below the colours: grey, so that every hue is the map's, or colour."""
    resize: str = "bilinear"
    """How a map is brought to the size of the picture, before it is scaled: bilinear or nearest."""
    cell: tuple[int, int] | None = None
    """A cell (y, x) of the layers; what it sees of the picture is outlined."""
    query: str | tuple[int, int] | None = None
    """Of attention: from which token. class, mean (of all tokens), or a patch (y, x), which is outlined.

    None is class where there is one, else mean.
    """
    prefix: int | None = None
    """Tokens before the patches; None is one, a class token, or none, by what fills the picture."""
    region: tuple[float, float, float, float] | None = None
    """What the model saw of the picture: top, left, bottom, right in pixels; None is what the store says."""
    original: bool = True
    """Whether the row's picture, its class and the predicted class stand at the left."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_heat(self.heat)
        check_resize(self.resize)
        if self.beneath not in BENEATH:
            raise DrawError(f"the picture beneath is {' or '.join(BENEATH)}, not {self.beneath!r}")
        if isinstance(self.alpha, bool) or not 0 < self.alpha <= 1:
            raise DrawError(f"alpha is above 0 and at most 1, not {self.alpha!r}")
        object.__setattr__(self, "cell", _pair(self.cell, "a cell"))
        if isinstance(self.query, str):
            if self.query not in QUERIES:
                raise DrawError(f"a query is class, mean or a patch (y, x), not {self.query!r}")
        else:
            object.__setattr__(self, "query", _pair(self.query, "a query"))
        if self.prefix is not None and (isinstance(self.prefix, bool) or self.prefix < 0):
            raise DrawError(f"prefix is a number of tokens, not {self.prefix!r}")
        object.__setattr__(self, "region", _region(self.region))
        self._check_together()

    def _check_together(self) -> None:
        """Refuse options of which one has no meaning beside the other."""
        of_attention = self.heat in OF_ATTENTION
        if self.scope == "data":
            raise DrawError(
                "a heat map's scale is of what is drawn: scope is layer, figure, row, channel, or limits"
            )
        by = ChannelChoice.parse(self.channels, self.by).by
        if self.heat == "head" and (self.over == "data" or by == F_RATIO):
            raise DrawError("heads are ranked over the rows that are drawn, and not by f_ratio")
        if self.heat in ("gradcam", "rollout") and self.channels not in ("auto", "all"):
            every = "heads" if of_attention else "channels"
            raise DrawError(f"{self.heat} is of all {every}; leave channels out")
        if self.cell is not None and of_attention:
            raise DrawError("attention has no cells; query=(y, x) chooses a patch and outlines it")
        if self.query is not None and not of_attention:
            raise DrawError(f"a query is of attention (heat='head' or 'rollout'), not of {self.heat!r}")


def _pair(value: Any, what: str) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        y, x = (int(n) for n in value)
    except (TypeError, ValueError):
        raise DrawError(f"{what} is two whole numbers (y, x), not {value!r}") from None
    if y < 0 or x < 0:
        raise DrawError(f"{what} is counted from 0 at the top left; got ({y}, {x})")
    return y, x


def _region(value: Any) -> tuple[float, float, float, float] | None:
    if value is None:
        return None
    try:
        top, left, bottom, right = (float(n) for n in value)
    except (TypeError, ValueError):
        raise DrawError(f"a region is four numbers (top, left, bottom, right), not {value!r}") from None
    if not (all(map(math.isfinite, (top, left, bottom, right))) and top < bottom and left < right):
        raise DrawError(f"a region has its top above its bottom and its left before its right; got {value!r}")
    return top, left, bottom, right


def _check_heat(heat: Any) -> None:
    if heat not in HEATS:
        raise DrawError(f"there is no heat map of {heat!r}. {closest(str(heat), HEATS)}")


def _choose(run: Run, named: Mapping[str, Any]) -> OverlaySpec:
    names = None if named.get("layers") is None else select_layers(run, named["layers"])
    heat = named.get("heat") or _suits(run, names, named)
    _check_heat(heat)
    return OverlaySpec.of(chosen(run, {**named, "heat": heat, "layers": layers_of(run, heat, names)}))


def _suits(run: Run, names: tuple[str, ...] | None, named: Mapping[str, Any]) -> str:
    """Return what is drawn of layers where nothing is said of that."""
    single = named.get("channels") is not None
    if names is not None and all(run[name].kind == "attention" for name in names):
        return "head" if single or len(names) == 1 else "rollout"
    return "channel" if single else "mean"


def _sheet(run: Run, spec: OverlaySpec) -> Sheet:
    select_rows(run, spec.rows)
    if not has_pictures(run):
        raise DrawError(
            f"{run.path} holds no pictures to lay maps over. A capture of pictures keeps them; in a loop of "
            "your own: rec.annotate(input=images), or picture= in uint8. A grid draws the maps alone"
        )
    height, width = run.rows["picture"].shape[1:3]
    seen = seen_by(run, (height, width), spec.region)
    rows = row_views(run, spec.rows, True)
    return overlay(rows, heats(run, spec, seen), seen, spec, unfinished(run))


OVERLAY = Kind(OverlaySpec, _choose, _sheet)
