"""How long what a writer thread does keeps the interpreter's lock from the thread that runs the model.

    python -m pytest benchmarks/bench_lock.py --benchmark-only

While a thread repeats one operation, the main thread reads the clock in a loop. A gap between two readings is
time in which it did not run: `longest_us` is the median over the rounds of the longest one, `rate` how many
readings it got, over those with no thread beside it. The control is a thread that sleeps. With fewer free
processors than threads, gaps come from the scheduler too; the control shows how long those are. `keeps` is a
checksum that keeps the lock, for comparison.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c  # comes with zarr
import numpy as np
from layertap.capture.checksum import crc32c
from layertap.capture.codecs import Codec
from layertap.capture.dtypes import DTYPES
from layertap.capture.layout import CHUNK_BYTES
from layertap.capture.paired import summary
from layertap.capture.shard import count_nonfinite

sys.path.insert(0, str(Path(__file__).parent))
from harness import n_rounds

ROUNDS = n_rounds(9)
SECONDS = 0.2

CHUNK = np.random.default_rng(0).standard_normal(CHUNK_BYTES // 4, np.float32).clip(min=0)
COPY = np.empty_like(CHUNK)
DATA = CHUNK.view(np.uint8).data
FIXED = DATA.tobytes()

OPERATIONS: dict[str, Callable[[], object]] = {
    "control": lambda: time.sleep(0.001),
    "keeps": lambda: google_crc32c.extend(0, FIXED),
    "crc32c": lambda: crc32c(DATA),
    "count_nonfinite": lambda: count_nonfinite([DATA], DTYPES["float32"]),
    "copy": lambda: np.copyto(COPY, CHUNK),
    "zstd": lambda: Codec("zstd", 4).encode(DATA),
    "lz4": lambda: Codec("lz4", 4).encode(DATA),
}


def gaps(operation: Callable[[], object] | None) -> tuple[int, float]:
    """Return how often the main thread read the clock beside `operation`, and the longest gap in seconds."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            assert operation is not None
            operation()

    thread = threading.Thread(target=repeat) if operation is not None else None
    if thread is not None:
        thread.start()
    n, longest, last = 0, 0.0, time.perf_counter()
    end = last + SECONDS
    while last < end:
        now = time.perf_counter()
        longest, last, n = max(longest, now - last), now, n + 1
    ended.set()
    if thread is not None:
        thread.join()
    return n, longest


def test_the_interpreters_lock(benchmark: Any) -> None:
    order = np.random.default_rng(0)
    rates: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    longest: dict[str, list[float]] = {name: [] for name in OPERATIONS}

    def measure() -> None:
        for _ in range(ROUNDS):
            alone, _ = gaps(None)
            for name in order.permutation(list(OPERATIONS)):
                n, gap = gaps(OPERATIONS[name])
                rates[name].append(n / alone)
                longest[name].append(gap * 1e6)

    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info |= {
        name: {"rate": summary(rates[name]), "longest_us": summary(longest[name], 0)} for name in OPERATIONS
    }
