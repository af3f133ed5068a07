"""What a tap costs in ONNX Runtime: a result that was inside of the graph, which keeps it from being fused.

    python -m pytest benchmarks/bench_onnx.py --benchmark-only

ResNet-20 at 32 x 32, batch 64, exported by torch, its batch norms folded into the convolutions. Arms are the
model without taps, twice, with the output of one Relu, of one Conv, and of all Relus or all nodes as further
results, which are given as arrays and go no further.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layertap.capture.paired import Rounds, interleaved

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
import parity_onnx
from harness import n_rounds, replayed, tell

pytestmark = replayed

BATCH, REPEATS = 64, 10
ARMS = ("none", "none again", "one Relu", "one Conv", "all Relus", "all nodes")


@cache
def measured() -> tuple[Rounds, dict[str, int]]:
    model = parity_onnx.trained()
    nodes = model.graph.nodes
    relus = [node.proto.output[0] for node in nodes if node.proto.op_type == "Relu"]
    convs = [node.proto.output[0] for node in nodes if node.proto.op_type == "Conv"]
    every = [tensor for node in nodes for _, tensor in node.outputs]
    taps = dict(zip(ARMS, ([], [], relus[8:9], convs[8:9], relus, every), strict=True))
    inputs = np.random.default_rng(0).standard_normal((BATCH, 3, 32, 32), np.float32)
    feeds = model.feeds((inputs,), {})
    runners = {arm: model.runner_with(tensors) for arm, tensors in taps.items()}

    def run(arm: str) -> None:
        for _ in range(REPEATS):
            runners[arm](feeds)

    rounds = interleaved({arm: partial(run, arm) for arm in ARMS}, n_rounds(9), warm=1)
    return rounds, {arm: len(tensors) for arm, tensors in taps.items()}


@pytest.mark.parametrize("arm", ARMS)
def test_cost_of_a_tap(benchmark: Any, arm: str) -> None:
    rounds, n_taps = measured()
    tell(
        benchmark, rounds, arm, group="ResNet-20 in ONNX Runtime", over="none", each=REPEATS, taps=n_taps[arm]
    )
