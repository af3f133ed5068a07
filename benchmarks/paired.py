"""Arms that are measured against each other: interleaved in random order, and compared round by round.

A machine drifts, and whatever else runs on it comes and goes; both fall on all arms of a round alike.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Timing:
    """One run of an arm."""

    wall_s: float
    """Seconds that passed."""
    cpu_s: float
    """Seconds of all processors that this process had."""


@dataclass
class Rounds:
    """The timings of all arms, round by round."""

    arms: dict[str, list[Timing]] = field(default_factory=dict)

    def wall(self, arm: str) -> list[float]:
        """Return the seconds of an arm in each round."""
        return [timing.wall_s for timing in self.arms[arm]]

    def cpu(self, arm: str) -> list[float]:
        """Return the processor seconds of an arm in each round."""
        return [timing.cpu_s for timing in self.arms[arm]]


def interleaved(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    before: Callable[[str], object] = lambda arm: None,
    seed: int = 0,
) -> Rounds:
    """Run every arm once a round, each round in another order; `before` each, outside the clock."""
    shuffle, measured = random.Random(seed), Rounds({name: [] for name in arms})
    for _ in range(rounds):
        for name in shuffle.sample(list(arms), len(arms)):
            before(name)
            cpu, started = time.process_time(), time.perf_counter()
            arms[name]()
            timing = Timing(time.perf_counter() - started, time.process_time() - cpu)
            measured.arms[name].append(timing)
    return measured


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def summary(values: Sequence[float], digits: int = 3, draws: int = 2000) -> dict[str, object]:
    """Return the median, its 90 % interval by the bootstrap, and all values."""
    resampled = random.Random(0)
    medians = sorted(statistics.median(resampled.choices(values, k=len(values))) for _ in range(draws))
    low, high = medians[draws // 20], medians[-draws // 20]
    return {
        "median": round(statistics.median(values), digits),
        "interval_90": [round(low, digits), round(high, digits)],
        "all": [round(value, digits) for value in values],
    }
