"""Pictures that move: over rows, over layers (depth), over channels, or over stores (checkpoints).

The frames of grids and montages are cuts of one view, laid out as their kind lays out a picture, so that what
a figure of all of them would have on one scale has it in every frame. Those of any other kind are pictures
of one row or layer each, for which the limits of the scale have to be given. Frames are
made, painted and written one after the other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import DrawError, closest
from . import carried, film
from .blocks import Block, Cut, Scaling
from .colormaps import palette
from .kinds import Kind, kind, spec_from_json
from .layout import CLASS, LARGEST, MARGIN, NOTE, grid, montage
from .lettering import shorten, text_width
from .paint_pillow import PillowPainter, entries
from .picture import wanted_forms, write_whole
from .selection import ChannelChoice, Rows, select_layers, select_rows
from .sheet import Ink, Sheet, Text
from .spec import GridSpec, MontageSpec, Spec, TilesSpec
from .view import View, take

if TYPE_CHECKING:
    from ..capture.reader import Run

OVER = ("rows", "layers", "channels", "stores")
FORMATS = ("gif", "webp", "png", "apng", "html")
SECONDS = 0.8
ROWS = 16  # that are shown where none are named
MOST_VALUES = 2**26  # of all frames together; 256 MiB in float32
MOST_FRAMES = 2_000

_SAMPLED = 16  # frames that a palette for all of them is made from
_CAPTION = 34  # pixels below a frame for what it is
_STILL_GAP = 14

_LAYOUTS: dict[type[Spec], Callable[[View, Any, Sequence[Block]], Sheet]] = {
    GridSpec: grid,
    MontageSpec: montage,
}

_HELD = {
    "layer": "one scale for each layer, in all frames",
    "figure": "one scale for all frames",
    "data": "one scale for each layer, of the whole data set",
    "row": "a scale for each row",
    "channel": "each channel by itself, on one scale in all frames",
}


@dataclass(frozen=True, kw_only=True)
class AnimationSpec(Spec):
    """A picture that moves."""

    kind: ClassVar[str] = "animation"

    frame: Spec
    """What all frames show together, as a picture of its kind."""
    over: str = "rows"
    """What differs from frame to frame: rows, layers, channels or stores."""
    seconds: float = SECONDS
    """How long each frame is shown."""
    loops: int = 0
    """How often it is shown; 0 is for ever."""
    names: tuple[str, ...] = ()
    """What the frames are called, in their order; none is by their rows, layers, channels or stores."""

    def __post_init__(self) -> None:
        frame = spec_from_json(self.frame) if isinstance(self.frame, (Mapping, str)) else self.frame
        object.__setattr__(self, "frame", frame)
        if self.over not in OVER:
            raise DrawError(f"there are no frames over {self.over!r}. {closest(self.over, OVER)}")
        _check_frame(frame, self.over)
        seconds = float(self.seconds)
        if not 0.02 <= seconds <= 60:
            raise DrawError(f"a frame is shown for 0.02 to 60 seconds, not {seconds:g}")
        object.__setattr__(self, "seconds", seconds)
        if not isinstance(self.loops, int) or isinstance(self.loops, bool) or not 0 <= self.loops < 65_536:
            raise DrawError(f"loops is how often it is shown, 0 for ever; not {self.loops!r}")
        object.__setattr__(self, "names", tuple(str(name) for name in self.names))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what has its default is left out."""
        return super().to_json() | {"frame": self.frame.to_json()}


