"""The rate at which rows are read for training, beside that of the disk and of other ways.

    python -m pytest benchmarks/bench_read.py --benchmark-only -s
    LAYERTAP_BENCH_MB=8192 python -m pytest benchmarks/bench_read.py --benchmark-only -k cold -s

Every arm hands out batches of 64 rows. `files` reads the store's shards from one end to the other in pieces
of 4 MiB and does nothing with them: the roof. `stream` is `torch_dataset(batch_size=64, shuffle=True)`, `in
order` the same without shuffling, `rows` is `torch_dataset()` with a list of random rows at a time; `memmap`
and `zarr` take random rows from an .npy file of the same values and by zarr-python from the store. Ways that
read at random take a share of the rows, and rates are compared. The control is `files` once more.

`warm`: all files are in the page cache before each arm. `cold`: they are dropped from it by
`posix_fadvise(DONTNEED)`, which takes pages that are on the disk already. Where a virtual machine's host
keeps the disk in a cache of its own, that is not the disk's rate: make the store several times larger than
any cache that cannot be dropped.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.paired import Rounds, interleaved, ratios, summary

sys.path.insert(0, str(Path(__file__).parent))
from harness import n_rounds

torch = pytest.importorskip("torch")


ROUNDS = n_rounds(3)
TOTAL_BYTES = int(os.environ.get("LAYERTAP_BENCH_MB", "1024")) * 2**20
BATCH, PIECE_BYTES, MEMORY = 64, 4 * 2**20, "256MiB"

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="drops files from the page cache")


@dataclass(frozen=True)
class Case:
    """Rows of one size."""

    name: str
    """What they are like."""
    shape: tuple[int, ...]
    """Shape of a row, in float32."""
    share: int
    """Of so many rows, ways that read at random take one."""

    @property
    def row_bytes(self) -> int:
        return 4 * int(np.prod(self.shape))

    @property
    def n_rows(self) -> int:
        return TOTAL_BYTES // self.row_bytes // BATCH * BATCH


CASES = (Case("vectors of 2 KiB", (512,), 32), Case("maps of 256 KiB", (64, 32, 32), 4))


class Stored:
    """One case on the disk, as a store and as an .npy file."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        some = np.random.default_rng(0).standard_normal((4096, *case.shape), np.float32)

        def model(rows: Any) -> dict[str, Any]:
            return {"a": some[np.asarray(rows)[:, 0] % len(some)]}

        numbers = np.arange(case.n_rows)[:, None]
        lt.record_dataset(model, numbers, folder / "run.zarr", "a", batch_size=BATCH, memory="512MiB")
        self.npy = folder / "a.npy"
        flat = np.lib.format.open_memmap(self.npy, "w+", np.float32, (case.n_rows, *case.shape))
        for row in range(0, case.n_rows, BATCH):
            flat[row : row + BATCH] = some[np.arange(row, row + BATCH) % len(some)]
        flat.flush()
        del flat
        os.sync()
        self.shards = sorted(file for file in (folder / "run.zarr" / "taps").rglob("c.*"))

    def random_batches(self) -> Iterator[np.ndarray]:
        """Yield the rows of each batch of a way that reads at random."""
        rows = np.random.default_rng(1).permutation(self.case.n_rows)[: self.case.n_rows // self.case.share]
        for start in range(0, len(rows), BATCH):
            yield rows[start : start + BATCH]

    def before(self, cold: bool) -> None:
        """Put all files into the page cache, or drop them from it."""
        for file in [*self.shards, self.npy]:
            if not cold:
                _read(file)
                continue
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def arms(self) -> dict[str, tuple[Callable[[], None], int]]:
        """Return each way, and the rows that it reads."""
        n_rows = self.case.n_rows
        n_random = sum(map(len, self.random_batches()))
        return {
            "files": (self.files, n_rows),
            "files again": (self.files, n_rows),
            "stream": (lambda: self.stream(True), n_rows),
            "in order": (lambda: self.stream(False), n_rows),
            "rows": (self.rows, n_random),
            "memmap": (self.memmap, n_random),
            "zarr": (self.zarr, n_random),
        }

    def files(self) -> None:
        for file in self.shards:
            _read(file)

    def stream(self, shuffle: bool) -> None:
        made = lt.open(self.folder / "run.zarr").torch_dataset(
            batch_size=BATCH, shuffle=shuffle, memory=MEMORY
        )
        assert sum(len(batch["a"]) for batch in made) == self.case.n_rows

    def rows(self) -> None:
        rows = lt.open(self.folder / "run.zarr").torch_dataset()
        for batch in self.random_batches():
            assert len(rows[batch]["a"]) == len(batch)

    def memmap(self) -> None:
        values = np.load(self.npy, mmap_mode="r")
        for batch in self.random_batches():
            assert len(torch.from_numpy(values[batch])) == len(batch)

    def zarr(self) -> None:
        values = lt.open(self.folder / "run.zarr").zarr()["taps/a/values"]
        for batch in self.random_batches():
            assert len(torch.from_numpy(values.oindex[np.sort(batch)])) == len(batch)


def _read(file: Path) -> None:
    buffer = bytearray(PIECE_BYTES)
    fd = os.open(file, os.O_RDONLY)
    at = 0
    while n_bytes := os.preadv(fd, [buffer], at):
        at += n_bytes
    os.close(fd)


def rates(measured: Rounds, arm: str, n_rows: int) -> list[float]:
    """Return rows a second in each round."""
    return [n_rows / seconds for seconds in measured.wall(arm)]


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_rate_of_reading(benchmark: Any, tmp_path: Path, case: Case, cold: bool) -> None:
    stored = Stored(case, tmp_path)
    arms = stored.arms()
    calls = {name: call for name, (call, _) in arms.items()}
    measured: list[Rounds] = []
    benchmark.pedantic(
        lambda: measured.append(interleaved(calls, ROUNDS, before=lambda arm: stored.before(cold))), rounds=1
    )
    roof = rates(measured[0], "files", case.n_rows)
    for name, (_, n_rows) in arms.items():
        found = rates(measured[0], name, n_rows)
        benchmark.extra_info[name] = {
            "rows_s": round(statistics.median(found)),
            "MB_s": round(statistics.median(found) * case.row_bytes / 1e6),
            "cpu_us_per_row": round(1e6 * statistics.median(measured[0].cpu(name)) / n_rows, 1),
            "files_over_it": summary(ratios(roof, found)),
        }
    print(f"\n{json.dumps(benchmark.extra_info, indent=1)}")
