"""A table of statistics: a line for each layer, its columns on axes that can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..capture.statistics import BINS
from ..capture.summary import TapStatistics
from .axes import ROOM, Axis, draw_axis, limits_of, moved
from .blocks import listing, number
from .layout import (
    COLUMN_GAP,
    MARGIN,
    NAME,
    NAME_LINE,
    NOTE,
    NOTE_LINE,
    NUMBER,
    Page,
    check_size,
    put_title,
)
from .lettering import shorten, text_width, wrap, wrap_name
from .sheet import Box, Fill, Ink, Line, Sheet, Text
from .tally import together

if TYPE_CHECKING:
    from .statistics import StatisticsSpec

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

NAMES_WIDTH = 190
_BAR = 3  # pixels of a histogram's bar
_SHARES = 20  # bins of channels by their share of zeros
_LINE_GAP = 12
_MOST_COARSE = 0.01  # share of values in bins too wide up to which a histogram and quantiles are drawn
_SMALL, _LARGE = 48, 96  # heights of plots in an overview and alone
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


@dataclass(frozen=True, eq=False)
class Facts:
    """The statistics of one layer, as they are drawn."""

    name: str
    type: str
    shape: tuple[int, ...]
    unit: str
    """What a channel is: channel, feature and so on."""
    n_channels: int
    whole: TapStatistics
    """As if it were one channel."""
    low: float
    high: float
    """Least and greatest finite value; NaN where there is none."""
    zero: float
    """Share of the finite values that are zero; NaN where there is none."""
    zeros: Floats
    """The same of each channel."""
    quantiles: Floats | None
    """At `QUANTILES`, where a histogram was kept that tells."""
    coarse: float
    """Share of the values that lie in bins too wide to be drawn."""
    listed: tuple[tuple[str, tuple[int, ...]], ...]
    """Channels that are zero or constant, or hold values that are not finite, behind what is said of them."""


def facts_of(its: TapStatistics, type: str, shape: tuple[int, ...]) -> Facts:
    """Return what is drawn of the statistics of a tap."""
    assert its.count is not None
    assert its.minimum is not None
    assert its.maximum is not None
    assert its.n_zero is not None
    assert its.zero_fraction is not None
    assert its.dead is not None
    assert its.n_nan is not None
    assert its.n_inf is not None
    whole = together(its)
    n = int(its.count.sum())
    coarse = 1.0 if its.histogram is None else coarse_share(whole)
    dead = its.dead & (its.count > 0)
    constant = (its.minimum == its.maximum) & (its.count > 1) & (its.n_nan + its.n_inf == 0) & ~dead
    candidates = (
        ("all zero:", dead),
        ("constant:", constant),
        (f"{its.nan:,} NaN in", its.n_nan > 0),
        (f"{its.inf:,} infinite in", its.n_inf > 0),
        ("no value in", its.count + its.n_nan + its.n_inf == 0),
    )
    return Facts(
        name=its.name,
        type=type,
        shape=shape,
        unit=its.axis or "value",
        n_channels=len(its.count),
        whole=whole,
        low=float(np.fmin.reduce(its.minimum)),
        high=float(np.fmax.reduce(its.maximum)),
        zero=int(its.n_zero.sum()) / n if n else float("nan"),
        zeros=its.zero_fraction,
        quantiles=None if coarse > _MOST_COARSE else whole.quantile(QUANTILES)[:, 0],
        coarse=coarse,
        listed=tuple((words, tuple(np.flatnonzero(hit).tolist())) for words, hit in candidates if hit.any()),
    )


def coarse_share(its: TapStatistics) -> float:
    """Return the share of the values of one channel in bins wider than an eighth of its range.

    Bins end at 4096 and begin at a millionth: of a layer of larger or smaller values they tell nothing.
    """
    assert its.histogram is not None
    assert its.minimum is not None
    assert its.maximum is not None
    assert its.n_zero is not None
    counts = its.histogram[0].copy()
    counts[BINS // 2] -= its.n_zero[0]
    limits = np.clip(its.edges, its.minimum[0], its.maximum[0])
    wide = np.diff(limits / 8) > its.maximum[0] / 64 - its.minimum[0] / 64  # what they span may overflow
    return float(counts[wide].sum() / max(int(its.histogram.sum()), 1))


def counts_between(its: TapStatistics, edges: Floats) -> Floats:
    """Return how many of the values other than zero of one channel lie between `edges`, even within a bin.

    Args:
        its: the statistics of one channel, with its histogram.
        edges: rising values from its least to its greatest.
    """
    assert its.histogram is not None
    assert its.minimum is not None
    assert its.maximum is not None
    assert its.n_zero is not None
    counts = its.histogram[0].astype(np.float64)
    counts[BINS // 2] -= float(its.n_zero[0])
    if not counts.any():
        return np.zeros(len(edges) - 1)
    limits = np.clip(its.edges, its.minimum[0], its.maximum[0])
    total = np.concatenate([[0.0], np.cumsum(counts)])
    first, last = np.flatnonzero(counts)[[0, -1]]
    inside = slice(first, last + 2)
    if limits[first] == limits[last + 1]:  # all of one value
        found = np.zeros(len(edges) - 1)
        found[np.searchsorted(edges[1:-1], limits[first], "right")] = counts.sum()
        return found
    return np.diff(np.interp(edges, limits[inside], total[inside]))


@dataclass(frozen=True, eq=False)
class _Column:
    """A column of the table."""

    head: str
    width: int
    height: int
    """Of what is drawn in it for a layer, its own axis included."""
    draw: Callable[[Page, Facts, int, int], int]
    """Draws a layer at x and y, and returns where that ends."""
    axis: Axis | None = None
    """One axis for all layers, from x = 0 on, drawn below them, and above many."""


def table(facts: Sequence[Facts], source: str, pages: str, spec: StatisticsSpec) -> Sheet:
    """Lay out the statistics of layers, a line for each.

    Raises:
        DrawError: the sheet would be too large.
    """
    page = Page()
    y = put_title(page, spec, MARGIN)
    columns = _columns(facts, spec)
    width = NAMES_WIDTH + sum(COLUMN_GAP + column.width for column in columns)
    said = [pages or f"{len(facts)} layer{'s' if len(facts) > 1 else ''}", source]
    y = page.lines(MARGIN, y, wrap(" · ".join(said), width, NOTE)) + 8
    lefts = [MARGIN + NAMES_WIDTH + COLUMN_GAP]
    for column in columns[:-1]:
        lefts.append(lefts[-1] + column.width + COLUMN_GAP)
    for column, x in zip(columns, lefts, strict=True):
        page.texts.append(Text(x, y + 12, column.head, NAME, bold=True))
    y += NAME_LINE + 6
    if len(facts) > 8 and any(column.axis for column in columns):
        y = _axes(page, columns, lefts, y) + 4
    top = y
    check_size(width, len(facts) * (max(column.height for column in columns) + _LINE_GAP))
    for one in facts:
        ends = [column.draw(page, one, x, y) for column, x in zip(columns, lefts, strict=True)]
        y = max(_name(page, one, y), *ends) + _LINE_GAP
        page.notes += [f"{one.name}: {words} {', '.join(map(str, where))}" for words, where in one.listed]
    page.shapes = [*_rules(columns, lefts, top, y - _LINE_GAP // 2), *page.shapes]
    if any(column.axis for column in columns):
        y = _axes(page, columns, lefts, y - _LINE_GAP // 2)
    y = page.lines(MARGIN, y, wrap(_words(spec), width, NOTE))
    return page.sheet(MARGIN + width + MARGIN, y + MARGIN, spec.title)


def _axes(page: Page, columns: Sequence[_Column], lefts: Sequence[int], y: int) -> int:
    for column, x in zip(columns, lefts, strict=True):
        if column.axis is not None:
            draw_axis(page, moved(column.axis, x), y)
    return y + ROOM


def _rules(columns: Sequence[_Column], lefts: Sequence[int], top: int, bottom: int) -> list[Line]:
    """Return light lines from top to bottom at the numbers of axes that all layers share."""
    found = []
    for column, x in zip(columns, lefts, strict=True):
        if column.axis is not None:
            axis = moved(column.axis, x)
            places = [axis.at(value) for value, _ in axis.ticks()]
            found += [Line(((place, top), (place, bottom)), Fill.RULE) for place in places]
    return found


def _name(page: Page, one: Facts, y: int) -> int:
    """Write a layer's name, type and shape; return where they end."""
    lines = wrap_name(one.name, NAMES_WIDTH, NAME)
    for line in lines:
        page.texts.append(Text(MARGIN, y + 12, line, NAME, bold=True))
        y += NAME_LINE
    if "".join(lines) != one.name:
        page.notes.append(f"{lines[-1]}: {one.name}")
    shape = " \N{MULTIPLICATION SIGN} ".join(map(str, one.shape))
    about = " · ".join(part for part in (one.type, shape) if part)
    return page.lines(MARGIN, y, [shorten(about, NAMES_WIDTH, NOTE)])


