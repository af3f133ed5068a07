"""What a capture costs beside the forward that it rides on: time, memory, and the command's own start.

    python -m pytest benchmarks/bench_capture.py --benchmark-only

The job: ResNet-20 over 10,000 pictures of 32 x 32 at batch 64, four stages in float32 (1.8 GB), on the
processor, the pictures in memory beforehand. The arms are the forward, the forward again, which is the
control, and the capture.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.paired import Rounds, interleaved

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
import resnet20  # noqa: E402
from harness import n_rounds  # noqa: E402

LAYERS = ["conv1", "layer1", "layer2", "layer3"]
N_ROWS, BATCH = 10_000, 64


class Pictures(lt.Source):
    """Normalised pictures with labels, in memory: real ones where they are at hand, else noise."""

    name = "pictures in memory"
    n_rows = N_ROWS

    def __init__(self) -> None:
        if resnet20.PICTURES.is_dir():
            folder = lt.PictureFolder(resnet20.PICTURES, lt.Preprocess(resnet20.MEAN, resnet20.STD))
            batch = folder.batch(range(N_ROWS))
            self.inputs, self.columns = batch.inputs[0], {k: batch.columns[k] for k in ("label", "picture")}
        else:
            rng = np.random.default_rng(0)
            self.inputs = rng.standard_normal((N_ROWS, 3, 32, 32), np.float32)
            self.columns = {
                "label": np.zeros(N_ROWS, np.int64),
                "picture": np.zeros((N_ROWS, 32, 32, 3), np.uint8),
            }

    def batch(self, rows: range) -> lt.Batch:
        window = slice(rows.start, rows.stop)
        columns = {name: values[window] for name, values in self.columns.items()}
        return lt.Batch(rows, (self.inputs[window],), columns=columns)


def network() -> Any:
    return resnet20.trained() if resnet20.WEIGHTS.is_file() else resnet20.untrained()


def forward(model: Any, inputs: Any) -> None:
    with torch.inference_mode():
        for start in range(0, N_ROWS, BATCH):
            model(inputs[start : start + BATCH])


def test_capture_over_the_forward_alone(benchmark: Any, tmp_path: Path) -> None:
    pictures, model = Pictures(), network()
    inputs = torch.from_numpy(pictures.inputs)
    store = tmp_path / "run.zarr"
    arms = {
        "forward": lambda: forward(model, inputs),
        "again": lambda: forward(model, inputs),
        "capture": lambda: lt.record_dataset(model, pictures, store, LAYERS),
    }
    forward(model, inputs)
    measured: list[Rounds] = []

    def before(arm: str) -> None:
        shutil.rmtree(store, ignore_errors=True)

    def capture() -> None:
        measured.append(interleaved(arms, n_rounds(5), before=before))

    benchmark.pedantic(capture, rounds=1)
    if not store.exists():
        arms["capture"]()
    rounds = measured[0]
    benchmark.extra_info |= {
        "forward_s": round(statistics.median(rounds.wall("forward")), 3),
        "store_MB": round(lt.open(store).n_bytes / 1e6),
        "capture_over_forward": rounds.over("capture", "forward").to_json(),
        "control": rounds.over("again", "forward").to_json(),
    }
    print(f"\n{json.dumps(benchmark.extra_info, indent=1)}")


MEMORY = """
import resource, sys
import layertap as lt, torch
sys.path.insert(0, sys.argv[1])
import bench_capture as bench
pictures, model = bench.Pictures(), bench.network()
pictures.n_rows = int(sys.argv[3])
inputs = torch.from_numpy(pictures.inputs)
with torch.inference_mode():
    for i in range(0, 1280, 64):
        model(inputs[i : i + 64])
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew, from what is resident now
before = peak()
lt.record_dataset(model, pictures, sys.argv[2], bench.LAYERS, memory=sys.argv[4])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("n_rows", "memory"), [(2_500, "128MiB"), (5_000, "128MiB"), (10_000, "128MiB"), (10_000, "512MiB")]
)
def test_peak_memory_over_what_the_forward_had(
    benchmark: Any, tmp_path: Path, n_rows: int, memory: str
) -> None:
    peaks = []

    def fresh_process() -> None:
        arguments = [str(Path(__file__).parent), str(tmp_path / f"{len(peaks)}.zarr"), str(n_rows), memory]
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) / 1024)

    benchmark.pedantic(fresh_process, rounds=1)
    benchmark.extra_info["peak_MiB"] = round(max(peaks))
    print(f"\n{n_rows} rows with {memory}: {max(peaks):.0f} MiB more than before the capture")


def test_help(benchmark: Any) -> None:
    benchmark.pedantic(
        lambda: subprocess.run([sys.executable, "-m", "layertap", "--help"], capture_output=True, check=True),
        rounds=15,
        warmup_rounds=2,
    )
