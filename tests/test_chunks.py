"""Inner chunks that are read straight to where they are wanted: what comes, in how many calls, and damage."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture import local
from layertap.capture.chunks import Chunks
from layertap.capture.codecs import CODECS
from layertap.capture.local import LocalBlob
from layertap.capture.place import Blob
from layertap.capture.shard import Shard
from layertap.capture.store import shard_path

N_ROWS = 90
RNG = np.random.default_rng(0)
WHOLE = RNG.standard_normal((N_ROWS, 64, 32, 32)).astype(np.float32)  # inner chunks of whole pages
ODD = RNG.standard_normal((N_ROWS, 1001)).astype(np.float32)


def capture(path: Path, codec: str) -> lt.Run:
    return lt.record_dataset(
        lambda batch: {"whole": WHOLE[batch[:, 0]], "odd": ODD[batch[:, 0]]},
        (np.arange(N_ROWS)[:, None], np.arange(N_ROWS)),
        path,
        ["whole", "odd"],
        batch_size=8,
        memory="32MiB",
        codec=codec,
        writers=1,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chunks")
    for codec in CODECS:
        layout = capture(made / codec, codec).manifest.layout
        assert layout.chunk_rows(layout.taps[0]) == 2
        assert layout.block_rows > 16
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[memoryview]]:
    """Buffers of every preadv."""
    made: list[list[memoryview]] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], at: int) -> int:
        made.append(buffers)
        return real(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", preadv)
    return made


def shard_of(run: lt.Run, array: int, block: int = 0) -> Shard:
    layout = run.manifest.layout
    spec = layout.arrays[array]
    return Shard(run.place, shard_path(spec, block), spec, layout, run.record(block)[1][array])


def buffers_of(run: lt.Run, array: int, numbers: list[int]) -> list[tuple[int, np.ndarray]]:
    spec = run.manifest.layout.arrays[array]
    n_bytes = run.manifest.layout.chunk_rows(spec) * spec.row_bytes
    return [(number, np.full(n_bytes, 0xAB, np.uint8)) for number in numbers]


@pytest.mark.parametrize("array", [0, 1, 2])
@pytest.mark.parametrize("codec", CODECS)
def test_chunks_come_where_they_are_wanted_in_any_order(folder, codec, array):
    run = lt.open(folder / codec)
    spec = run.manifest.layout.arrays[array]
    last = run.manifest.layout.block_rows // run.manifest.layout.chunk_rows(spec) - 1
    with shard_of(run, array) as shard:
        for numbers in ([], [0], list(range(last + 1)), [last, 0, last // 2], [0, 0]):
            wanted = buffers_of(run, array, numbers)
            shard.fill([(number, buffer.data) for number, buffer in wanted])
            for (_, buffer), expected in zip(wanted, shard.chunks(numbers), strict=True):
                assert buffer.tobytes() == expected.tobytes()


@pytest.mark.parametrize("array", [0, 1])
def test_chunks_that_follow_each_other_are_one_call_straight_into_their_targets(folder, calls, array):
    run = lt.open(folder / "none")
    with shard_of(run, array) as shard:
        n_chunks = int(np.count_nonzero(shard._index[:, 0] != 2**64 - 1))
        wanted = buffers_of(run, array, list(range(n_chunks)))
        shard.fill([(number, buffer.data) for number, buffer in wanted])
        assert len(calls) == 1
        into = {np.frombuffer(buffer, np.uint8).ctypes.data for buffer in calls[0]}
        assert into >= {buffer.ctypes.data for _, buffer in wanted}
        rest = sum(buffer.nbytes for buffer in calls[0]) - sum(buffer.nbytes for _, buffer in wanted)
        assert rest <= 4096 * n_chunks
        calls.clear()
        if n_chunks > 3:
            shard.fill([(number, buffers_of(run, array, [number])[0][1].data) for number in (0, 2, 3)])
            assert len(calls) == 2


@pytest.mark.parametrize("most", [1, 3, 5000])
def test_reads_that_end_early_are_gone_on_with(folder, monkeypatch, most):
    real = os.preadv
    monkeypatch.setattr(local, "_IOV_MAX", 3)
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, at: real(fd, [memoryview(buffers[0])[: most * 1009]], at)
    )
    run = lt.open(folder / "none")
    assert run["whole"][3:20].tobytes() == WHOLE[3:20].tobytes()
    assert run["odd"][...].tobytes() == ODD.tobytes()


def test_a_system_without_such_calls_and_a_place_of_another_kind_read_the_same(folder, monkeypatch):
    monkeypatch.setattr(local, "_HAS_PREADV", False)
    run = lt.open(folder / "none")
    assert run["whole"][...].tobytes() == WHOLE.tobytes()
    chunks, target = Chunks(run, [0, 1], 0), np.empty((3, ODD[0].nbytes), np.uint8)
    chunks.rows(1, np.array([80, 3, 4]), target)
    assert target.tobytes() == ODD[[80, 3, 4]].tobytes()


def test_a_file_that_ends_early_fills_nothing_more(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    for fill in (LocalBlob.fill, Blob.fill):
        blob = LocalBlob(tmp_path / "f")
        first, second = bytearray(10), bytearray(10)
        assert fill(blob, [(90, memoryview(first))])
        assert first == bytes(range(90, 100))
        assert not fill(blob, [(90, memoryview(first)), (100, memoryview(second))])
        assert not fill(blob, [(95, memoryview(first))])
        assert not fill(blob, [(200, memoryview(first))])
        assert fill(blob, [])
        blob.close()


def test_a_member_of_a_zip_file_ends_where_it_ends(folder, tmp_path):
    blob = lt.open(lt.pack(folder / "none", tmp_path / "run.zip")).place.blob("zarr.json")
    whole = bytearray(blob.n_bytes)
    assert blob.fill([(0, memoryview(whole))])
    assert whole == (folder / "none" / "zarr.json").read_bytes()
    assert not blob.fill([(1, memoryview(whole))]), "those are another member's bytes"


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_is_found_wherever_whole_chunks_are_read(tmp_path, codec):
    run = capture(tmp_path / "s", codec)
    layout = run.manifest.layout
    with shard_of(run, 1) as shard:
        offset, n_bytes = shard._extent(0)
    file = tmp_path / "s" / shard_path(layout.arrays[1], 0)
    for at in (offset, offset + n_bytes // 2, offset + n_bytes - 1):  # the last is of the checksum
        data = bytearray(file.read_bytes())
        data[at] ^= 4
        file.write_bytes(data)
        for read in (
            lambda run: run["odd"][...],
            lambda run: run["odd"][: layout.block_rows],
            lambda run: Chunks(run, [1], 0).window(0, 0, np.arange(4), np.empty((4, 4004), np.uint8)),
            lambda run: Chunks(run, [1], 0).rows(0, np.arange(40), np.empty((40, 4004), np.uint8)),
        ):
            with pytest.raises(lt.ChecksumError, match=r"inner chunk 0 of .* is damaged"):
                read(lt.open(tmp_path / "s"))
        data[at] ^= 4
        file.write_bytes(data)
    assert lt.open(tmp_path / "s")["odd"][...].tobytes() == ODD.tobytes()


def test_what_was_read_whole_is_read_without_a_copy(folder, calls):
    run = lt.open(folder / "none")
    values = run["whole"][...]
    start, stop = values.ctypes.data, values.ctypes.data + values.nbytes
    read = [
        buffer.nbytes
        for buffers in calls
        for buffer in buffers
        if start <= np.frombuffer(buffer, np.uint8).ctypes.data < stop
    ]
    assert sum(read) == values.nbytes
    assert len(calls) == run.manifest.n_blocks


ROWS = {
    "one": [17],
    "none": [],
    "some": [3, 80, 41, 40],
    "one twice": [5, 5],
    "a chunk": [16, 17],
    "backwards": list(range(N_ROWS))[::-1],
    "all": list(range(N_ROWS)),
}


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("keep_bytes", [0, 10**9])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_come_in_the_order_in_which_they_are_asked_for(folder, codec, keep_bytes, check, rows):
    chunks = Chunks(lt.open(folder / codec, check=check), [1, 0, 2], keep_bytes)
    for array, values in enumerate((ODD, WHOLE, np.arange(N_ROWS))):
        target = np.full((len(rows), chunks.specs[array].row_bytes), 0xAB, np.uint8)
        if rows:
            chunks.rows(array, np.array(rows), target)
        assert target.tobytes() == values[rows].tobytes()


def test_a_decoded_chunk_is_kept_as_long_as_there_is_room(folder, monkeypatch):
    filled: list[Any] = []
    fill = Shard.fill
    monkeypatch.setattr(Shard, "fill", lambda self, wanted: (filled.append(wanted), fill(self, wanted))[1])
    run = lt.open(folder / "zstd")
    chunk_bytes = 2 * WHOLE[0].nbytes
    for keep_bytes, expected in ((0, 12), (chunk_bytes, 6), (3 * chunk_bytes, 3)):
        filled.clear()
        chunks = Chunks(run, [0], keep_bytes)
        target = np.empty((1, WHOLE[0].nbytes), np.uint8)
        for row in (0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5):
            chunks.rows(0, np.array([row]), target)
        assert len(filled) == expected
        assert chunks._own.n_bytes <= keep_bytes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
def test_a_forked_process_has_files_and_locks_of_its_own(folder):
    chunks = Chunks(lt.open(folder / "none"), [1], 10**6)
    target = np.empty((1, ODD[0].nbytes), np.uint8)
    chunks.rows(0, np.array([3]), target)
    own = chunks._own
    own.lock.acquire()  # as another thread may have at the fork
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # a deadlock is a death
        chunks.rows(0, np.array([4]), target)
        os._exit(0 if target.tobytes() == ODD[4].tobytes() and chunks._own is not own else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    own.lock.release()


def test_of_threads_that_want_a_chunk_at_once_one_reads_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lt.open(folder / "none")
    chunks = Chunks(run, [1], keep_bytes=2**24)
    length = chunks.chunk_rows[0]
    assert length > 4
    begun, real = [], Shard.fill

    def slowly(self: Shard, wanted: Any) -> None:
        begun.append(wanted)
        time.sleep(0.05)  # long enough for the others to come
        real(self, wanted)

    monkeypatch.setattr(Shard, "fill", slowly)
    targets = [np.empty((length, 4 * 1001), np.uint8) for _ in range(4)]
    wanted = np.arange(length)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda target: chunks.rows(0, wanted, target), targets))
    assert len(begun) == 1
    for target in targets:
        assert (target.view(np.float32) == ODD[:length]).all()
    assert not chunks._mine().turns
