"""Where everything stands in a picture of principal components as colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .blocks import number
from .layout import (
    COLUMN_GAP,
    HEAD_GAP,
    LINE_GAP,
    MARGIN,
    NARROWEST,
    NOTE,
    NOTE_LINE,
    NUMBER,
    NUMBER_ROOM,
    WIDTH_OF_WORDS,
    Page,
    check_size,
    photo_at,
    put_photo,
    put_title,
    row_about,
)
from .lettering import wrap
from .sheet import Ink, Photo, Sheet, Text
from .view import RowView, View

if TYPE_CHECKING:
    from .pca import PcaSpec

SIDE = 176  # pixels across that the longer side of a map should have
_CELL = 28  # the same where it is a single place
_STRIP, _STRIP_GAP = 9, 5
_NAMES = ("red", "green", "blue")


@dataclass(frozen=True, eq=False)
class Coloured:
    """The components of one row of a layer."""

    levels: NDArray[np.uint8]
    """RGB, shape (height, width, 3); white where there is no place."""
    broken: NDArray[np.bool_]
    """Places with a value that is not finite, (height, width)."""


@dataclass(frozen=True, eq=False)
class LayerColours:
    """The components of the drawn rows of one layer, and what must be said of them."""

    name: str
    type: str
    shape: tuple[int, ...]
    """Shape of one row; of a tap whose rows differ, the greatest."""
    unit: str
    """What is reduced: channel, feature and so on."""
    note: str
    """How its values became maps, where that is not plain."""
    fitted_to: str
    shares: tuple[float, ...]
    """Of the variance, for each component; none where nothing varies."""
    limits: tuple[float, ...]
    """Size at which the colour of each component ends."""
    n_clipped: int
    n_values: int
    """Components of places that are drawn, and how many lie beyond the limits."""
    n_channels: int
    n_still: int
    """Channels that there are, and that do not vary in what was fitted."""
    rows: tuple[Coloured, ...]


def pca_sheet(view: View, layers: Sequence[LayerColours], spec: PcaSpec) -> Sheet:
    """Lay out each row's picture and, beside it, the components of every layer as colours.

    Raises:
        DrawError: the sheet would be too large.
    """
    page, rows = Page(), view.rows
    top = page.unfinished(view, put_title(page, spec, MARGIN))
    sizes = [photo_at(row.picture, 0, 0).size[0] for row in rows if row.picture is not None]
    known = any(row.true or row.predicted for row in rows)
    photo_width = max([NARROWEST, *sizes]) if spec.picture and (sizes or known or len(rows) > 1) else 0
    x = MARGIN + (photo_width + COLUMN_GAP if photo_width else 0)
    places = []
    for layer in layers:
        width = max(NARROWEST, *(_photo_of(row, 0, 0).size[0] for row in layer.rows))
        places.append((x, width))
        x += width + COLUMN_GAP
    tallest = max(_photo_of(row, 0, 0).size[1] for layer in layers for row in layer.rows)
    check_size(x, tallest * len(rows))
    y = HEAD_GAP + max(
        page.layer_head(left, top, width, layer.name, layer.type, layer.shape)
        for layer, (left, width) in zip(layers, places, strict=True)
    )
    for i, row in enumerate(rows):
        y += LINE_GAP if i else 0
        if not photo_width:
            y = page.lines(MARGIN, y - NOTE_LINE // 2, wrap(row_about(row), x - 2 * MARGIN, NOTE)) + 2
        ends = [put_photo(page, row, MARGIN, y, photo_width)] if photo_width else []
        for layer, (left, _) in zip(layers, places, strict=True):
            ends.append(_put_row(page, layer.rows[i], left, y + NUMBER_ROOM))
            _note_broken(page, layer, row, layer.rows[i])
        y = max(ends)
    ends = [
        _put_legend(page, layer, left, y + 14, width, spec)
        for layer, (left, width) in zip(layers, places, strict=True)
    ]
    width = max(x - COLUMN_GAP - MARGIN, WIDTH_OF_WORDS)
    bottom = page.lines(MARGIN, max(ends) + 6, wrap(_convention(len(rows)), width, NOTE))
    return page.sheet(width + 2 * MARGIN, bottom + MARGIN, spec.title)


def _convention(n_rows: int) -> str:
    """Return what holds for every layer."""
    scale = "" if n_rows == 1 else f" One scale for all {n_rows} rows."
    return (
        "Percentages are shares of the variance. Each component is turned so that its largest loading is "
        f"positive; grey is the mean of what was fitted.{scale}"
    )


def _factor(shape: Sequence[int]) -> int:
    largest = max(shape[:2])
    return max(1, round((SIDE if largest > 1 else _CELL) / largest))


def _photo_of(row: Coloured, x: int, y: int) -> Photo:
    """Return a row's colours at their size; what is not finite has a pattern that no colour has."""
    if not row.broken.any():
        return Photo(x, y, row.levels, _factor(row.levels.shape))
    factor = _factor(row.levels.shape)
    large = row.levels.repeat(factor, 0).repeat(factor, 1)
    broken = row.broken.repeat(factor, 0).repeat(factor, 1)
    large[broken] = _checked(*broken.shape)[broken]
    return Photo(x, y, large, 1)


