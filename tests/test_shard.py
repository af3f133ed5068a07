"""Shards: what is written is read back, by us and by others, and damage is found."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import layertap as lt
import ml_dtypes
import numpy as np
import pytest
from layertap.capture import files
from layertap.capture.codecs import CODECS, Codec, check_codec
from layertap.capture.dtypes import DTYPES, EXPONENT_BITS, FLOAT8_E4M3FN, dtype_name, held_as, named_dtype
from layertap.capture.errors import ChecksumError, FormatError, PlanError, StoreError
from layertap.capture.files import PAGE, PART, STAGING_BYTES, DurableFile, part, publish, write_file
from layertap.capture.layout import CHUNK_BYTES, ArraySpec, Layout, aligned, array_view
from layertap.capture.local import LocalPlace
from layertap.capture.shard import Shard, ShardRecord, count_nonfinite, write_shard

FLOATS = tuple(dtype for dtype in EXPONENT_BITS if dtype != FLOAT8_E4M3FN)  # which has no infinity


def spec(shape: tuple[int, ...], dtype: Any = np.uint8, codec: str = "none", name: str = "a") -> ArraySpec:
    dims = ("row", *(f"d{i}" for i in range(len(shape))))
    return ArraySpec(name, f"taps/{name}/values", dims, shape, np.dtype(dtype), codec)


def layout_of(array: ArraySpec, step_rows: int, steps: int) -> Layout:
    # A neighbour on each side, so that an offset that is wrong shows.
    return Layout(
        (spec((3,), np.int16, name="before"), array, spec((5,), name="after")),
        (),
        step_rows,
        steps * step_rows,
    )


def random_bits(array: ArraySpec, n_rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if array.dtype == np.bool_:
        return rng.integers(0, 2, (n_rows, *array.shape)).astype(np.bool_)
    # Half of it zeros, as in feature maps, so that codecs have something to do.
    raw = rng.integers(0, 256, n_rows * array.row_bytes, np.uint8)
    raw[rng.random(raw.size) < 0.5] = 0
    return raw.view(array.dtype).reshape(n_rows, *array.shape)


def slabs_of(layout: Layout, index: int, values: np.ndarray) -> list[memoryview]:
    """Lay `values` into slabs at page boundaries, as the engine's memory is; the rest is rubbish."""
    import mmap

    slabs = []
    for step in range(layout.steps_per_block):
        memory = np.frombuffer(mmap.mmap(-1, layout.slab_bytes), np.uint8)
        memory[:] = 0xAB
        rows = values[step * layout.step_rows : (step + 1) * layout.step_rows]
        array_view(layout, index, memory)[: len(rows)] = rows
        memory.flags.writeable = False
        slabs.append(memory.data)
    return slabs


def write(path: Path, array: ArraySpec, layout: Layout, values: np.ndarray) -> ShardRecord:
    slabs = slabs_of(layout, layout.arrays.index(array), values)
    file = DurableFile(path)
    record = write_shard(file, array, layout, slabs, len(values))
    file.settle()
    publish(path)
    return record


def opened(path: Path, array: ArraySpec, layout: Layout, record: ShardRecord) -> Shard:
    return Shard(LocalPlace(path.parent), path.name, array, layout, record)


