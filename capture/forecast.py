"""What a capture would take: bytes of each tap, time, and what would set the pace. Nothing is stored.

A few steps run with all that their hooks do, in memory of one step; a sample of each array is encoded, and a
file is made durable where the store would be. What runs beside a model on the CPU takes processors from it:
no capture is quicker than the processor time of all stages over the processors there are. What comes of it is
an estimate: rates change, and the first steps of a model may be slower than the rest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backend import backend_for, backend_named
from .checksum import CRC_BYTES, crc32c
from .data import Batch, Source
from .errors import PlanError
from .files import PAGE
from .layout import ArraySpec, Layout
from .machine import n_cores
from .pca import fitted, is_fitted
from .place import PathLike, Place, place_of
from .plan import (
    DEFAULT_MEMORY,
    PlannedTap,
    Settings,
    check_memory,
    plan_layout,
    plan_taps,
    slots_of,
)
from .ragged import Padded, Ragged, varying
from .record import settings_of, source_of
from .recorder import Facts, column_specs, tried
from .reduce import Reductions
from .rehearsal import Rehearsal, Spent, batches, rehearsing
from .score import Score
from .shard import count_nonfinite, index_bytes, plain_bytes
from .statistics import plan_statistics
from .taps import Patterns

#: Steps that are timed, after one that warms up.
_STEPS = 2
#: Bytes that are encoded of each array, and that are made durable.
_SAMPLE_BYTES, _PROBE_BYTES = 4 * 2**20, 32 * 2**20


@dataclass(frozen=True)
class TapForecast:
    """What one tap would take."""

    name: str
    """Its name."""
    type: str
    """Type of its layer."""
    source_shape: tuple[int, ...]
    """Shape of one row of the layer's output."""
    source_dtype: str
    """Its element type."""
    shape: tuple[int, ...]
    """Shape of one row of its values as stored."""
    dtype: str
    """Their element type."""
    reduction: str
    """What is done to it; `none`."""
    error: str
    """How far its values lie from the layer's output, in words."""
    source_bytes: int
    """Bytes of one row of the layer's output."""
    reduced_bytes: int
    """Bytes of one row after the reduction, with all parts."""
    disk_bytes: float
    """Bytes of one row on disk, by the sample, with checksums; 0 where statistics alone are kept."""


@dataclass(frozen=True)
class StatisticsForecast:
    """What the statistics of a capture would take."""

    names: tuple[str, ...]
    """Which they are."""
    n_files: int
    """Files that they add."""
    rows_bytes: int
    """Bytes of those that hold means and maxima of rows."""
    blocks_bytes: int
    """Bytes of those that hold what merges over blocks; these are encoded, so that is by the sample."""
    measured_bytes: int
    """Bytes that they are computed of."""
    rate: float
    """Bytes a second of which one writer computes them."""

    @property
    def disk_bytes(self) -> int:
        """Bytes that they add to the store."""
        return self.rows_bytes + self.blocks_bytes


