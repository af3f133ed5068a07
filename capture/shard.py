"""Shards: the one file that holds a block of one array, in Zarr v3's `sharding_indexed` form.

A shard is its inner chunks back to back, each followed by the CRC-32C of its (encoded) bytes, and then an
index: offset and length of each inner chunk as little-endian uint64, both all ones for a chunk that is
not there, and the CRC-32C of the index. Nothing in that needs a copy where nothing is encoded: the kernel
gathers the rows straight from where they were captured. Inner chunks that are whole pages start at whole
pages (zeros fill the page that their checksum begins), which Zarr's index allows and direct writing needs.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .checksum import CRC_BYTES, crc32c, crc_bytes, unsealed
from .dtypes import EXPONENT_BITS, DType
from .errors import ChecksumError, FormatError, StoreError
from .files import PAGE, Bytes, DurableFile
from .layout import CHUNK_BYTES, ArraySpec, Layout, chunk_rows

_MISSING = 2**64 - 1
FLUSH_BYTES = 5 * 512 * 1024
MAX_BUFFERS = 1024  # that wait, of any size
_TAILS = 64  # pages for checksums that wait to be written
_COUNTED_BYTES = 64 * 1024  # values that are not finite are counted in pieces of this
ENCODER_BYTES = 1024 * 1024  # what zstd and Blosc allocate beside their output
_BUFFER_BYTES = 384  # a waiting buffer: the objects that Python and the kernel's list need for it


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
    path: Path, array: ArraySpec, layout: Layout, slabs: Sequence[memoryview], n_rows: int
) -> ShardRecord:
    """Write the first `n_rows` rows of a block of `array`, durable, under a temporary name.

    Args:
        path: the shard's final name; `files.publish` gives it.
        array: which array of `layout`.
        layout: how slabs are laid out.
        slabs: the block's slabs, in order, read-only.
        n_rows: rows of the block that exist; fewer than `layout.block_rows` in the last block alone. What
            its last inner chunk lacks is written as zeros.
    """
    chunk_length = layout.chunk_rows(array)
    chunk_bytes = chunk_length * array.row_bytes
    n_chunks = -(-n_rows // chunk_length)
    index = np.full((layout.block_rows // chunk_length, 2), _MISSING, "<u8")
    # Whole pages start at whole pages, so that they can bypass the page cache.
    pages = array.codec == "none" and chunk_bytes % PAGE == 0
    tails = memoryview(mmap.mmap(-1, min(n_chunks, _TAILS) * PAGE)) if pages else None
    offset = layout.offsets[layout.arrays.index(array)]
    n_nan = n_inf = position = chunks_crc = 0
    batch = _Batch()
    with DurableFile(path) as file:
        for i in range(n_chunks):
            last = min((i + 1) * chunk_length, n_rows)
            pieces = list(_pieces(array, offset, layout.step_rows, slabs, i * chunk_length, last))
            nan, inf = count_nonfinite(pieces, array.dtype)
            n_nan, n_inf = n_nan + nan, n_inf + inf
            data = _encoded(array, pieces, chunk_bytes)
            n_bytes = sum(memoryview(buffer).nbytes for buffer in data) + CRC_BYTES
            index[i] = position, n_bytes
            crc = crc_bytes(_crc_of(data))
            chunks_crc = crc32c(crc, chunks_crc)
            whole = tails is not None and (i + 1) * chunk_length <= n_rows
            if tails is not None:
                at = i % _TAILS
                if at == 0:
                    batch.write(file)  # the pages are taken again
                tail = tails[at * PAGE : (at + 1) * PAGE]
                tail[:CRC_BYTES] = crc
                position += chunk_bytes + PAGE
            else:
                tail = memoryview(crc)
                position += n_bytes
            batch.add(file, [*data, tail], direct=whole, flush=array.codec != "none")
        index_bytes = index.tobytes()
        index_crc = crc32c(index_bytes)
        batch.add(file, [index_bytes, crc_bytes(index_crc)], direct=False)
        batch.write(file)
        return ShardRecord(file.n_bytes, index_crc, chunks_crc, n_nan, n_inf)


def buffer_bytes(array: ArraySpec, step_rows: int, n_steps: int) -> int:
    """Return the most that `write_shard` holds beside the slabs, for a block of `n_steps` steps."""
    shard_bytes = array.row_bytes * step_rows * n_steps
    chunk_bytes = min(shard_bytes, max(array.row_bytes, CHUNK_BYTES))
    n_chunks = n_steps * (step_rows // chunk_rows(array.row_bytes, step_rows, 1))  # or fewer
    # What waits is written once there are so many buffers; one chunk may be made of more.
    waiting = _BUFFER_BYTES * (min(2 * n_chunks, MAX_BUFFERS) + n_steps) + 32 * n_chunks
    if array.codec == "none":
        return waiting + min(n_chunks, _TAILS) * PAGE + min(shard_bytes, 4 * _COUNTED_BYTES)
    # The chunk in one piece, what it becomes at worst, and that again cut to its length.
    encoding = 3 * chunk_bytes + min(ENCODER_BYTES, 128 * 1024 + 2 * chunk_bytes)
    return waiting + encoding + min(shard_bytes, FLUSH_BYTES)


class _Batch:
    """Buffers that wait to be written in one call."""

    def __init__(self) -> None:
        self._buffers: list[Bytes] = []
        self._direct = False
        self._n_bytes = 0

    def add(self, file: DurableFile, buffers: list[Bytes], *, direct: bool, flush: bool = False) -> None:
        if direct != self._direct:
            self.write(file)
            self._direct = direct
        self._buffers += buffers
        self._n_bytes += sum(memoryview(buffer).nbytes for buffer in buffers)
        if (flush and self._n_bytes >= FLUSH_BYTES) or len(self._buffers) >= MAX_BUFFERS:
            self.write(file)

    def write(self, file: DurableFile) -> None:
        file.write(self._buffers, direct=self._direct)
        self._buffers, self._n_bytes = [], 0


def _pieces(
    array: ArraySpec, offset: int, step_rows: int, slabs: Sequence[memoryview], first: int, stop: int
) -> Iterator[memoryview]:
    while first < stop:
        slab, row = divmod(first, step_rows)
        n_rows = min(stop - first, step_rows - row)
        start = offset + row * array.row_bytes
        yield slabs[slab][start : start + n_rows * array.row_bytes]
        first += n_rows


def _encoded(array: ArraySpec, pieces: list[memoryview], n_bytes: int) -> list[Bytes]:
    """Return the buffers of one inner chunk of `n_bytes` rows' bytes, without its checksum."""
    missing = n_bytes - sum(piece.nbytes for piece in pieces)
    buffers: list[Bytes] = [*pieces, bytes(missing)] if missing else list(pieces)
    if array.codec == "none":
        return buffers
    whole = buffers[0] if len(buffers) == 1 else b"".join(buffers)
    return [array.encoding.encode(whole)]