def _checked(height: int, width: int) -> NDArray[np.uint8]:
    """Return a check of black and white pixels, (height, width, 3)."""
    odd = np.add.outer(np.arange(height), np.arange(width)) % 2
    return np.where(odd[..., None] == 1, 255, 0).astype(np.uint8).repeat(3, axis=2)


def _put_row(page: Page, row: Coloured, x: int, y: int) -> int:
    photo = _photo_of(row, x, y)
    page.photos.append(photo)
    return y + photo.size[1]


def _note_broken(page: Page, layer: LayerColours, view: RowView, row: Coloured) -> None:
    n = int(row.broken.sum())
    if n:
        page.notes.append(f"{layer.name}, row {view.row}: not finite at {n} of {row.broken.size} places")


def _put_legend(page: Page, layer: LayerColours, x: int, y: int, width: int, spec: PcaSpec) -> int:
    """Write what each colour stands for, and what it follows from."""
    for i in range(len(_NAMES)):
        y = _put_component(page, layer, i, x, y, width)
    said = [layer.note, layer.fitted_to]
    if layer.shares:
        total = sum(layer.shares)
        n = f"{len(layer.shares)} of {layer.n_channels:,} components"
        said.append(f"{n}, together {_percent(total)} of the variance")
    else:
        said.append("nothing varies in what was fitted")
    said.append(_clipped(layer, spec))
    if layer.n_still:
        said.append(f"{layer.n_still:,} of {layer.n_channels:,} {layer.unit}s constant in what was fitted")
    y = page.lines(x, y + 2, [line for text in said if text for line in wrap(text, width, NOTE)])
    broken = sum(int(row.broken.sum()) for row in layer.rows)
    if broken:
        y += NOTE_LINE
        page.photos.append(Photo(x + 1, y - 11, _checked(9, 9), 1))
        words = f"not finite: {broken:,} place{'s' if broken > 1 else ''}"
        page.texts.append(Text(x + 16, y - 3, words, NOTE, ink=Ink.GREY))
    return y


def _put_component(page: Page, layer: LayerColours, i: int, x: int, y: int, width: int) -> int:
    """Draw a strip of a component's colours, the others at their mean; return where it ends."""
    name = _NAMES[i]
    if i >= len(layer.shares):
        return page.lines(x, y - 4, [f"{name}: no component {i + 1}"]) + 4
    page.lines(x, y - 4, [f"{name}: component {i + 1}, {_percent(layer.shares[i])}"])
    y += NOTE_LINE - 2
    limit = layer.limits[i]
    if not limit:
        return page.lines(x, y - 4, ["no bar: it is 0 at every place drawn"]) + 4
    levels = np.full((1, width, 3), 128, np.uint8)
    levels[0, :, i] = np.rint(np.linspace(0, 255, width))
    page.photos.append(Photo(x, y, levels.repeat(_STRIP, 0), 1))
    y += _STRIP + 11
    page.texts.append(Text(x, y, number(-limit), NUMBER))
    page.texts.append(Text(x + width / 2, y, "0", NUMBER, "center"))
    page.texts.append(Text(x + width, y, number(limit), NUMBER, "right"))
    return y + _STRIP_GAP + 4


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share < 0.9995 or share == 1 else "> 99.9 %"


def _clipped(layer: LayerColours, spec: PcaSpec) -> str:
    """Return how many values have the colour of an end and lie beyond it."""
    if not layer.n_values:
        return ""
    if not layer.n_clipped:
        return "nothing is clipped"
    return f"{layer.n_clipped:,} of {layer.n_values:,} values clipped, beyond percentile {spec.clip:g}"