class Animation:
    """A picture that moves: save it, or have its frames. In a notebook it shows itself."""

    def __init__(self, runs: Sequence[Run], spec: AnimationSpec) -> None:
        #: What was drawn; `spec.to_json()` draws it again.
        self.spec = spec
        _check_runs(runs, spec)
        self._frames = _Cuts(runs, spec) if type(spec.frame) in _LAYOUTS else _Singles(runs[0], spec)
        n = len(self._frames.names)
        if n > MOST_FRAMES:
            raise DrawError(f"there would be {n} frames; {MOST_FRAMES} are the most: name fewer {spec.over}")
        if spec.names and len(spec.names) != n:
            raise DrawError(f"there are {n} frames, but {len(spec.names)} names")
        #: What each frame is.
        self.names: tuple[str, ...] = spec.names or self._frames.names

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"<Animation over {self.spec.over}: {len(self)} frames>"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of every frame in pixels."""
        return self._survey.width, self._survey.height

    @property
    def notes(self) -> tuple[str, ...]:
        """What should be known about the frames, each of it once."""
        return self._survey.notes

    def sheet(self, i: int) -> Sheet:
        """Return frame `i` as data, with its caption."""
        survey, name = self._survey, self.names[i]
        bare, y = self._frames.sheet(i), survey.height - MARGIN
        count, room = f"{i + 1} of {len(self)}", survey.width - 2 * MARGIN
        start = MARGIN + survey.count_width
        texts = (
            *bare.texts,
            Text(MARGIN, y - 15, count, NOTE, ink=Ink.GREY),
            Text(start, y - 15, shorten(name, room - survey.count_width, CLASS, bold=True), CLASS, bold=True),
            Text(MARGIN, y, shorten(self._held, room, NOTE), NOTE, ink=Ink.GREY),
        )
        spec = carried.values_of(self.spec)
        return replace(bare, width=survey.width, height=survey.height, texts=texts, spec=spec)

    def arrays(self) -> Iterator[NDArray[np.uint8]]:
        """Yield each frame in RGB, shape (height, width, 3)."""
        for i in range(len(self)):
            yield PillowPainter().array(self.sheet(i))

    def still(self) -> Sheet:
        """Return all frames one below the other, for what does not move.

        Raises:
            DrawError: the sheet would be too large.

        """
        width, height = self.size
        pitch = height + _STILL_GAP
        if width * pitch * len(self) > LARGEST:
            raise DrawError(
                f"{len(self)} frames of {width} x {height} pixels one below the other are too much for one "
                "picture; name fewer, or save an animation (.gif, .webp, .apng)"
            )
        frames = [self.sheet(i).moved(0, i * pitch) for i in range(len(self))]
        return replace(
            frames[0].joined(frames[1:]), width=width, height=pitch * len(self) - _STILL_GAP, notes=self.notes
        )

    def encode(self, format: str) -> bytes:
        """Return the bytes of a file of a format: gif, webp, png or apng (both are APNG), or html.

        GIF keeps every colour where one palette is enough. Beside pictures it has 256 colours for all; the
        others keep every colour there too.

        Raises:
            DrawError: there is no such format, or the frames are too large for it.

        """
        return b"".join(self._pieces(format))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a file whose suffix says its format, whole or not at all; return its path.

        Raises:
            DrawError: the format is unknown, or the file cannot be written.

        """
        target = Path(path)
        write_whole(target, self._pieces(target.suffix.lower().removeprefix(".")))
        return target

    def _repr_html_(self) -> str:
        from .paint_html import image_element

        return image_element("image/png", self.encode("png"), *self.size, repr(self)[1:-1], self.notes)

    def _repr_mimebundle_(
        self, include: Container[str] | None = None, exclude: Container[str] | None = None
    ) -> dict[str, Any]:
        forms = {"text/plain": lambda: repr(self), "text/html": self._repr_html_}
        return wanted_forms(forms, include, exclude)

    def _pieces(self, format: str) -> Iterable[bytes]:
        if format not in FORMATS:
            raise DrawError(
                f"an animation is saved as {', '.join(FORMATS)}, not as {format or 'no format'!r}"
            )
        if format == "html":
            return [self._page()]
        about = film.Film(
            *self.size,
            len(self),
            round(self.spec.seconds * 1000),
            self.spec.loops,
            carried.marked(carried.values_of(self.spec)),
        )
        film.check_film(about, "png" if format == "apng" else format)
        if format == "webp":
            return film.webp(about, self.arrays(), carried.xmp(carried.values_of(self.spec)))
        colormap = self._survey.colormap
        if colormap is not None:
            colours, frames = palette(colormap), (entries(self.sheet(i)) for i in range(len(self)))
        elif format == "gif":
            some = range(0, len(self), -(-len(self) // _SAMPLED))
            sampled = (PillowPainter().array(self.sheet(i)) for i in some)
            colours = film.shared_palette(self._survey.colormaps, sampled, Ink)
            frames = (film.nearest(rgb, colours) for rgb in self.arrays())
        else:
            return film.apng(about, self.arrays(), None)
        return film.gif(about, frames, colours) if format == "gif" else film.apng(about, frames, colours)

    def _page(self) -> bytes:
        from .paint_html import data_uri, page

        width, height = self.size
        source = data_uri("image/png", self.encode("png"))
        image = f'<img src="{source}" width="{width}" height="{height}" alt="{escape(repr(self)[1:-1])}">\n'
        return page(replace(self.sheet(0), notes=self.notes), image, [])

    @property
    def _held(self) -> str:
        scope = getattr(self.spec.frame, "scope", None)
        return _HELD.get(scope, scope) if isinstance(scope, str) else "one scale for all frames; it was given"

    @cached_property
    def _survey(self) -> _Survey:
        """Look at every frame once, without painting it."""
        counts = [text_width(f"{i + 1} of {len(self)}", NOTE) for i in (0, len(self) - 1)]
        count_width = math.ceil(max(counts)) + 12
        names = max(text_width(name, CLASS, bold=True) for name in self.names)
        width, height = 0, 0
        notes: dict[str, None] = {}
        colormaps: dict[str, None] = {}
        palettes: set[str | None] = set()
        for i in range(len(self)):
            sheet = self._frames.sheet(i)
            width, height = max(width, sheet.width), max(height, sheet.height)
            notes |= dict.fromkeys(sheet.notes)
            palettes.add(sheet.colormap)
            colormaps |= dict.fromkeys(panel.colormap for panel in sheet.panels)
            colormaps |= dict.fromkeys(bar.colormap for bar in sheet.bars)
        words = max(count_width + min(names, 400), text_width(self._held, NOTE))
        return _Survey(
            max(width, math.ceil(words) + 2 * MARGIN),
            height + _CAPTION,
            count_width,
            tuple(notes),
            palettes.pop() if len(palettes) == 1 else None,
            tuple(colormaps),
        )


@dataclass(frozen=True, eq=False)
class _Survey:
    """What all frames have together."""

    width: int
    height: int
    count_width: int
    """Room for the number of a frame."""
    notes: tuple[str, ...]
    colormap: str | None
    """The one palette that shows all of them, or None."""
    colormaps: tuple[str, ...]


def animate(
    run: Run | Sequence[Run],
    kind: str | Spec = "grid",
    *,
    over: str | None = None,
    seconds: float = SECONDS,
    loops: int = 0,
    names: Sequence[str] = (),
    rows: Rows = None,
    layers: str | Sequence[str] | None = None,
    channels: str | int | Sequence[int] | None = None,
    **options: Any,
) -> Animation:
    """Draw a picture that moves.

    Args:
        run: the store; or several, say of a training's checkpoints, in the order of their frames.
        kind: `grid` or `montage`, of which each frame is one; or a whole specification. Other kinds that
            have rows, layers and a scale go over rows or layers, with `scope` as limits.
        over: what differs from frame to frame: `rows`, `layers` (depth), `channels` or `stores`; None is
            rows of one store, and stores where there are several.
        seconds: how long each frame is shown.
        loops: how often it is shown; 0 is for ever.
        names: what the frames are called, in place of their rows, layers, channels or stores.
        rows: as for `draw`, of all frames together; None is the first 16 captured rows for frames over
            rows, and the first captured one for others.
        layers: as for `draw`, of all frames together.
        channels: as for `draw`, of all frames together; `top` ranks over all rows, in the first store.
        options: other options of the kind, as for `draw`, but for what `top` ranks over. `scope` says what
            shares a scale, as in one figure of all frames; for frames over layers it is the `figure` if
            nothing says, so that all frames are on one scale.

    Raises:
        SelectionError: a layer, row, channel or class is not there; the closest are named.
        DrawError: what was asked for cannot be drawn, is not captured yet, or takes too much memory.

    """
    runs = list(run) if isinstance(run, Sequence) else [run]
    if not runs:
        raise DrawError("there is no store to draw from")
    if isinstance(kind, AnimationSpec):
        return Animation(runs, kind)
    named = {"rows": rows, "layers": layers, "channels": channels}
    given = options | {name: value for name, value in named.items() if value is not None}
    if isinstance(kind, Spec) and given:
        raise DrawError("a specification says it all; give other rows or options within it")
    given |= {"frame": kind, "over": over or ("stores" if len(runs) > 1 else "rows")}
    return Animation(runs, chosen(runs[0], given | {"seconds": seconds, "loops": loops, "names": names}))


def chosen(run: Run, named: Mapping[str, Any]) -> AnimationSpec:
    """Return the specification of frames that a user names by patterns of layers, rows as text and so on.

    `frame` is the kind of picture that each is, or its whole specification.
    """
    own = {name: named[name] for name in ("over", "seconds", "loops", "names") if name in named}
    given = {name: value for name, value in named.items() if name not in (*own, "frame")}
    frame = named.get("frame", "grid")
    over = own.get("over", "rows")
    if not isinstance(frame, Spec):
        if given.get("rows") is None and over == "rows":
            given["rows"] = select_rows(run)[:ROWS]
        if over == "layers":
            given = {"scope": "figure"} | given
            given["layers"] = select_layers(run, given.get("layers"))
        frame = kind(frame).choose(run, given)
    return AnimationSpec.of(own | {"frame": frame})


class _Cuts:
    """Frames of tiles: cuts of one view, which keep the scales of all of it."""

    def __init__(self, runs: Sequence[Run], spec: AnimationSpec) -> None:
        assert isinstance(spec.frame, TilesSpec)
        self._frame = spec.frame
        for run in runs:
            select_rows(run, spec.frame.rows)
            _check_amount(run, spec.frame, len(runs))
        view = take(runs[0], spec.frame)
        if spec.over == "stores":
            view = _side_by_side(view, runs, spec.frame)
        self._scaling = Scaling(view, spec.frame)
        self._cuts, names = _cuts(view, spec, runs)
        self.names = tuple(names)

    def sheet(self, i: int) -> Sheet:
        """Return frame `i` without its caption, of its own size."""
        view, blocks = self._scaling.of(self._cuts[i])
        return _LAYOUTS[type(self._frame)](view, self._frame, blocks)


class _Singles:
    """Frames of any kind: a picture of each row or layer by itself."""

    def __init__(self, run: Run, spec: AnimationSpec) -> None:
        self._run = run
        rows, layers = (getattr(spec.frame, name) for name in ("rows", "layers"))
        if spec.over == "rows":
            self._specs: list[Any] = [replace(spec.frame, rows=(row,)) for row in rows]  # type: ignore[call-arg]
            self.names = tuple(f"row {row}" for row in rows)
        else:
            self.names = select_layers(run, layers)
            self._specs = [replace(spec.frame, layers=(name,)) for name in self.names]  # type: ignore[call-arg]
        self._kind = kind(spec.frame.kind)

    def sheet(self, i: int) -> Sheet:
        """Return frame `i` without its caption, of its own size."""
        return self._kind.sheet(self._run, self._specs[i])


def _check_frame(frame: Spec, over: str) -> None:
    """Raise DrawError where pictures of a kind cannot be frames over this."""
    if type(frame) in _LAYOUTS:
        return
    known = {field.name for field in fields(frame)}
    if not {"rows", "layers", "scope"} <= known or getattr(frame, "rows", None) is None:
        raise DrawError(f"pictures of kind {frame.kind!r} cannot be animated; grids and montages can")
    if over not in ("rows", "layers"):
        raise DrawError(f"{frame.kind!r} goes over rows or layers, not over {over}; grids and montages do")
    if isinstance(getattr(frame, "scope", None), str):
        raise DrawError(
            f"each {frame.kind!r} finds a scale of its own, and frames take one for all: give its limits, "
            "scope=(low, high)"
        )


def _check_runs(runs: Sequence[Run], spec: AnimationSpec) -> None:
    if (len(runs) > 1) != (spec.over == "stores"):
        takes = "two stores or more" if spec.over == "stores" else "one store"
        raise DrawError(f"frames over {spec.over} take {takes}; there are {len(runs)}")


def _cuts(view: View, spec: AnimationSpec, runs: Sequence[Run]) -> tuple[list[Cut], list[str]]:
    """Return what of a view each frame shows, and what the frames are."""
    rows, layers = tuple(range(len(view.rows))), tuple(range(len(view.layers)))
    if spec.over == "rows":
        return [Cut((i,), layers) for i in rows], [f"row {row.row}" for row in view.rows]
    if spec.over == "stores":
        n = len(rows) // len(runs)
        return [Cut(rows[i : i + n], layers) for i in range(0, len(rows), n)], _store_names(runs)
    if spec.over == "layers":
        return [Cut(rows, (i,)) for i in layers], [layer.name for layer in view.layers]
    first, *others = view.layers
    if any(layer.channels != first.channels for layer in others):
        raise DrawError(
            "frames are over channels, but the layers do not show the same ones; name one layer, or "
            "channels by their numbers"
        )
    names = [f"{first.unit} {channel}" for channel in first.channels]
    return [Cut(rows, layers, (i,)) for i in range(len(names))], names


def _side_by_side(view: View, runs: Sequence[Run], frame: TilesSpec) -> View:
    """Return the same rows, layers and channels of every store, store after store."""
    rows, layers = list(view.rows), list(view.layers)
    for run in runs[1:]:
        for i, layer in enumerate(layers):
            one = replace(frame, layers=(layer.name,), channels=layer.channels, by=None)
            there = take(run, one)
            found = there.layers[0]
            if found.values.shape[2:] != layer.values.shape[2:] or found.n_channels != layer.n_channels:
                raise DrawError(
                    f"{layer.name} has another shape in {run.path} than in {runs[0].path}: "
                    f"{found.shape} and {layer.shape}; stores of one animation hold the same layers"
                )
            layers[i] = replace(layer, values=np.concatenate([layer.values, found.values]))
        rows += there.rows
    return replace(view, rows=tuple(rows), layers=tuple(layers))


def _check_amount(run: Run, frame: TilesSpec, n_stores: int) -> None:
    """Refuse what would take too much memory, before it is read."""
    choice = ChannelChoice.parse(frame.channels, frame.by)
    total = 0
    for name in frame.layers or run.taps:
        tap = run[name]
        values = math.prod(tap.bound)
        if choice.how in ("first", "list") and tap.bound:
            n = choice.n if choice.how == "first" else len(choice.indices(10**9, "channel"))
            values = min(values, values * n // max(tap.bound[0], 1))
        total += values * len(frame.rows) * n_stores
    if total > MOST_VALUES:
        raise DrawError(
            f"the frames would take {total:,} values in memory, and {MOST_VALUES:,} are the most: name fewer "
            "rows, layers or channels (channels='first:9'), or capture the layers pooled (reduce='pool:28')"
        )


def _store_names(runs: Sequence[Run]) -> list[str]:
    """Return the stores' names without their folders, and numbered where these are the same."""
    names = [Path(str(run.path).rstrip("/")).name.removesuffix(".zarr").removesuffix(".zip") for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]


def _sheet(run: Run, spec: AnimationSpec) -> Sheet:
    return Animation([run], spec).still()


ANIMATION = Kind(AnimationSpec, chosen, _sheet)
