"""Rows that differ in shape: what the user asks for, how they lie in memory, and how they lie on disk.

A tap whose rows vary is *ragged*, or *padded* to one shape. In memory either has room for the greatest rows
that the user names, its *bound*, so memory stays a number that is known beforehand.

Of a ragged tap, a batch is copied as it is, in one copy, to the front of its rows' room; beside it lies a
table that says where each row's elements begin there and how long its axes are. A batch that was padded
brings a mask, and the table then points at the part of each row that the mask leaves. Once a block is full,
the writer moves the rows of each step together in their own memory, where they are not already, and what is
written is the elements of all rows back to back: a one-dimensional array, of which a block has so many inner
chunks as its rows need. The table becomes the array `extents`: where each row begins in it, and its shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .dtypes import DType, is_float
from .errors import CaptureError, FormatError, PlanError, closest
from .layout import CHUNK_BYTES, EXTENTS, ArraySpec, Layout, array_view
from .reduce import VALUES, Chain, Rows
from .shard import Pieces, buffer_bytes
from .taps import Layer, TapName, choose

#: Name of the array that says of each place of a padded row whether it is one of the row's own.
MASK = "mask"

Sizes: TypeAlias = int | Sequence[int]
#: As the user gives it: text, `pattern:bound`, one or several, or a dict from patterns to bounds.
Ragged: TypeAlias = "str | Sequence[str] | Mapping[str, Sizes] | None"
#: Likewise; a bound may come with the value that pads, `pattern:size,value` or `(size, value)`.
Padded: TypeAlias = "str | Sequence[str] | Mapping[str, Sizes | tuple[Sizes, float]] | None"

_RULE = re.compile(r"(?P<pattern>.+):(?P<sizes>[0-9]+(x[0-9]+)*)(,(?P<value>[^,]+))?", re.DOTALL)
_USUAL = {1: (0,), 2: (0,), 3: (1, 2), 4: (1, 2, 3)}


@dataclass(frozen=True)
class Rule:
    """What is asked for of the taps that a pattern matches."""

    pattern: str
    """As for layers; see `layertap.capture.taps.select`."""
    sizes: tuple[int, ...]
    """Greatest sizes: one for all axes that vary, one for each of these, or one for each axis of a row."""
    pad: float | None = None
    """What shorter rows are padded with; None where they are kept as they are."""

    def bound(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the greatest shape of a row of the tap `name`, whose rows in the first batch have `shape`.

        Raises:
            PlanError: the sizes do not fit the number of axes.
        """
        axes = self.axes(len(shape))
        if len(self.sizes) == len(shape):
            return self.sizes
        if len(self.sizes) not in (1, len(axes)) or not axes:
            raise PlanError(
                f"{self} gives {len(self.sizes)} sizes, and {name} has rows of shape {shape}; give one size "
                "for all axes that vary, or one for each axis of a row: 12x64x64"
            )
        sizes = self.sizes * len(axes) if len(self.sizes) == 1 else self.sizes
        bound = list(shape)
        for axis, size in zip(axes, sizes, strict=True):
            bound[axis] = size
        return tuple(bound)

    def axes(self, n_axes: int) -> tuple[int, ...]:
        """Return which axes of a row may vary: all but the channels, where not every axis has a size."""
        return tuple(range(n_axes)) if len(self.sizes) == n_axes else usual_axes(n_axes)

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.sizes))
        kind, value = ("ragged", "") if self.pad is None else ("pad", f",{self.pad:g}")
        return f"{kind} {self.pattern}:{sizes}{value}"


