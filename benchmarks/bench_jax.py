"""What a tap costs in JAX: a result of the compiled function, which keeps it from being fused away.

    python -m pytest benchmarks/bench_jax.py --benchmark-only

ResNet-20 in Flax NNX at 32 x 32, batch 64. Arms are the compiled model without taps, twice; with the output
of one block, of all blocks, and of all modules as further results; and `step`: all blocks, through a session,
which looks at the module again, starts the function and copies what the step before gave into a slab.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layertap.capture.paired import Rounds, interleaved

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
import parity_flax  # noqa: E402
from harness import n_rounds, replayed, tell  # noqa: E402
from layertap.backends.jax import JaxSession  # noqa: E402
from layertap.backends.jax_nnx import NnxModel  # noqa: E402

pytestmark = replayed

BATCH, REPEATS = 64, 5
TAPS = {
    "none": [],
    "none again": [],
    "one block": ["layer2.1"],
    "all blocks": ["layer?.?"],
    "all modules": ["**"],
    "step": ["layer?.?"],
}


def alone(model: Any, images: Any, layers: list[str]) -> Callable[[], None]:
    """Return what runs the compiled function by itself."""
    session = JaxSession(NnxModel(model), layers or ["."])
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((images,), {})
    (session.tapped if layers else session.plain)(*inputs)
    call, compiled = session._call(*inputs), next(iter(session._compiled.values()))
    function = compiled.tapped if layers else compiled.plain
    assert function is not None
    return lambda: jax.block_until_ready(function(compiled.traced.consts, *call.arrays, *call.leaves))


def stepped(model: Any, images: Any, layers: list[str]) -> Callable[[], None]:
    """Return what runs steps of a session and copies the values of each while the next one runs."""
    session = JaxSession(NnxModel(model), layers)
    _, returned = session.tapped((images,), {})
    slabs = [np.empty(value.shape, value.dtype) for parts in returned.values() for value in parts.values()]
    before: list[Any] = []

    def step() -> None:
        _, returned = session.tapped((images,), {})
        values = [value for parts in returned.values() for value in parts.values()]
        for value in values:
            value.copy_to_host_async()
        for slab, value in zip(slabs, before, strict=False):
            np.copyto(slab, np.asarray(value))
        before[:] = values

    def steps() -> None:
        for _ in range(REPEATS):
            step()
        for slab, value in zip(slabs, before, strict=True):
            np.copyto(slab, np.asarray(value))
        before.clear()

    return steps


@cache
def measured() -> tuple[Rounds, dict[str, int]]:
    model = parity_flax.resnet_nnx()
    images = jax.numpy.asarray(np.random.default_rng(0).standard_normal((BATCH, 3, 32, 32), np.float32))
    runs = {arm: (stepped if arm == "step" else alone)(model, images, layers) for arm, layers in TAPS.items()}
    session = JaxSession(NnxModel(model), "**")
    session.tapped((images,), {})
    n_modules = len(session._wanted)

    def run(arm: str) -> None:
        for _ in range(1 if arm == "step" else REPEATS):
            runs[arm]()

    arms = {arm: (lambda arm=arm: run(arm)) for arm in TAPS}
    rounds = interleaved(arms, n_rounds(9), warm=1)
    return rounds, dict(zip(TAPS, (0, 0, 1, 9, n_modules, 9), strict=True))


@pytest.mark.parametrize("arm", TAPS)
def test_cost_of_a_tap(benchmark: Any, arm: str) -> None:
    rounds, n_taps = measured()
    tell(benchmark, rounds, arm, group="ResNet-20 in JAX", over="none", each=REPEATS, taps=n_taps[arm])