def _columns(facts: Sequence[Facts], spec: StatisticsSpec) -> list[_Column]:
    large = spec.what != "overview"
    log_values = spec.log in ("values", "both")
    log_counts = spec.log in ("counts", "both")
    height = _LARGE if large else _SMALL
    made: dict[str, Callable[[], _Column]] = {
        "histograms": lambda: _histograms(600 if large else 240, height, log_counts, log_values),
        "sparsity": lambda: _sparsity(480 if large else 160, height),
        "dead": lambda: _dead(facts, 620 if large else 190, large),
        "ranges": lambda: _ranges(facts, 600 if large else 240, 44 if large else height, log_values),
    }
    return [made[name]() for name in (made if spec.what == "overview" else (spec.what,))]


def _histograms(width: int, height: int, log_counts: bool, log_values: bool) -> _Column:
    n = width // _BAR

    def draw(page: Page, one: Facts, x: int, y: int) -> int:
        if not np.isfinite(one.low) or one.low == one.high:
            finite = np.isfinite(one.low)
            words = f"every value is {number(one.low)}" if finite else "no finite value"
            return page.lines(x, y, [words])
        if one.coarse > _MOST_COARSE:
            words = f"no histogram: {_percent(one.coarse)} of the values lie where the bins that are counted "
            words += "are wider than an eighth of the range (they go from 2^-20 to 2^12)"
            return page.lines(x, y, wrap(words, width, NOTE))
        axis = Axis(one.low, one.high, x, width, log_values)
        counts = counts_between(one.whole, axis.edges(n))
        bottom = draw_axis(page, axis, y + height)
        if not counts.any():
            return bottom
        sizes = np.log1p(counts) if log_counts else counts
        heights = np.ceil(sizes / sizes.max() * height).astype(int)
        for i, tall in enumerate(heights.tolist()):
            page.shapes.append(Box(x + i * _BAR, y + height - tall, _BAR, tall, Fill.MIDDLE))
        assert one.whole.count is not None
        most = f"{_percent(counts.max() / max(int(one.whole.count[0]), 1))}"
        # On the side where the bars are lower, so that it stands on white.
        room = round(text_width(most, NUMBER)) + 4
        ends = heights[: room // _BAR].max(initial=0), heights[-(room // _BAR) :].max(initial=0)
        if min(ends) < height - 10:
            left = ends[0] <= ends[1]
            place = x if left else x + width
            page.texts.append(Text(place, y + 8, most, NUMBER, "left" if left else "right", Ink.GREY))
        return bottom

    return _Column("Values other than 0", width, height + ROOM, draw)


def _nothing(page: Page, x: int, y: int) -> int:
    """Write that there is nothing to draw, clear of the light lines of an axis; return where it ends."""
    words = "no finite value"
    page.shapes.append(Box(x - 2, y + 1, round(text_width(words, NOTE)) + 4, NOTE_LINE, Fill.PAGE))
    return page.lines(x, y, [words])


def _sparsity(width: int, height: int) -> _Column:
    room = 50  # for the share in words
    axis = Axis(0.0, 100.0, 0, width - room, unit=" %")

    def draw(page: Page, one: Facts, x: int, y: int) -> int:
        known = one.zeros[np.isfinite(one.zeros)]
        if not known.size:
            return _nothing(page, x, y)
        counts, _ = np.histogram(known, _SHARES, (0, 1))
        bounds = np.rint(np.linspace(0, axis.width, _SHARES + 1)).astype(int).tolist()
        for count, left, right in zip(counts.tolist(), bounds, bounds[1:], strict=False):
            tall = -(-count * height // int(counts.max()))
            page.shapes.append(Box(x + left, y + height - tall, right - left, tall, Fill.MIDDLE))
        place = moved(axis, x).at(100 * one.zero)
        page.shapes.append(Line(((place, y), (place, y + height - 1)), Fill.DARK, 2))
        page.texts.append(Text(x + width, y + height - 2, _percent(one.zero), NUMBER, "right"))
        return y + height + 4

    return _Column("Zeros", width, height + 4, draw, axis)


def _percent(share: float) -> str:
    """Return a share in percent; one that is not all or nothing never reads as such."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.3g} %"


def _dead(facts: Sequence[Facts], width: int, large: bool) -> _Column:
    def lines_of(one: Facts) -> list[str]:
        if not one.listed:
            return [f"none of {one.n_channels:,} {one.unit}{'s' if one.n_channels > 1 else ''}"]
        lines = []
        for words, where in one.listed:
            if large:
                amount = f"{words} {len(where):,} of {one.n_channels:,} {one.unit}s: "
                lines += wrap(amount + ", ".join(map(str, where)), width, NOTE)
            else:
                lines.append(f"{words} {_listed(where, one.unit, width - text_width(words + ' ', NOTE))}")
        return lines

    def draw(page: Page, one: Facts, x: int, y: int) -> int:
        return page.lines(x, y, lines_of(one))

    tallest = max(len(lines_of(one)) for one in facts)
    return _Column("Zero and constant", width, tallest * NOTE_LINE, draw)


def _listed(where: Sequence[int], unit: str, room: float) -> str:
    return listing(where, unit, lambda text: text_width(text, NOTE) <= room)


def _ranges(facts: Sequence[Facts], width: int, height: int, log: bool) -> _Column:
    room = 96  # for the limits in words
    finite = [one for one in facts if np.isfinite(one.low)]
    low, high = min((one.low for one in finite), default=0.0), max((one.high for one in finite), default=0.0)
    axis = Axis(*limits_of(low, high), 0, width - room, log)

    def draw(page: Page, one: Facts, x: int, y: int) -> int:
        if not np.isfinite(one.low):
            return _nothing(page, x, y)
        mine, middle = moved(axis, x), y + height // 2
        page.shapes.append(Line(((mine.at(one.low), middle), (mine.at(one.high), middle)), Ink.GREY))
        for end in (one.low, one.high):
            page.shapes.append(Line(((mine.at(end), middle - 4), (mine.at(end), middle + 4)), Ink.GREY))
        if one.quantiles is not None:
            least, lower, median, upper, most = (mine.at(value) for value in one.quantiles.tolist())
            page.shapes.append(Box(least, middle - 7, most - least + 1, 15, Fill.LIGHT))
            page.shapes.append(Box(lower, middle - 7, upper - lower + 1, 15, Fill.MIDDLE))
            page.shapes.append(Line(((median, middle - 9), (median, middle + 9)), Fill.DARK, 2))
        words = f"{number(one.low)} to {number(one.high)}"
        page.texts.append(Text(x + width, middle + 3, words, NUMBER, "right"))
        return y + height

    return _Column("Ranges", width, height, draw, axis)


def _words(spec: StatisticsSpec) -> str:
    """Return what the columns show."""
    counts = "by the logarithm of counts" if spec.log in ("counts", "both") else "by counts"
    values = " Values are on an axis that is logarithmic beyond a thousandth of its longer end, and even "
    values += "around 0." if spec.log in ("values", "both") else ""
    said = {
        "histograms": f"Histograms: heights {counts}, each layer's highest bar as high as there is room; the "
        "number beside it is its share of all values. Values that are 0 are left out.",
        "sparsity": "Zeros: how many channels have which share of zeros, each layer's highest bar as high as "
        "there is room; the dark line and the number are the share of the whole layer.",
        "dead": "Numbers are channels; all zero or constant over all rows and positions.",
        "ranges": "Ranges: least to greatest value, a light box from 1 % to 99 % of the values, a darker one "
        "from 25 % to 75 %, and the median.",
    }
    chosen = list(said.values()) if spec.what == "overview" else [said[spec.what]]
    if spec.log in ("values", "both") and spec.what in ("overview", "histograms", "ranges"):
        chosen.append(values.strip())
    return " ".join(chosen)
