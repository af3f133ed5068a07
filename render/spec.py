"""What to draw, as data: frozen dataclasses that go to JSON and come back equal.

A specification says everything about a picture but the store it is drawn from, so that a call, a command
and a link can mean the same picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np

from ..capture.errors import DrawError, closest
from .colormaps import DIVERGING, check_colormap
from .importance import check_measure
from .scale import Clip
from .selection import ChannelChoice

SCOPES = ("layer", "figure", "row", "channel", "data")
SIGNS = ("auto", "sequential", "diverging")
OVER = ("drawn", "data")
Scope = str | tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What every kind of picture is told, and how it goes to JSON and back."""

    kind: ClassVar[str] = ""

    title: str | None = None
    """Title of the figure; None is the kind's own, an empty one is none."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what has its default is left out."""
        values: dict[str, Any] = {"kind": self.kind}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | str) -> Self:
        """Return the specification that `to_json` gave, from its values or their JSON text.

        Raises:
            DrawError: it is of another kind, or holds an option that this kind does not have.

        """
        if isinstance(values, str):
            try:
                values = json.loads(values)
            except ValueError as error:
                raise DrawError(f"the specification is not JSON: {error}") from error
        if not isinstance(values, Mapping):
            raise DrawError(f"the specification is not a JSON object but {type(values).__name__}")
        given = dict(values)
        kind = given.pop("kind", cls.kind)
        if kind != cls.kind:
            raise DrawError(f"this is the specification of a {kind!r}, not of a {cls.kind!r}")
        return cls.of(given)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Return the specification with these options.

        Raises:
            DrawError: there is no such option (the closest are named), or one has a bad value.

        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise DrawError(f"{_a(cls.kind)} has no option {name!r}. {closest(name, known)}")
        try:
            return cls(**options)
        except (TypeError, ValueError) as error:
            if isinstance(error, DrawError):
                raise
            raise DrawError(f"{_a(cls.kind)} cannot be drawn from these options: {error}") from error


@dataclass(frozen=True, kw_only=True)
class TilesSpec(Spec):
    """What a picture of channels as tiles is told."""

    rows: tuple[int, ...]
    """Rows of the data set, in the order in which they are drawn."""
    layers: tuple[str, ...] | None = None
    """Names of taps, in the order in which they are drawn; None is every tap that can be drawn."""
    channels: str | tuple[int, ...] = "auto"
    """`all`, `first:9`, `top:9`, `top:9:variance`, `page:2:64`, `page:2:64:variance`, `0,3,5:8`, or numbers.

    `auto` is what suits the kind; pages count from 1.
    """
    by: str | None = None
    """What `top` and `page` rank by: index, mean, maximum, variance, l1, l2, sparsity or f_ratio.

    sparsity has the least sparse first; f_ratio is how well a channel tells the classes apart. None is what
    `channels` says, or else mean for `top` and index for `page`.
    """
    over: str = "drawn"
    """Over which rows channels are ranked: those `drawn`, or `data`, all captured ones (f_ratio always)."""
    scope: Scope = "layer"
    """What shares one scale: a layer, the figure, a row of a layer, a channel; or limits (low, high).

    `data` is a layer's limits over all captured rows and channels, whatever is drawn of it.
    """
    clip: Clip | None = None
    """Percentiles of what shares a scale beyond which values are marked as over and under.

    One number is the upper one, of the values' sizes where the scale is symmetric around 0; two are both.
    """
    sign: str = "auto"
    """`sequential` from 0 (or a negative least), `diverging`, symmetric around 0, or `auto`: by the data."""
    columns: int | None = None
    """Tiles in a line; None is the square root of their number, rounded up, as far as a page is wide."""
    colormap: str | None = None
    """viridis, magma, gray or RdBu_r; None is viridis for values >= 0 and RdBu_r for signed ones."""
    magnification: int | None = None
    """Sheet pixels a value, in each direction; None makes tiles of about 64 pixels."""
    numbers: bool | None = None
    """Whether each tile is numbered, further apart if need be; None is where there is room."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(int(row) for row in self.rows))
        if self.layers is not None:
            layers = (self.layers,) if isinstance(self.layers, str) else self.layers
            object.__setattr__(self, "layers", tuple(str(layer) for layer in layers))
        if isinstance(self.channels, str) and set(self.channels) <= set("0123456789, "):
            plain = tuple(part for part in self.channels.replace(" ", "").split(",") if part)
            object.__setattr__(self, "channels", plain or self.channels)
        if not isinstance(self.channels, str):
            object.__setattr__(self, "channels", tuple(int(c) for c in self.channels))
        if not self.rows:
            raise DrawError("there is no row to draw")
        ChannelChoice.parse(self.channels, self.by)
        if self.by is not None:
            check_measure(self.by)
        object.__setattr__(self, "scope", _checked_scope(self.scope))
        object.__setattr__(self, "clip", _checked_clip(self.clip, self.scope))
        for name, known in (("over", OVER), ("sign", SIGNS)):
            value = getattr(self, name)
            if value not in known:
                raise DrawError(f"{name} is one of {', '.join(known)}, not {value!r}")
        for name in ("columns", "magnification"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise DrawError(f"{name} must be a whole number of 1 or more, not {value!r}")
        if self.colormap is not None:
            check_colormap(self.colormap)
            its = "diverging" if self.colormap in DIVERGING else "sequential"
            if self.sign not in ("auto", its):
                raise DrawError(f"{self.colormap} is a {its} colour map, and sign says {self.sign}")


@dataclass(frozen=True, kw_only=True)
class GridSpec(TilesSpec):
    """The pictures of some rows, and beside each a block of channels for every layer."""

    kind: ClassVar[str] = "grid"

    picture: bool = True
    """Whether the row's picture, its class and the predicted class stand at the left."""


@dataclass(frozen=True, kw_only=True)
class MontageSpec(TilesSpec):
    """All channels of a layer for one row, one channel over many rows, or channels by rows."""

    kind: ClassVar[str] = "montage"


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _checked_scope(scope: Any) -> Scope:
    if isinstance(scope, str):
        if scope not in SCOPES:
            raise DrawError(
                f"there is no scope {scope!r}: it is one of {', '.join(SCOPES)}, or limits (low, high)"
            )
        return scope
    try:
        low, high = (float(limit) for limit in scope)
    except (TypeError, ValueError):
        raise DrawError(f"limits are two numbers (low, high), not {scope!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise DrawError(f"limits must be finite, the low one below the high one; got {low:g} and {high:g}")
    return low, high


def _checked_clip(clip: Any, scope: Scope) -> Clip | None:
    if clip is None:
        return None
    if not isinstance(scope, str):
        raise DrawError("limits were given as the scope; clip finds limits by itself: give one of the two")
    try:
        numbers = [float(clip)] if np.ndim(clip) == 0 else [float(percentile) for percentile in clip]
    except (TypeError, ValueError):
        raise DrawError(f"clip is a percentile such as 99.5, or two (0.5, 99.5), not {clip!r}") from None
    if len(numbers) == 1 and 0 < numbers[0] <= 100:
        return numbers[0]
    if len(numbers) == 2 and 0 <= numbers[0] < numbers[1] <= 100:
        return numbers[0], numbers[1]
    raise DrawError(f"clip is a percentile such as 99.5, or two that rise (0.5, 99.5), not {clip!r}")
