"""Memory is one number: the peak stays under it and does not grow with the data set."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.backend import backend_named
from layertap.capture.data import prefetched

MIB = 2**20

needs_peaks = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system has no peak that can be set back"
)

#: Captures argv[1] rows and prints the peak above what was there before, in bytes.
PEAK = """
import gc, sys, time
import numpy as np
MORE = globals().get("MORE", {})
import layertap as lt
from layertap.capture.files import DurableFile

n_rows, path, shape, step, codec, memory, slow = int(sys.argv[1]), sys.argv[2], *map(eval, sys.argv[3:])
pool = np.random.default_rng(0).standard_normal((step, *shape), np.float32)
pool[pool > 2] = np.nan  # counting them takes memory too

class Made(lt.Source):
    name = "made"
    def __init__(self, n_rows):
        self.n_rows = n_rows
    def batch(self, rows):
        return lt.Batch(rows, (pool[:len(rows)],), columns={"id": [f"row {row}" for row in rows]})

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

write = DurableFile.write
def slowly(self, *args, **options):
    time.sleep(slow)
    write(self, *args, **options)

def capture(n_rows, path):
    options = dict(batch_size=step, memory=memory, codec=codec, writers=2, **MORE)
    lt.record_dataset(MODEL, Made(n_rows), path, LAYERS, **options)

