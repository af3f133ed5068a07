"""The engine between the model and the disk, by counts: copies, calls, files, memory, handles, order."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture import files, local, pipeline, store
from layertap.capture.files import PART
from layertap.capture.layout import ArraySpec, Layout, array_view
from layertap.capture.local import LocalPlace
from layertap.capture.pipeline import Pipeline
from layertap.capture.shard import ShardRecord, write_shard
from layertap.capture.store import Manifest, StoreWriter, committed_blocks

pytestmark = pytest.mark.skipif(not hasattr(os, "writev"), reason="counts POSIX calls")
needs_direct = pytest.mark.skipif(not files._DIRECT, reason="this system has no direct writing")


def spec(name: str, shape: tuple[int, ...], codec: str = "none") -> ArraySpec:
    dims = ("row", *(f"d{i}" for i in range(len(shape))))
    return ArraySpec(name, f"taps/{name}/values", dims, shape, np.dtype(np.float32), codec)


def open_pipeline(path: Path, *taps: ArraySpec, n_blocks: int, **options: Any) -> Pipeline:
    """Return a pipeline of blocks of two steps of four rows, its slots full of values."""
    layout = Layout(taps, (), 4, 8)
    manifest = Manifest(layout, 8 * n_blocks, {"taps": {tap.name: {} for tap in taps}})
    opened = Pipeline(
        StoreWriter.create(LocalPlace(path), manifest, None), (), **{"n_slots": 2, "n_writers": 1, **options}
    )
    rng = np.random.default_rng(0)
    for slab in opened.slabs:
        for i in range(len(taps)):
            view = array_view(layout, i, slab.memory)
            view[...] = rng.standard_normal(view.shape, np.float32)
    return opened


def put(opened: Pipeline, block: int) -> None:
    """Let the rows of a block pass."""
    for row in (8 * block, 8 * block + 4):
        opened.begin(row, 4)
        opened.end(row, 4)


PAGES, ODD = spec("pages", (64, 32, 32)), spec("odd", (999, 33))


def address(buffer: Any) -> tuple[int, int]:
    array = np.frombuffer(buffer, np.uint8)
    return array.__array_interface__["data"][0], array.nbytes


class Writes:
    """The buffers of every writev, as (address, bytes)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[tuple[int, int]]] = []
        real = os.writev

        def writev(fd: int, buffers: list[Any]) -> int:
            n = real(fd, buffers)
            self.calls.append([address(buffer) for buffer in buffers])
            return n

        monkeypatch.setattr(os, "writev", writev)

    def inside(self, memory: np.ndarray) -> int:
        """Return the bytes that came straight from `memory`."""
        start, size = address(memory)
        return sum(n for call in self.calls for at, n in call if start <= at < at + n <= start + size)


@pytest.mark.parametrize("tap", [PAGES, ODD], ids=lambda tap: tap.name)
@pytest.mark.parametrize("direct", [True, False])
def test_what_is_not_encoded_is_written_from_the_slot_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tap: ArraySpec, direct: bool
) -> None:
    if not direct:
        monkeypatch.setattr(files, "_DIRECT", 0)
    opened = open_pipeline(tmp_path / "s", tap, n_blocks=3, staging_bytes=256 * 1024)
    writes = Writes(monkeypatch)
    for block in range(3):
        put(opened, block)
    opened.close()
    copied = (
        direct and tap is ODD and files._DIRECT
    )  # what is no whole page goes by way of the staging buffer
    assert writes.inside(opened.memory) == (0 if copied else 3 * 8 * tap.row_bytes)
    if copied:
        large = {call[0] for call in writes.calls if call[0][1] == 256 * 1024}
        assert len(large) == 1, "one staging buffer for all shards of a writer"


def test_a_shard_of_whole_pages_takes_one_gathering_call_and_one_for_its_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_pipeline(tmp_path / "s", PAGES, n_blocks=1)
    writes = Writes(monkeypatch)
    put(opened, 0)
    opened.close()
    n_chunks = 8 // opened.layout.chunk_rows(PAGES)
    # The chunks' slabs and their checksums; the index and its checksum, staged; the commit record.
    assert len(writes.calls) == 3
    assert len(writes.calls[0]) == 2 * n_chunks