def read(path: Path, array: ArraySpec, layout: Layout, record: ShardRecord, n_rows: int) -> np.ndarray:
    rows = layout.chunk_rows(array)
    with opened(path, array, layout, record) as shard:
        chunks = list(shard.chunks(range(-(-n_rows // rows))))
    return np.concatenate(chunks).view(array.dtype).reshape(-1, *array.shape)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


# (shape of a row in bytes, rows of a step, steps of a block)
CUTS = {
    "chunk is a part of a slab, whole pages": ((64 * 1024,), 32, 3),
    "chunk is a part of a slab, odd rows": ((60_001,), 16, 3),
    "chunk is one slab": ((CHUNK_BYTES // 8,), 8, 4),
    "chunk is several slabs, whole pages": ((4096,), 16, 8),
    "chunk is several slabs, pages across slabs": ((256,), 8, 4),
    "chunk is several slabs, odd rows": ((37,), 5, 12),
    "chunk is the block": ((4096,), 2, 1),
    "rows larger than a chunk": ((CHUNK_BYTES + PAGE,), 2, 2),
    "rows larger than a chunk, odd": ((CHUNK_BYTES + 1,), 2, 2),
    "rows of one byte": ((), 3, 2),
}
cuts = pytest.mark.parametrize(("shape", "step_rows", "steps"), CUTS.values(), ids=CUTS)


@cuts
@pytest.mark.parametrize("codec", CODECS)
def test_every_row_reads_back(
    tmp_path: Path, shape: tuple[int, ...], step_rows: int, steps: int, codec: str
) -> None:
    array = spec(shape, codec=codec)
    layout = layout_of(array, step_rows, steps)
    block = layout.block_rows
    for n_rows in sorted({1, min(step_rows + 1, block), block - 1, block} - {0}):
        values = random_bits(array, n_rows, seed=n_rows)
        path = tmp_path / f"c.{n_rows}.0"
        record = write(path, array, layout, values)
        back = read(path, array, layout, record, n_rows)
        assert same_bits(back[:n_rows], values)
        assert not back[n_rows:].any(), "what the last inner chunk lacks is zeros"
        assert record.n_bytes == path.stat().st_size


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_type_reads_back_bit_for_bit(tmp_path: Path, dtype: np.dtype, codec: str) -> None:
    array = spec((4, 9), dtype, codec)
    layout = layout_of(array, 5, 3)
    values = random_bits(array, 13)
    record = write(tmp_path / "c.0.0.0", array, layout, values)
    assert same_bits(read(tmp_path / "c.0.0.0", array, layout, record, 13)[:13], values)


def test_chunks_behind_the_last_row_are_not_there(tmp_path: Path) -> None:
    array = spec((CHUNK_BYTES,))
    layout = layout_of(array, 2, 2)
    record = write(tmp_path / "c", array, layout, random_bits(array, 2))
    assert record.n_bytes < 3 * CHUNK_BYTES
    with opened(tmp_path / "c", array, layout, record) as shard:
        list(shard.chunks([1]))
        with pytest.raises(FormatError, match=r"chunk 2 .* is missing"):
            list(shard.chunks([2]))


def test_a_window_is_read_by_itself(tmp_path: Path) -> None:
    array = spec((40,))
    layout = layout_of(array, 4, 2)
    values = random_bits(array, 8)
    record = write(tmp_path / "c", array, layout, values)
    with opened(tmp_path / "c", array, layout, record) as shard:
        assert next(shard.windows([(0, 43, 50)])) == values.tobytes()[43:50]
        with pytest.raises(FormatError, match="shorter"):
            list(shard.windows([(0, 0, 8 * 40 + 1)]))


def test_compressed_zeros_are_small(tmp_path: Path) -> None:
    for codec in ("lz4", "zstd"):
        array = spec((4096,), np.float32, codec)
        layout = layout_of(array, 8, 4)
        record = write(tmp_path / codec, array, layout, np.zeros((32, 4096), np.float32))
        assert record.n_bytes < 32 * 4096 * 4 / 20


# Ways of writing


@cuts
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_the_bytes_do_not_depend_on_how_they_were_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    step_rows: int,
    steps: int,
    codec: str,
) -> None:
    array = spec(shape, codec=codec)
    layout = layout_of(array, step_rows, steps)
    values = random_bits(array, max(1, layout.block_rows - 1))
    record = write(tmp_path / "direct", array, layout, values)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_DIRECT", 0)
        assert write(tmp_path / "cached", array, layout, values) == record
    with monkeypatch.context() as patch:
        patch.setattr(files, "_DIRECT", 0)
        patch.setattr(files, "_HAS_WRITEV", False)
        assert write(tmp_path / "written", array, layout, values) == record
    with monkeypatch.context() as patch:
        patch.setattr(files, "_HAS_WRITEV", False)
        assert write(tmp_path / "direct-written", array, layout, values) == record
    with monkeypatch.context() as patch:
        patch.setattr(files, "_IOV_MAX", 3)
        assert write(tmp_path / "in-threes", array, layout, values) == record
    expected = (tmp_path / "direct").read_bytes()
    for name in ("cached", "written", "direct-written", "in-threes"):
        assert (tmp_path / name).read_bytes() == expected, name


def at_most(n_bytes: int, calls: list[int]) -> Any:
    """Return a writev that writes no more than `n_bytes` at a time, and notes each call."""
    real = os.writev

    def writev(fd: int, buffers: list[Any]) -> int:
        left, some = n_bytes, []
        for buffer in buffers:
            some.append(memoryview(buffer)[:left])
            left -= some[-1].nbytes
            if not left:
                break
        calls.append(real(fd, some))
        return calls[-1]

    return writev


@pytest.mark.parametrize("shape", [(37,), (4096,), (256,)], ids=["odd", "pages", "quarter pages"])
@pytest.mark.parametrize("step", [1, 13, 4096, 5000], ids=lambda n: f"{n} bytes at a time")
def test_partial_writes_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], step: int
) -> None:
    array = spec(shape)
    layout = layout_of(array, 2, 2)
    values = random_bits(array, 4)
    record = write(tmp_path / "whole", array, layout, values)
    calls: list[int] = []
    monkeypatch.setattr(files, "_DIRECT", 0)
    monkeypatch.setattr(os, "writev", at_most(step, calls))
    assert write(tmp_path / "parts", array, layout, values) == record
    assert sum(calls) == record.n_bytes
    assert max(calls) <= step
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


needs_direct = pytest.mark.skipif(not files._DIRECT, reason="this system has no direct writing")


def is_direct(fd: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & files._DIRECT)


@pytest.fixture
def direct_folder(tmp_path: Path) -> Path:
    """A folder on a file system that has direct writing."""
    import mmap

    fd = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        files.fcntl.fcntl(fd, files.fcntl.F_SETFL, files._DIRECT)
        os.write(fd, mmap.mmap(-1, PAGE))
    except OSError:
        pytest.skip("the file system of the temporary folder has no direct writing")
    finally:
        os.close(fd)
        (tmp_path / "probe").unlink()
    return tmp_path


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Every writev: whether it was direct, and its bytes."""
    seen: list[tuple[bool, int]] = []
    real = os.writev

    def writev(fd: int, buffers: list[Any]) -> int:
        direct = is_direct(fd)
        n = real(fd, buffers)
        seen.append((direct, n))
        return n

    monkeypatch.setattr(os, "writev", writev)
    return seen


@needs_direct
def test_whole_pages_go_past_the_cache_and_what_is_left_of_a_page_through_it(
    direct_folder: Path, writes: list[tuple[bool, int]]
) -> None:
    array = spec((64 * 1024,))
    layout = layout_of(array, 32, 2)  # chunks of 8 rows
    record = write(direct_folder / "c", array, layout, random_bits(array, 60))
    index_bytes = 8 * 16 + 4
    # Seven whole chunks as they lie, the short one staged, the page of its checksum and the index.
    assert writes == [
        (True, 7 * (CHUNK_BYTES + PAGE)),
        (True, CHUNK_BYTES),
        (False, PAGE + index_bytes),
    ]
    assert sum(n for _, n in writes) == record.n_bytes


@needs_direct
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_odd_rows_and_encoded_ones_are_staged_past_the_cache(
    direct_folder: Path, writes: list[tuple[bool, int]], codec: str
) -> None:
    array = spec((100_001,), codec=codec)
    layout = layout_of(array, 10, 3)
    record = write(direct_folder / "c", array, layout, random_bits(array, 30))
    *full, last, rest = writes
    assert full
    assert all(call == (True, STAGING_BYTES) for call in full)
    assert last == (True, record.n_bytes % STAGING_BYTES // PAGE * PAGE)
    assert rest == (False, record.n_bytes % PAGE)


@needs_direct
def test_what_is_small_goes_through_the_cache_in_one_call(
    tmp_path: Path, writes: list[tuple[bool, int]]
) -> None:
    sizes = []
    for array in (spec((1000,)), spec((4096,), codec="zstd")):
        layout = layout_of(array, 8, 2)
        sizes.append(write(tmp_path / array.codec, array, layout, random_bits(array, 8)).n_bytes)
    assert writes == [(False, n) for n in sizes]


@needs_direct
def test_a_thread_stages_all_its_files_in_one_buffer_and_two_open_files_in_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = files.mmap.mmap

    def counted(fd: int, n_bytes: int) -> Any:
        made.append(n_bytes)
        return real(fd, n_bytes)

    monkeypatch.setattr(files, "_staging", files._Staging())
    monkeypatch.setattr(files.mmap, "mmap", counted)
    data = np.random.default_rng(0).integers(0, 256, 3 * STAGING_BYTES + 5, np.uint8).data
    for i in range(4):
        with DurableFile(tmp_path / f"{i}") as file:
            file.write([data])
        file.settle()
    assert made == [STAGING_BYTES]
    with DurableFile(tmp_path / "a") as a, DurableFile(tmp_path / "b") as b:
        for start in range(0, len(data), 1000):
            a.write([data[start : start + 1000]])
            b.write([data[start : start + 1000]])
    a.settle()
    b.settle()
    assert made == [STAGING_BYTES] * 2
    for name in "3ab":
        assert part(tmp_path / name).read_bytes() == bytes(data)


@needs_direct
@pytest.mark.parametrize("n_bytes", [1, PAGE, 65535, 65536, STAGING_BYTES, STAGING_BYTES + 1, 3_000_001])
@pytest.mark.parametrize("step", [7001, 4096, 300_000, 600_000])
def test_whatever_is_appended_is_what_the_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_bytes: int, step: int
) -> None:
    data = np.random.default_rng(n_bytes).integers(0, 256, n_bytes, np.uint8).data
    buffers = [data[start : start + step] for start in range(0, n_bytes, step)]
    real = os.writev

    def writev_of(limit: int, refused: bool) -> Any:
        def writev(fd: int, some: list[Any]) -> int:
            if is_direct(fd) and refused:
                raise OSError(errno.EINVAL, "Invalid argument")
            first = memoryview(some[0])
            return real(fd, [first[:limit]] if first.nbytes > limit else some)

        return writev

    for limit, refused in ((n_bytes, False), (8192, False), (n_bytes, True), (1 << 15, True)):
        monkeypatch.setattr(os, "writev", writev_of(limit, refused))
        with DurableFile(tmp_path / "c") as file:
            for buffer in buffers:
                file.write([buffer])
            assert file.n_bytes == n_bytes
        file.settle()
        assert part(tmp_path / "c").read_bytes() == bytes(data)


@needs_direct
def test_a_full_disk_under_the_staging_buffer_is_raised_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "writev", fail_with(OSError(errno.ENOSPC, "No space left on device")))
    for n_bytes in (100, STAGING_BYTES + 1):  # at the end, and in between
        with pytest.raises(OSError, match="No space left"), DurableFile(tmp_path / "c") as file:
            file.write([bytes(n_bytes)])
        assert not list(tmp_path.iterdir())


@needs_direct
@pytest.mark.parametrize("shape", [(4096,), (64 * 1024,)])
def test_a_file_system_that_refuses_direct_writes_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    array = spec(shape)
    layout = layout_of(array, 16, 2)
    values = random_bits(array, 31)
    record = write(tmp_path / "willing", array, layout, values)
    real, refused = os.writev, 0

    def writev(fd: int, buffers: list[Any]) -> int:
        nonlocal refused
        if is_direct(fd):
            refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers)

    monkeypatch.setattr(os, "writev", writev)
    assert write(tmp_path / "refusing", array, layout, values) == record
    assert refused == 1, "a file that was refused once is not tried again"
    assert (tmp_path / "refusing").read_bytes() == (tmp_path / "willing").read_bytes()
    import fcntl

    real_fcntl = fcntl.fcntl

    def no_direct(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & files._DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_fcntl(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", no_direct)
    before = refused
    assert write(tmp_path / "without", array, layout, values) == record
    assert refused == before
    assert (tmp_path / "without").read_bytes() == (tmp_path / "willing").read_bytes()


@needs_direct
def test_a_direct_write_that_stops_inside_a_page_is_gone_on_with_through_the_cache(
    direct_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = spec((4096,))
    layout = layout_of(array, 4, 2)
    values = random_bits(array, 8)
    record = write(direct_folder / "whole", array, layout, values)
    real, short = os.writev, 0

    def writev(fd: int, buffers: list[Any]) -> int:
        nonlocal short
        if not is_direct(fd):
            return real(fd, buffers)
        # What a file system does that stops inside a page.
        short += 1
        files.fcntl.fcntl(fd, files.fcntl.F_SETFL, 0)
        n = real(fd, [memoryview(buffers[0])[:1000]])
        files.fcntl.fcntl(fd, files.fcntl.F_SETFL, files._DIRECT)
        return n

    monkeypatch.setattr(os, "writev", writev)
    assert write(direct_folder / "short", array, layout, values) == record
    assert short == 1
    assert (direct_folder / "short").read_bytes() == (direct_folder / "whole").read_bytes()


# Errors while writing


def fail_with(error: BaseException) -> Any:
    def fail(*args: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("step", ["writev", "fdatasync", "posix_fadvise"])
@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="this system syncs otherwise")
def test_an_error_while_writing_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    array = spec((37,))
    layout = layout_of(array, 4, 2)
    monkeypatch.setattr(os, step, fail_with(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "c", array, layout, random_bits(array, 8))
    assert not list(tmp_path.iterdir())


def test_an_error_inside_the_block_leaves_no_file_and_no_open_descriptor(tmp_path: Path) -> None:
    file = DurableFile(tmp_path / "c")

    def fail() -> None:
        with file:
            file.write([b"some"])
            fds.append(file._fd)
            assert [entry.name for entry in tmp_path.iterdir()] == [f"c{PART}"]
            raise RuntimeError("mine")

    fds: list[int] = []
    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[0])


def test_a_file_that_is_not_settled_is_discarded_whole(tmp_path: Path) -> None:
    with DurableFile(tmp_path / "c") as file:
        file.write([b"some"])
    fd = file._fd
    file.discard()
    file.discard()
    file.settle()
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_an_error_of_direct_writing_that_is_not_its_alignment_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = spec((4096,))
    layout = layout_of(array, 4, 2)
    monkeypatch.setattr(os, "writev", fail_with(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path / "c", array, layout, random_bits(array, 8))
    assert not list(tmp_path.iterdir())


def test_invalid_arguments_without_direct_writing_are_an_error_and_not_an_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_DIRECT", 0)
    monkeypatch.setattr(os, "writev", fail_with(OSError(errno.EINVAL, "Invalid argument")))
    with pytest.raises(OSError, match="Invalid argument"), DurableFile(tmp_path / "c") as file:
        file.write([b"x"], direct=True)


def test_a_file_has_its_temporary_name_until_it_is_published(tmp_path: Path) -> None:
    path = tmp_path / "c.0.0"
    with DurableFile(path) as file:
        file.write([b"", b"ab", bytearray(b"c"), memoryview(b"xdx")[1:2], b""])
        file.write([])
    file.settle()
    file.settle()
    assert file.n_bytes == 4
    assert not path.exists()
    assert part(path).read_bytes() == b"abcd"
    publish(path)
    assert path.read_bytes() == b"abcd"
    assert not part(path).exists()


def test_what_a_killed_run_left_under_the_temporary_name_is_written_over(tmp_path: Path) -> None:
    part(tmp_path / "c").write_bytes(b"much longer than what follows")
    write_file(tmp_path / "c", b"new")
    assert (tmp_path / "c").read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


# Damage


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(37,), (256,)], ids=["odd", "pages"])
def test_any_flipped_byte_is_found_or_harmless(tmp_path: Path, shape: tuple[int, ...], codec: str) -> None:
    array = spec(shape, codec=codec)
    layout = layout_of(array, 4, 4)
    values = random_bits(array, 15)
    path = tmp_path / "c"
    record = write(path, array, layout, values)
    whole = path.read_bytes()
    expected = read(path, array, layout, record, 15)
    pages = codec == "none" and shape == (256,)
    # Of a page that a checksum begins, the zeros behind it belong to nothing.
    padding = range(4096 + 4, 8192) if pages else range(0)
    assert not any(whole[padding.start : padding.stop])
    step = 1 if len(whole) < 2000 else 7
    positions = {*range(0, len(whole), step), *range(4090, 4110), *range(len(whole) - 40, len(whole))}
    for position in sorted(p for p in positions if 0 <= p < len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        if position in padding:
            assert same_bits(read(path, array, layout, record, 15), expected)
        else:
            with pytest.raises((ChecksumError, FormatError)):
                read(path, array, layout, record, 15)


@pytest.mark.parametrize("codec", CODECS)
def test_a_chunk_in_another_ones_place_is_found_by_the_index(tmp_path: Path, codec: str) -> None:
    array = spec((CHUNK_BYTES // 2,), codec=codec)
    layout = layout_of(array, 2, 2)
    path = tmp_path / "c"
    record = write(path, array, layout, random_bits(array, 4))
    data = bytearray(path.read_bytes())
    index = np.frombuffer(data, "<u8", count=4, offset=len(data) - 4 - 32).reshape(2, 2)
    index[[0, 1]] = index[[1, 0]]
    from layertap.capture.checksum import sealed

    path.write_bytes(bytes(data[: -4 - 32]) + sealed(index.tobytes()))
    with pytest.raises(ChecksumError, match="index"):
        opened(path, array, layout, record)


@pytest.mark.parametrize("change", [-1, 1, -30])
def test_a_file_of_another_length_is_found(tmp_path: Path, change: int) -> None:
    array = spec((37,))
    layout = layout_of(array, 4, 2)
    path = tmp_path / "c"
    record = write(path, array, layout, random_bits(array, 8))
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * change if change > 0 else data[:change])
    with pytest.raises(ChecksumError, match=f"{record.n_bytes} were committed"):
        opened(path, array, layout, record)


def test_a_shard_that_is_too_short_for_its_index_is_no_shard(tmp_path: Path) -> None:
    array = spec((37,))
    layout = layout_of(array, 4, 2)
    path = tmp_path / "c"
    record = write(path, array, layout, random_bits(array, 8))
    path.write_bytes(b"12")
    with pytest.raises(FormatError, match="too short"):
        opened(path, array, layout, replace(record, n_bytes=2))


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    array = spec((37,))
    layout = layout_of(array, 4, 2)
    with pytest.raises(StoreError, match=r"c\.0\.0 was committed and cannot be opened"):
        opened(tmp_path / "c.0.0", array, layout, ShardRecord(100, 0, 0, 0, 0))


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("n_bytes", [0, 999, 1001, 2000])
def test_a_chunk_that_decodes_to_another_length_is_refused(codec: str, n_bytes: int) -> None:
    codec_ = Codec(codec, 1)
    encoded = bytes(codec_.encode(bytes(1000)))
    assert bytes(codec_.decode(encoded, 1000)) == bytes(1000)
    with pytest.raises(FormatError):
        codec_.decode(encoded, n_bytes)
    with pytest.raises(FormatError):
        codec_.decode(b"rubbish and more rubbish", 1000)


def test_a_chunk_without_a_codec_of_another_length_is_refused() -> None:
    with pytest.raises(FormatError, match="3 bytes and should hold 4"):
        Codec("none", 1).decode(b"abc", 4)


def test_nothing_is_copied_without_a_codec() -> None:
    data = memoryview(b"abc")
    assert Codec("none", 1).encode(data) is data


def test_an_unknown_codec_is_refused_with_those_that_there_are() -> None:
    assert check_codec("lz4") == "lz4"
    with pytest.raises(PlanError, match="none, lz4, zstd"):
        check_codec("gzip")


# Element types


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items(), ids=DTYPES)
def test_a_type_and_its_name_are_one_to_one(name: str, dtype: np.dtype) -> None:
    assert dtype_name(dtype) == name
    assert named_dtype(name) == dtype


@pytest.mark.parametrize("dtype", ["S3", "U3", "O", "datetime64[s]", ml_dtypes.float8_e4m3])
def test_a_type_that_no_store_holds_is_refused_with_those_it_holds(dtype: Any) -> None:
    with pytest.raises(FormatError, match="bfloat16"):
        dtype_name(np.dtype(dtype))


@pytest.mark.parametrize("name", ["float8", "", None, ["uint8"], {"name": "uint8"}])
def test_an_unknown_type_name_is_refused(name: Any) -> None:
    with pytest.raises(FormatError, match="unknown data type"):
        named_dtype(name)


# Values that are not finite


def special_bits(dtype: np.dtype) -> dict[str, int]:
    sign, exponent = 1 << (8 * dtype.itemsize - 1), EXPONENT_BITS[dtype]
    mantissa = ~(sign | exponent) & (2 * sign - 1)
    low_exponent_bit = mantissa + 1
    return {
        "+0": 0,
        "-0": sign,
        "smallest denormal": 1,
        "-smallest denormal": sign | 1,
        "largest denormal": mantissa,
        "largest": exponent - low_exponent_bit | mantissa,
        "-largest": sign | exponent - low_exponent_bit | mantissa,
        "inf": exponent,
        "-inf": sign | exponent,
        "signalling NaN": exponent | 1,
        "-signalling NaN": sign | exponent | 1,
        "NaN": exponent | mantissa,
        "-NaN": sign | exponent | mantissa,
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_each_special_value_is_counted_as_numpy_counts_it(dtype: np.dtype) -> None:
    unsigned = np.dtype(f"u{dtype.itemsize}")
    for name, bits in special_bits(dtype).items():
        for filler in (0, special_bits(dtype)["-largest"], special_bits(dtype)["largest"]):
            raw = np.full(9, filler, unsigned)
            raw[[2, 8]] = bits
            expected = 2 * ("NaN" in name), 2 * name.endswith("inf")
            assert count_nonfinite([raw.data.cast("B")], dtype) == expected, name
            values = raw.view(dtype)
            with np.errstate(invalid="ignore"):
                assert expected == (np.isnan(values).sum(), np.isinf(values).sum()), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_are_counted_as_numpy_counts_them_over_many_pieces(dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (5, 1000 * dtype.itemsize), np.uint8)
    raw[1] = 0
    values = raw.view(dtype)
    values[3, 7], values[3, 8], values[4, 0] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        expected = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    assert min(expected) > 0
    assert count_nonfinite([row.data for row in raw], dtype) == expected
    assert count_nonfinite([], dtype) == (0, 0)
    assert count_nonfinite([memoryview(b"")], dtype) == (0, 0)


def test_a_type_without_infinity_has_nan_alone() -> None:
    raw = np.arange(256, dtype=np.uint8)
    values = raw.view(FLOAT8_E4M3FN).astype(np.float32)
    assert count_nonfinite([raw.data], FLOAT8_E4M3FN) == (int(np.isnan(values).sum()), 0) == (2, 0)
    assert count_nonfinite([raw[:127].data], FLOAT8_E4M3FN) == (0, 0)


@pytest.mark.parametrize("name", ["bool", "uint8", "int64"])
def test_what_is_no_float_has_none(name: str) -> None:
    raw = np.full(64, 0xFF, np.uint8)
    assert count_nonfinite([raw.data], DTYPES[name]) == (0, 0)


def test_the_record_counts_the_rows_and_not_what_lies_behind_them(tmp_path: Path) -> None:
    array = spec((3,), np.float32)
    layout = layout_of(array, 4, 2)
    values = np.zeros((8, 3), np.float32)
    values[2, 1], values[4, 0], values[4, 2], values[7, 0] = np.nan, np.inf, -np.inf, np.nan
    slabs = slabs_of(layout, 1, values)
    file = DurableFile(tmp_path / "c")
    record = write_shard(file, array, layout, slabs, 5)
    file.settle()
    assert (record.n_nan, record.n_inf) == (1, 2)


# Other readers


def step_bytes(dtype: np.dtype) -> int:
    return sum(aligned(4 * n * dtype.itemsize) for n in (3 * 5, 1500 * 5))


def capture(path: Path, dtype: np.dtype, codec: str) -> tuple[lt.Run, np.ndarray]:
    values = random_bits(spec((3, 5), dtype), 37)
    # What the first step and the writer keep, and two steps in each of three blocks.
    memory = 3 * 2 * (step := step_bytes(dtype)) + step
    memory += CHUNK_BYTES if codec == "none" else STAGING_BYTES + 2 * CHUNK_BYTES
    run = lt.record_dataset(
        lambda batch: {"a": batch, "wide": np.repeat(batch, 500, axis=1)},
        lt.ArraySource(values),
        path,
        ["a", "wide"],
        batch_size=4,
        memory=memory,
        codec=codec,
        writers=1,
    )
    assert run.manifest.n_blocks > 1
    return run, values


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_zarr_and_tensorstore_read_the_same_bits(tmp_path: Path, dtype: np.dtype, codec: str) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    run, values = capture(tmp_path / "run.zarr", dtype, codec)
    assert same_bits(run["a"][...], values)
    wide = np.repeat(values, 500, axis=1)
    group = run.zarr()
    for name, expected in (("a", values), ("wide", wide)):
        path = f"taps/{name}/values"
        if held_as(dtype) != dtype_name(dtype):
            expected = expected.view(held_as(dtype))
            assert group[path].attrs["layertap"] == {"dtype": dtype_name(dtype)}
        assert same_bits(np.asarray(group[path][...]), expected)
        assert same_bits(np.asarray(group[path][35:]), expected[35:])
        opened = tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(run.path / path)}}
        ).result()
        assert opened.domain.labels == run[name].dims
        assert same_bits(np.asarray(opened.read().result()), expected)