capture(step, path + ".warm")
DurableFile.write = slowly if slow else write
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
capture(n_rows, path)
print(status("VmHWM") - before)
"""

ARRAYS = "MODEL, LAYERS = (lambda batch: {'maps': batch}), ['maps']\n"
MEASURED = f"{ARRAYS}MORE = {{'stats': 'all'}}\n"
#: Batches of 7 to 64 tokens; the longest come often enough to fill the room of each step.
RAGGED = """
import itertools
count = itertools.count()
LENGTHS = [64, 7, 40, 64, 33]
MODEL, LAYERS = (lambda batch: {"maps": batch[:, : LENGTHS[next(count) % 5]]}), ["maps"]
MORE = {"ragged": "maps:64"}
"""
TORCH = """
import torch
torch.set_num_threads(1)
MODEL, LAYERS = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten(), torch.nn.Identity()), ["0"]
"""


def peak(
    path: Path, n_rows: int, shape: tuple[int, ...], step: int, codec: str, memory: int, slow: float = 0,
    model: str = ARRAYS,
) -> int:  # fmt: skip
    arguments = [n_rows, path / f"{n_rows}", shape, step, repr(codec), memory, slow]
    done = subprocess.run(
        [sys.executable, "-c", model + PEAK, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@needs_peaks
@pytest.mark.parametrize(
    ("shape", "step", "codec", "memory", "n_rows", "model"),
    [
        ((64, 32, 32), 16, "none", 24 * MIB, 160, ARRAYS),
        ((64, 32, 32), 16, "zstd", 40 * MIB, 160, ARRAYS),
        ((64, 32, 32), 16, "none", 24 * MIB, 160, TORCH),
        ((3000, 1000), 1, "none", 48 * MIB, 8, ARRAYS),
        ((2048,), 97, "none", 24 * MIB, 97 * 40, ARRAYS),
        ((2,), 1, "none", 16 * MIB, 6000, ARRAYS),
        ((64, 32, 32), 16, "none", 44 * MIB, 160, MEASURED),
        ((64, 1024), 16, "none", 24 * MIB, 480, RAGGED),
        ((64, 1024), 16, "zstd", 40 * MIB, 480, RAGGED),
    ],
    ids=[
        *("maps", "maps encoded", "maps of torch", "rows of 12 MB", "one row a chunk", "one row a step"),
        *("statistics", "ragged", "ragged encoded"),
    ],
)
def test_the_peak_is_the_budget_whatever_the_length(tmp_path, shape, step, codec, memory, n_rows, model):
    if model == TORCH:
        pytest.importorskip("torch")
    n_blocks = []
    peaks = []
    for factor in (1, 2, 4):
        peaks.append(peak(tmp_path, factor * n_rows, shape, step, codec, memory, model=model))
        n_blocks.append(lt.open(tmp_path / f"{factor * n_rows}").manifest.n_blocks)
    assert n_blocks[0] > 3, "too few blocks to tell"
    assert max(peaks) <= 1.1 * memory
    # Flat: what is left of a slope is less than a hundredth of the bytes that passed.
    passed = 3 * n_rows * int(np.prod(shape)) * 4
    assert max(peaks) - min(peaks) <= max(1.5 * MIB, min(0.05 * memory, 0.01 * passed))
    assert max(peaks) > 0.2 * memory, "the capture hardly used its memory, so the test tells nothing"


@needs_peaks
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_sink_slower_than_the_model_holds_it_back_and_nothing_is_dropped(tmp_path, codec):
    memory = 24 * MIB if codec == "none" else 40 * MIB
    got = peak(tmp_path, 200, (64, 32, 32), 16, codec, memory, slow=0.03)
    assert got <= 1.1 * memory
    run = lt.open(tmp_path / "200", check=True)
    assert run.complete
    assert run["maps"].shape == (200, 64, 32, 32)
    first = run["maps"][:16]
    for start in range(16, 192, 16):
        assert run["maps"][start : start + 16].tobytes() == first.tobytes()
    assert list(run.rows["id"][...]) == [f"row {row}" for row in range(200)]


class Counting(lt.Source):
    """A data set that knows how many of its batches are alive."""

    name = "counting"

    def __init__(self, n_rows: int) -> None:
        self.n_rows, self.alive, self.most, self.n_loaded = n_rows, 0, 0, 0
        self.lock = threading.Lock()

    def batch(self, rows: range) -> lt.Batch:
        with self.lock:
            self.alive += 1
            self.n_loaded += 1
            self.most = max(self.most, self.alive)
        values = np.ones((len(rows), 8), np.float32)
        weakref.finalize(values, self._gone)
        return lt.Batch(rows, (values,))

    def _gone(self) -> None:
        with self.lock:
            self.alive -= 1


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_at_most_two_batches_more_than_workers_are_alive(tmp_path, workers):
    source = Counting(400)
    lt.record_dataset(
        lambda batch: {"a": batch * 2}, source, tmp_path / "s", ["a"], batch_size=4, workers=workers
    )
    assert source.n_loaded == 100
    assert source.most <= workers + 2
    assert source.most >= workers
    gc.collect()
    assert source.alive == 0


def test_batches_are_not_loaded_further_ahead_of_a_slow_reader():
    source = Counting(400)
    steps = (range(i, i + 4) for i in range(0, 400, 4))
    batches = prefetched(source, steps, 3)
    for n in range(1, 20):
        next(batches)
        threading.Event().wait(0.002)
        assert source.n_loaded <= n + 4
    batches.close()  # type: ignore[attr-defined]


def test_the_loader_of_torch_asks_for_steps_only_as_they_are_due():
    torch = pytest.importorskip("torch")
    asked: list[int] = []

    def steps() -> Any:
        for i in range(0, 400, 4):
            asked.append(i)
            yield range(i, i + 4)

    backend = backend_named("torch")
    source = backend.source(torch.utils.data.TensorDataset(torch.ones(400, 3)))
    batches = backend.batches(source, steps(), 2)
    for n in range(1, 20):
        assert len(next(batches).inputs[0]) == 4
        assert len(asked) <= n + 2 * 2  # two for each worker, as DataLoader has it
    batches.close()  # type: ignore[attr-defined]


def test_each_way_out_of_a_plan_that_does_not_fit_is_one(tmp_path):
    """Memory, batch size, fewer layers and a cast, each followed as the message says."""
    rows = np.ones((64, 4096), np.float32)

    def capture(**changed: Any) -> lt.Run:
        options: dict[str, Any] = {"batch_size": 32, "memory": "2300KiB", "writers": 1} | changed
        layers = options.pop("layers", ["a", "b"])
        return lt.record_dataset(
            lambda batch: {"a": batch, "b": batch}, rows, tmp_path / str(len(changed)), layers,
            overwrite=True, **options,
        )  # fmt: skip

    with pytest.raises(lt.PlanError, match="a batch of 32 rows takes 1MiB and does not fit") as caught:
        capture()
    needed = re.search(
        r"need (\S+), \S+ more\. Give memory=(\S+) or more, or a batch size of at most (\d+), "
        r"or fewer layers \(a alone fits\)$",  # a cast would not do: the first step is kept as it is
        str(caught.value),
    )
    assert needed
    assert capture(memory=needed[2]).complete
    assert capture(batch_size=int(needed[3])).complete
    assert capture(layers=["a"]).complete
    for not_enough in ({"batch_size": int(needed[3]) + 1}, {"dtype": "float16"}):
        with pytest.raises(lt.PlanError):
            capture(**not_enough)
    with pytest.raises(lt.PlanError, match=r", or a cast to float16$"):
        capture(memory="2800KiB")
    assert capture(memory="2800KiB", dtype="float16").complete
