"""Rows of some arrays of a store, read again and again: what a data set for training stands on.

Every shard is opened once as long as there is room for open files, its record and index are checked then, and
values go from the file to where they are wanted without a copy between, where no codec lies between. What has
to be decoded, or is smaller than what is asked for at once, is kept as far as a given number of bytes goes.

An object may be used by many threads, be pickled, and be forked with its process: files are opened anew where
it is not the process that opened them (reading moves no position that another process could rely on, but a
lock may have been held at the fork).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .layout import ArraySpec
from .ragged import as_stored, check_extents, flat
from .shard import Shard
from .store import shard_path
from .trust import check_room

if TYPE_CHECKING:
    from .reader import Run

Bytes2D = NDArray[np.uint8]
Bytes1D = NDArray[np.uint8]
Indices = NDArray[np.int64]

#: Shards that are open at the same time, at most; fewer where the system allows fewer files.
MOST_OPEN = 512

# A row is read by itself where no more than this share of its chunk's rows is wanted.
_ALONE_SHARE = 0.5


class _Opening:
    """A shard that the first thread that wants it opens, while others that want it wait."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.shard: Shard | None = None


class _Own:
    """What belongs to one process: open shards and decoded chunks, the oldest first."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.shards: OrderedDict[Hashable, _Opening] = OrderedDict()
        self.chunks: OrderedDict[Hashable, Bytes2D] = OrderedDict()
        self.n_bytes = 0
        self.turns: dict[Hashable, threading.Lock] = {}
        self.most_open = min(MOST_OPEN, _most_files() // 2)

    def kept(self, key: Hashable) -> Bytes2D | None:
        """Return a chunk that is kept, and keep it longest."""
        chunk = self.chunks.get(key)
        if chunk is not None:
            self.chunks.move_to_end(key)
        return chunk


class Chunks:
    """The inner chunks of some arrays of a run.

    Args:
        run: the run.
        arrays: which arrays, by their numbers in `run.manifest.layout.arrays`.
        keep_bytes: the most bytes of decoded chunks that are kept.
    """

    def __init__(self, run: Run, arrays: Sequence[int], keep_bytes: int) -> None:
        layout = run.manifest.layout
        self.run = run
        self.keep_bytes = keep_bytes
        self.numbers = tuple(arrays)
        #: The arrays, in the order of `arrays`; methods take their number in this order.
        self.specs: tuple[ArraySpec, ...] = tuple(layout.arrays[i] for i in arrays)
        #: Rows of an inner chunk of each.
        self.chunk_rows: tuple[int, ...] = tuple(layout.chunk_rows(spec) for spec in self.specs)
        self.block_rows = layout.block_rows
        #: How each lies on disk: of a ragged one, its elements.
        self._stored = [as_stored(spec, layout)[:2] for spec in self.specs]
        self._extents = {
            i: next(j for j, other in enumerate(self.specs) if other.is_extents and other.group == spec.group)
            for i, spec in enumerate(self.specs)
            if spec.is_ragged
        }
        self._own = _Own()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own = _Own()

    def window(self, array: int, first: int, wanted: Indices, target: Bytes2D) -> None:
        """Read rows of one block, all of them checked, so that row `first + i` lies at `target[i]`.

        Args:
            array: which array.
            first: a row of the data set.
            wanted: distances of the rows from `first`, increasing, all in one block. Whole inner chunks are
                read straight to their place where `first` and `target` begin and end with chunks, so rows
                that are not wanted may be there too.
            target: shape (rows, row_bytes); rows of a ragged array lie at the front of theirs.

        Raises:
            StoreError: the block is not committed, or cannot be read.
            FormatError: what is there is not what was written.
        """
        if array in self._extents:
            rows = first + wanted
            extents = self.extents(array, rows)
            n_bytes = extents[:, 1:].prod(1) * self.specs[array].dtype.itemsize
            pieces = [target[i][:n] for i, n in zip(wanted.tolist(), n_bytes.tolist(), strict=True)]
            self.elements(array, rows, extents, pieces)
            return
        size = self.chunk_rows[array]
        block, at = divmod(first, self.block_rows)
        numbers = np.unique((at + wanted) // size).tolist()
        if at % size == 0 and len(target) % size == 0:
            pieces = [target[number * size - at :][:size] for number in numbers]
            self._shard(array, block).fill(
                [(number, piece.reshape(-1).data) for number, piece in zip(numbers, pieces, strict=True)]
            )
            return
        for number in numbers:
            inside = wanted[(at + wanted) // size == number]
            target[inside] = self._chunk(array, block, number)[at + inside - number * size]

    def rows(self, array: int, rows: Indices, target: Bytes2D) -> None:
        """Read rows of any blocks in any order: `rows[i]` to `target[i]`.

        Few rows of a chunk of an array without a codec are read by themselves and not checked, unless the
        run was opened with `check`.

        Args:
            array: which array.
            rows: rows of the data set; shape (rows,).
            target: shape (rows, row_bytes), contiguous.

        Raises:
            StoreError: a block is not committed, or cannot be read.
            FormatError: what is there is not what was written.
        """
        if len(rows) == 1:
            self._block_rows(array, int(rows[0]) // self.block_rows, rows, np.zeros(1, np.int64), target)
            return
        order = np.argsort(rows, kind="stable")
        blocks = rows[order] // self.block_rows

        def read(start: int, stop: int) -> None:
            self._block_rows(array, int(blocks[start]), rows, order[start:stop], target)

        spans = list(_runs(blocks))
        n_at_once = min(self.run.place.parallel, len(spans))
        if n_at_once < 2:
            for span in spans:
                read(*span)
            return
        with ThreadPoolExecutor(n_at_once) as pool:
            for _ in pool.map(lambda span: read(*span), spans):
                pass

    def extents(self, array: int, rows: Indices) -> Indices:
        """Return where each of some rows of a ragged array begins, and its shape; (rows, 1 + axes).

        Raises:
            StoreError: a block is not committed, or cannot be read.
            FormatError: what is there cannot be.
        """
        beside, order = self._extents[array], np.argsort(rows, kind="stable")
        found = np.empty((len(rows), 1 + len(self.specs[array].shape)), np.int64)
        for start, stop in _runs(rows[order] // self.block_rows):
            these = order[start:stop]
            first = int(rows[these[0]])
            wanted, back = np.unique(rows[these] - first, return_inverse=True)
            check_room((int(wanted[-1]) + 1) * self.specs[beside].row_bytes, "the extents of some rows")
            table: Bytes2D = np.empty((int(wanted[-1]) + 1, self.specs[beside].row_bytes), np.uint8)
            self.window(beside, first, wanted, table)
            found[these] = table.view(np.int64)[wanted][back]
        check_extents(self.run.path, self.specs[array], self.run.manifest.layout, rows, found)
        return found

    def elements(self, array: int, rows: Indices, extents: Indices, targets: Sequence[Bytes1D]) -> None:
        """Read rows of a ragged array, all of them checked, each to a target of its own.

        Args:
            array: which array.
            rows: rows of the data set.
            extents: what `extents` says of them.
            targets: as many bytes for each as it has.

        Raises:
            StoreError: a block is not committed, or cannot be read.
            FormatError: what is there is not what was written.
        """
        stored, layout = self._stored[array]
        chunk, size = layout.chunk_rows(stored), stored.dtype.itemsize
        room = flat(self.specs[array], self.run.manifest.layout)[1].block_rows
        last: tuple[tuple[int, int], Bytes1D] | None = None
        for i in np.argsort(extents[:, 0], kind="stable").tolist():
            block = int(rows[i]) // self.block_rows
            at, target, done = (int(extents[i, 0]) - block * room) * size, targets[i], 0
            while done < len(target):
                number, skipped = divmod(at + done, chunk * size)
                if last is None or last[0] != (block, number):
                    last = (block, number), self._chunk(array, block, number).reshape(-1)
                n = min(len(target) - done, chunk * size - skipped)
                target[done : done + n] = last[1][skipped : skipped + n]
                done += n

    def _block_rows(self, array: int, block: int, rows: Indices, positions: Indices, target: Bytes2D) -> None:
        """Read the rows at `positions`, sorted by row and all of one block."""
        size, row_bytes = self.chunk_rows[array], self.specs[array].row_bytes
        inside = rows[positions] - block * self.block_rows
        numbers = inside // size
        alone: list[tuple[int, int, memoryview]] = []
        may_be_alone = self.specs[array].codec == "none" and not self.run.check
        for start, stop in _runs(numbers):
            number = int(numbers[start])
            some, places = inside[start:stop] - number * size, positions[start:stop]
            if may_be_alone and stop - start <= _ALONE_SHARE * size:
                both = zip((some * row_bytes).tolist(), places.tolist(), strict=True)
                alone += [(number, at, target[place].data) for at, place in both]
            elif size == stop - start == 1:
                self._shard(array, block).fill([(number, target[int(places[0])].data)])
            else:
                target[places] = self._chunk(array, block, number)[some]
        if alone:
            self._shard(array, block).fill_windows(alone)

    def _chunk(self, array: int, block: int, number: int) -> Bytes2D:
        """Return the rows of an inner chunk, checked; shape (chunk rows, row_bytes), not to be changed."""
        own, key = self._mine(), (array, block, number)
        with own.lock:
            if (kept := own.kept(key)) is not None:
                return kept
            turn = own.turns.setdefault(key, threading.Lock())
        with turn:  # of two that want it at once, one reads it
            with own.lock:
                if (kept := own.kept(key)) is not None:
                    return kept
            try:
                return self._read(own, key)
            finally:
                with own.lock:
                    own.turns.pop(key, None)

    def _read(self, own: _Own, key: tuple[int, int, int]) -> Bytes2D:
        array, block, number = key
        stored, layout = self._stored[array]
        size, row_bytes = layout.chunk_rows(stored), stored.row_bytes
        check_room(size * row_bytes, f"an inner chunk of {self.specs[array].name}")
        chunk: Bytes2D = np.empty((size, row_bytes), np.uint8)
        self._shard(array, block).fill([(number, chunk.reshape(-1).data)])
        with own.lock:
            if key not in own.chunks and chunk.nbytes <= self.keep_bytes:
                own.chunks[key] = chunk
                own.n_bytes += chunk.nbytes
            while own.n_bytes > self.keep_bytes:
                own.n_bytes -= own.chunks.popitem(last=False)[1].nbytes
        return chunk

    def _shard(self, array: int, block: int) -> Shard:
        own, key = self._mine(), (array, block)
        with own.lock:
            opening = own.shards.get(key)
            if opening is None:
                opening = own.shards[key] = _Opening()
                if len(own.shards) > own.most_open:
                    own.shards.popitem(last=False)  # closed when nothing reads it any more
            else:
                own.shards.move_to_end(key)
        if opening.shard is not None:
            return opening.shard
        with opening.lock:
            if opening.shard is None:
                self.run.check_same()
                record = self.run.record(block)[1][self.numbers[array]]
                name = shard_path(self.specs[array], block)
                opening.shard = Shard(self.run.place, name, *self._stored[array], record)
            return opening.shard

    def _mine(self) -> _Own:
        if self._own.pid != os.getpid():
            self._own = _Own()
        return self._own


def _runs(values: Indices) -> Iterator[tuple[int, int]]:
    """Return start and stop of each run of equal values."""
    return pairwise([0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)])


def _most_files() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 2 * MOST_OPEN
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2 * MOST_OPEN if limit == resource.RLIM_INFINITY else limit
