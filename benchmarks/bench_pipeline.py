"""The wall of a capture over the slowest of its parts alone: forward, transfer, write.

    python -m pytest benchmarks/bench_pipeline.py --benchmark-only
    python -m pytest benchmarks/bench_pipeline.py --benchmark-only -k disk -s

One arm is the capture; one is the model alone over the same batches; one is the engine's own writers with the
same bytes and no model, the slots filled beforehand; one is the copies into the slots alone. Arms are
interleaved in random order and compared round by round. The control is the forward alone, twice. Runs are
some seconds long, so planning and making the store weigh more than they will; the ratio without them stands
beside the whole one. `forward_slowdown` is the time of the forwards inside the capture, hooks and copies
included, over the forward alone.

`shared` gives the model all processors, so the writers take theirs from it; `spare` keeps it to one thread.
Processors that are two threads of one core are not to spare: what any busy process does to a model on one of
them is measured (`beside_a_busy_process`), and a capture's writers do the same while they work.
`cpu_floor` is the processor time of the parts, alone, added up, over the processors, over the slowest part:
no schedule is faster than that, so where it is above 1 it is the ratio to hold the measured one against.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import layertap as lt
import pytest
from layertap.capture.layout import array_view
from layertap.capture.local import LocalPlace
from layertap.capture.paired import interleaved, ratios, summary
from layertap.capture.pipeline import Pipeline
from layertap.capture.plan import Settings, slots_of
from layertap.capture.store import StoreWriter

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

sys.path.insert(0, str(Path(__file__).parent))
from cases import Case, Held, Inputs, is_leaf, resnet18  # noqa: E402
from harness import n_rounds  # noqa: E402

ROUNDS = n_rounds(3)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


CASES = (
    Case("compute", resnet18, 112, 16, 768, ("layer4",)),
    Case("disk", Held, 8, 16, 4096, (".",)),
    Case("many-small-taps", resnet18, 112, 8, 640, (is_leaf,), memory="2GiB"),
    Case("few-large-taps", resnet18, 160, 16, 480, ("conv1", "layer1.0")),
    Case("zstd-float16", resnet18, 112, 16, 640, ("conv1", "layer*.1"), "float16", "zstd"),
)


class Arms:
    """What is timed for one case."""

    def __init__(self, case: Case, folder: Path, device: str) -> None:
        self.case, self.folder, self.device = case, folder, device
        torch.manual_seed(0)
        self.model = case.model().eval().to(device)
        self.source = Inputs(case)
        self.inputs = torch.from_numpy(self.source.values)
        self.settings = Settings(case.dtype, case.codec, case.memory)
        self.overlaps: list[float] = []
        self.starts: list[float] = []
        self.forwards: list[float] = []
        self.capture()  # warm, and what the writers alone will write
        self.manifest = (run := lt.open(folder / "run.zarr")).manifest
        self.n_bytes = run.n_bytes
        layout = self.manifest.layout
        self.values = [run[tap.name][: layout.step_rows] for tap in layout.taps]
        self.taps = [torch.from_numpy(values).float() for values in self.values]  # a cast is part of the copy
        self.forward()
        self.pipeline: Pipeline | None = None

    def all(self) -> dict[str, Callable[[], None]]:
        """Return the arms by their names."""
        transfer = self.transfer if self.device == "cuda" else self.copy
        arms = {"forward": self.forward, "again": self.forward, "transfer": transfer, "write": self.write}
        return arms | {"capture": self.capture}

    def before(self, arm: str) -> None:
        """Take away what the last arm made, and make what `arm` is not timed for.

        Its files are emptied and not removed: ext4 does not give out inodes that were freed a minute ago, and
        passes over each of them with every file that it makes.
        """
        self.close()
        for made in list(self.folder.glob("*.zarr")):
            spent = Path(tempfile.mkdtemp(prefix="spent-", dir=self.folder))
            made.rename(spent / made.name)
            for file in spent.rglob("*"):
                if file.is_file():
                    os.truncate(file, 0)
        os.sync()
        if arm not in ("transfer", "write"):
            return
        store = StoreWriter.create(LocalPlace(self.folder / "alone.zarr"), self.manifest, None)
        layout = self.manifest.layout
        self.pipeline = Pipeline(
            store,
            (),
            n_slots=slots_of(layout, self.settings),
            n_writers=self.settings.n_writers,
            staging_bytes=self.settings.staging_bytes,
        )
        for slab in self.pipeline.slabs:
            slab.memory[:] = 0
            for i, values in enumerate(self.values):
                array_view(layout, i, slab.memory)[: len(values)] = values

    def close(self) -> None:
        """End the writers of the last arm."""
        if self.pipeline is not None:
            self.pipeline.close(failed=True)
            self.pipeline = None

    def steps(self) -> list[tuple[int, int]]:
        """Return first row and rows of every step."""
        n, size = self.case.n_rows, self.case.batch
        return [(row, min(size, n - row)) for row in range(0, n, size)]

    def forward(self) -> None:
        with torch.no_grad():
            for row, n_rows in self.steps():
                self.model(self.inputs[row : row + n_rows].to(self.device))
        if self.device == "cuda":
            torch.cuda.synchronize()

    def write(self) -> None:
        assert self.pipeline is not None
        for row, n_rows in self.steps():
            self.pipeline.begin(row, n_rows)
            self.pipeline.end(row, n_rows)
        self.pipeline.close()

    def copy(self) -> None:
        assert self.pipeline is not None
        layout, slabs = self.manifest.layout, self.pipeline.slabs
        taps = [
            [torch.from_numpy(array_view(layout, i, slab.memory)) for slab in slabs]
            for i in range(len(self.taps))
        ]
        for step, (_, n_rows) in enumerate(self.steps()):
            for values, slots in zip(self.taps, taps, strict=True):
                slots[step % len(slabs)][:n_rows].copy_(values[:n_rows])

    def transfer(self) -> None:
        assert self.pipeline is not None
        layout, slabs = self.manifest.layout, self.pipeline.slabs
        device = torch.empty(layout.device_bytes, dtype=torch.uint8, device=self.device)
        host = [torch.from_numpy(slab.memory[: layout.device_bytes]) for slab in slabs]
        memory = self.pipeline.memory
        assert int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0
        started = torch.cuda.Event(enable_timing=True)
        ended = torch.cuda.Event(enable_timing=True)
        started.record()
        for i in range(len(self.steps())):
            host[i % len(host)].copy_(device, non_blocking=True)
        ended.record()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)

    def capture(self) -> None:
        case = self.case
        with (
            lt.record(
                self.model,
                self.folder / "run.zarr",
                list(case.layers),
                dtype=case.dtype,
                codec=case.codec,
                memory=case.memory,
            ) as rec,
            torch.no_grad(),
        ):
            for row, n_rows in self.steps():
                self.model(self.inputs[row : row + n_rows].to(self.device))
        self.overlaps.append(rec.report.overlap)
        self.starts.append(rec.stages.start_s)
        self.forwards.append(rec.stages.forward_s)


def measure(benchmark: Any, case: Case, folder: Path, device: str) -> None:
    arms = Arms(case, folder, device)
    arms.overlaps.clear()
    arms.starts.clear()
    arms.forwards.clear()
    measured: list[Any] = []
    benchmark.pedantic(lambda: measured.append(interleaved(arms.all(), ROUNDS, before=arms.before)), rounds=1)
    arms.close()
    rounds = measured[0]
    alone = ["forward", "transfer", "write"]
    # Of two forwards a round, the mean.
    walls = {name: rounds.wall(name) for name in alone}
    both = zip(rounds.wall("forward"), rounds.wall("again"), strict=True)
    walls["forward"] = [(a + b) / 2 for a, b in both]
    slowest = max(alone, key=lambda name: statistics.median(walls[name]))
    cpu = [sum(seconds) for seconds in zip(*map(rounds.cpu, alone), strict=True)]
    running = [wall - start for wall, start in zip(rounds.wall("capture"), arms.starts, strict=True)]
    gigabytes = arms.n_bytes / 1e9
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name() if device == "cuda" else "processor",
        "rows": case.n_rows,
        "taps": len(arms.manifest.layout.taps),
        "store_MB": round(arms.n_bytes / 1e6),
        **{f"{name}_s": round(statistics.median(walls[name]), 3) for name in alone},
        "capture_s": round(statistics.median(rounds.wall("capture")), 3),
        "slowest": slowest,
        "wall_over_slowest": summary(ratios(rounds.wall("capture"), walls[slowest])),
        "wall_without_start_over_slowest": summary(ratios(running, walls[slowest])),
        "wall_over_forward": summary(ratios(rounds.wall("capture"), walls["forward"])),
        "forward_slowdown": summary(ratios(arms.forwards, walls["forward"])),
        "control": summary(ratios(rounds.wall("again"), rounds.wall("forward"))),
        "cpu_floor": summary(ratios([seconds / CORES for seconds in cpu], walls[slowest])),
        "write_cpu_s_per_GB": summary([seconds / gigabytes for seconds in rounds.cpu("write")]),
        "reported_overlap": summary(arms.overlaps),
    }
    print(f"\n{json.dumps(benchmark.extra_info, indent=1)}")


@pytest.fixture
def threads() -> Any:
    """Return what sets torch's threads, and set them back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("share", ["shared", "spare"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wall_over_the_slowest_part(
    benchmark: Any, tmp_path: Path, threads: Callable[[int], None], case: Case, share: str
) -> None:
    threads(CORES if share == "shared" else max(1, CORES - 1))
    measure(benchmark, case, tmp_path, "cpu")