@dataclass(frozen=True)
class Varying:
    """All that the user asks for of taps whose rows differ in shape."""

    rules: tuple[Rule, ...] = ()
    """The last that matches a tap counts."""
    mask: str | None = "attention_mask"
    """Name of the model's argument that says which tokens of a padded batch are the rows' own."""

    def rule(self, tap: TapName, kind: str) -> Rule | None:
        """Return what is asked for of `tap`, of a layer of type `kind`."""
        layer = [Layer(tap.layer, (kind,))]
        for rule in reversed(self.rules):
            if any(choice.takes(tap) for choice in choose(layer, rule.pattern)[0]):
                return rule
        return None

    def check_used(self, taps: Sequence[tuple[TapName, str]]) -> None:
        """Refuse a rule that no tap follows.

        Raises:
            PlanError: with the closest names.
        """
        used = {id(self.rule(tap, kind)) for tap, kind in taps}
        for rule in self.rules:
            if id(rule) not in used:
                names = [str(tap) for tap, _ in taps]
                raise PlanError(f"no tap follows {rule}. {closest(rule.pattern, names)}")


def varying(ragged: Ragged = None, pad: Padded = None, mask: str | None = "attention_mask") -> Varying:
    """Read what the user gave.

    Raises:
        PlanError: something is not of that form.
    """
    rules = [_ragged_rule(*one) for one in _listed(ragged)] + [_pad_rule(*one) for one in _listed(pad)]
    return Varying(tuple(rules), mask)


def _listed(given: Any) -> list[tuple[str, Any]]:
    if given is None:
        return []
    if isinstance(given, Mapping):
        return list(given.items())
    found = []
    for text in [given] if isinstance(given, str) else given:
        match = _RULE.fullmatch(text)
        if match is None:
            raise PlanError(
                f"{text!r} does not say how large rows may be: write PATTERN:SIZE, encoder.*:512 or "
                "conv1:224x320, which is room for the largest"
            )
        sizes = tuple(map(int, match["sizes"].split("x")))
        found.append((match["pattern"], sizes if match["value"] is None else (sizes, match["value"])))
    return found


def _ragged_rule(pattern: str, sizes: Any) -> Rule:
    return Rule(pattern, _sizes(pattern, sizes))


def _pad_rule(pattern: str, given: Any) -> Rule:
    sizes, value = given, 0.0
    if isinstance(given, tuple) and len(given) == 2 and not isinstance(given[1], int):
        sizes, value = given
    try:
        return Rule(pattern, _sizes(pattern, sizes), float(value))
    except (TypeError, ValueError):
        raise PlanError(f"{pattern} is padded with {value!r}, which is no number") from None


def _sizes(pattern: str, given: Any) -> tuple[int, ...]:
    sizes = (given,) if isinstance(given, int) else given
    if not isinstance(sizes, tuple | list) or not sizes or not all(type(n) is int and n > 0 for n in sizes):
        raise PlanError(
            f"{pattern} is given the size {given!r}; a size is a whole number above 0, or one for each axis "
            "that varies"
        )
    return tuple(sizes)


# What a tap becomes


def usual_axes(n_axes: int) -> tuple[int, ...]:
    """Return which axes of a row vary where nothing else is said: all but the channels."""
    return _USUAL.get(n_axes, tuple(range(n_axes)))


def extents_spec(values: ArraySpec) -> ArraySpec:
    """Return the array that says where each row of a ragged tap begins, and its shape."""
    folder = values.path.rpartition("/")[0]
    shape = (len(values.shape) + 1,)
    name = f"{values.name}/{EXTENTS}"
    path = f"{folder}/{EXTENTS}"
    return ArraySpec(name, path, ("row", "extent"), shape, np.dtype(np.uint64), role="extents")


def mask_spec(values: ArraySpec, axes: Sequence[int]) -> ArraySpec:
    """Return the array that says which places of a padded row are the row's own."""
    folder = values.path.rpartition("/")[0]
    dims = ("row", *(values.dims[1 + axis] for axis in axes))
    shape = tuple(values.shape[axis] for axis in axes)
    return ArraySpec(f"{values.name}/{MASK}", f"{folder}/{MASK}", dims, shape, np.dtype(np.bool_), "zstd")


def check_pad(name: str, pad: float, dtype: DType) -> None:
    """Refuse a value that a padded tap cannot hold.

    Raises:
        PlanError: with both.
    """
    with np.errstate(all="ignore"):
        held = float(np.asarray(pad).astype(dtype))
    whole = not is_float(dtype)
    if (whole and held != pad) or (math.isfinite(pad) and not math.isfinite(held)):
        raise PlanError(f"{name} holds {dtype}, which cannot be padded with {pad:g}; give another value")


