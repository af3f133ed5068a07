"""What a hook costs the forward: none, one that does nothing, and ways to keep what a layer gives.

    python -m pytest benchmarks/bench_hooks.py --benchmark-only

Every leaf layer is tapped. `no-op` hooks return at once; `reference` hooks keep the output itself, which a
layer that works in place overwrites; `clone` hooks keep a copy in memory that is new each time; `tap` is what
a capture does up to the slot: a copy into memory that is used again, with all that belongs to a step. Nothing
is written. `none again` is the control. On the processor a tap's bytes are moved by the thread of the model,
so the copy is most of its cost; `us_per_tap` is that of one hook, its copy included.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import layertap as lt
import pytest
from layertap.capture.backend import backend_for
from layertap.capture.paired import Rounds, estimate, interleaved
from layertap.capture.plan import Settings, plan_layout, plan_taps
from layertap.capture.recorder import tried
from layertap.capture.rehearsal import Rehearsal, rehearsing

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import resnet20  # noqa: E402
from cases import is_leaf, resnet18  # noqa: E402
from harness import n_rounds, replayed, tell  # noqa: E402

pytestmark = replayed
ARMS = ("none", "none again", "no-op", "reference", "clone", "tap")
ARM_S = 0.1


def resnet50() -> Any:
    return torchvision.models.resnet50()


def vit() -> Any:
    return torchvision.models.VisionTransformer(
        image_size=64, patch_size=8, num_layers=8, num_heads=3, hidden_dim=192, mlp_dim=768
    )


@dataclass(frozen=True)
class Hooked:
    """A model and a batch."""

    name: str
    """What it is called."""
    model: Callable[[], Any]
    """Makes the model."""
    side: int
    """Height and width of its pictures."""
    batch: int
    """Rows of a forward."""
    compiled: bool = False
    """Whether it is compiled, by the default backend of torch.compile."""

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}{', compiled' * self.compiled}"


CASES = (
    *(Hooked("ResNet-20, 32 px", resnet20.untrained, 32, batch) for batch in (1, 16, 64)),
    *(Hooked("ResNet-18, 112 px", resnet18, 112, batch) for batch in (1, 16)),
    Hooked("ResNet-50, 64 px", resnet50, 64, 16),
    *(Hooked("ViT of 8 blocks, 64 px", vit, 64, batch) for batch in (1, 16)),
    Hooked("ResNet-20, 32 px", resnet20.untrained, 32, 16, compiled=True),
)


class Case:
    """A model that runs with one kind of hook at a time."""

    def __init__(self, case: Hooked) -> None:
        torch.manual_seed(0)
        self.plain = case.model().eval()
        self.model = torch.compile(self.plain) if case.compiled else self.plain
        self.compiled = case.compiled
        self.inputs = torch.randn(case.batch, 3, case.side, case.side)
        self.batch = lt.Batch(range(case.batch), (self.inputs.numpy(),), columns={})
        self.leaves = [m for name, m in self.plain.named_modules() if is_leaf(name, m)]
        self.kept: dict[int, Any] = {}
        self.rehearsal: Rehearsal | None = None
        self.set_up = contextlib.ExitStack()
        self.n_taps = self.tap_bytes = 0
        self.before("none")
        self.run()
        started = time.perf_counter()
        self.run()
        self.repeats = max(1, round(ARM_S / (time.perf_counter() - started)))

    def arms(self) -> dict[str, Callable[[], None]]:
        names = ("none", "none again", "tap") if self.compiled else ARMS
        return dict.fromkeys(names, self.run_all)

    def run(self) -> None:
        if self.rehearsal is not None:
            self.rehearsal.timed(self.batch)
        else:
            with torch.inference_mode():
                self.model(self.inputs)

    def run_all(self) -> None:
        for _ in range(self.repeats):
            self.run()

    def before(self, arm: str) -> None:
        """Take the last arm's hooks away, set up those of `arm`, and run it once."""
        self.set_up.close()
        self.kept.clear()
        self.rehearsal = None
        if arm == "tap":
            self.rehearsal = self.set_up.enter_context(
                rehearsing(backend_for(self.model), self.model, is_leaf)
            )
            self.prepare(self.rehearsal)
        elif not arm.startswith("none"):
            for i, leaf in enumerate(self.leaves):
                handle = leaf.register_forward_hook(partial(getattr(self, arm.replace("-", "_")), i))
                self.set_up.callback(handle.remove)
        self.run()

    def prepare(self, rehearsal: Rehearsal) -> None:
        session, n_rows = rehearsal.session, len(self.batch.rows)
        learned = rehearsal.learn(self.batch)
        settings = Settings(memory="8GiB")
        taps = plan_taps(learned, settings, partial(tried, session), session.n_tokens)
        self.n_taps, self.tap_bytes = len(taps), sum(tap.values.row_bytes for tap in taps) * n_rows
        layout = plan_layout([tap.values for tap in taps], [], n_rows, n_rows, settings)
        rehearsal.prepare(layout, taps, n_rows)

    def no_op(self, i: int, module: Any, inputs: Any, output: Any) -> None:
        pass

    def reference(self, i: int, module: Any, inputs: Any, output: Any) -> None:
        self.kept[i] = output

    def clone(self, i: int, module: Any, inputs: Any, output: Any) -> None:
        self.kept[i] = output.clone()


@cache
def measured(case: Hooked) -> tuple[Rounds, int, int, int]:
    arms = Case(case)
    found = interleaved(arms.arms(), n_rounds(9), before=arms.before, warm=1)
    arms.set_up.close()
    return found, arms.repeats, arms.n_taps, arms.tap_bytes


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cost_of_a_hook(benchmark: Any, case: Hooked, arm: str) -> None:
    if case.compiled and arm in ("no-op", "reference", "clone"):
        pytest.skip("what a hook of one's own does to a compiled model depends on what is in it")
    rounds, repeats, n_taps, n_bytes = measured(case)
    each = repeats * n_taps / 1e6
    more = estimate([seconds / each for seconds in rounds.more(arm, "none").rounds])
    figures: dict[str, Any] = {"us_per_tap": more.to_json(2)} if not arm.startswith("none") else {}
    if arm in ("clone", "tap"):
        figures["MB"] = round(n_bytes / 1e6, 2)
        seconds = statistics.median(rounds.more(arm, "none").rounds) / repeats
        figures["GB_s"] = round(n_bytes / 1e9 / seconds, 2) if seconds > 0 else None
    tell(benchmark, rounds, arm, group=str(case), over="none", each=repeats, taps=n_taps, **figures)
