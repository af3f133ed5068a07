"""Blocks in memory, and the threads that make them durable.

The thread that runs the model takes a free slot, has rows copied into it, and goes on; writer threads
turn full slots into committed blocks. The contract:

* `begin` is the only call that waits. It waits while every slot is full or being written, so memory never
  grows and nothing is dropped; and it raises what a writer failed with.
* The first failure wins. Nothing more is written after it; what was committed stays.
* `close` waits for the writers, and raises what they failed with unless another error is on its way. What
  interrupts it makes the writers leave what is queued; it waits for the shards that are half-written all the
  same, because a thread that writes on after the end would meet the next capture.

A writer spends its time in C (gather-write, checksum, encode, sync) without the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import queue
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .dtypes import is_float
from .errors import CaptureError, LayertapError, NoSpaceError, PlanError, StoreError, why
from .files import MOST_OPEN, STAGING_BYTES, stage_by
from .layout import ArraySpec, Layout
from .measure import forget_scratch, measure
from .place import NewFile, Place
from .ragged import as_written
from .shard import ShardRecord, write_shard
from .spans import Spans
from .stages import Laps
from .stages import Stages as Stages
from .store import StoreWriter

Memory = NDArray[np.uint8]


@dataclass(frozen=True)
class Slab:
    """The host memory of one step's rows."""

    number: int
    """Its place among all slabs of the pipeline; what a backend prepared for it is found by this."""
    memory: Memory
    """Its bytes, laid out by `Layout.offsets`."""


@dataclass(frozen=True)
class Piece:
    """Where consecutive rows of a batch go."""

    slab: Slab
    """The memory that takes them."""
    start: int
    """First row inside the slab."""
    batch: slice
    """The rows of the batch."""
    row: int = 0
    """Which row of the data set the first of them is."""

    @property
    def rows(self) -> slice:
        """The rows inside the slab."""
        return slice(self.start, self.start + self.batch.stop - self.batch.start)


@dataclass
class _Slot:
    slabs: tuple[Slab, ...]
    entries: NDArray[np.float64]
    block: int = -1
    n_rows: int = 0
    n_waiting: int = 0
    records: list[ShardRecord | None] = field(default_factory=list)
    files: list[NewFile] = field(default_factory=list)
    ready: list[Callable[[], None]] = field(default_factory=list)


