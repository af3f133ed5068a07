"""The plan: what will be captured, how it is cut, and whether it fits memory and disk.

It is worked out once, from the first step's shapes, before a byte is written.

Memory is one number. It is shared out as follows: one step's bytes for the copies that the first step keeps
(later: what a device holds back), the buffers of the writers, and the rest for two or three blocks.
Two blocks let the model fill one while the other is written; the third evens out their speeds.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from .axes import dims_of
from .backend import Learned
from .codecs import check_codec
from .dtypes import DType, is_float, named_dtype
from .errors import CaptureError, NoSpaceError, PlanError
from .files import MOST_STAGING_BYTES, PAGE, STAGING_BYTES
from .layout import CHUNK_BYTES, ArraySpec, Layout, slab_bytes
from .machine import available_bytes, n_cores
from .measure import scratch_bytes
from .place import Place
from .ragged import (
    Form,
    Rule,
    Varying,
    check_pad,
    check_reduced,
    extents_spec,
    is_masked,
    mask_spec,
    writer_bytes,
)
from .reduce import VALUES, Cast, Chain, Int8, Reductions, Rows
from .reduce_text import choose
from .statistics import Choice, Statistics
from .taps import distinct_folders

DEFAULT_MEMORY = "2GiB"
_BLOCK_BYTES = 64 * 2**20
_SHARD_BYTES = 4 * 2**20
_STAGING_SHARE = 512  # of memory, a staging buffer
_MOST_WRITERS = 8
_WRITER_BYTES = 64 * 2**20  # of memory, for each writer beyond the second
_UNITS = {"": 1, "B": 1, **{f"{u}B": 1000 ** (i + 1) for i, u in enumerate("KMGT")}}
_UNITS |= {f"{u}iB": 1024 ** (i + 1) for i, u in enumerate("KMGT")}


@dataclass(frozen=True)
class Settings:
    """What the user chose about a capture, beside the model, the data and the layers."""

    dtype: str | None = None
    """Cast floating-point taps to this, after any other reduction; None keeps what there is."""
    codec: str = "none"
    """How inner chunks are encoded."""
    memory: str | int = DEFAULT_MEMORY
    """Bytes of host memory that the engine may hold, as a number or as text (`1GiB`).

    They cover the blocks, the copies that the first step keeps and the buffers of the writers; not the model
    and its data, of which up to `workers` + 2 batches are alive at a time.
    """
    writers: int | None = None
    """Writer threads; None: two, or one where there is one core, and more to encode where there are many, or
    to wait for a network."""
    upload_bytes: int = 0
    """Bytes that each writer holds back for an upload; 0 where the store is on a disk."""
    statistics: Choice = field(default_factory=Choice)
    """What is computed of the taps."""
    values: bool = True
    """Whether the taps' values are written; else their statistics alone."""
    kept: Statistics | None = None
    """How the statistics are laid out, once the taps are known."""
    reduce: Reductions = None
    """What is kept of the taps; see `layertap.capture.reduce`."""
    varying: Varying = field(default_factory=Varying)
    """What is asked for of taps whose rows differ in shape."""

    @property
    def memory_bytes(self) -> int:
        """The memory in bytes."""
        return parse_bytes(self.memory)

    @property
    def staging_bytes(self) -> int:
        """What each writer stages data in that are not written as they lie."""
        share = self.memory_bytes // _STAGING_SHARE // PAGE * PAGE
        return max(STAGING_BYTES, min(share, MOST_STAGING_BYTES))

    @property
    def n_writers(self) -> int:
        """The writer threads.

        Raises:
            PlanError: fewer than one were asked for.
        """
        if self.writers is not None and self.writers < 1:
            raise PlanError(f"a capture has at least one writer; {self.writers} were asked for")
        if self.writers is not None:
            return self.writers
        if self.upload_bytes:
            return 4  # they wait more than they work
        cores = n_cores()
        if self.codec == "none":
            # Two keep a disk busy while one waits until its block is durable.
            return 3 if self.memory_bytes >= 3 * _WRITER_BYTES else min(2, cores)
        # Encoding is bound by cores, of which half are the model's.
        return max(min(2, cores), min(cores // 2, _MOST_WRITERS, self.memory_bytes // _WRITER_BYTES))


@dataclass(frozen=True)
class PlannedTap:
    """How one tap is reduced and stored."""

    learned: Learned
    """What the first step showed of it."""
    rows: Rows
    """The form of its rows as the layer gives them."""
    chain: Chain
    """What is done to them, bound to that form."""
    values: ArraySpec
    """The array of its values."""
    parts: tuple[ArraySpec, ...]
    """The arrays of its further parts."""
    form: Form
    """How its rows may vary."""

    @property
    def made_bytes(self) -> int:
        """Bytes of the values of a row of the first batch, as they are stored."""
        return self.chain.after(self.form.rows)[VALUES].n_bytes


#: Tries a chain on the first step's values of a tap, by its number: gives shape and type of a row.
Trial: TypeAlias = Callable[[int, Chain, Rows], tuple[tuple[int, ...], DType]]


def tap_arrays(learned: Sequence[Learned], settings: Settings) -> list[ArraySpec]:
    """Return how the values of taps are stored; see `plan_taps`."""
    return [tap.values for tap in plan_taps(learned, settings)]


def plan_taps(
    learned: Sequence[Learned],
    settings: Settings,
    trial: Trial | None = None,
    n_tokens: int | None = None,
) -> list[PlannedTap]:
    """Return how taps are reduced and stored, each in a folder of its own on any file system.

    Args:
        learned: what the first batch showed.
        settings: what is asked for.
        trial: tries a chain whose result is not known beforehand.
        n_tokens: tokens of the first batch's mask, where it has one.

    Raises:
        PlanError: a reduction, cast or codec is unknown or does not fit, a tap is empty, two have one name.
        SelectionError: a reduction's pattern matches no layer.
    """
    names = [tap.name for tap in learned]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PlanError(f"two taps are called {twice}; rename a layer or key, or choose one of them alone")
    if settings.dtype is not None:
        Cast(settings.dtype)
    chains = choose(settings.reduce, [(tap.tap, tap.type) for tap in learned])
    kinds = [(tap.tap, tap.type) for tap in learned]
    settings.varying.check_used(kinds)
    folders = distinct_folders(names)
    return [
        _planned_tap(i, tap, chain, folder, settings, trial, n_tokens)
        for i, (tap, chain, folder) in enumerate(zip(learned, chains, folders, strict=True))
    ]


def _planned_tap(
    i: int,
    learned: Learned,
    chain: Chain,
    folder: str,
    settings: Settings,
    trial: Trial | None,
    n_tokens: int | None,
) -> PlannedTap:
    rule = settings.varying.rule(learned.tap, learned.type)
    vary = () if rule is None else rule.axes(len(learned.shape))
    if 0 in [n for axis, n in enumerate(learned.shape) if axis not in vary]:
        raise PlanError(f"{learned.name} gives no values: the shape of one row is {learned.shape}")
    rows = learned.rows
    if settings.dtype is not None and not any(isinstance(step, Int8) for step in chain.steps):
        chain = chain | Cast(settings.dtype)
    asked = chain

    def probe(tried: Chain) -> Rows:
        if rule is not None:
            raise PlanError(
                f"{tried.steps[-1]} takes rows of one shape, and {rule} lets them differ: leave out one of "
                "the two"
            )
        if trial is None:
            raise PlanError(f"what {tried} makes is not known before it ran")
        shape, dtype = trial(i, tried, rows)
        before = Chain(tried.steps[:-1]).after(rows)[VALUES].dims
        return Rows(shape, before if len(before) == len(shape) else dims_of(shape)[1:], dtype)

    if rule is not None:
        rows = replace(rows, shape=rule.bound(learned.name, learned.shape))
    try:
        bound = chain.bind(rows, probe)
        made = bound.after(rows)
    except PlanError as error:
        raise PlanError(f"{learned.name}: {error}") from error
    values, *parts = (
        ArraySpec(
            learned.name if part == VALUES else f"{learned.name}/{part}",
            f"taps/{folder}/{part}",
            ("row", *form.dims),
            form.shape,
            form.dtype,
            check_codec(settings.codec),
            part == VALUES and any(isinstance(step, Int8) for step in bound.steps),
        )
        for part, form in made.items()
    )
    masked = is_masked(rule, learned.shape, n_tokens)
    form = Form(learned.name, replace(rows, shape=learned.shape), asked, bound, rule, masked)
    if rule is not None:
        values, parts = _varied(values, parts, form, rule)
    return PlannedTap(learned, rows, bound, values, tuple(parts), form)


def _varied(
    values: ArraySpec, parts: list[ArraySpec], form: Form, rule: Rule
) -> tuple[ArraySpec, list[ArraySpec]]:
    """Return how a tap is stored whose rows vary: with room for the greatest, and what goes with it.

    Raises:
        PlanError: it is reduced by what needs one shape, or cannot be padded so.
    """
    check_reduced(form.name, rule, form.chain, form.room)
    try:
        form.checked([form.rows.shape], 0)
    except CaptureError as error:
        raise PlanError(str(error)) from None
    if not form.varies:
        return values, parts
    if rule.pad is None:
        room = replace(values, role="ragged")
        return room, [extents_spec(room)]
    check_pad(form.name, rule.pad, values.dtype)
    room = replace(values, role="padded")
    return room, [mask_spec(room, form.axes)]


def plan_layout(
    taps: Sequence[ArraySpec],
    columns: Sequence[ArraySpec],
    step_rows: int,
    n_rows: int | None,
    settings: Settings,
    kept_row_bytes: int | None = None,
    parts: Sequence[ArraySpec] = (),
) -> Layout:
    """Choose the block length.

    Args:
        taps: the taps, as stored.
        columns: the columns, as stored.
        step_rows: rows of a step.
        n_rows: rows of the data set, where they are known.
        settings: memory, writers and codec.
        kept_row_bytes: bytes of a row as the first step keeps it, before any cast; those of `taps` if None.
        parts: what reduced taps hold beside their values, as stored.

    Raises:
        PlanError: two steps do not fit the memory; the message says what would.
    """
    values, taps = taps, (*taps, *parts)
    said = tuple(columns)
    columns = (*said, *(settings.kept.row_arrays if settings.kept else ()))
    arrays = (*taps, *columns)
    step_bytes = slab_bytes(arrays, step_rows)
    wanted = max(_BLOCK_BYTES, len(arrays) * _SHARD_BYTES)
    most = max(1, wanted // step_bytes)
    if n_rows is not None:
        most = min(most, -(-n_rows // step_rows))

    def needed_for(n_slots: int, n_rows: int, steps: int) -> int:
        reserve = _reserve(taps, columns, n_rows, steps, settings, kept_row_bytes)
        return n_slots * steps * slab_bytes(arrays, n_rows) + reserve

    for n_slots in (3, 2):
        key = partial(needed_for, n_slots, step_rows)
        steps = bisect_right(range(1, most + 1), settings.memory_bytes, key=key)
        if steps:
            kept = settings.kept, settings.values
            return Layout(tuple(values), said, step_rows, steps * step_rows, *kept, tuple(parts))

    def needed(n_bytes: int) -> int:
        return _two_steps(taps, columns, step_rows, replace(settings, memory=n_bytes), kept_row_bytes)

    needs = needed(settings.memory_bytes)
    while (more := needed(needs)) > needs:
        needs = more  # more memory has larger buffers, and by default more writers
    lacking = show_bytes(needs - settings.memory_bytes)
    fits = bisect_right(range(1, step_rows), settings.memory_bytes, key=lambda n: needed_for(2, n, 1))
    ways = [
        f"memory={_enough(needs)} or more",
        *([f"a batch size of at most {fits}"] if fits else []),
        *_smaller(taps, columns, step_rows, settings, kept_row_bytes),
    ]
    raise PlanError(
        f"a batch of {step_rows} rows takes {show_bytes(step_bytes)} and does not fit the memory of "
        f"{settings.memory}: two batches, the copies of the first and "
        f"{settings.n_writers} writers need {show_bytes(needs)}, {lacking} more. "
        f"Give {', or '.join(ways)}"
    )


def _smaller(
    taps: Sequence[ArraySpec],
    columns: Sequence[ArraySpec],
    step_rows: int,
    settings: Settings,
    kept_row_bytes: int | None,
) -> list[str]:
    """Return which of fewer layers and a cast would make two steps fit."""
    kept = kept_row_bytes or sum(tap.row_bytes for tap in taps)
    ways = []
    if len(taps) > 1:
        least = min(taps, key=lambda tap: tap.row_bytes)
        share = kept * least.row_bytes // sum(tap.row_bytes for tap in taps)
        if _two_steps([least], columns, step_rows, settings, share) <= settings.memory_bytes:
            ways.append(f"fewer layers ({least.name} alone fits)")
    half = [replace(tap, dtype=named_dtype("float16")) if is_float(tap.dtype) else tap for tap in taps]
    if (
        settings.dtype is None
        and _two_steps(half, columns, step_rows, settings, kept) <= settings.memory_bytes
    ):
        ways.append("a cast to float16")
    return ways


def _two_steps(
    taps: Sequence[ArraySpec],
    columns: Sequence[ArraySpec],
    step_rows: int,
    settings: Settings,
    kept_row_bytes: int | None,
) -> int:
    reserve = _reserve(taps, columns, step_rows, 1, settings, kept_row_bytes)
    return 2 * slab_bytes((*taps, *columns), step_rows) + reserve


def slots_of(layout: Layout, settings: Settings, kept_row_bytes: int | None = None) -> int:
    """Return how many blocks of `layout` the memory holds: two or three.

    Raises:
        PlanError: not even two.
    """
    steps = layout.steps_per_block
    columns, settings = layout.columns + layout.row_statistics, replace(settings, kept=layout.statistics)
    reserve = _reserve(layout.moved, columns, layout.step_rows, steps, settings, kept_row_bytes)
    room = settings.memory_bytes - reserve
    n_slots = min(3, room // layout.block_bytes)
    if n_slots < 2:
        needed = 2 * layout.block_bytes + settings.memory_bytes - room
        raise PlanError(
            f"the store's blocks of {layout.block_rows} rows take {show_bytes(layout.block_bytes)}; two of "
            f"them and the buffers need memory={_enough(needed)}, and "
            f"{show_bytes(settings.memory_bytes)} are given"
        )
    return n_slots


def check_memory(layout: Layout, n_slots: int, settings: Settings) -> None:
    """Refuse to allocate more than the container, or the machine, has left.

    Raises:
        PlanError: with what is needed and what is left.
    """
    entries = layout.statistics.block_bytes if layout.statistics is not None else 0
    needed, left = n_slots * (layout.block_bytes + entries), available_bytes()
    if left is not None and needed > left:
        raise PlanError(
            f"{n_slots} blocks of {layout.block_rows} rows take {show_bytes(needed)}, and {show_bytes(left)} "
            f"of memory are left here; give memory={_enough(left // 2)} or less in place of "
            f"{settings.memory}, smaller batches or fewer layers"
        )


def store_bytes(layout: Layout, n_rows: int, ratio: float = 1.0) -> int:
    """Return the bytes that `n_rows` rows take on disk, with taps encoded to 1 / `ratio`."""
    taps = sum(array.row_bytes for array in layout.moved) / ratio if layout.values else 0
    columns = sum(column.row_bytes for column in layout.columns + layout.row_statistics)
    entries = layout.statistics.block_bytes if layout.statistics is not None else 0
    return int((taps + columns) * n_rows) + -(-n_rows // layout.block_rows) * entries


def check_space(place: Place, n_bytes: int) -> None:
    """Refuse what the place cannot hold, where it tells.

    Raises:
        NoSpaceError: with what is needed and what is free.
    """
    free = place.free_bytes()
    if free is not None and n_bytes > free:
        raise NoSpaceError(
            f"the store needs {show_bytes(n_bytes)} and {show_bytes(free)} are free for {place}. "
            "Cast to float16, choose a codec or fewer layers, or write elsewhere"
        )


def parse_bytes(text: str | int) -> int:
    """Read a number of bytes: `1073741824`, `1GiB`, `512 MB`.

    Raises:
        PlanError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    n_bytes = int(float(match[1]) * units.get(match[2].lower(), 0)) if match else 0
    if n_bytes < 1:
        raise PlanError(f"{text!r} is no amount of memory; write 1GiB, 512MiB or a number of bytes")
    return n_bytes


def show_bytes(n_bytes: float) -> str:
    """Return a number of bytes as people read it: `1.5GiB`."""
    power = max(0, min(4, (int(n_bytes).bit_length() - 1) // 10))
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    n_bytes /= 1024**power
    return f"{n_bytes:.0f}{unit}" if unit == "B" or n_bytes >= 100 else f"{n_bytes:.3g}{unit}"


def _enough(n_bytes: int) -> str:
    """Return an amount that people can read and that is not less than `n_bytes`."""
    shown = show_bytes(n_bytes)
    while parse_bytes(shown) < n_bytes:
        n_bytes += -(-n_bytes // 1000)
        shown = show_bytes(n_bytes)
    return shown


def _reserve(
    taps: Sequence[ArraySpec],
    columns: Sequence[ArraySpec],
    step_rows: int,
    n_steps: int,
    settings: Settings,
    kept_row_bytes: int | None,
) -> int:
    """Return the bytes that are needed beside the blocks."""
    first_step = slab_bytes(tuple(taps), step_rows)
    if kept_row_bytes is not None:
        first_step = max(first_step, kept_row_bytes * step_rows)
    staging = 0 if settings.upload_bytes else settings.staging_bytes
    # What small blocks would not need; the allocator keeps as much for each thread.
    least = CHUNK_BYTES if settings.codec == "none" else staging + 2 * CHUNK_BYTES
    buffers = [writer_bytes(array, step_rows, n_steps, staging) for array in (*taps, *columns)]
    entries = 0
    if settings.kept is not None:
        entries = 3 * settings.kept.block_bytes  # of as many blocks as are held
        buffers.append(writer_bytes(settings.kept.blocks, settings.kept.n_pieces, 1, staging))
    writer = settings.upload_bytes + max(least, *buffers) + scratch_bytes(settings.kept, step_rows)
    return first_step + entries + settings.n_writers * writer
