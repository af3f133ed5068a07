"""Hands arms that were measured against each other to pytest-benchmark, an entry for each.

pytest-benchmark alone runs one arm to its end before the next begins, and what the machine does meanwhile is
taken for a difference. Here all arms of a case run interleaved (`layertap.capture.paired`) when the first of
them is asked for; then each entry is told the seconds that its arm took, by a clock that replays them, so
that groups, tables, JSON and comparisons of pytest-benchmark are of interleaved rounds.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

import pytest
from layertap.capture.paired import Rounds


class _Clock:
    """Stands still but for what is added to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


_CLOCK = _Clock()

#: Marks a module's benchmarks as measured beforehand.
replayed = pytest.mark.benchmark(timer=_CLOCK)


def n_rounds(default: int) -> int:
    """Return how many rounds are measured: `default`, or what `LAYERTAP_BENCH_ROUNDS` says."""
    return int(os.environ.get("LAYERTAP_BENCH_ROUNDS", default))


def tell(
    benchmark: Any, measured: Rounds, arm: str, *, group: str, over: str, each: float = 1, **figures: Any
) -> None:
    """Tell pytest-benchmark what an arm took.

    Args:
        benchmark: its fixture.
        measured: all arms of the case.
        arm: which one this entry is.
        group: name of the case.
        over: the arm that it is compared with.
        each: how often the arm did its work in one run; what is told is of one.
        figures: what else belongs to the entry.
    """
    durations = iter([timing.wall_s / each for timing in measured.arms[arm]])

    def replay() -> None:
        _CLOCK.now += next(durations)

    benchmark.group = group
    benchmark.pedantic(replay, rounds=len(measured.arms[arm]))
    benchmark.extra_info |= {
        "arm": arm,
        "over": over,
        "ratio": measured.over(arm, over).to_json(),
        "cpu_s": statistics.median(measured.cpu(arm)) / each,
        **figures,
    }
