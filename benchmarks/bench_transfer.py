"""What it takes to bring activations to where they are written from: copies of many sizes, and of many taps.

    python -m pytest benchmarks/bench_transfer.py --benchmark-only

On the processor the copy into the slot is the whole transfer: `slot` is that copy, into memory that is used
again; `clone` and `numpy` take memory that is new each time, as what keeps a list of results does; `slot
again` is the control. `60 taps` are as many arrays of 64 KiB: one by one, or gathered first and moved in
one piece.

On a GPU `pageable` is `.cpu()`, `pinned` allocates page-locked memory each time, `slot` copies into memory
that was page-locked once, `side stream` does so beside the stream that computes, and 60 taps go in 60
copies or, from one slab that the hooks fill, in one.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layertap.capture.paired import Rounds, interleaved

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent))
from harness import n_rounds, replayed, tell  # noqa: E402

pytestmark = replayed
KIB = 1024
SIZES = (4 * KIB, 64 * KIB, KIB**2, 16 * KIB**2, 256 * KIB**2, 1024 * KIB**2)
N_TAPS, TAP_BYTES = 60, 64 * KIB
ARM_S = 0.05

Copies = dict[str, Callable[[], object]]


def shown(n_bytes: int) -> str:
    return f"{n_bytes // KIB} KiB" if n_bytes < KIB**2 else f"{n_bytes // KIB**2} MiB"


def on_processor(n_bytes: int) -> Copies:
    given, slot = torch.rand(n_bytes // 4), torch.zeros(n_bytes // 4)
    return {
        "slot": lambda: slot.copy_(given),
        "slot again": lambda: slot.copy_(given),
        "clone": given.clone,
        "numpy": lambda: np.array(given.numpy()),
    }


def taps_on_processor() -> Copies:
    given = [torch.rand(TAP_BYTES // 4) for _ in range(N_TAPS)]
    slots = [torch.zeros(TAP_BYTES // 4) for _ in range(N_TAPS)]
    staged, slot = (torch.zeros(N_TAPS * TAP_BYTES // 4) for _ in range(2))
    pieces = staged.split(TAP_BYTES // 4)

    def one_by_one() -> None:
        for target, values in zip(slots, given, strict=True):
            target.copy_(values)

    def gathered() -> None:
        for target, values in zip(pieces, given, strict=True):
            target.copy_(values)
        slot.copy_(staged)

    return {"slot": one_by_one, "slot again": one_by_one, "gathered first": gathered}


def on_gpu(n_bytes: int) -> Copies:
    given = torch.rand(n_bytes // 4, device="cuda")
    pinned, side = torch.zeros(n_bytes // 4, pin_memory=True), torch.cuda.Stream()

    def slot() -> None:
        pinned.copy_(given, non_blocking=True)
        torch.cuda.synchronize()

    def beside() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            pinned.copy_(given, non_blocking=True)
        side.synchronize()

    def new() -> None:
        torch.empty(n_bytes // 4, pin_memory=True).copy_(given, non_blocking=True)
        torch.cuda.synchronize()

    return {"slot": slot, "slot again": slot, "pageable": given.cpu, "pinned": new, "side stream": beside}


def taps_on_gpu() -> Copies:
    given = [torch.rand(TAP_BYTES // 4, device="cuda") for _ in range(N_TAPS)]
    slab = torch.zeros(N_TAPS * TAP_BYTES // 4, device="cuda")
    pinned = torch.zeros(N_TAPS * TAP_BYTES // 4, pin_memory=True)
    pieces, slots = slab.split(TAP_BYTES // 4), pinned.split(TAP_BYTES // 4)

    def one_by_one() -> None:
        for target, values in zip(slots, given, strict=True):
            target.copy_(values, non_blocking=True)
        torch.cuda.synchronize()

    def slab_first() -> None:
        for target, values in zip(pieces, given, strict=True):
            target.copy_(values)
        pinned.copy_(slab, non_blocking=True)
        torch.cuda.synchronize()

    def pageable() -> None:
        for values in given:
            values.cpu()

    return {"slot": slab_first, "slot again": slab_first, "one by one": one_by_one, "pageable": pageable}


def repeated(copy: Callable[[], object], n: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(n):
            copy()

    return run


@cache
def measured(device: str, n_bytes: int | None) -> tuple[Rounds, int]:
    """Return the rounds of copies of a size, or of 60 taps, and how often an arm copies."""
    copies: Any = {"cpu": (on_processor, taps_on_processor), "cuda": (on_gpu, taps_on_gpu)}[device]
    made: Copies = copies[1]() if n_bytes is None else copies[0](n_bytes)
    for copy in made.values():
        copy()
    started = time.perf_counter()
    made["slot"]()
    n = max(1, min(5000, round(ARM_S / (time.perf_counter() - started))))
    return interleaved({arm: repeated(copy, n) for arm, copy in made.items()}, n_rounds(11), warm=1), n


def told(benchmark: Any, device: str, n_bytes: int | None, arm: str) -> None:
    rounds, n = measured(device, n_bytes)
    moved = N_TAPS * TAP_BYTES if n_bytes is None else n_bytes
    group = f"{'processor' if device == 'cpu' else 'GPU'}, {'60 taps' if n_bytes is None else shown(n_bytes)}"
    rate = round(moved * n / statistics.median(rounds.wall(arm)) / 1e9, 2)
    tell(benchmark, rounds, arm, group=group, over="slot", each=n, GB_s=rate)


@pytest.mark.parametrize("arm", ["slot", "slot again", "clone", "numpy"])
@pytest.mark.parametrize("n_bytes", SIZES, ids=shown)
def test_copy_of_one_size(benchmark: Any, n_bytes: int, arm: str) -> None:
    told(benchmark, "cpu", n_bytes, arm)


@pytest.mark.parametrize("arm", ["slot", "slot again", "gathered first"])
def test_copies_of_many_taps(benchmark: Any, arm: str) -> None:
    told(benchmark, "cpu", None, arm)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arm", ["slot", "slot again", "pageable", "pinned", "side stream"])
@pytest.mark.parametrize("n_bytes", SIZES, ids=shown)
def test_transfer_of_one_size(benchmark: Any, n_bytes: int, arm: str) -> None:
    told(benchmark, "cuda", n_bytes, arm)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arm", ["slot", "slot again", "one by one", "pageable"])
def test_transfers_of_many_taps(benchmark: Any, arm: str) -> None:
    told(benchmark, "cuda", None, arm)