def _crc_of(buffers: Sequence[Bytes]) -> int:
    crc = 0
    for buffer in buffers:
        crc = crc32c(buffer, crc)
    return crc


def count_nonfinite(pieces: Sequence[memoryview], dtype: DType) -> tuple[int, int]:
    """Return how many values are NaN and how many are infinite; of complex numbers, each part counts."""
    if dtype.kind == "c":
        dtype = np.dtype(f"f{dtype.itemsize // 2}")
    exponent = EXPONENT_BITS.get(dtype)
    if exponent is None:
        return 0, 0
    n_nan = n_inf = 0
    # As integers, all that is not finite lies above everything finite of its sign: two reductions without a
    # temporary tell whether there is any, several times faster than isfinite().
    sign = 1 << (8 * dtype.itemsize - 1)
    signed, unsigned = np.dtype(f"i{dtype.itemsize}"), np.dtype(f"u{dtype.itemsize}")
    for piece in _cut(pieces, _COUNTED_BYTES):
        highest = np.frombuffer(piece, signed).max(initial=0)
        if highest >= exponent or np.frombuffer(piece, unsigned).max(initial=0) >= sign | exponent:
            # Not isnan(): ml_dtypes' warns of signalling NaNs.
            magnitude = np.frombuffer(piece, unsigned) & unsigned.type(sign - 1)
            n_nan += int(np.count_nonzero(magnitude > exponent))
            n_inf += int(np.count_nonzero(magnitude == exponent))
    return n_nan, n_inf


