"""Finds receptive fields by marking pixels of a picture with NaN: what depends on them comes out as NaN.

* It takes the model as it runs: branches, functions, shared layers, any framework. Nothing is assumed of
  the layers but that they pass NaN on, as arithmetic, ReLU and pooling do. Gradients would not do: they
  follow one place of a maximum, and none of a dead ReLU.
* One row of a batch is marked up to a line of pixels, another from it on, for lines in both directions: 4
  rows for each pixel of the side of a small picture. Of a larger one about 32 lines are tried, every third,
  fifth and so on. Most layers have places at equal distances, and these are powers of 2: odd steps meet them
  at every offset, as on a vernier, and the field follows to the pixel. Any other is widened to those lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .axes import channels_last, places_of
from .backend import Backend, Learned, Session
from .data import Batch, Source
from .errors import LayertapError, PlanError, StoreExistsError
from .fields import Pixels, ReceptiveField
from .place import Place
from .rehearsal import batches, rehearsing
from .score import Score
from .store import read_manifest
from .taps import Patterns

Values = NDArray[Any]
Flags = NDArray[np.bool_]

_LINES = 32  # that are tried on each side of a picture, at most about so many


@dataclass(frozen=True)
class _Mark:
    """Which pixels of a row are NaN."""

    axis: int
    """0: lines of pixels, by their y; 1: columns, by their x."""
    first: int
    stop: int


_NOTHING = _Mark(0, 0, 0)


def found_fields(
    backend: Backend,
    model: Any,
    source: Source,
    layers: Patterns,
    batch_size: int,
    place: Place | None,
    score: Score | None = None,
) -> dict[str, ReceptiveField]:
    """Return the receptive field of each tap that has one, by its name.

    Args:
        backend: the model's.
        model: what runs.
        source: the data; their first row is what is marked.
        layers: what is tapped.
        batch_size: rows of one forward.
        place: where a store may be whose capture goes on: it has the fields then, and there are none here.
        score: what gradients are of.

    Raises:
        PlanError: the model gets no picture, or none of the taps has a field that can be found.
        StoreExistsError: the store was begun without them.
    """
    if place is not None and place.exists():
        _check_known(place)
        return {}
    if source.lists:
        raise PlanError("rows that differ in shape have no common receptive field: leave out fields=")
    first = next(batches(source, 1, 1))
    with rehearsing(backend, model, layers, score) as rehearsal:
        probe = _Probe(first, rehearsal.session, batch_size)
        found: dict[str, _Seen] = {}
        with rehearsal.session.separate():
            for marks, batch in probe.batches():
                try:
                    learned = rehearsal.learn(batch)
                except LayertapError:
                    raise
                except Exception as error:
                    raise PlanError(
                        "receptive fields are found by pictures with NaN, and the model fails on these: "
                        f"{error}. Leave out fields= (--fields)"
                    ) from error
                for i, tap in enumerate(learned):
                    if _has_places(tap):
                        seen = found.setdefault(tap.name, _Seen(tap.shape, probe.size))
                        seen.add(marks, np.asarray(rehearsal.session.sample(i)))
        fields = {name: seen.field() for name, seen in found.items() if seen.is_sound}
    if not fields:
        raise PlanError(
            "no tap has a receptive field that can be found: vectors have no places, whole numbers hold no "
            "NaN, and what replaces NaN hides it. Leave out fields= (--fields)"
        )
    return fields


def _check_known(place: Place) -> None:
    if not any("field" in about for about in read_manifest(place).facts["taps"].values()):
        raise StoreExistsError(
            f"{place} was captured without receptive fields. Leave out fields= (--fields), choose another "
            "name, or overwrite=True (--overwrite) to make it anew"
        )


def _has_places(tap: Learned) -> bool:
    told = tap.tap.kind in ("output", "input")
    return told and bool(places_of(tap.shape)) and tap.dtype.kind not in "iub"


class _Probe:
    """A row of the data, over and over, each time with other pixels marked."""

    def __init__(self, batch: Batch, session: Session, batch_size: int) -> None:
        self._batch, self._session = batch, session
        named = [*enumerate(batch.inputs), *batch.kwargs.items()]
        arrays = {key: session.to_numpy(value) for key, value in named if hasattr(value, "shape")}
        picture = batch.columns.get("picture")
        shape: tuple[int, ...] = np.shape(picture)[1:3] if picture is not None else ()
        axes = {key: at for key, values in arrays.items() if (at := _axes(values, shape)) is not None}
        self._marked = next(iter(axes), None)
        if self._marked is None or arrays[self._marked].dtype.kind in "iub":
            raise PlanError(
                "receptive fields are found by marking pixels of a picture, and the model gets none, or one "
                "of whole numbers, which have no NaN. Leave out fields= (--fields)"
            )
        self._arrays, self._axes = arrays, axes[self._marked]
        self.size = (int(shape[0]), int(shape[1]))
        marks = _marks(self.size)
        self._n = min(batch_size, len(marks))
        # Every batch is full: a compiled model is then compiled once.
        self._marks = marks + [_NOTHING] * (-len(marks) % self._n)

    def batches(self) -> Iterator[tuple[list[_Mark], Batch]]:
        """Yield batches, and which pixels of each row are marked."""
        for start in range(0, len(self._marks), self._n):
            marks = self._marks[start : start + self._n]
            yield marks, self._made(marks)

    def _made(self, marks: Sequence[_Mark]) -> Batch:
        repeated = {key: np.repeat(values[:1], self._n, axis=0) for key, values in self._arrays.items()}
        assert self._marked is not None
        values = repeated[self._marked]
        if values.dtype.kind != "f":  # bfloat16, say; the session casts to what the model takes
            values = values.astype(np.float32)
        values = np.where(np.isfinite(values), values, 0)
        for row, mark in zip(values, marks, strict=True):
            np.moveaxis(row, self._axes[mark.axis] - 1, 0)[mark.first : mark.stop] = np.nan
        repeated[self._marked] = values
        given = self._batch
        return Batch(
            range(self._n),
            tuple(repeated.get(i, value) for i, value in enumerate(given.inputs)),
            {key: repeated.get(key, value) for key, value in given.kwargs.items()},
            {"label": np.repeat(given.columns["label"], self._n)} if "label" in given.columns else {},
        )


def _axes(values: Values, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the axes of height and width of a batch of pictures of `shape`; None where it is no such."""
    for axes in ((2, 3), (1, 2)) if values.ndim == 4 else ((1, 2),) if values.ndim == 3 else ():
        if shape and tuple(values.shape[axis] for axis in axes) == tuple(shape):
            return axes
    return None


