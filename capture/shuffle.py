"""Rows of a store in a random order, at the rate at which it is read in order.

Reading at random costs a disk most of its rate, so what is read at once is a *window*: some consecutive rows
of one block, whole inner chunks of every array that is asked for. In an epoch the windows come in a random
order, each once; so many of them as memory allows make a *group*, and the rows of a group come in a random
order. While one group is handed out the next is read into memory of its own.

How good a shuffle that is: a row may come anywhere in the epoch, and every order of the windows, and of the
rows of a group, is equally likely. Two rows of one window come in the same group, so no further from each
other than a group's rows; a batch holds rows of up to as many places of the data set as a group has windows.
What it is not: a uniform permutation of all rows, unless one group holds them all.

Memory: two groups, and an eighth for inner chunks of arrays that windows cut through, such as labels, of
which one chunk holds the rows of many windows. That together is at most the number that the user gives.

Shares: the epoch's sequence of rows is cut into as many runs as there are ranks, of equal length to one row,
and each rank's run into its workers', at whole batches. All of them know the whole order from the seed and
the epoch, and none talks to another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np

from .chunks import Bytes2D, Chunks, Indices
from .errors import PlanError
from .layout import ArraySpec
from .parts import Part
from .plan import show_bytes
from .rowset import RowSet
from .trust import check_room, empty

#: Bytes of a window at most, where an inner chunk is not longer: a disk's full rate needs no longer reads.
WINDOW_BYTES = 4 * 2**20
#: Windows of a group at least, as far as inner chunks are short enough.
MIXED_WINDOWS = 32

_LEAST_READERS, _MOST_READERS = 2, 16


@dataclass(frozen=True)
class Windows:
    """How the rows of a data set are cut into windows, and how many of those are mixed."""

    rows: RowSet
    """The rows of the data set."""
    block_rows: int
    """Rows of a block; windows do not cross its edges."""
    length: int
    """Rows of a window, fewer at the end of a block."""
    mixed: int
    """Windows of a group."""
    first: Indices
    """First row of each window; shape (windows,)."""
    position: Indices
    """How many rows of the data set lie below each window."""
    count: Indices
    """How many rows of the data set lie in each window, one at least."""

    @classmethod
    def plan(cls, chunks: Chunks, rows: RowSet, group_bytes: int) -> Windows:
        """Cut `rows` into windows, of which a group of `group_bytes` holds as many as it can.

        Raises:
            PlanError: it does not hold one.
        """
        row_bytes = sum(spec.row_bytes for spec in chunks.specs)
        most = max(1, min(WINDOW_BYTES, group_bytes // MIXED_WINDOWS) // row_bytes)
        length = _length(chunks.specs, chunks.chunk_rows, most, chunks.block_rows)
        if length * row_bytes > group_bytes:
            raise PlanError(
                f"{length} rows that are read at once take {show_bytes(length * row_bytes)}; memory for two "
                f"groups of them and what lies around is {show_bytes(least_bytes(length * row_bytes))} at "
                "least. Give more memory=, use fewer workers, or take fewer taps"
            )
        block_rows = chunks.block_rows
        blocks = np.unique(np.concatenate([rows.starts // block_rows, _spanned(rows, block_rows)]))
        n_windows = len(blocks) * -(-block_rows // length)
        check_room(64 * n_windows, f"the order of {n_windows} windows")
        starts = np.arange(0, block_rows, length)
        first = (blocks[:, None] * block_rows + starts).reshape(-1)
        stop = (blocks[:, None] * block_rows + np.append(starts[1:], block_rows)).reshape(-1)
        position = rows.below(first)
        count = rows.below(stop) - position
        there = count > 0
        return cls(
            *(rows, block_rows, length, group_bytes // (length * row_bytes)),
            *(first[there], position[there], count[there]),
        )

    def wanted(self, window: int, start: int, stop: int) -> Indices:
        """Return the rows `start` to `stop` of those wanted of a window, as distances from its first."""
        at = int(self.position[window])
        wanted: Indices = self.rows[np.arange(at + start, at + stop)] - self.first[window]
        return wanted


def least_bytes(group_bytes: int) -> int:
    """Return the memory of which two groups of `group_bytes` can be had; see `group_bytes_of`."""
    return 16 * -(-group_bytes // 7)


def group_bytes_of(memory: int) -> int:
    """Return the bytes of one group of a stream that takes `memory`."""
    return memory * 7 // 16


def kept_bytes_of(memory: int) -> int:
    """Return the bytes of inner chunks that a stream that takes `memory` keeps."""
    return memory // 8


def _spanned(rows: RowSet, block_rows: int) -> Indices:
    """Return the blocks that runs of rows reach beyond their first."""
    firsts, lasts = rows.starts // block_rows, (rows.starts + rows.lengths - 1) // block_rows
    more = lasts > firsts
    reached = [np.arange(a + 1, b + 1) for a, b in zip(firsts[more], lasts[more], strict=True)]
    return np.concatenate([np.zeros(0, np.int64), *reached])


def _length(specs: Sequence[ArraySpec], chunk_rows: Sequence[int], most: int, block_rows: int) -> int:
    """Return the rows of a window: whole chunks of the widest arrays, and of others as far as that fits."""
    widest_first = sorted(zip(specs, chunk_rows, strict=True), key=lambda pair: -pair[0].row_bytes)
    unit = widest_first[0][1]
    for _, size in widest_first[1:]:
        if math.lcm(unit, size) <= most:
            unit = math.lcm(unit, size)
    return min(block_rows, unit * max(1, most // unit))


@dataclass(frozen=True)
class Share:
    """The batches of one rank that one of its workers makes."""

    rank: Part
    """Which rank of how many."""
    worker: Part
    """Which worker of how many; batch `j` of the rank comes from worker `j % n`, the first having 0."""

    def n_batches(self, n_rows: int, batch_size: int, drop_last: bool) -> int:
        """Return the batches of the rank, of `n_rows` rows of all ranks."""
        if drop_last:
            return n_rows // self.rank.n // batch_size  # the same on every rank
        return -(-len(self.rank.blocks(n_rows)) // batch_size)

    def rows(self, n_rows: int, batch_size: int, drop_last: bool) -> range:
        """Return the worker's run of the epoch's sequence of `n_rows` rows."""
        mine, n = self.rank.blocks(n_rows), self.n_batches(n_rows, batch_size, drop_last)
        if n == 0:
            return mine[:0]
        # The short batch is the rank's last, so the worker that makes it has the last run.
        order = [(n + i) % self.worker.n for i in range(self.worker.n)]
        before = order[: order.index(self.worker.k - 1)]
        start = sum(self._batches_of(worker, n) for worker in before)
        stop = start + self._batches_of(self.worker.k - 1, n)
        return mine[start * batch_size : stop * batch_size]

    def done(self, n_batches: int) -> int:
        """Return how many of the first `n_batches` of the rank are this worker's."""
        return self._batches_of(self.worker.k - 1, n_batches)

    def _batches_of(self, worker: int, n: int) -> int:
        return max(0, -(-(n - worker) // self.worker.n))


@dataclass(frozen=True)
class _Piece:
    """Some of a window's rows in a group."""

    window: int
    """The window."""
    start: int
    """The first of its wanted rows that belongs to the group."""
    stop: int
    """The end of those."""


class Target(Protocol):
    """Memory for one batch."""

    @property
    def arrays(self) -> Sequence[Bytes2D]:
        """One for each array; shape (rows, row_bytes)."""


T = TypeVar("T", bound=Target)


@dataclass(frozen=True)
class Order:
    """What comes when in one epoch."""

    windows: Windows
    """What the rows are read by."""
    batch_size: int
    """Rows of a batch."""
    shuffle: bool
    """Whether the order is random, else that of the rows."""
    seed: int
    """Of the random numbers."""
    drop_last: bool
    """Leave out what makes no full batch on every rank."""

    def n_batches(self, share: Share) -> int:
        """Return the batches that the rank of `share` makes in an epoch."""
        return share.n_batches(len(self.windows.rows), self.batch_size, self.drop_last)

    def groups(self, epoch: int, share: Share) -> list[tuple[int, list[_Piece]]]:
        """Return the groups of a share: where each begins in the epoch's sequence, and what it holds."""
        windows = self.windows
        n_windows = len(windows.first)
        order = self._random(epoch).permutation(n_windows) if self.shuffle else np.arange(n_windows)
        ends = np.cumsum(windows.count[order])
        mine = share.rows(len(windows.rows), self.batch_size, self.drop_last)
        if not mine:
            return []
        first, last = np.searchsorted(ends, [mine.start, mine.stop - 1], side="right").tolist()
        pieces = []
        for i in range(first, last + 1):
            window = int(order[i])
            begin = int(ends[i] - windows.count[window])
            pieces.append(_Piece(window, max(0, mine.start - begin), min(int(ends[i]), mine.stop) - begin))
        n_groups = -(-len(pieces) // windows.mixed)
        cuts = [len(pieces) * i // n_groups for i in range(n_groups + 1)]  # no group is much smaller
        groups, start = [], mine.start
        for a, b in pairwise(cuts):
            groups.append((start, pieces[a:b]))
            start += sum(piece.stop - piece.start for piece in pieces[a:b])
        return groups

    def shuffled(self, epoch: int, start: int, n_rows: int) -> Indices:
        """Return the order of the rows of the group that begins at `start` in the epoch's sequence."""
        if not self.shuffle:
            return np.arange(n_rows)
        return self._random(epoch, start).permutation(n_rows)

    def _random(self, epoch: int, *more: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, len(more), *more])


def stream(
    chunks: Chunks, order: Order, epoch: int, share: Share, make: Callable[[int], T], skip: int = 0
) -> Iterator[tuple[Indices, T]]:
    """Yield the batches of a share, the first `skip` of them left out: numbers of the rows, and their values.

    Args:
        chunks: the arrays.
        order: what comes when.
        epoch: of which epoch.
        share: whose batches.
        make: makes the memory for a batch of so many rows; it is filled when it is yielded.
        skip: batches of the share that are left out; what they alone need is not read.

    Raises:
        StoreError: what was committed cannot be read.
        ChecksumError: it is not what was written.
    """
    mine = share.rows(len(order.windows.rows), order.batch_size, order.drop_last)
    at = mine.start + skip * order.batch_size
    filled, rows, target = 0, np.empty(0, np.int64), None
    for group in _read_ahead(chunks, order, epoch, order.groups(epoch, share), at):
        while at < group.stop:
            if target is None:
                filled, rows = 0, np.empty(min(order.batch_size, mine.stop - at), np.int64)
                target = make(len(rows))
            n = min(len(rows) - filled, group.stop - at)
            rows[filled : filled + n] = group.take(at, n, [a[filled : filled + n] for a in target.arrays])
            filled, at = filled + n, at + n
            if filled == len(rows):
                yield rows, target
                target = None


def _read_ahead(
    chunks: Chunks, order: Order, epoch: int, groups: Sequence[tuple[int, list[_Piece]]], at: int
) -> Iterator[_Group]:
    """Yield the groups that end behind `at`, each read while the one before it is used."""
    wanted = [_Group(order, epoch, start, pieces) for start, pieces in groups]
    wanted = [group for group in wanted if group.stop > at]
    n_windows = max((len(group.pieces) for group in wanted), default=0)
    n_readers = min(_MOST_READERS, max(_LEAST_READERS, chunks.run.place.parallel))
    pool = ThreadPoolExecutor(n_readers, thread_name_prefix="layertap-read")
    memory = [_memory(chunks, order.windows.length * n_windows) for _ in wanted[:2]]
    try:
        for i, group in enumerate(wanted):
            if i == 0:
                group.read(chunks, memory[0], pool)
            if i + 1 < len(wanted):
                wanted[i + 1].read(chunks, memory[(i + 1) % 2], pool)
            group.wait()
            yield group
            group.forget()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _memory(chunks: Chunks, n_rows: int) -> tuple[Bytes2D, ...]:
    return tuple(
        empty((n_rows, spec.row_bytes), np.dtype(np.uint8), f"{n_rows} rows of {spec.name}")
        for spec in chunks.specs
    )


class _Group:
    """Rows of some windows, which threads read into memory of their own.

    Window `i` of the group has the rows from `i * length` on, and each row lies there as in the window.
    """

    def __init__(self, order: Order, epoch: int, start: int, pieces: list[_Piece]) -> None:
        # They are read as they lie in the files: mixed is afterwards.
        self.pieces = sorted(pieces, key=lambda piece: piece.window)
        self.start = start
        self.stop = start + sum(piece.stop - piece.start for piece in pieces)
        self._order, self._epoch = order, epoch
        self._memory: tuple[Bytes2D, ...] = ()
        self._reading: list[Future[None]] = []

    def read(self, chunks: Chunks, memory: tuple[Bytes2D, ...], pool: ThreadPoolExecutor) -> None:
        """Start to read the group into `memory`."""
        windows, length = self._order.windows, self._order.windows.length
        wanted = [windows.wanted(piece.window, piece.start, piece.stop) for piece in self.pieces]
        firsts = [int(windows.first[piece.window]) for piece in self.pieces]
        order = self._order.shuffled(self._epoch, self.start, self.stop - self.start)
        self._memory = memory
        self._rows = np.concatenate([f + w for f, w in zip(firsts, wanted, strict=True)])[order]
        self._places = np.concatenate([i * length + w for i, w in enumerate(wanted)])[order]

        def window(i: int) -> None:
            for array, whole in enumerate(memory):
                chunks.window(array, firsts[i], wanted[i], whole[i * length : (i + 1) * length])

        self._reading = [pool.submit(window, i) for i in range(len(wanted))]

    def wait(self) -> None:
        """Wait until all of the group is there, and raise what failed."""
        for reading in self._reading:
            reading.result()

    def take(self, at: int, n: int, targets: Sequence[Bytes2D]) -> Indices:
        """Copy `n` rows, from `at` in the epoch's sequence on, of each array; return their numbers."""
        some = slice(at - self.start, at - self.start + n)
        for whole, target in zip(self._memory, targets, strict=True):
            np.take(whole, self._places[some], 0, target, "clip")  # another mode would buffer all of it
        return self._rows[some]

    def forget(self) -> None:
        """Let go of the memory, which another group has next."""
        self._memory, self._reading = (), []
