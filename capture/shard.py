"""Shards: the one file that holds a block of one array, in Zarr v3's `sharding_indexed` form.

A shard is its inner chunks back to back, each followed by the CRC-32C of its (encoded) bytes, and then an
index: offset and length of each inner chunk as little-endian uint64, both all ones for a chunk that is
not there, and the CRC-32C of the index. Nothing in that needs a copy where nothing is encoded: the kernel
gathers the rows straight from where they were captured. Inner chunks that are whole pages start at whole
pages (zeros fill the page that their checksum begins), which Zarr's index allows and direct writing needs.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .checksum import CRC_BYTES, crc32c, crc_bytes, unsealed
from .dtypes import CODE_INF, CODE_MINUS_INF, CODE_NAN, EXPONENT_BITS, FLOAT8_E4M3FN, DType
from .errors import ChecksumError, FormatError, StoreError, why
from .files import PAGE
from .layout import CHUNK_BYTES, ArraySpec, Layout, chunk_rows
from .place import Blob, Bytes, NewFile, Place
from .stages import Laps, Stages
from .trust import check_room

_MISSING = 2**64 - 1
_TAILS = 64  # pages for checksums that wait to be written
_COUNTED_BYTES = 256 * 1024  # counted in one piece: in the cache, and few turns of the interpreter's lock
_ENCODER_BYTES = 1024 * 1024  # what zstd and Blosc allocate beside their output
_BUFFER_BYTES = 384  # a waiting buffer: the objects that Python and the kernel's list need for it

#: Gives the bytes of rows from one to another.
Pieces: TypeAlias = Callable[[int, int], Iterable[memoryview]]


@dataclass(frozen=True)
class ShardRecord:
    """What a commit record says of one shard."""

    n_bytes: int
    """Size of the file."""
    index_crc: int
    """CRC-32C of the shard's index."""
    chunks_crc: int
    """CRC-32C of the inner chunks' checksums, in order: it binds the record to these very values."""
    n_nan: int
    """NaN values among the rows."""
    n_inf: int
    """Infinite values among the rows."""


