"""Ways to get shards to the disk: through the page cache, past it, staged, preallocated.

    python -m pytest benchmarks/bench_files.py --benchmark-only -s

What counts is processor seconds a gigabyte, which the model would have had, and the rate, by one thread and
by two. Arms are interleaved in random order, and each is compared round by round with the first. `pages`
are inner chunks of whole pages, written as they lie; `odd` ones start anywhere and are staged, unless they
go through the cache. Every arm writes the same bytes and ends with a sync; the control is the first arm
again. `names` compares ways to make the renames of a block of 60 shards durable.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layertap.capture import files
from layertap.capture.files import PAGE, DurableFile, part, publish, stage_by, sync_folder, write_file
from layertap.capture.paired import interleaved, ratios, summary

sys.path.insert(0, str(Path(__file__).parent))
from harness import n_rounds

ROUNDS = n_rounds(5)
SHARD_BYTES, CHUNK_BYTES, N_SHARDS = 64 * 2**20, 512 * 1024, 4
N_NAMES = 60

pytestmark = pytest.mark.skipif(not hasattr(os, "writev"), reason="compares POSIX calls")


@dataclass(frozen=True)
class Way:
    """How a shard is written."""

    name: str
    """What the result calls it."""
    direct: bool = True
    """Past the page cache."""
    staging_bytes: int = files.MOST_STAGING_BYTES
    """Size of the staging buffer."""
    preallocated: bool = False
    """Reserve the blocks of the file first."""


WAYS = {
    "pages": (
        Way("direct"),
        Way("direct again"),
        Way("direct, preallocated", preallocated=True),
        Way("page cache", direct=False),
    ),
    "odd": (
        Way("staged"),
        Way("staged again"),
        Way("staged by 128 KiB", staging_bytes=128 * 1024),
        Way("staged by 512 KiB", staging_bytes=files.STAGING_BYTES),
        Way("staged, preallocated", preallocated=True),
        Way("page cache", direct=False),
    ),
}


@contextmanager
def set_to(way: Way) -> Iterator[None]:
    """Let `DurableFile` work that way."""
    before = files._DIRECT
    if not way.direct:
        files._DIRECT = 0
    try:
        yield
    finally:
        files._DIRECT = before


def chunks(kind: str) -> list[list[memoryview]]:
    """Return the buffers of each inner chunk of a shard: its rows, then its checksum."""
    memory = memoryview(mmap.mmap(-1, SHARD_BYTES))
    np.frombuffer(memory, np.uint8)[:] = np.random.default_rng(0).integers(0, 256, SHARD_BYTES, np.uint8)
    tails = memoryview(mmap.mmap(-1, SHARD_BYTES // CHUNK_BYTES * PAGE))
    found = []
    for i in range(SHARD_BYTES // CHUNK_BYTES):
        rows, tail = memory[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES], tails[i * PAGE : (i + 1) * PAGE]
        found.append([rows, tail] if kind == "pages" else [rows[:-52], tail[:4]])
    return found


def write(path: Path, kind: str, shard: list[list[memoryview]], way: Way) -> None:
    with DurableFile(path) as file:
        if way.preallocated:
            os.posix_fallocate(file._fd, 0, sum(buffer.nbytes for chunk in shard for buffer in chunk))
        if kind == "pages":
            file.write([buffer for chunk in shard for buffer in chunk], direct=way.direct)
        else:
            for chunk in shard:
                file.write(chunk)
    file.settle()


@pytest.mark.parametrize("n_writers", [1, 2])
@pytest.mark.parametrize("kind", WAYS)
def test_a_shard(benchmark: Any, tmp_path: Path, kind: str, n_writers: int) -> None:
    shard = chunks(kind)

    def arm(way: Way) -> Callable[[], None]:
        def run() -> None:
            pool = ThreadPoolExecutor(n_writers, initializer=stage_by, initargs=(way.staging_bytes,))
            with set_to(way), pool:
                list(pool.map(lambda i: write(tmp_path / f"{i}", kind, shard, way), range(N_SHARDS)))

        return run

    def before(arm: str) -> None:
        for left in tmp_path.iterdir():
            left.unlink()
        os.sync()

    measured: list[Any] = []
    arms = {way.name: arm(way) for way in WAYS[kind]}
    benchmark.pedantic(lambda: measured.append(interleaved(arms, ROUNDS, before=before)), rounds=1)
    gigabytes = N_SHARDS * SHARD_BYTES / 1e9
    first = WAYS[kind][0].name
    for name in arms:
        wall, cpu = measured[0].wall(name), measured[0].cpu(name)
        benchmark.extra_info[name] = {
            "MB_s": round(statistics.median(1000 * gigabytes / seconds for seconds in wall)),
            "cpu_s_per_GB": summary([seconds / gigabytes for seconds in cpu]),
            "wall_over_first": summary(ratios(wall, measured[0].wall(first))),
        }
    print(f"\n{json.dumps(benchmark.extra_info, indent=1)}")


def one_by_one(folders: list[Path]) -> None:
    for folder in folders:
        sync_folder(folder)


def in_threads(folders: list[Path]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sync_folder, folders))


def file_system(folders: list[Path]) -> None:
    import ctypes

    fd = os.open(folders[0], os.O_RDONLY)
    try:
        assert ctypes.CDLL(None).syncfs(fd) == 0
    finally:
        os.close(fd)


@pytest.mark.skipif(sys.platform != "linux", reason="compares with Linux's syncfs")
def test_the_names_of_a_block(benchmark: Any, tmp_path: Path) -> None:
    folders = [tmp_path / f"{i}" for i in range(N_NAMES)]

    def before(arm: str) -> None:
        shutil.rmtree(tmp_path)
        for folder in folders:
            folder.mkdir(parents=True)
            write_file(folder / "old", bytes(4096))
            with DurableFile(folder / "new") as file:
                file.write([bytes(4096)])
            file.settle()
            assert part(folder / "new").exists()
        os.sync()

    def arm(sync: Callable[[list[Path]], None]) -> Callable[[], None]:
        def run() -> None:
            for folder in folders:
                publish(folder / "new")
            sync(folders)

        return run

    ways = {"one by one": one_by_one, "again": one_by_one, "in 8 threads": in_threads, "syncfs": file_system}
    measured: list[Any] = []
    arms = {name: arm(sync) for name, sync in ways.items()}
    benchmark.pedantic(lambda: measured.append(interleaved(arms, ROUNDS, before=before)), rounds=1)
    for name in arms:
        wall = measured[0].wall(name)
        benchmark.extra_info[name] = {
            "ms": summary([1000 * seconds for seconds in wall], digits=2),
            "over_one_by_one": summary(ratios(wall, measured[0].wall("one by one"))),
        }
    print(f"\n{json.dumps(benchmark.extra_info, indent=1)}")