@pytest.mark.skipif(CORES < 2, reason="needs a second processor")
def test_a_model_beside_a_busy_process(
    benchmark: Any, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    threads(1)
    case = next(case for case in CASES if case.name == "compute")
    arms = Arms(case, tmp_path, "cpu")
    busy: list[subprocess.Popen[bytes]] = []

    def before(arm: str) -> None:
        while busy:
            busy[-1].kill()
            busy.pop().wait()
        if arm == "beside":
            busy.append(subprocess.Popen([sys.executable, "-c", "while True: sum(range(1000))"]))
            time.sleep(0.5)

    calls = {"forward": arms.forward, "again": arms.forward, "beside": arms.forward}
    measured: list[Any] = []
    benchmark.pedantic(lambda: measured.append(interleaved(calls, ROUNDS, before=before)), rounds=1)
    before("")
    rounds = measured[0]
    benchmark.extra_info |= {
        "beside_a_busy_process": summary(ratios(rounds.wall("beside"), rounds.wall("forward"))),
        "control": summary(ratios(rounds.wall("again"), rounds.wall("forward"))),
    }
    print(f"\n{json.dumps(benchmark.extra_info, indent=1)}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: there is nothing to transfer")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wall_over_the_slowest_part_on_a_gpu(benchmark: Any, tmp_path: Path, case: Case) -> None:
    measure(benchmark, replace(case, n_rows=16 * case.n_rows), tmp_path, "cuda")
