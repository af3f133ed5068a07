"""What statistics cost: a capture with none, with the cheap ones, and with all, over the forward alone.

    python -m pytest benchmarks/bench_statistics.py --benchmark-only -s

Arms are interleaved in random order and compared round by round; the control is the capture without them,
once more. `alone` writes statistics and no activations. The model has all processors, so what the writers
compute is taken from it; `cpu_s_per_GB` is the processor time that statistics add to a gigabyte of
activations, whatever hides it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.paired import interleaved, ratios, summary

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import resnet20  # noqa: E402
from cases import Case, Inputs, resnet18  # noqa: E402
from harness import n_rounds  # noqa: E402

ROUNDS = n_rounds(3)

#: Arm -> what `record` is told.
CHOICES: dict[str, dict[str, Any]] = {
    "none": {},
    "again": {},
    "channels": {"stats": "channels"},
    "cheap": {"stats": "cheap"},
    "all": {"stats": "all"},
    "alone": {"stats": "cheap", "values": False},
}


STAGES = ("conv1", "layer1", "layer2", "layer3")
CASES = (
    Case("resnet20-stages", resnet20.untrained, 32, 64, 4096, STAGES),
    Case("resnet20-stages-float16", resnet20.untrained, 32, 64, 4096, STAGES, "float16"),
    Case("resnet18-stages", resnet18, 112, 16, 640, ("conv1", "layer*.1")),
)


class Arms:
    """What is timed for one case."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        torch.manual_seed(0)
        self.model = case.model().eval()
        self.inputs = torch.from_numpy(Inputs(case).values)

    def all(self) -> dict[str, Callable[[], None]]:
        """Return the arms by their names."""
        captures = {name: self.capture(**options) for name, options in CHOICES.items()}
        return {"forward": self.forward, **captures}

    def before(self, arm: str) -> None:
        """Take away what the last arm made."""
        for made in self.folder.iterdir():
            shutil.rmtree(made)
        os.sync()

    def forward(self) -> None:
        with torch.no_grad():
            for batch in self.inputs.split(self.case.batch):
                self.model(batch)

    def capture(self, **options: Any) -> Callable[[], None]:
        case = self.case

        def run() -> None:
            layers, path = list(case.layers), self.folder / "run.zarr"
            options.setdefault("classes", [str(label) for label in range(10)])
            with lt.record(self.model, path, layers, dtype=case.dtype, **options) as rec, torch.no_grad():
                for i, batch in enumerate(self.inputs.split(case.batch)):
                    self.model(batch)
                    rec.annotate(label=(np.arange(len(batch)) + i) % 10)

        return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cost_of_statistics(benchmark: Any, tmp_path: Path, case: Case) -> None:
    arms = Arms(case, tmp_path)
    for warm in arms.all().values():
        arms.before("")
        warm()
    arms.before("")
    arms.capture()()
    n_bytes = lt.open(tmp_path / "run.zarr").n_bytes
    measured: list[Any] = []
    benchmark.pedantic(lambda: measured.append(interleaved(arms.all(), ROUNDS, before=arms.before)), rounds=1)
    rounds = measured[0]
    kept = [name for name in CHOICES if name not in ("none", "again")]
    benchmark.extra_info |= {
        "rows": case.n_rows,
        "store_MB": round(n_bytes / 1e6),
        **{f"{name}_s": round(statistics.median(rounds.wall(name)), 3) for name in rounds.arms},
        "none_over_forward": summary(ratios(rounds.wall("none"), rounds.wall("forward"))),
        "control": summary(ratios(rounds.wall("again"), rounds.wall("none"))),
        "wall_over_none": {name: summary(ratios(rounds.wall(name), rounds.wall("none"))) for name in kept},
        "cpu_s_per_GB": {
            name: summary(
                [
                    (with_it - without) / (n_bytes / 1e9)
                    for with_it, without in zip(rounds.cpu(name), rounds.cpu("none"), strict=True)
                ]
            )
            for name in kept
        },
    }
    print(f"\n{json.dumps(benchmark.extra_info, indent=1)}")