def check_fits(name: str, shape: tuple[int, ...], bound: tuple[int, ...], rows: str) -> None:
    """Refuse rows that are larger than their room.

    Raises:
        CaptureError: with the rows, their shape and the bound.
    """
    if len(shape) != len(bound) or any(n > most for n, most in zip(shape, bound, strict=True)):
        raise CaptureError(
            f"{name} has shape {shape} for {rows}; there is room for {bound}. Give a greater size (and "
            "overwrite=True, for rows of another size make another store), or one for each axis of a row"
        )


def is_masked(rule: Rule | None, shape: Sequence[int], n_tokens: int | None) -> bool | None:
    """Return whether a mask of `n_tokens` speaks of the first axis of rows of `shape`; None: there is none.

    Rows of one axis or two are sequences of tokens; of more, the first axis is that of channels or heads.
    """
    if rule is None or n_tokens is None:
        return None
    return 0 in rule.axes(len(shape)) and len(shape) in (1, 2) and shape[0] == n_tokens


def check_reduced(name: str, rule: Rule, chain: Chain, room: Rows) -> None:
    """Refuse what cannot be done to rows that vary, or what is done to channels that may vary.

    Args:
        name: the tap.
        rule: what is asked for.
        chain: what is done to it, bound to `room`.
        room: the greatest row.

    Raises:
        PlanError: with the step, and what can be done.
    """
    for step, rows in chain.each(room):
        if not step.is_cast and rows.channel is not None and rows.channel in rule.axes(len(room.shape)):
            raise PlanError(
                f"{name} is reduced by {step}, and {rule} lets its channels (the axis "
                f"{rows.dims[rows.channel]}) vary too; give sizes of the other axes alone, if it has some, "
                "or leave the reduction out"
            )
        if step.of_whole_row:
            return
        if not step.by_place:
            raise PlanError(
                f"{name} is asked for with {rule} and reduced by {chain}; {step} takes rows of one shape, or "
                "would give a second array of rows that differ. What acts on each place by itself may be "
                "done (channels, norm, project, pca, casts), or what makes one shape of all places "
                "(pool:global, topk:5,space, tokens:mean). Else leave out one of the two: what comes to one "
                "shape (pool:7) may vary without it"
            )


def check_same(name: str, shape: tuple[int, ...], bound: tuple[int, ...], axes: Sequence[int]) -> None:
    """Refuse another size of an axis that does not vary.

    Raises:
        CaptureError: with the axis.
    """
    for axis, (n, size) in enumerate(zip(shape, bound, strict=True)):
        if axis not in axes and n != size:
            raise CaptureError(
                f"{name} has rows of shape {shape}, and axis {axis} had {size} entries in the first batch. "
                f"If it varies too, give a size for each axis of a row: {'x'.join(map(str, bound))}"
            )