def _cuts(size: int) -> Pixels:
    step = 1 if size < 2 * _LINES else size // _LINES // 2 * 2 + 1
    return np.arange(step, size, step)


def _marks(size: tuple[int, int]) -> list[_Mark]:
    """Return nothing, everything, and for each line that is tried what lies before and beyond it."""
    marks = [_NOTHING, _Mark(0, 0, size[0])]
    for axis, length in enumerate(size):
        for cut in _cuts(length).tolist():
            marks += [_Mark(axis, 0, cut), _Mark(axis, cut, length)]
    return marks


@dataclass
class _Seen:
    """Where NaN came out at one tap."""

    shape: tuple[int, ...]
    """Shape of a row of it, which has places on one axis or on two."""
    size: tuple[int, int]
    """Height and width of the picture."""
    sees: Sequence[Flags] = ()
    """Which lines and columns of places have NaN where everything is marked."""
    hits: dict[_Mark, Flags] = field(default_factory=dict)
    """For each other mark, which lines of places along its axis have NaN."""
    is_sound: bool = True
    """Whether there is no NaN without a mark, and some where everything is marked."""

    def add(self, marks: Sequence[_Mark], values: Values) -> None:
        """Take the values of a batch, each row marked otherwise."""
        is_map = len(self.shape) == 3
        channels = 1 if is_map and not channels_last(self.shape) else -1
        nan: Flags = np.asarray(np.isnan(values).any(axis=channels))
        for mark, row in zip(marks, nan, strict=True):
            if mark == _NOTHING:
                self.is_sound = self.is_sound and not row.any()
            elif mark == _Mark(0, 0, self.size[0]):
                self.is_sound = self.is_sound and bool(row.any())
                self.sees = [row.any(axis=1 - axis) if is_map else row for axis in (0, 1)]
            else:
                self.hits[mark] = row.any(axis=1 - mark.axis) if is_map else row

    def field(self) -> ReceptiveField:
        """Return the field that follows."""
        return ReceptiveField(self.size, self._pixels(0), self._pixels(1))

    def _pixels(self, axis: int) -> Pixels:
        """Return the first pixel of each line of places and the one behind its last, (places, 2)."""
        size, sees = self.size[axis], np.flatnonzero(self.sees[axis])
        cuts = _cuts(size)
        edges = np.concatenate([[0], cuts, [size]])

        def n_hits(marks: list[_Mark]) -> Pixels:
            n = np.zeros(len(sees), np.int64)
            for mark in marks:
                n += self.hits[mark][sees]
            return n

        # The first pixel lies before the first cut up to which a mark is seen, and not before the one before.
        unseen = len(cuts) - n_hits([_Mark(axis, 0, cut) for cut in cuts.tolist()])
        seen = n_hits([_Mark(axis, cut, size) for cut in cuts.tolist()])
        first, stop = edges[unseen], edges[seen + 1]
        if len(self.shape) == 3:  # tokens follow each other in lines
            first = _evenly(first, edges[unseen + 1] - 1, sees, size)
            # Seen from the other side, ends are beginnings.
            stop = size - _evenly(size - stop, size - edges[seen] - 1, -sees, size)
        pixels = np.zeros((len(self.sees[axis]), 2), np.int64)
        pixels[sees] = np.stack([first, stop], -1)
        return pixels


def _evenly(low: Pixels, high: Pixels, places: Pixels, size: int) -> Pixels:
    """Return where places begin that begin from `low` to `high`: at equal distances, if that can be.

    Of several distances that can be, it is the one at which they cover the picture; if that cannot be, the
    earliest beginnings of all count. Where padding reaches beyond the picture, places begin at its edge.
    """
    if (low == high).all():
        return low
    strides = np.arange(size + 1)[:, None]
    least = np.where(low == low.min(), -np.inf, low - strides * places).max(1)
    fits = np.flatnonzero(least <= (high - strides * places).min(1))
    if not fits.size:
        return low
    covering = round(size / len(low))
    fits = fits[fits == covering] if covering in fits else fits
    begins = (least[fits, None] + strides[fits] * places).min(0)
    return np.asarray(np.maximum(low, begins), np.int64)