class Calls:
    """The system calls that touch files, in order."""

    NAMES = ("open", "close", "writev", "fdatasync", "fsync", "replace", "posix_fadvise")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, str]] = []
        self._paths: dict[int, str] = {}
        for name in self.NAMES:
            if hasattr(os, name):
                monkeypatch.setattr(os, name, self._noting(name, getattr(os, name)))

    def _noting(self, name: str, real: Any) -> Any:
        def call(first: Any, *rest: Any) -> Any:
            result = real(first, *rest)
            if name == "open":
                self._paths[result] = str(first)
            path = self._paths.get(first, "?") if isinstance(first, int) else str(first)
            self.seen.append((name, path))
            return result

        return call


def test_a_block_takes_a_fixed_number_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taps = [spec(f"tap{i}", (8, 8), codec) for i, codec in enumerate(["none", "zstd", "lz4"])]
    opened = open_pipeline(tmp_path / "s", *taps, n_blocks=5)
    counts = []
    for block in range(5):
        with monkeypatch.context() as patch:
            calls = Calls(patch)
            put(opened, block)
            wait_for_commit(opened, block)
            counts.append(Counter(name for name, _ in calls.seen))
    opened.close()
    # Three shards and the record; each in a folder that is opened and synced.
    expected = {
        "writev": 4,
        "fdatasync": 4,
        "posix_fadvise": 4,
        "replace": 4,
        "fsync": 4,
        "open": 8,
        "close": 8,
    }
    assert counts == [expected] * 5
    assert len(list((tmp_path / "s" / "taps").rglob("c.*"))) == 3 * 5


def wait_for_commit(opened: Pipeline, block: int) -> None:
    with opened._lock:
        assert opened._lock.wait_for(lambda: opened.stages.n_rows == 8 * (block + 1), timeout=60)


def test_every_shard_and_every_name_is_durable_before_the_record_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taps = [spec(f"tap{i}", (n,)) for i, n in enumerate((16, 1000, 40_000))]
    opened = open_pipeline(tmp_path / "s", *taps, n_blocks=1, n_writers=2)
    calls = Calls(monkeypatch)
    put(opened, 0)
    opened.close()
    names = [name for name, _ in calls.seen if name in ("fdatasync", "replace", "fsync")]
    assert names == ["fdatasync"] * 3 + ["replace"] * 3 + ["fsync"] * 3 + ["fdatasync", "replace", "fsync"]
    record = calls.seen.index(("open", f"{tmp_path / 's' / 'commits' / 'c.0.0'}{PART}"))
    assert sum(name == "fsync" for name, _ in calls.seen[:record]) == 3
    last: dict[str, str] = {}
    for name, path in calls.seen:  # what is synced was written before, and nothing is written after
        assert name != "fdatasync" or last[path] == "writev", path
        if name in ("open", "writev", "fdatasync"):
            assert last.get(path) != "fdatasync", path
            last[path] = name