def ways(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return what can be done about a tap whose rows vary, as the end of an error."""
    alike = len(shape) == len(expected)
    size = "x".join(map(str, map(max, shape, expected))) if alike and shape else "SIZE"
    return (
        f"Rows of a size of their own are kept by ragged={{{name!r}: ...}} (--ragged '{name}:{size}'), or "
        f"in one size by pad= (--pad '{name}:{size}'); the size is the greatest that comes. What is reduced "
        "to one size (pool:7, tokens:mean) may vary too. Else give inputs of one size"
    )


@dataclass(frozen=True)
class Form:
    """How the rows of one tap come, and may come in later batches."""

    name: str
    """Its name."""
    rows: Rows
    """Its rows in the first batch, as the layer gives them."""
    asked: Chain
    """What is done to them, as it was asked for."""
    chain: Chain
    """The same, bound to the rows of the first batch; to the greatest, where they vary."""
    rule: Rule | None = None
    """What is asked for where they vary."""
    masked: bool | None = None
    """Whether a batch's mask speaks of their first axis, as the first batch showed; None: it had no mask."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The greatest shape of a row, as the layer gives it."""
        return self.rows.shape if self.rule is None else self.rule.bound(self.name, self.rows.shape)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of a row that may vary."""
        return () if self.rule is None else self.rule.axes(len(self.rows.shape))

    @property
    def varies(self) -> bool:
        """Whether rows may differ in shape as they are stored."""
        return self.rule is not None and not self.chain.of_whole_row

    @property
    def minds_mask(self) -> bool:
        """Whether it matters which tokens of a padded batch are the rows' own."""
        return self.rule is not None or any(step.minds_mask for step in self.chain.steps)

    @property
    def room(self) -> Rows:
        """The greatest row, as the layer gives it."""
        return replace(self.rows, shape=self.shape)

    @cached_property
    def stored(self) -> Rows:
        """The greatest row, as it is stored."""
        return self.chain.after(self.room)[VALUES]

    def mask_of(self, shape: Sequence[int], mask: Any) -> Any:
        """Return `mask` where it says what is the rows' own of a batch of `shape`, else None; see `heeds`."""
        return mask if mask is not None and self.heeds(shape, mask.shape) else None

    def heeds(self, shape: Sequence[int], mask: Sequence[int] | None) -> bool:
        """Return whether a mask of the shape `mask` says what is the rows' own of a batch of `shape`.

        Which axis is that of the tokens is seen in the first batch: in another, the channels may be as many.

        Raises:
            CaptureError: it did in the first batch and cannot now; or only now there is a mask.
        """
        if mask is None or self.masked is False:
            return False
        if self.masked is None or mask[1] != shape[1]:
            raise CaptureError(
                f"{self.name} has shape {tuple(shape)} and the batch's mask {tuple(mask)}; the first batch "
                + ("had no mask" if self.masked is None else "had as many tokens in both")
                + ". Give every batch a mask of its tokens, name another argument by mask= (--mask), or none"
            )
        return True

    def checked(self, shapes: Sequence[tuple[int, ...]], first_row: int) -> list[tuple[int, ...]]:
        """Return the shapes of rows where there is room for them.

        Raises:
            CaptureError: there is none for one of them, which is named.
        """
        for row, shape in enumerate(shapes, start=first_row):
            if len(shape) == len(self.shape):
                check_same(self.name, shape, self.rows.shape, self.axes)
            check_fits(self.name, shape, self.shape, f"row {row}")
        return list(shapes)

    def bound_to(self, shape: tuple[int, ...]) -> tuple[Chain, Rows] | None:
        """Return the chain for rows of another shape, where what it makes of them has the same one."""
        if not self.asked.steps or len(shape) != len(self.rows.shape):
            return None
        rows = replace(self.rows, shape=shape)
        try:
            chain = self.asked.bind(rows)
        except PlanError:
            return None
        return (chain, rows) if chain.after(rows) == self.chain.after(self.rows) else None


# In memory


def table_of(
    shape: tuple[int, ...], start: int, n_rows: int, skipped: Any = None, kept: Any = None
) -> NDArray[np.int64]:
    """Return the table of rows of one `shape` that lie one behind the other.

    Args:
        shape: shape of a row.
        start: element at which the first row begins.
        n_rows: number of rows.
        skipped: for each row, the entries of its first axis before those that are kept, as `runs` gives them.
        kept: for each row, the entries of its first axis that are kept; None: all.
    """
    table = np.empty((n_rows, 1 + len(shape)), np.int64)
    table[:, 0] = start + np.arange(n_rows) * math.prod(shape)
    table[:, 1:] = shape
    if kept is not None:
        table[:, 0] = np.where(skipped < 0, -1, table[:, 0] + skipped * math.prod(shape[1:]))
        table[:, 1] = kept
    return table


def runs(mask: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the true entries of each row begin (-1: not one run) and how many there are."""
    true = mask.astype(bool)
    kept = true.sum(1)
    first = true.argmax(1)
    last = true.shape[1] - 1 - true[:, ::-1].argmax(1)
    whole = (kept == 0) | (last - first + 1 == kept)
    return np.where(whole, first, -1), kept


def check_in_time(forms: Sequence[Form]) -> None:
    """Refuse a mask that comes after the forward, in which a tap was reduced to some of its tokens.

    Raises:
        CaptureError: with the tap.
    """
    late = next((form for form in forms if form.minds_mask and not form.varies), None)
    if late is not None:
        raise CaptureError(
            f"{late.name} is reduced by {late.chain} while the model runs, and the mask came after that; "
            "give the model the mask as an argument"
        )


def checked_mask(name: str, shape: Sequence[int], n_rows: int) -> None:
    """Refuse what does not say of each token of each row whether it is one of the row's own.

    Raises:
        CaptureError: with its shape.
    """
    if len(shape) != 2 or shape[0] != n_rows:
        raise CaptureError(
            f"{name} has shape {tuple(shape)}; the mask of a batch has one entry for each token of its "
            f"{n_rows} rows. Name another argument of the model with mask= (--mask), or none at all"
        )


# On disk


@lru_cache(maxsize=256)
def flat(array: ArraySpec, layout: Layout) -> tuple[ArraySpec, Layout]:
    """Return how the packed elements of a ragged array are laid out: each is a row of its own, as it were.

    A block has room for its rows at their greatest, rounded up to whole inner chunks.
    """
    n_elements = array.row_bytes // array.dtype.itemsize * layout.block_rows
    chunk = max(1, min(CHUNK_BYTES // array.dtype.itemsize, n_elements))
    elements = replace(array, dims=("element",), shape=(), role="")
    return elements, Layout((elements,), (), chunk, -(-n_elements // chunk) * chunk)


def as_stored(array: ArraySpec, layout: Layout, n_rows: int = 0) -> tuple[ArraySpec, Layout, int]:
    """Return `array`, its layout and a block's rows as they are on disk; of a ragged one, no row is sure."""
    return (*flat(array, layout), 0) if array.is_ragged else (array, *layout.shard(array, n_rows))


class Written(NamedTuple):
    """What `write_shard` is given for a block of any array."""

    array: ArraySpec
    """The array, as its rows are on disk: of a ragged one, its elements."""
    layout: Layout
    """Theirs."""
    slabs: Sequence[memoryview]
    """The block's slabs, where rows are written as they lie there."""
    n_rows: int
    """Their number."""
    pieces: Pieces | None
    """Else what gives their bytes."""


def as_written(
    array: ArraySpec, layout: Layout, slabs: Sequence[NDArray[np.uint8]], n_rows: int, block: int
) -> Written:
    """Return how the first `n_rows` rows of `block` of an array are written, once they are in `slabs`.

    Rows of a ragged array are moved together in their memory.

    Raises:
        CaptureError: the mask of a row leaves no single run of it.
    """
    views = [slab.data.toreadonly() for slab in slabs]
    if array.is_ragged:
        elements, packed = flat(array, layout)
        offset, n_bytes = layout.offsets[layout.arrays.index(array)], array.dtype.itemsize
        first, step = block * layout.block_rows, layout.step_rows
        lengths = [
            pack(array, layout, slab, n, first + i * step)
            for i, (slab, n) in enumerate(_steps(layout, slabs, n_rows))
        ]
        cut = [view[offset : offset + n * n_bytes] for view, n in zip(views, lengths, strict=False)]
        return Written(elements, packed, (), sum(lengths), _run_of(cut, n_bytes))
    if array.is_extents:
        table = _table(array, layout, slabs, n_rows, block).reshape(-1).view(np.uint8)
        return Written(array, layout, (), n_rows, _run_of([table.data], array.row_bytes))
    return Written(array, layout, views, n_rows, None)


def _steps(
    layout: Layout, slabs: Sequence[NDArray[np.uint8]], n_rows: int
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Yield each slab that has rows, with their number."""
    for i, slab in enumerate(slabs):
        n = min(layout.step_rows, n_rows - i * layout.step_rows)
        if n > 0:
            yield slab, n


def pack(array: ArraySpec, layout: Layout, slab: NDArray[np.uint8], n_rows: int, first_row: int) -> int:
    """Move the rows of a step of a ragged array together in their memory; return their elements.

    The table says where they are then, so that it may be done again.

    Raises:
        CaptureError: the mask of a row, which is counted from `first_row`, leaves no single run of it.
    """
    number, extents = layout.numbers_of(array)
    elements = array_view(layout, number, slab).reshape(-1)
    table = array_view(layout, extents, slab)[:n_rows].view(np.int64)
    starts, sizes = table[:, 0].copy(), table[:, 1:].prod(1)
    ends = np.cumsum(sizes)
    for row in np.flatnonzero(starts != ends - sizes).tolist():
        start, n, end = int(starts[row]), int(sizes[row]), int(ends[row])
        if start < 0:
            raise CaptureError(
                f"the mask of row {first_row + row} leaves tokens of {array.name} out between others; a "
                "ragged row is one run of tokens. Keep all of it by pad=, or give mask=None (--mask none)"
            )
        elements[end - n : end] = elements[start : start + n]
    table[:, 0] = ends - sizes
    return int(ends[-1])


def check_extents(
    where: Any, array: ArraySpec, layout: Layout, rows: NDArray[Any], extents: NDArray[np.int64]
) -> None:
    """Hold what a store says of rows of a ragged array to what can be.

    Args:
        where: the store, for the error.
        array: the array.
        layout: that of the store.
        rows: rows of the data set; (rows,).
        extents: what is said of them; (rows, 1 + axes).

    Raises:
        FormatError: a row lies where none can.
    """
    room = flat(array, layout)[1].block_rows
    sizes, starts = extents[:, 1:], extents[:, 0] - rows // layout.block_rows * room
    fits = (sizes >= 0).all(1) & (sizes <= np.array(array.shape)).all(1)
    fits &= (starts >= 0) & (starts <= room - np.where(fits, sizes.prod(1), 0))
    if not fits.all():
        row = int(rows[int(np.argmin(fits))])
        raise FormatError(f"{where} says that row {row} of {array.name} lies where no row can")


def _table(
    array: ArraySpec, layout: Layout, slabs: Sequence[NDArray[np.uint8]], n_rows: int, block: int
) -> NDArray[np.uint64]:
    """Return where each row of a block begins on disk, and its shape."""
    number = layout.arrays.index(array)
    values = next(tap for tap in layout.taps if tap.group == array.group)
    table = np.concatenate(
        [array_view(layout, number, slab)[:n].view(np.uint64) for slab, n in _steps(layout, slabs, n_rows)]
    )
    sizes = table[:, 1:].prod(1)
    table[:, 0] = block * flat(values, layout)[1].block_rows + np.cumsum(sizes) - sizes
    return table


def _run_of(cut: Sequence[memoryview], row_bytes: int) -> Pieces:
    """Return what yields rows from one to another of memory that lies in some pieces."""

    def pieces(first: int, stop: int) -> Iterator[memoryview]:
        at, low, high = 0, first * row_bytes, stop * row_bytes
        for piece in cut:
            if at < high and at + piece.nbytes > low:
                yield piece[max(0, low - at) : high - at]
            at += piece.nbytes

    return pieces


def writer_bytes(array: ArraySpec, step_rows: int, n_steps: int, staging_bytes: int) -> int:
    """Return the most that a writer holds beside the slabs, for a block of any array; see `buffer_bytes`."""
    if array.is_extents:
        tables = 4 * array.row_bytes * step_rows * n_steps
        return tables + buffer_bytes(array, step_rows, n_steps, staging_bytes)
    if not array.is_ragged:
        return buffer_bytes(array, step_rows, n_steps, staging_bytes)
    elements, layout = flat(array, Layout((array,), (), step_rows, step_rows * n_steps))
    table = 64 * step_rows * (2 + len(array.shape))  # of one step, as lists of Python's numbers
    return table + buffer_bytes(elements, layout.step_rows, layout.steps_per_block, staging_bytes)