@dataclass(frozen=True)
class Forecast:
    """What a capture would take, by measurement of a few steps."""

    path: str
    """Where the store would be."""
    taps: tuple[TapForecast, ...]
    """Its taps, in the order of the model."""
    n_rows: int
    """Rows of the data set."""
    step_rows: int
    """Rows of a step."""
    column_bytes: float
    """Bytes of one row of the columns on disk, pictures among them."""
    load_s: float
    """Seconds in which one thread loads a step's batch."""
    forward_s: float
    """Seconds of a step's forward, with its hooks, reductions and copies to the host."""
    load_cpu_s: float
    """Processor seconds of all threads while a step's batch is loaded."""
    forward_cpu_s: float
    """Processor seconds of all threads in a step's forward."""
    n_cores: int
    """Processors that this process may run on."""
    workers: int
    """Threads or processes that load ahead; 0: the thread of the model loads."""
    n_writers: int
    """Writer threads."""
    encode_rate: float
    """Bytes a second that one writer sums and encodes."""
    durable_rate: float | None
    """Bytes a second that become durable in the store's place; None where that was not tried."""
    free_bytes: int | None
    """What the place has free, where it tells."""
    memory_bytes: int
    """Host memory that the engine may hold."""
    block_rows: int | None
    """Rows of a block; None where memory does not hold two."""
    held_bytes: int
    """Bytes of the blocks that are held at once."""
    memory_problem: str | None
    """Why memory does not hold it, and what would; None where it does."""
    statistics: StatisticsForecast | None = None
    """What statistics would take; None where there are none."""
    values: bool = True
    """Whether activations are written; else statistics alone."""

    @property
    def source_bytes(self) -> int:
        """Bytes of all taps of the data set as the layers give them."""
        return self.n_rows * sum(tap.source_bytes for tap in self.taps)

    @property
    def reduced_bytes(self) -> int:
        """Bytes of all taps after the reduction."""
        return self.n_rows * sum(tap.reduced_bytes for tap in self.taps)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the whole store."""
        statistics = 0 if self.statistics is None else self.statistics.disk_bytes
        return statistics + int(self.n_rows * (self.column_bytes + sum(tap.disk_bytes for tap in self.taps)))

    @property
    def n_steps(self) -> int:
        """Steps of the whole data set."""
        return -(-self.n_rows // self.step_rows)

    @property
    def stages_s(self) -> dict[str, float]:
        """Seconds that each stage takes alone for the whole data set: `data`, `forward`, `write`.

        Data that are loaded ahead by workers take the thread of the model only what the forward does not
        hide. Writers compute statistics and encode side by side, and share the disk.
        """
        load_s = self.load_s if not self.workers else max(0.0, self.load_s / self.workers - self.forward_s)
        write_s = self._writers_s / min(self.n_writers, self.n_cores)
        if self.durable_rate is not None:
            write_s += self.disk_bytes / self.durable_rate
        return {"data": load_s * self.n_steps, "forward": self.forward_s * self.n_steps, "write": write_s}

    @property
    def processors_s(self) -> float:
        """Seconds in which all processors have done what all stages need: the model, writers, and loading."""
        of_steps = (self.load_cpu_s + self.forward_cpu_s) * self.n_steps
        return (of_steps + self._writers_s) / self.n_cores

    @property
    def _writers_s(self) -> float:
        """Seconds in which one thread sums, encodes and computes statistics."""
        encoding = self.reduced_bytes / self.encode_rate if self.values else 0.0
        its = self.statistics
        return encoding + (its.measured_bytes / its.rate if its is not None else 0.0)

    @property
    def bottleneck(self) -> str:
        """What would set the pace: `data` or `forward`, which alternate, or `write` beside them."""
        stages = self.stages_s
        if stages["write"] > stages["data"] + stages["forward"]:
            return "write"
        return max(("data", "forward"), key=stages.__getitem__)

    @property
    def seconds(self) -> float:
        """Estimated seconds of the capture by one process."""
        stages = self.stages_s
        return max(stages["data"] + stages["forward"], stages["write"], self.processors_s)

    @property
    def fits_disk(self) -> bool:
        """Whether the store fits what is free, as far as the place tells."""
        return self.free_bytes is None or self.disk_bytes <= self.free_bytes

    @property
    def fits_memory(self) -> bool:
        """Whether the engine's memory holds two blocks."""
        return self.memory_problem is None

    def __str__(self) -> str:
        from .forecast_text import show

        return show(self)


def plan(
    model: Any,
    data: Any,
    path: PathLike,
    layers: Patterns,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    score: Score | None = None,
    reduce: Reductions = None,
    ragged: Ragged = None,
    pad: Padded = None,
    mask: str | None = "attention_mask",
    dtype: str | None = None,
    codec: str = "none",
    stats: str | Sequence[str] | None = None,
    values: bool = True,
    memory: str | int = DEFAULT_MEMORY,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str | None = None,
    writers: int | None = None,
    storage: Mapping[str, Any] | None = None,
) -> Forecast:
    """Say what `record_dataset` with the same arguments would take, by running a few steps.

    Nothing is stored: a file is written where the store would be, to time it, and taken away again.

    Args:
        model: see `record_dataset`; the other arguments likewise.
        data: likewise.
        path: where the store would be; what is there is not touched.
        layers: likewise.
        batch_size: likewise.
        workers: likewise.
        score: likewise.
        reduce: likewise.
        ragged: likewise.
        pad: likewise.
        mask: likewise.
        dtype: likewise.
        codec: likewise.
        stats: likewise.
        values: likewise.
        memory: likewise.
        classes: likewise.
        mean: likewise.
        std: likewise.
        backend: likewise.
        writers: likewise.
        storage: likewise.

    Returns:
        A `Forecast`; as text, a table.
    """
    chosen = backend_named(backend) if backend else backend_for(model)
    if batch_size < 1:
        raise PlanError(f"a batch has at least one row; {batch_size} were asked for")
    source, place = source_of(chosen, data, mean, std, lists=bool(ragged or pad)), place_of(path, storage)
    batch_size = min(batch_size, source.n_rows)
    how = varying(ragged, pad, mask)
    if not is_fitted(reduce):
        reduce = fitted(reduce, chosen, model, source, layers, batch_size, score=score, varying=how)
    settings = settings_of(dtype, codec, memory, writers, stats, values, reduce, how)
    settings = replace(settings, upload_bytes=place.upload_bytes)
    names = source.classes if classes is None else tuple(classes)
    n_workers = source.default_workers if workers is None else workers
    with rehearsing(chosen, model, layers, score, how) as rehearsal:
        return _measure(rehearsal, source, place, batch_size, settings, n_workers, names)