def _cut(pieces: Sequence[memoryview], n_bytes: int) -> Iterator[memoryview]:
    for piece in pieces:
        for start in range(0, piece.nbytes, n_bytes):
            yield piece[start : start + n_bytes]


class Shard:
    """A shard that was committed, open for reading; a context manager.

    Raises:
        StoreError: it cannot be opened.
        ChecksumError: it is not the file that was committed.
        FormatError: its index points outside it.
    """

    def __init__(self, path: Path, array: ArraySpec, layout: Layout, record: ShardRecord) -> None:
        self._fd = -1
        self.path = path
        self._array = array
        self._chunk_rows = layout.chunk_rows(array)
        self._record = record
        self._index_start = record.n_bytes - CRC_BYTES - 16 * (layout.block_rows // self._chunk_rows)
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise StoreError(f"{path} was committed and cannot be opened: {error.strerror}") from error
        try:
            self._index = self._read_index(layout.block_rows // self._chunk_rows, record)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def chunk(self, i: int) -> NDArray[np.uint8]:
        """Return the decoded bytes of inner chunk `i`, checked."""
        offset, n_bytes = self._extent(i)
        data = unsealed(self._read(offset, n_bytes))
        if data is None:
            raise ChecksumError(
                f"inner chunk {i} of {self.path} is damaged: its bytes do not give its CRC-32C"
            )
        decoded = self._array.encoding.decode(data, self._chunk_rows * self._array.row_bytes)
        return np.frombuffer(decoded, np.uint8)

    def check(self, n_rows: int) -> None:
        """Read all of the shard's first `n_rows` rows, and its padding, and hold them to their checksums.

        Raises:
            ChecksumError: something is not what was written.
            FormatError: something is not there.
        """
        chunks_crc = end = 0
        for i in range(-(-n_rows // self._chunk_rows)):
            offset, n_bytes = self._extent(i)
            self._check_padding(end, offset)
            self.chunk(i)
            chunks_crc = crc32c(self._read(offset + n_bytes - CRC_BYTES, CRC_BYTES), chunks_crc)
            end = offset + n_bytes
        self._check_padding(end, self._index_start)
        if chunks_crc != self._record.chunks_crc:
            raise ChecksumError(f"{self.path} holds other values than those that were committed")

    def _check_padding(self, start: int, stop: int) -> None:
        if not start <= stop < start + PAGE or any(self._read(start, stop - start)):
            raise ChecksumError(f"{self.path} has something between its chunks, at byte {start}")

    def window(self, i: int, start: int, stop: int) -> bytes:
        """Return bytes `start:stop` of inner chunk `i` of an array without a codec, *unchecked*."""
        offset, n_bytes = self._extent(i)
        if not 0 <= start <= stop <= n_bytes - CRC_BYTES:
            raise FormatError(f"inner chunk {i} of {self.path} is shorter than its rows")
        return self._read(offset + start, stop - start)

    def _read_index(self, n_chunks: int, record: ShardRecord) -> NDArray[np.uint64]:
        size = os.fstat(self._fd).st_size
        if size != record.n_bytes:
            raise ChecksumError(f"{self.path} has {size} bytes; {record.n_bytes} were committed")
        index_bytes = n_chunks * 16
        index = unsealed(self._read(size - index_bytes - CRC_BYTES, index_bytes + CRC_BYTES))
        if index is None or crc32c(index) != record.index_crc:
            raise ChecksumError(f"the index of {self.path} is damaged")
        return np.frombuffer(index, "<u8").reshape(n_chunks, 2)

    def _extent(self, i: int) -> tuple[int, int]:
        offset, n_bytes = (int(n) for n in self._index[i])
        if offset == _MISSING:
            raise FormatError(f"inner chunk {i} of {self.path} is missing")
        return offset, n_bytes

    def _read(self, offset: int, n_bytes: int) -> bytes:
        if offset < 0 or n_bytes < 0:
            raise FormatError(f"{self.path} is too short")
        data = os.pread(self._fd, n_bytes, offset)
        while len(data) < n_bytes:
            more = os.pread(self._fd, n_bytes - len(data), offset + len(data))
            if not more:
                raise FormatError(f"{self.path} ends at byte {offset + len(data)}, inside a chunk")
            data += more
        return data
