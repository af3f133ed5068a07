"""What a forecast says a capture takes, over what the capture then takes.

    python -m pytest benchmarks/bench_forecast.py --benchmark-only
    python -m pytest benchmarks/bench_forecast.py --benchmark-only -k disk -s

In each round a forecast is made of a few steps, as `layertap capture --dry-run` makes it, and the same
capture is run, in random order. `predicted_over_real` is the time that was told over the wall of the whole
capture, and `without_start` over that without planning and making the store, which a forecast does not
count. Beside them stands the same for each stage, alone in the forecast and beside all others in the
capture: the forwards, the thread of the model loading or waiting for data, and the time in which any writer
was at work. `told_right` is the share of rounds in which the forecast named what set the pace. Bytes are
compared too.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import layertap as lt
import pytest
from layertap.capture.paired import interleaved, ratios, summary

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import resnet20  # noqa: E402
from cases import Case, Held, Inputs, resnet18  # noqa: E402
from harness import n_rounds  # noqa: E402

ROUNDS = n_rounds(3)


@dataclass(frozen=True)
class Told:
    """A capture that is forecast and then run."""

    case: Case
    """What is captured."""
    options: dict[str, Any] = field(default_factory=dict)
    """What else `record_dataset` and `plan` are told."""
    load_s: float = 0.0
    """Seconds that a batch takes to load."""


#: One for each thing that can set the pace, and for each that a forecast has a rate of its own for.
CASES = (
    Told(Case("compute", resnet18, 112, 16, 768, ("layer4",))),
    Told(Case("disk", Held, 8, 16, 4096, (".",))),
    Told(Case("data", resnet20.untrained, 32, 64, 4096, ("layer3",)), {"workers": 1}, 0.1),
    Told(Case("few-large-taps", resnet18, 160, 16, 480, ("conv1", "layer1.0"))),
    Told(Case("zstd-float16", resnet18, 112, 16, 640, ("conv1", "layer*.1"), "float16", "zstd")),
    Told(Case("reduced", resnet18, 112, 16, 640, ("conv1", "layer*.1")), {"reduce": "pool:7|float16"}),
    Told(Case("statistics", resnet18, 112, 16, 640, ("conv1", "layer*.1")), {"stats": "all"}),
    Told(
        Case("statistics-alone", resnet18, 112, 16, 640, ("conv1", "layer*.1")),
        {"stats": "cheap", "values": False},
    ),
)


class Slow(Inputs):
    """Noise that takes its time."""

    def __init__(self, told: Told) -> None:
        super().__init__(told.case)
        self._load_s = told.load_s

    def batch(self, rows: range) -> lt.Batch:
        time.sleep(self._load_s)
        return super().batch(rows)


class Arms:
    """What is timed for one case."""

    def __init__(self, told: Told, folder: Path) -> None:
        case = told.case
        torch.manual_seed(0)
        self.model, self.source, self.folder = case.model().eval(), Slow(told), folder
        self.layers = list(case.layers)
        self.options = {
            "batch_size": case.batch,
            "dtype": case.dtype,
            "codec": case.codec,
            "memory": case.memory,
            **told.options,
        }
        self.forecasts: list[lt.Forecast] = []
        self.stages: list[Any] = []
        self.n_bytes = 0

    def all(self) -> dict[str, Callable[[], None]]:
        """Return the arms by their names."""
        return {"forecast": self.forecast, "capture": self.capture}

    def before(self, arm: str) -> None:
        """Take away what the last capture made."""
        for made in self.folder.glob("*.zarr"):
            shutil.rmtree(made)
        os.sync()

    def forecast(self) -> None:
        self.forecasts.append(
            lt.plan(self.model, self.source, self.folder / "run.zarr", self.layers, **self.options)
        )

    def capture(self) -> None:
        run = lt.record_dataset(
            self.model,
            self.source,
            self.folder / "run.zarr",
            self.layers,
            on_report=lambda report: self.stages.append(report.stages),
            **self.options,
        )
        self.n_bytes = run.n_bytes


@pytest.mark.parametrize("told", CASES, ids=lambda told: told.case.name)
def test_predicted_time_over_the_real_one(benchmark: Any, tmp_path: Path, told: Told) -> None:
    arms = Arms(told, tmp_path)
    arms.capture()  # warm
    arms.stages.clear()
    measured: list[Any] = []
    benchmark.pedantic(lambda: measured.append(interleaved(arms.all(), ROUNDS, before=arms.before)), rounds=1)
    real = measured[0].wall("capture")
    predicted = [forecast.seconds for forecast in arms.forecasts]
    running = [wall - stages.start_s for wall, stages in zip(real, arms.stages, strict=True)]
    stages = {
        "data": [one.data_s for one in arms.stages],
        "forward": [one.forward_s for one in arms.stages],
        "write": [one.writing_s for one in arms.stages],
    }
    right = [
        forecast.bottleneck == one.slowest()
        for forecast, one in zip(arms.forecasts, arms.stages, strict=True)
    ]
    benchmark.extra_info |= {
        "rows": told.case.n_rows,
        "store_MB": round(arms.n_bytes / 1e6),
        "predicted_s": round(statistics.median(predicted), 3),
        "real_s": round(statistics.median(real), 3),
        "forecast_takes_s": round(statistics.median(measured[0].wall("forecast")), 3),
        "predicted_over_real": summary(ratios(predicted, real)),
        "without_start": summary(ratios(predicted, running)),
        "of_stages": {
            name: {
                "predicted_s": round(statistics.median(one.stages_s[name] for one in arms.forecasts), 3),
                "real_s": round(statistics.median(seconds), 3),
            }
            for name, seconds in stages.items()
        },
        "told_right": round(sum(right) / len(right), 2),
        "pace": sorted({one.slowest() for one in arms.stages}),
        "predicted_bytes_over_real": round(arms.forecasts[-1].disk_bytes / max(1, arms.n_bytes), 4),
    }
    print(f"\n{json.dumps(benchmark.extra_info, indent=1)}")
