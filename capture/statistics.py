"""What is computed of each tap while it streams by, and where a block's part of it lies.

Two arrays hold all of it, so that a block adds two files however many taps there are. `statistics/rows` has
rows first: the mean and maximum of each row and channel of every tap, one tap behind the other.
`statistics/blocks` has blocks first: what merges over blocks, in float64, one field behind the other. Both
are shards like any other, with checksums that the commit record binds, and a reader merges blocks in their
order; so a result depends on the rows of a store and on the length of its blocks, not on who captured which.

The channel of (token, feature) and of (feature) is the feature; of anything else it is a row's first axis.
The other axes are *positions*.

Of rows that differ in shape, what is a row's own is measured: a channel or a position that a row lacks has no
values in it. A vector of any length has no channels: its entries are positions. There are no mean maps then,
because no position is the same place in two rows. Of int8 codes, it is the values that they stand for.

A value's bin in a histogram is its sign and the upper bits of its float32: octaves from 2**-20 to 2**12,
eight bins each, one around zero, one at each end. They are the same for every tap, so they merge by addition.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import DType, dtype_name
from .errors import FormatError, PlanError, closest
from .layout import CHUNK_BYTES, ArraySpec
from .trust import LONGEST_AXIS, listed, shown, whole

Json = dict[str, Any]
Values = NDArray[np.float64]

#: What can be asked for; `channels` comes with any other.
NAMES = ("channels", "pooled", "top", "histogram", "classes", "gram")
#: Sets of them by name.
SETS = {"none": (), "cheap": ("channels", "pooled", "top"), "all": NAMES}

ROWS, BLOCKS = "statistics/rows", "statistics/blocks"

TOP_ROWS, MOST_TOP_ROWS = 9, 1024
#: A tap with more channels has no Gram matrix: its half would take more than 4 MiB a block.
MOST_GRAM_CHANNELS = 1024
#: Mean maps of classes are at most this long on each axis, and less where all of a tap would take more bytes.
LONGEST_MAP, MAP_BYTES = 8, 2**20
MOST_CLASSES = 2**20

#: Octaves of the histogram, as exponents of 2, and the bits of a float32's fraction that divide each.
FIRST_OCTAVE, LAST_OCTAVE, BIN_BITS = -20, 11, 3
#: Bins on each side of the one around zero, the open one at the end included.
SIDE = (LAST_OCTAVE - FIRST_OCTAVE + 1) * 2**BIN_BITS + 1
BINS = 2 * SIDE + 1


@dataclass(frozen=True)
class Choice:
    """Which statistics are kept."""

    names: tuple[str, ...] = ()
    """In the order of `NAMES`; empty: none."""
    k: int = TOP_ROWS
    """Rows that `top` keeps for each channel."""
    lenient: bool = False
    """Whether `classes` is left out where no classes are known: it was not asked for by name."""

    @classmethod
    def parse(cls, said: str | Iterable[str] | None) -> Choice:
        """Read `cheap`, `all`, `none`, or names, in a list or with commas between; `top:16` keeps 16 rows.

        Raises:
            PlanError: a name is unknown.
        """
        if said is not None and not isinstance(said, Iterable):
            raise PlanError(f"stats={said!r} does not say which: give 'cheap', 'all', or names")
        parts = [] if said is None else said.split(",") if isinstance(said, str) else list(said)
        wanted: set[str] = set()
        k, named = TOP_ROWS, False
        for part in (part.strip() for part in parts):
            if part in SETS:
                wanted |= set(SETS[part])
                continue
            name, colon, number = part.partition(":")
            if name not in NAMES or (colon and name != "top"):
                raise PlanError(f"there are no statistics {part!r}. {closest(part, [*SETS, *NAMES])}")
            if colon:
                k = _rows_to_keep(number)
            wanted.add(name)
            named = named or name == "classes"
        if wanted:
            wanted.add("channels")
        if "classes" in wanted:
            wanted.add("pooled")
        return cls(tuple(name for name in NAMES if name in wanted), k, not named)


def _rows_to_keep(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MOST_TOP_ROWS:
        raise PlanError(f"top keeps 1 to {MOST_TOP_ROWS} rows for each channel; {text!r} were asked for")
    return int(text)


@dataclass(frozen=True)
class Field:
    """Some numbers of a tap in a block's entries."""

    name: str
    """What they are."""
    shape: tuple[int, ...]
    """How they are arranged."""
    start: int
    """The first of them among the entries."""

    @property
    def stop(self) -> int:
        """The entry behind the last."""
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class TapFields:
    """Where the statistics of one tap lie."""

    channels: int
    """How many there are."""
    axis: str | None
    """Name of the axis that they lie on; None where there is one channel: of single values, and of vectors of
    any length."""
    positions: tuple[int, ...]
    """Sizes of the other axes of a row, the greatest where rows differ in shape."""
    grid: tuple[int, ...]
    """Size of the mean maps of classes; empty where there are none, and the pooled means serve."""
    pooled: int
    """First entry of the row means in `statistics/rows`; the maxima follow. -1: they are not kept."""
    fields: tuple[Field, ...]
    """What is kept for each block."""
    copied: bool = False
    """Whether values are not measured as they lie, but copied a piece at a time."""

    def views(self, entries: Values) -> dict[str, Values]:
        """Return each field as a view of a block's entries."""
        return {field.name: entries[field.start : field.stop].reshape(field.shape) for field in self.fields}