def _measure(
    rehearsal: Rehearsal,
    source: Source,
    place: Place,
    batch_size: int,
    settings: Settings,
    workers: int,
    classes: Sequence[str] | None,
) -> Forecast:
    loaded, load = loaded_batches(source, batch_size)
    session = rehearsal.session
    learned = rehearsal.learn(loaded[0])
    taps = plan_taps(learned, settings, partial(tried, session), session.n_tokens)
    columns = column_specs(loaded[0].columns, session, Facts(text_bytes=source.text_bytes()))
    kept = sum(tap.row_bytes for tap in learned)
    choice = settings.statistics
    statistics = plan_statistics([tap.values for tap in taps], columns, choice, classes)
    settings = replace(settings, kept=statistics)
    layout, n_slots, problem = tried_layout(taps, columns, batch_size, source.n_rows, settings, kept)
    n_first = len(loaded[0].rows)
    rehearsal.prepare(layout, taps, n_first)
    forward = _forward(rehearsal, loaded)
    # What the last timed step, or the first, left in memory.
    last = loaded[-1]
    rehearsal.put_columns(last)
    samples = [rehearsal.stored(i, len(last.rows)) for i in range(len(layout.arrays))]
    sizes, encode_rate = _encoded(layout, samples)
    measured = None if statistics is None else rehearsal.measured(len(last.rows))
    durable_rate = place.durable_rate(probe_of(samples[: len(layout.moved)]))
    blocks = problem is None
    return Forecast(
        path=str(place),
        taps=tuple(_tap(tap, sizes, layout.numbers[i], layout.values) for i, tap in enumerate(taps)),
        n_rows=source.n_rows,
        step_rows=batch_size,
        column_bytes=sum(sizes[len(layout.moved) :][: len(layout.columns)]),
        load_s=load.wall_s,
        forward_s=forward.wall_s,
        load_cpu_s=load.cpu_s,
        forward_cpu_s=forward.cpu_s,
        n_cores=n_cores(),
        workers=workers,
        n_writers=settings.n_writers,
        encode_rate=encode_rate,
        durable_rate=durable_rate,
        free_bytes=place.free_bytes(),
        memory_bytes=settings.memory_bytes,
        block_rows=layout.block_rows if blocks else None,
        held_bytes=n_slots * layout.block_bytes,
        memory_problem=problem,
        statistics=measured and _statistics(layout, source.n_rows, len(last.rows), *measured),
        values=layout.values,
    )


def _statistics(
    layout: Layout, n_rows: int, n_measured: int, seconds: float, entries: NDArray[np.float64]
) -> StatisticsForecast:
    """Return what statistics take, of which those of one step are there."""
    statistics = layout.statistics
    assert statistics is not None
    size, row_bytes = layout.block_rows, sum(tap.row_bytes for tap in layout.taps)
    blocks = [min(size, n_rows - first) for first in range(0, n_rows, size)]
    pieces = np.split(entries, statistics.n_pieces)
    encoded = sum(memoryview(statistics.blocks.encoding.encode(piece.tobytes())).nbytes for piece in pieces)
    beside = CRC_BYTES * len(pieces) + index_bytes(len(pieces))
    return StatisticsForecast(
        statistics.names,
        len(blocks) * (1 + len(statistics.row_arrays)),
        sum(plain_bytes(array, layout, n) for array in statistics.row_arrays for n in blocks),
        len(blocks) * (encoded + beside),
        n_rows * row_bytes,
        n_measured * row_bytes / max(seconds, 1e-9),
    )