class Pipeline:
    """Slots, writers and commits for one store."""

    def __init__(
        self,
        store: StoreWriter,
        done: Collection[int],
        *,
        n_slots: int,
        n_writers: int,
        on_commit: Callable[[Stages], None] | None = None,
        stages: Stages | None = None,
        staging_bytes: int = STAGING_BYTES,
        spans: Spans | None = None,
    ) -> None:
        """Allocate the slots, once, and start the writers.

        Args:
            store: what blocks are committed to.
            done: blocks that are committed already; rows of theirs are not taken again.
            n_slots: blocks that are held in memory at most.
            n_writers: writer threads.
            on_commit: called by a writer after each commit.
            stages: what the pipeline adds its share to.
            staging_bytes: what each writer holds for data that are not written as they lie.
            spans: what gets a span of everything that a writer does.
        """
        self.layout: Layout = store.manifest.layout
        self.store = store
        self.stages = stages if stages is not None else Stages()
        self.stages.n_writers = n_writers
        self._staging_bytes, self._spans = staging_bytes, spans
        self._n_busy, self._busy_since = 0, 0.0
        self._done = frozenset(done)
        self._on_commit = on_commit
        self._lock = threading.Condition()
        self._failure: BaseException | None = None
        # Anonymous pages: aligned for direct transfers, given back as a whole, and never a copy.
        self.memory: Memory = np.frombuffer(_allocated(n_slots * self.layout.block_bytes), np.uint8)
        self._slots = [self._slot(i) for i in reversed(range(n_slots))]
        self._free = list(self._slots)
        self.slabs = tuple(slab for slot in self._slots for slab in slot.slabs)
        self._open: dict[int, _Slot] = {}
        self._jobs: queue.SimpleQueue[tuple[_Slot, int] | None] = queue.SimpleQueue()
        self._writers = [
            threading.Thread(target=self._write, name=f"layertap-writer-{i}", daemon=True)
            for i in range(n_writers)
        ]
        for writer in self._writers:
            writer.start()

    def begin(self, row: int, n_rows: int) -> list[Piece]:
        """Return where rows `row` to `row + n_rows` go; waits for slots.

        Rows of blocks that were committed before go nowhere.

        Raises:
            CaptureError: the rows touch more blocks than there are slots.
        """
        step = self.layout.step_rows
        blocks = range(row // self.layout.block_rows, (row + n_rows - 1) // self.layout.block_rows + 1)
        slots = {b: self._take(b) for b in blocks if b not in self._done}
        pieces = []
        at = row
        while at < row + n_rows:
            block, within = divmod(at, self.layout.block_rows)
            n = min(row + n_rows - at, step - within % step)
            if block in slots:
                slab = slots[block].slabs[within // step]
                pieces.append(Piece(slab, within % step, slice(at - row, at - row + n), at))
            at += n
        return pieces

    def end(self, row: int, n_rows: int, ready: Callable[[], None] | None = None) -> None:
        """Say that rows `row` to `row + n_rows` are in their slots, or will be once `ready` returns."""
        size = self.layout.block_rows
        for block in range(row // size, (row + n_rows - 1) // size + 1):
            slot = self._open.get(block)
            if slot is None:
                continue
            slot.n_rows = min(size, row + n_rows - block * size)
            if ready is not None:
                slot.ready.append(ready)
            n_total = self.store.manifest.n_rows
            if slot.n_rows == size or (n_total is not None and row + n_rows >= n_total):
                self._submit(slot)

    def flush(self) -> None:
        """Write the open block although it is not full: the last one of a loop that ended."""
        for slot in list(self._open.values()):
            if slot.n_rows:
                self._submit(slot)

    def close(self, *, failed: bool = False) -> None:
        """Wait until what was submitted is committed, and end the writers."""
        for _ in self._writers:
            self._jobs.put(None)
        try:
            self._join()
        except BaseException as error:
            self._fail(error)
            self._join()
            raise
        finally:
            if self._failure is not None and not self.at_work:
                self._discard()
        if self._failure is not None and not failed:
            self._raise_failure()

    def _discard(self) -> None:
        """Remove the shards of blocks that will not be committed: a disk that is full needs the room."""
        for slot in self._slots:
            for file in slot.files:
                file.discard()
            done = [
                a for a, record in zip(self.layout.stored, slot.records, strict=False) if record is not None
            ]
            if slot.n_waiting and done:
                with contextlib.suppress(OSError):
                    self.store.abandon(slot.block, done)

    @property
    def at_work(self) -> bool:
        """Whether a writer may still write."""
        return any(writer.is_alive() for writer in self._writers)

    def _join(self) -> None:
        for writer in self._writers:
            writer.join()

    def _slot(self, i: int) -> _Slot:
        layout = self.layout
        slabs = []
        for j in range(layout.steps_per_block):
            number = i * layout.steps_per_block + j
            start = number * layout.slab_bytes
            slabs.append(Slab(number, self.memory[start : start + layout.slab_bytes]))
        statistics = layout.statistics
        n_entries = 0 if statistics is None else statistics.block_bytes // 8
        return _Slot(tuple(slabs), np.zeros(n_entries))

    def _take(self, block: int) -> _Slot:
        if block in self._open:
            return self._open[block]
        with self._lock:
            while not self._free and self._failure is None:
                if len(self._open) * self.layout.steps_per_block == len(self.slabs):
                    raise CaptureError(
                        f"one batch fills all {len(self._open)} blocks of {self.layout.block_rows} rows "
                        "that memory holds; give more memory or smaller batches"
                    )
                self._lock.wait()
            if self._failure is not None:
                self._raise_failure()
            slot = self._free.pop()
        slot.block, slot.n_rows, slot.ready, slot.files = block, 0, [], []
        self._open[block] = slot
        return slot

    def _submit(self, slot: _Slot) -> None:
        del self._open[slot.block]
        slot.n_waiting = n_jobs = len(self.layout.moved) + len(self.layout.columns)
        slot.records = [None] * len(self.layout.stored)
        for i in range(n_jobs):
            self._jobs.put((slot, i))

    def _write(self) -> None:
        stage_by(self._staging_bytes)
        while (job := self._jobs.get()) is not None:
            if self._failure is not None:
                continue
            try:
                self._write_shard(*job)
            except OSError as error:
                self._fail(explained(error, self.store.place))
            except Exception as error:
                self._fail(self._unexpected(error, *job))
            except BaseException as error:
                self._fail(error)
        forget_scratch()

    def _write_shard(self, slot: _Slot, i: int) -> None:
        laps = Laps(Stages(), self._spans, block=slot.block, array=self.layout.arrays[i].name)
        for ready in slot.ready:
            ready()
        laps.lap("transfer")
        self._count_busy(1)
        try:
            records = self._durable(slot, i, laps)
            if records is not None:
                self.store.commit(slot.block, slot.n_rows, records)
                laps.lap("commit")
        finally:
            self._count_busy(-1)
            with self._lock:
                self.stages.add(laps.stages)
        if records is not None:
            self._committed(slot, records)

    def _durable(self, slot: _Slot, i: int, laps: Laps) -> list[ShardRecord] | None:
        """Do what array `i` of a block needs; once it was the last one, settle all and return the records."""
        layout = self.layout
        array = layout.arrays[i]
        if layout.statistics is not None and i < len(layout.taps):
            slabs = [slab.memory for slab in slot.slabs]
            measure(layout, i, slabs, slot.n_rows, slot.block * layout.block_rows, slot.entries)
            laps.lap("statistics")
        if layout.values or i >= len(layout.moved):
            self._write_array(slot, array, laps)
        with self._lock:
            slot.n_waiting -= 1
            if slot.n_waiting:
                return None
        if layout.statistics is not None:
            for array in (*layout.row_statistics, layout.statistics.blocks):
                self._write_array(slot, array, laps)
        for file in slot.files:
            file.settle()
        laps.lap("sync")
        return [r for r in slot.records if r is not None]

    def _write_array(self, slot: _Slot, array: ArraySpec, laps: Laps) -> None:
        layout, n_rows = self.layout.shard(array, slot.n_rows)
        if layout is self.layout:
            slabs = [slab.memory for slab in slot.slabs]
        else:
            slabs = [piece.view(np.uint8) for piece in slot.entries.reshape(1, -1)]
        new = self.store.new_shard(array, slot.block)
        rows = as_written(array, layout, slabs, n_rows, slot.block)
        record = write_shard(new, *rows[:4], laps, rows.pieces)
        if len(self.layout.stored) > MOST_OPEN:
            new.settle()
            laps.lap("sync")
        with self._lock:
            slot.records[self.layout.stored_at[array.path]] = record
            slot.files.append(new)

    def _committed(self, slot: _Slot, records: list[ShardRecord]) -> None:
        stages, arrays = self.stages, self.layout.stored
        with self._lock:
            stages.n_rows += slot.n_rows
            stages.n_shards += len(records)
            stages.n_bytes += sum(r.n_bytes for r in records)
            stages.raw_bytes += slot.n_rows * sum(a.row_bytes for a in arrays if a.dims[0] == "row")
            if self.layout.statistics is not None:
                stages.measured_bytes += slot.n_rows * sum(tap.row_bytes for tap in self.layout.taps)
            stages.castable_bytes += slot.n_rows * sum(map(_castable, self.layout.taps)) * self.layout.values
            for array, record in zip(arrays, records, strict=True):
                if array.is_ragged:  # what its rows did not need of their room was never there
                    spare = max(0, slot.n_rows * array.row_bytes - record.n_bytes)
                    stages.raw_bytes -= spare
                    stages.measured_bytes -= spare if self.layout.statistics is not None else 0
                    stages.castable_bytes -= spare * _castable(array) // array.row_bytes
            self._free.append(slot)
            self._lock.notify_all()
        if self._on_commit is not None:
            self._on_commit(stages)

    def _count_busy(self, change: int) -> None:
        """Keep the time in which any writer is at work."""
        with self._lock:
            now = time.perf_counter()
            if self._n_busy:
                self.stages.writing_s += now - self._busy_since
            self._n_busy, self._busy_since = self._n_busy + change, now

    def _unexpected(self, error: Exception, slot: _Slot, i: int) -> Exception:
        if isinstance(error, LayertapError):
            return error
        first, name = slot.block * self.layout.block_rows, self.layout.arrays[i].name
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        unexpected = CaptureError(
            f"cannot write rows {first} to {first + slot.n_rows - 1} of {name}: {what}. {_KEPT}"
        )
        unexpected.__cause__ = error
        return unexpected

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
            self._lock.notify_all()

    def _raise_failure(self) -> None:
        assert self._failure is not None
        raise self._failure


def _castable(tap: ArraySpec) -> int:
    """Return the bytes of a row that a cast to float16 would save."""
    size = tap.dtype.itemsize
    return tap.row_bytes * max(0, size - 2) // size if is_float(tap.dtype) else 0


_KEPT = "Blocks that are committed are kept: once this is mended, the same capture goes on after them"


def explained(error: OSError, place: Place) -> OSError:
    """Return what the user is told of a file, of the store at `place`, that could not be written."""
    if isinstance(error, StoreError):
        told: OSError = error if _KEPT in str(error) else type(error)(f"{error}. {_KEPT}")
    else:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
        file = error.filename2 or error.filename or place  # of a rename, what stands in the way
        told = kind(f"cannot write {file}: {why(error)}. {_KEPT}")
    if told is not error:
        told.__cause__ = error
    return told


def _allocated(n_bytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, n_bytes)
    except (OSError, MemoryError) as error:
        raise PlanError(
            f"the blocks take {n_bytes:,} bytes of memory, and the system does not give them: "
            f"{getattr(error, 'strerror', None) or error}. Give less memory=, smaller batches or fewer layers"
        ) from error