@dataclass(frozen=True)
class Statistics:
    """What is kept of every tap of a store, and where."""

    names: tuple[str, ...]
    """Which statistics, in the order of `NAMES`."""
    k: int
    """Rows that `top` keeps for each channel."""
    n_classes: int
    """Classes that mean maps are made for; 0: none."""
    taps: tuple[TapFields, ...]
    """For each tap, in the order of the layout."""
    dtype: DType
    """Type of the row means and maxima: float32, or float64 where a tap holds more than that tells apart."""

    @classmethod
    def of(cls, taps: Sequence[ArraySpec], names: tuple[str, ...], k: int, n_classes: int) -> Statistics:
        """Lay out the statistics `names` of `taps`.

        Raises:
            PlanError: a tap holds complex numbers.
        """
        laid_out, start, pooled = [], 0, 0
        for tap in taps:
            if tap.dtype.kind == "c":
                raise PlanError(
                    f"{tap.name} holds complex numbers, which have no order and so no statistics; leave the "
                    "tap or the statistics out, or capture its real and imaginary parts"
                )
            fields = _tap_fields(tap, names, k, n_classes, start, pooled)
            start = fields.fields[-1].stop
            pooled += 2 * fields.channels
            laid_out.append(fields)
        narrow = all(is_narrow(tap.dtype) or tap.dtype == np.float32 for tap in taps)
        return cls(names, k, n_classes, tuple(laid_out), np.dtype(np.float32 if narrow else np.float64))

    @property
    def n_entries(self) -> int:
        """Numbers that are kept for each block."""
        return self.taps[-1].fields[-1].stop

    @property
    def n_pieces(self) -> int:
        """Inner chunks of a block's entries."""
        return -(-self.n_entries * 8 // CHUNK_BYTES)

    @cached_property
    def rows(self) -> ArraySpec | None:
        """The array of row means and maxima."""
        if "pooled" not in self.names:
            return None
        n = sum(2 * tap.channels for tap in self.taps)
        return ArraySpec("statistics", ROWS, ("row", "pooled"), (n,), self.dtype)

    @property
    def row_arrays(self) -> tuple[ArraySpec, ...]:
        """`rows`, where it is kept."""
        return () if self.rows is None else (self.rows,)

    @cached_property
    def blocks(self) -> ArraySpec:
        """The array of the blocks' entries; a row of this is one inner chunk, and a block has `n_pieces`."""
        width = -(-self.n_entries // self.n_pieces)
        return ArraySpec("statistics", BLOCKS, ("block", "entry"), (width,), np.dtype(np.float64), "zstd")

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's entries before they are encoded, filled up to whole pieces."""
        return self.n_pieces * self.blocks.row_bytes

    def to_json(self, taps: Sequence[ArraySpec]) -> Json:
        """Return what the manifest says of them."""
        return {
            "names": list(self.names),
            "top_rows": self.k,
            "classes": self.n_classes,
            "rows": None if self.rows is None else {"path": ROWS, "dtype": dtype_name(self.dtype)},
            "blocks": {"path": BLOCKS, "pieces": self.n_pieces, "piece_entries": self.blocks.shape[0]},
            "taps": {
                tap.name: {
                    "channels": its.channels,
                    "axis": its.axis,
                    "grid": list(its.grid),
                    "pooled": its.pooled,
                    "fields": {field.name: [field.start, *field.shape] for field in its.fields},
                }
                for tap, its in zip(taps, self.taps, strict=True)
            },
        }

    @classmethod
    def from_json(cls, data: Any, taps: Sequence[ArraySpec]) -> Statistics | None:
        """Read what `to_json` returned; all but the choice follows from it, and is held to that.

        Raises:
            FormatError: it is not what `to_json` returns.
        """
        if data is None:
            return None
        if not isinstance(data, dict):
            raise FormatError(f"'statistics' is {shown(data)}; it should be an object or null")
        said = listed(data["names"], "the names of the statistics")
        names = tuple(name for name in NAMES if name in said)
        if list(names) != said or "channels" not in names:
            raise FormatError(
                f"the names of the statistics are {shown(said)}, which this version does not know"
            )
        k = whole(data["top_rows"], "'top_rows'", 1, MOST_TOP_ROWS)
        n_classes = whole(data["classes"], "the number of classes", 0, MOST_CLASSES)
        try:
            found = cls.of(taps, names, k, n_classes)
        except PlanError as error:
            raise FormatError(str(error)) from None
        if found.n_entries > LONGEST_AXIS or (found.rows is not None and found.rows.shape[0] > LONGEST_AXIS):
            raise FormatError("its statistics have more entries than an axis can have")
        if found.to_json(taps) != data:
            raise FormatError("what it says of its statistics does not follow from its taps")
        return found


def is_narrow(dtype: DType) -> bool:
    """Return whether float32 holds every value of a type that is no float32 itself."""
    return dtype.kind == "b" or dtype.itemsize == 1 or (dtype.itemsize == 2 and dtype.kind != "c")


def plan_statistics(
    taps: Sequence[ArraySpec], columns: Sequence[ArraySpec], choice: Choice, classes: Sequence[str] | None
) -> Statistics | None:
    """Return how the statistics of `choice` are kept; None where there are none.

    Args:
        taps: the taps, as they are captured.
        columns: the columns.
        choice: what was asked for.
        classes: class names by label, where they are known.

    Raises:
        PlanError: they cannot be kept of these taps.
    """
    names = choice.names
    if not names:
        return None
    labelled = any(is_label(column) for column in columns)
    n_classes = len(classes or ()) if "classes" in names and labelled else 0
    if "classes" in names and n_classes == 0:
        if not choice.lenient:
            raise PlanError(
                "statistics of classes need a label for each row, one whole number, and classes=, the names "
                "by label; " + ("there are no names" if labelled else "the rows have no label")
            )
        names = tuple(name for name in names if name != "classes")
    return Statistics.of(taps, names, choice.k, n_classes)


def is_label(column: ArraySpec) -> bool:
    """Return whether `column` holds the class of each row."""
    return column.name == "label" and column.shape == () and column.dtype.kind in "iub"


def channel_last(tap: ArraySpec) -> bool:
    """Return whether the channels of `tap` are its last axis, its features."""
    return tap.dims[-1] in ("feature", "component") and channel_axis(tap) is not None


def channel_axis(tap: ArraySpec) -> int | None:
    """Return the axis of a row that the channels of `tap` lie on; None where there is one channel."""
    if not tap.shape or (tap.varies and len(tap.shape) == 1):
        return None
    return len(tap.shape) - 1 if tap.dims[-1] in ("feature", "component") else 0


def _tap_fields(
    tap: ArraySpec, names: tuple[str, ...], k: int, n_classes: int, start: int, pooled: int
) -> TapFields:
    at = channel_axis(tap)
    n = 1 if at is None else tap.shape[at]
    positions = tap.shape if at is None else tap.shape[:at] + tap.shape[at + 1 :]
    grid = () if tap.varies else _grid(n, positions, n_classes)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("count", "nan", "inf", "zero", "minimum", "maximum", "mean", "squares"), (n,)
    )
    if "top" in names:
        shapes |= dict.fromkeys(("top_value", "top_row", "top_position"), (k, n))
    if "histogram" in names:
        shapes["histogram"] = (n, BINS)
    if "classes" in names and grid:
        shapes |= {"class_rows": (n_classes,), "class_sum": (n_classes, n, *grid)}
    if "gram" in names and n <= MOST_GRAM_CHANNELS:
        shapes["gram"] = (n * (n + 1) // 2,)
    fields = []
    for name, shape in shapes.items():
        fields.append(Field(name, shape, start))
        start = fields[-1].stop
    axis = None if at is None else tap.dims[1 + at]
    kept = pooled if "pooled" in names else -1
    return TapFields(n, axis, positions, grid, kept, tuple(fields), tap.varies or tap.codes)


def _grid(n_channels: int, positions: tuple[int, ...], n_classes: int) -> tuple[int, ...]:
    """Return the size of mean maps that are not too large; none where one cell would be all that is left."""
    for longest in range(LONGEST_MAP, 1, -1):
        grid = tuple(min(size, longest) for size in positions)
        if math.prod(grid) > 1 and 8 * n_classes * n_channels * math.prod(grid) <= MAP_BYTES:
            return grid if n_classes else ()
    return ()


def cells(size: int, n: int) -> Iterator[slice]:
    """Yield the positions of each of `n` cells of an axis: all of them once, as even as can be."""
    for i in range(n):
        yield slice(size * i // n, size * (i + 1) // n)


def edges() -> Values:
    """Return the edges of the histogram's bins, shape (`BINS` + 1,), from minus to plus infinity.

    A value lies in the bin whose edge that is nearer to zero it reaches: [a, b) above zero, (-b, -a] below.
    """
    per_octave = 2**BIN_BITS
    steps = 1 + np.arange(per_octave) / per_octave
    upper = np.outer(2.0 ** np.arange(FIRST_OCTAVE, LAST_OCTAVE + 1), steps).ravel()
    upper = np.append(upper, [2.0 ** (LAST_OCTAVE + 1), np.inf])
    return np.concatenate([-upper[::-1], upper])