def write_shard(
    new: NewFile,
    array: ArraySpec,
    layout: Layout,
    slabs: Sequence[memoryview],
    n_rows: int,
    laps: Laps | None = None,
    pieces: Pieces | None = None,
) -> ShardRecord:
    """Write the first `n_rows` rows of a block of `array`, whole, into a file not settled yet.

    Args:
        new: the shard's file, not begun yet.
        array: which array of `layout`.
        layout: how slabs are laid out.
        slabs: the block's slabs, in order, read-only.
        n_rows: rows of the block that exist; fewer than `layout.block_rows` in the last block alone. What
            its last inner chunk lacks is written as zeros.
        laps: told where the time goes: `checksum`, `encode`, `write`.
        pieces: gives the bytes of rows from one to another, where they do not lie in slabs.
    """
    laps = laps or Laps(Stages())
    chunk_length = layout.chunk_rows(array)
    chunk_bytes = chunk_length * array.row_bytes
    n_chunks = -(-n_rows // chunk_length)
    index = np.full((layout.block_rows // chunk_length, 2), _MISSING, "<u8")
    # Whole pages start at whole pages, so that they can bypass the page cache.
    pages = array.codec == "none" and chunk_bytes % PAGE == 0
    tails = memoryview(mmap.mmap(-1, max(1, min(n_chunks, _TAILS)) * PAGE)) if pages else None
    if pieces is None:
        offset = layout.offsets[layout.arrays.index(array)]
        pieces = partial(_pieces, array, offset, layout.step_rows, slabs)
    n_nan = n_inf = position = chunks_crc = 0
    waiting: list[Bytes] = []
    with new as file:
        for i in range(n_chunks):
            last = min((i + 1) * chunk_length, n_rows)
            rows = list(pieces(i * chunk_length, last))
            data, checksum, nan, inf = _chunk(array, rows, chunk_bytes, laps)
            n_nan, n_inf = n_nan + nan, n_inf + inf
            n_bytes = sum(memoryview(buffer).nbytes for buffer in data) + CRC_BYTES
            index[i] = position, n_bytes
            crc = crc_bytes(checksum)
            chunks_crc = crc32c(crc, chunks_crc)
            if tails is not None:
                at = i % _TAILS
                if at == 0:  # the pages are taken again
                    file.write(waiting, direct=True)
                    waiting = []
                tail = tails[at * PAGE : (at + 1) * PAGE]
                tail[:CRC_BYTES] = crc
                position += chunk_bytes + PAGE
            else:
                tail = memoryview(crc)
                position += n_bytes
            if tails is not None and (i + 1) * chunk_length <= n_rows:
                waiting += [*data, tail]
                continue
            # Those that bypass the cache as they lie go in one call; the rest while the cache still holds it.
            file.write(waiting, direct=True)
            waiting = []
            file.write([*data, tail])
            laps.lap("write")
        file.write(waiting, direct=True)
        index_bytes = index.tobytes()
        index_crc = crc32c(index_bytes)
        file.write([index_bytes, crc_bytes(index_crc)])
    laps.lap("write")
    return ShardRecord(file.n_bytes, index_crc, chunks_crc, n_nan, n_inf)


def buffer_bytes(array: ArraySpec, step_rows: int, n_steps: int, staging_bytes: int) -> int:
    """Return the most that a writer holds beside the slabs, for a block of `n_steps` steps of `array`."""
    shard_bytes = array.row_bytes * step_rows * n_steps
    n_chunk_rows = chunk_rows(array.row_bytes, step_rows, 1)  # or more
    n_chunks = n_steps * (step_rows // n_chunk_rows)
    index_bytes = 32 * n_chunks
    counting = min(shard_bytes, 2 * _COUNTED_BYTES)  # magnitudes, and which are great
    if array.codec == "none":
        if n_chunk_rows * array.row_bytes % PAGE:
            return index_bytes + counting + min(shard_bytes, staging_bytes)
        # What waits is written once its tails are used up; one chunk may be the pieces of many slabs.
        n_tails = min(n_chunks, _TAILS)
        return index_bytes + counting + n_tails * PAGE + _BUFFER_BYTES * (2 * n_tails + n_steps)
    # The chunk in one piece, what it becomes at worst, and that again cut to its length.
    chunk_bytes = min(shard_bytes, max(array.row_bytes, CHUNK_BYTES))
    encoding = 3 * chunk_bytes + min(_ENCODER_BYTES, 128 * 1024 + 2 * chunk_bytes)
    return index_bytes + encoding + min(shard_bytes, staging_bytes)


def _chunk(
    array: ArraySpec, pieces: list[memoryview], n_bytes: int, laps: Laps
) -> tuple[list[Bytes], int, int, int]:
    """Return the buffers of one inner chunk of `n_bytes` rows' bytes, their CRC-32C, and its NaN and inf."""
    missing = n_bytes - sum(piece.nbytes for piece in pieces)
    rows: list[Bytes] = [*pieces, bytes(missing)] if missing else list(pieces)
    if array.codec == "none":
        scanned = _scan(rows, array)
        laps.lap("checksum")
        return rows, *scanned
    n_nan, n_inf = count_nonfinite(pieces, array.dtype, array.codes)
    laps.lap("checksum")
    whole = rows[0] if len(rows) == 1 else b"".join(rows)
    data: list[Bytes] = [array.encoding.encode(whole)]
    laps.lap("encode")
    crc, _, _ = _scan(data, None)
    laps.lap("checksum")
    return data, crc, n_nan, n_inf


def _scan(buffers: Sequence[Bytes], array: ArraySpec | None) -> tuple[int, int, int]:
    """Return the CRC-32C of `buffers`, and how many of their values, as `array`, are NaN and infinite.

    A little at a time: what was counted is in the processor's cache when it is summed.
    """
    crc = n_nan = n_inf = 0
    for buffer in buffers:
        whole = memoryview(buffer)
        for start in range(0, whole.nbytes, CHUNK_BYTES):
            some = whole[start : start + CHUNK_BYTES]
            if array is not None:
                nan, inf = count_nonfinite([some], array.dtype, array.codes)
                n_nan, n_inf = n_nan + nan, n_inf + inf
            crc = crc32c(some, crc)
    return crc, n_nan, n_inf


def _pieces(
    array: ArraySpec, offset: int, step_rows: int, slabs: Sequence[memoryview], first: int, stop: int
) -> Iterator[memoryview]:
    while first < stop:
        slab, row = divmod(first, step_rows)
        n_rows = min(stop - first, step_rows - row)
        start = offset + row * array.row_bytes
        yield slabs[slab][start : start + n_rows * array.row_bytes]
        first += n_rows


def count_nonfinite(pieces: Sequence[memoryview], dtype: DType, codes: bool = False) -> tuple[int, int]:
    """Return how many values are NaN and how many are infinite; of complex numbers, each part counts.

    Of int8 `codes`, those that stand for such.
    """
    if codes:
        return _count_codes(pieces)
    if dtype.kind == "c":
        dtype = np.dtype(f"f{dtype.itemsize // 2}")
    exponent = EXPONENT_BITS.get(dtype)
    if exponent is None:
        return 0, 0
    n_nan = n_inf = 0
    # As integers, all that is not finite lies above everything finite of its sign: two reductions without a
    # temporary tell whether there is any (one where nothing is negative), much faster than isfinite().
    sign = 1 << (8 * dtype.itemsize - 1)
    signed, unsigned = np.dtype(f"i{dtype.itemsize}"), np.dtype(f"u{dtype.itemsize}")
    for piece in _cut(pieces, _COUNTED_BYTES):
        bits = np.frombuffer(piece, unsigned)
        highest = bits.max(initial=0)
        if highest >= sign:
            finite = highest < sign | exponent and bits.view(signed).max() < exponent
        else:
            finite = highest < exponent
        if not finite:
            # Not isnan(): ml_dtypes' warns of signalling NaNs.
            magnitude = bits & unsigned.type(sign - 1)
            n_nan += int(np.count_nonzero(magnitude > exponent))
            n_inf += int(np.count_nonzero(magnitude == exponent))
    return (n_inf, 0) if dtype == FLOAT8_E4M3FN else (n_nan, n_inf)


def _count_codes(pieces: Sequence[memoryview]) -> tuple[int, int]:
    n_nan = n_inf = 0
    for piece in _cut(pieces, _COUNTED_BYTES):
        values = np.frombuffer(piece, np.int8)
        n_nan += int(np.count_nonzero(values == CODE_NAN))
        n_inf += int(np.count_nonzero(values == CODE_INF)) + int(np.count_nonzero(values == CODE_MINUS_INF))
    return n_nan, n_inf


def _cut(pieces: Sequence[memoryview], n_bytes: int) -> Iterator[memoryview]:
    for piece in pieces:
        for start in range(0, piece.nbytes, n_bytes):
            yield piece[start : start + n_bytes]


def plain_bytes(array: ArraySpec, layout: Layout, n_rows: int) -> int:
    """Return the bytes of a shard that holds `n_rows` rows of an array without a codec."""
    chunk_rows = layout.chunk_rows(array)
    chunk_bytes = chunk_rows * array.row_bytes
    beside = CRC_BYTES if chunk_bytes % PAGE else PAGE
    return -(-n_rows // chunk_rows) * (chunk_bytes + beside) + index_bytes(layout.block_rows // chunk_rows)


def index_bytes(n_chunks: int) -> int:
    """Return the bytes of the index of a shard of `n_chunks` inner chunks."""
    return 16 * n_chunks + CRC_BYTES


def least_bytes(array: ArraySpec, layout: Layout, n_rows: int) -> int:
    """Return the fewest bytes of a shard that holds `n_rows` rows: a smaller file cannot be one."""
    chunk_rows = layout.chunk_rows(array)
    chunk_bytes = array.encoding.least_bytes(chunk_rows * array.row_bytes) + CRC_BYTES
    return -(-n_rows // chunk_rows) * chunk_bytes + 16 * (layout.block_rows // chunk_rows) + CRC_BYTES


def _check_extents(index: NDArray[np.uint64], end: int, name: str) -> None:
    """Refuse an index whose chunks do not follow each other before `end`, those that are missing last."""
    there = index[: int(np.count_nonzero(index[:, 0] != _MISSING))]
    starts, lengths = there[:, 0], there[:, 1]
    if (starts > end).any() or (lengths > end).any():  # from here on, sums do not overflow
        raise FormatError(f"the index of {name} points outside it")
    if (starts + lengths > np.append(starts[1:], np.uint64(end))).any() or (
        index[len(there) :] != _MISSING
    ).any():
        raise FormatError(f"the inner chunks of {name} do not follow each other")


class Shard:
    """A shard that was committed, open for reading; a context manager.

    Raises:
        StoreError: it cannot be opened.
        ChecksumError: it is not the file that was committed.
        FormatError: its index points outside it.
    """

    def __init__(
        self, place: Place, name: str, array: ArraySpec, layout: Layout, record: ShardRecord
    ) -> None:
        self.name = f"{place}/{name}"
        self._array = array
        self.chunk_rows = layout.chunk_rows(array)
        self._record = record
        self._index_start = record.n_bytes - CRC_BYTES - 16 * (layout.block_rows // self.chunk_rows)
        try:
            self._blob: Blob = place.blob(name)
        except OSError as error:
            raise StoreError(f"{self.name} was committed and cannot be opened: {why(error)}") from error
        try:
            self._index = self._read_index(layout.block_rows // self.chunk_rows, record)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._blob.close()

    @property
    def n_there(self) -> int:
        """Rows of the inner chunks that are there."""
        return self.chunk_rows * int(np.count_nonzero(self._index[:, 0] != _MISSING))

    def chunks(self, numbers: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield the decoded bytes of inner chunks, checked."""
        for i, stored in zip(numbers, self._read_many([self._extent(i) for i in numbers]), strict=True):
            yield self._decoded(i, stored)

    def windows(self, wanted: Sequence[tuple[int, int, int]]) -> Iterator[bytes]:
        """Yield bytes `start` to `stop` of inner chunk `i`, for each `(i, start, stop)`, *unchecked*.

        The array has no codec.
        """
        extents = []
        for i, start, stop in wanted:
            offset, n_bytes = self._extent(i)
            if not 0 <= start <= stop <= n_bytes - CRC_BYTES:
                raise FormatError(f"inner chunk {i} of {self.name} is shorter than its rows")
            extents.append((offset + start, stop - start))
        yield from self._read_many(extents)

    def fill(self, wanted: Sequence[tuple[int, memoryview]]) -> None:
        """Read whole inner chunks to where they are wanted, checked: all of chunk `i` for each `(i, target)`.

        Without a codec nothing is copied: chunks that follow each other are read in one call, each straight
        into its target.
        """
        if self._array.codec == "none":
            self._fill_plain(wanted)
            return
        stored = self._read_many([self._extent(i) for i, _ in wanted])
        for (i, target), data in zip(wanted, stored, strict=True):
            self._decoded(i, data, np.frombuffer(target, np.uint8))

    def fill_windows(self, wanted: Sequence[tuple[int, int, memoryview]]) -> None:
        """Fill buffers from byte `start` of inner chunk `i` on, for each `(i, start, buffer)`, *unchecked*.

        The array has no codec.
        """
        pieces = []
        for i, start, buffer in wanted:
            offset, n_bytes = self._extent(i)
            if not 0 <= start <= n_bytes - CRC_BYTES - buffer.nbytes:
                raise FormatError(f"inner chunk {i} of {self.name} is shorter than its rows")
            pieces.append((offset + start, buffer))
        self._fill_pieces(pieces)

    def _fill_plain(self, wanted: Sequence[tuple[int, memoryview]]) -> None:
        extents = [self._extent(i) for i, _ in wanted]
        pieces, tails = [], []
        for i, (_, target) in enumerate(wanted):
            offset, _ = extents[i]
            end = offset + target.nbytes
            # The checksum and what fills its page are read on the way to the next chunk.
            gap = extents[i + 1][0] - end if i + 1 < len(extents) else 0
            tails.append(memoryview(bytearray(gap if CRC_BYTES <= gap <= PAGE else CRC_BYTES)))
            pieces += [(offset, target), (end, tails[-1])]
        self._fill_pieces(pieces)
        for (i, target), tail in zip(wanted, tails, strict=True):
            if crc_bytes(crc32c(target)) != tail[:CRC_BYTES]:
                raise self._damaged(i)

    def _fill_pieces(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        for start, buffer in pieces:
            self._check_inside(start, buffer.nbytes)
        if not self._blob.fill(pieces):
            raise FormatError(f"{self.name} ends inside a chunk")

    def check(self, n_rows: int) -> None:
        """Read all of the shard's first `n_rows` rows, and its padding, and hold them to their checksums.

        Raises:
            ChecksumError: something is not what was written.
            FormatError: something is not there.
        """
        extents = [self._extent(i) for i in range(-(-n_rows // self.chunk_rows))]
        ends = [0, *(offset + n_bytes for offset, n_bytes in extents)]
        starts = [*(offset for offset, _ in extents), self._index_start]
        # Each chunk is read together with the padding before it; the last padding ends at the index.
        spans = [(end, stop - end) for end, stop in zip(ends, [*ends[1:], self._index_start], strict=True)]
        chunks_crc = 0
        for i, stored in enumerate(self._read_many(spans)):
            n_padding = starts[i] - ends[i]
            if n_padding >= PAGE or any(stored[:n_padding]):
                raise ChecksumError(f"{self.name} has something between its chunks, at byte {ends[i]}")
            if i < len(extents):
                self._decoded(i, stored[n_padding:])
                chunks_crc = crc32c(stored[-CRC_BYTES:], chunks_crc)
        if chunks_crc != self._record.chunks_crc:
            raise ChecksumError(f"{self.name} holds other values than those that were committed")

    def _decoded(self, i: int, stored: bytes, into: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        data = unsealed(stored)
        if data is None:
            raise self._damaged(i)
        whole = self.chunk_rows * self._array.row_bytes
        if into is None:
            check_room(whole, f"inner chunk {i} of {self.name}")
        return np.frombuffer(self._array.encoding.decode(data, whole, into), np.uint8)

    def _damaged(self, i: int) -> ChecksumError:
        return ChecksumError(f"inner chunk {i} of {self.name} is damaged: its bytes do not give its CRC-32C")

    def _read_index(self, n_chunks: int, record: ShardRecord) -> NDArray[np.uint64]:
        n_bytes = n_chunks * 16 + CRC_BYTES
        if self._index_start < 0:
            raise FormatError(f"{self.name} is too short: {record.n_bytes} bytes do not hold its index")
        check_room(n_bytes, f"the index of {self.name}")
        stored = self._blob.read(self._index_start, n_bytes)
        size = self._blob.n_bytes
        if size != record.n_bytes:
            raise ChecksumError(f"{self.name} has {size} bytes; {record.n_bytes} were committed")
        index = unsealed(stored)
        if len(stored) != n_bytes or index is None or crc32c(index) != record.index_crc:
            raise ChecksumError(f"the index of {self.name} is damaged")
        extents: NDArray[np.uint64] = np.frombuffer(index, "<u8").reshape(n_chunks, 2)
        _check_extents(extents, self._index_start, self.name)
        return extents

    def _extent(self, i: int) -> tuple[int, int]:
        offset, n_bytes = (int(n) for n in self._index[i])
        if offset == _MISSING:
            raise FormatError(f"inner chunk {i} of {self.name} is missing")
        whole = self.chunk_rows * self._array.row_bytes
        encoding = self._array.encoding
        if not encoding.least_bytes(whole) <= n_bytes - CRC_BYTES <= encoding.most_bytes(whole):
            raise FormatError(f"inner chunk {i} of {self.name} has {n_bytes} bytes, which cannot be its rows")
        return offset, n_bytes

    def _read_many(self, extents: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        for start, n_bytes in extents:
            self._check_inside(start, n_bytes)
        for (start, n_bytes), data in zip(extents, self._blob.read_many(extents), strict=True):
            if len(data) < n_bytes:
                raise FormatError(f"{self.name} ends at byte {start + len(data)}, inside a chunk")
            yield data

    def _check_inside(self, start: int, n_bytes: int) -> None:
        if start < 0 or n_bytes < 0 or start + n_bytes > self._record.n_bytes:
            raise FormatError(
                f"{self.name} ends at byte {self._record.n_bytes}, inside a chunk that its index has at byte "
                f"{start}"
            )