def loaded_batches(source: Source, batch_size: int) -> tuple[list[Batch], Spent]:
    """Return the first batches, all of the first one's length, and what one of them takes."""
    found: list[Batch] = []
    times = []
    start = Spent.until_now()
    for batch in islice(batches(source, batch_size, (1 + _STEPS) * batch_size), 1 + _STEPS):
        times.append(Spent.until_now() - start)
        if not found or len(batch.rows) == len(found[0].rows):
            found.append(batch)
        start = Spent.until_now()
    return found, min(times[: len(found)])


def _forward(rehearsal: Rehearsal, loaded: Sequence[Batch]) -> Spent:
    """Return what the quickest of a few warm steps takes; a single batch is run again."""
    following = list(loaded[1:]) or [loaded[0]] * _STEPS
    return min(rehearsal.timed(batch) for batch in following)


def tried_layout(
    taps: Sequence[PlannedTap],
    columns: Sequence[ArraySpec],
    step_rows: int,
    n_rows: int,
    settings: Settings,
    kept: int,
) -> tuple[Layout, int, str | None]:
    """Return the layout, the blocks held at once, and why memory does not hold it."""
    values, parts = [tap.values for tap in taps], [part for tap in taps for part in tap.parts]
    try:
        layout = plan_layout(values, columns, step_rows, n_rows, settings, kept, parts)
        n_slots = slots_of(layout, settings, kept)
        check_memory(layout, n_slots, settings)
    except PlanError as error:
        kept_too = settings.kept, settings.values
        layout = Layout(tuple(values), tuple(columns), step_rows, step_rows, *kept_too, tuple(parts))
        return layout, 2, str(error)
    return layout, n_slots, None


def _encoded(layout: Layout, samples: Sequence[NDArray[Any]]) -> tuple[list[float], float]:
    """Return the bytes of a row of each array on disk, and the bytes a second that one writer prepares."""
    sizes, n_bytes, seconds = [], 0, 0.0
    for array, values in zip(layout.arrays, samples, strict=True):
        n_rows = min(len(values), layout.chunk_rows(array))
        n_chunks = max(1, min(len(values) // n_rows, _SAMPLE_BYTES // max(1, n_rows * array.row_bytes)))
        n_stored = 0
        array.encoding.encode(bytes(array.dtype.itemsize))  # the first brings the codec
        for i in range(n_chunks):
            chunk = (
                np.ascontiguousarray(values[i * n_rows : (i + 1) * n_rows]).reshape(-1).view(np.uint8).data
            )
            start = time.perf_counter()
            count_nonfinite([chunk], array.dtype, array.codes)
            data = array.encoding.encode(chunk)
            crc32c(data)
            seconds += time.perf_counter() - start
            n_bytes += chunk.nbytes
            n_stored += memoryview(data).nbytes
        sizes.append(n_stored / (n_chunks * n_rows) + _beside(array, layout) / layout.chunk_rows(array))
    return sizes, n_bytes / max(seconds, 1e-9)


def _beside(array: ArraySpec, layout: Layout) -> int:
    """Return the bytes of an inner chunk's checksum, with what pads it, and of its entry in the index."""
    pages = array.codec == "none" and layout.chunk_rows(array) * array.row_bytes % PAGE == 0
    return (PAGE if pages else CRC_BYTES) + 16


def probe_of(samples: Sequence[NDArray[Any]]) -> bytes:
    """Return captured values, over and over, to be written."""
    data = bytearray()
    for values in samples:
        if len(data) < _PROBE_BYTES:
            data += np.ascontiguousarray(values).reshape(-1).view(np.uint8)[:_SAMPLE_BYTES].tobytes()
    return bytes(data * -(-_PROBE_BYTES // len(data)))[:_PROBE_BYTES]


def _tap(tap: PlannedTap, sizes: Sequence[float], numbers: Sequence[int], written: bool) -> TapForecast:
    # Of a ragged tap, what the first batch's rows take of their room.
    share = tap.made_bytes / tap.values.row_bytes if tap.values.is_ragged else 1.0
    return TapForecast(
        tap.learned.name,
        tap.learned.type,
        tap.learned.shape,
        str(tap.learned.dtype),
        tap.values.shape,
        str(tap.values.dtype),
        str(tap.chain),
        tap.chain.said(tap.rows),
        tap.learned.row_bytes,
        sum(array.row_bytes for array in (tap.values, *tap.parts)),
        sizes[numbers[0]] * share + sum(sizes[number] for number in numbers[1:]) if written else 0.0,
    )