def n_handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def n_records() -> int:
    return sum(type(thing) is ShardRecord for thing in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_memory_and_open_files_do_not_grow_with_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    taps = [spec("pages", (16, 32, 32), codec), spec("odd", (999, 3), codec)]
    opened = open_pipeline(tmp_path / "s", *taps, n_blocks=64)
    most, before, records = [0], n_handles(), n_records()
    real = files.os.open

    def noting(*args: Any) -> int:
        fd = real(*args)
        most[0] = max(most[0], n_handles() - before)
        return fd

    monkeypatch.setattr(os, "open", noting)
    maps, held = [], []
    tracemalloc.start()
    try:
        for block in range(64):
            put(opened, block)
            wait_for_commit(opened, block)
            if block in (7, 63):
                held.append(tracemalloc.get_traced_memory()[0])
                maps.append(Path("/proc/self/maps").read_text().count("\n"))
    finally:
        tracemalloc.stop()
    opened.close()
    # The interpreter keeps freed tuples of each length for later; a block's smallest shard has 96 KB.
    assert held[1] - held[0] < 48 * 1024
    assert n_records() - records <= len(opened._slots) * len(taps)
    assert abs(maps[1] - maps[0]) <= 4
    assert most[0] <= 2  # a file, and the listing that counts it
    assert n_handles() == before


def test_the_model_waits_while_all_slots_are_full_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, started = threading.Event(), threading.Semaphore(0)

    def held(*args: Any) -> Any:
        started.release()
        assert gate.wait(60)
        return write_shard(*args)

    monkeypatch.setattr(pipeline, "write_shard", held)
    opened = open_pipeline(tmp_path / "s", spec("a", (16,)), n_blocks=4)
    put(opened, 0)
    put(opened, 1)
    assert started.acquire(timeout=60)
    passed = threading.Event()
    model = threading.Thread(target=lambda: (put(opened, 2), passed.set()))
    model.start()
    assert not passed.wait(0.2), "both slots are full"
    gate.set()
    assert passed.wait(60)
    model.join()
    put(opened, 3)
    opened.close()
    assert committed_blocks(LocalPlace(tmp_path / "s")) == {0, 1, 2, 3}
    assert opened.stages.n_rows == 32


@contextlib.contextmanager
def failing_at(monkeypatch: pytest.MonkeyPatch, n: int) -> Iterator[None]:
    """Let the `n`-th shard from here on fail for want of space."""
    count = [0]

    def fails(*args: Any) -> Any:
        count[0] += 1
        if count[0] >= n:
            raise OSError(28, "No space left on device")
        return write_shard(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_shard", fails)
        yield


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_a_failure_takes_away_the_shards_of_the_block_that_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    taps = [spec(f"tap{i}", (16,)) for i in range(3)]
    opened = open_pipeline(tmp_path / "s", *taps, n_blocks=3)
    with failing_at(monkeypatch, n), pytest.raises(OSError, match="No space left"):
        for block in range(3):
            put(opened, block)
        opened.close()
    opened.close(failed=True)
    assert not list((tmp_path / "s").rglob(f"*{PART}"))
    assert committed_blocks(LocalPlace(tmp_path / "s")) == ({0} if n > 3 else set())
    assert store.read_manifest(LocalPlace(tmp_path / "s")).n_rows == 24


@pytest.mark.parametrize("most_open", [128, 2])
def test_shards_are_settled_when_all_of_their_block_are_written_as_far_as_files_may_be_open(
    tmp_path, monkeypatch, most_open
):
    open_now, most, synced = set(), [0], []
    enter, settle = files.DurableFile.__enter__, files.DurableFile.settle

    def begins(self):
        if self.path.name.startswith("c.") and "taps" in str(self.path):
            open_now.add(self.path)
            most[0] = max(most[0], len(open_now))
        return enter(self)

    def ends(self):
        if self._fd >= 0:
            synced.append(self.path)
        settle(self)
        open_now.discard(self.path)

    monkeypatch.setattr(pipeline, "MOST_OPEN", most_open)
    monkeypatch.setattr(files.DurableFile, "__enter__", begins)
    monkeypatch.setattr(files.DurableFile, "settle", ends)
    taps = [f"tap{i}" for i in range(6)]
    lt.record_dataset(
        lambda batch: dict.fromkeys(taps, batch),
        np.zeros((4, 3), np.float32),
        tmp_path / "s",
        taps,
        batch_size=4,
        writers=1,
    )
    assert most[0] == (6 if most_open == 128 else 1)
    assert len([path for path in synced if "taps" in str(path) and path.name.startswith("c.")]) == 6
    assert not open_now


@pytest.mark.parametrize("most_open", [128, 3])
def test_a_new_stores_metadata_are_durable_before_it_has_its_name(tmp_path, monkeypatch, most_open):
    order: list[str] = []
    rename, fsync, fdatasync = os.rename, os.fsync, os.fdatasync
    monkeypatch.setattr(local, "MOST_OPEN", most_open)
    monkeypatch.setattr(os, "fdatasync", lambda fd: (order.append("file"), fdatasync(fd))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("folder"), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), rename(a, b))[1])
    opened = open_pipeline(tmp_path / "s", spec("a", (3,)), spec("b", (3,)), n_blocks=2)
    opened.close()
    files_there = list((tmp_path / "s").rglob("zarr.json"))
    folders = {path.parent for path in files_there}
    assert order == [*["file"] * len(files_there), *["folder"] * len(folders), "rename", "folder"]
    assert not list(tmp_path.rglob(f"*{PART}"))
