"""Arms that are measured against each other: interleaved in random order, and compared round by round.

A machine drifts, and whatever else runs on it comes and goes; both fall on all arms of a round alike. What is
told of two arms is the median of what each round tells of them, with an interval by the bootstrap (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, the percentile method), and an arm that is run twice, the
control, tells how far two arms lie apart that do not differ.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

#: What is run, by name. An arm that returns a `Timing` has timed itself, without what it made ready.
Arms = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """One run of an arm."""

    wall_s: float
    """Seconds that passed."""
    cpu_s: float
    """Seconds of all processors that this process had."""

    def plus(self, wall_s: float) -> Timing:
        """Return it longer by `wall_s`."""
        return Timing(self.wall_s + wall_s, self.cpu_s)


@dataclass(frozen=True)
class Estimate:
    """A median with its interval."""

    median: float
    """The median of all rounds."""
    low: float
    """The lower end of its interval of 90 %."""
    high: float
    """The upper end."""
    rounds: tuple[float, ...]
    """What each round told."""

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate of `factor` times as much."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Estimate(self.median * factor, low, high, tuple(value * factor for value in self.rounds))

    def includes(self, value: float) -> bool:
        """Return whether the interval has `value` in it."""
        return self.low <= value <= self.high

    def to_json(self, digits: int = 3) -> dict[str, object]:
        """Return it as JSON, rounded."""
        return {
            "median": round(self.median, digits),
            "interval_90": [round(self.low, digits), round(self.high, digits)],
            "all": [round(value, digits) for value in self.rounds],
        }


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

    def seconds(self, arm: str) -> Estimate:
        """Return the seconds of an arm."""
        return estimate(self.wall(arm))

    def over(self, above: str, below: str) -> Estimate:
        """Return the seconds of one arm over those of another."""
        return estimate(ratios(self.wall(above), self.wall(below)))

    def more(self, above: str, below: str) -> Estimate:
        """Return by how many seconds one arm is longer than another."""
        return estimate([a - b for a, b in zip(self.wall(above), self.wall(below), strict=True)])


def interleaved(
    arms: Arms,
    rounds: int,
    *,
    before: Callable[[str], object] = lambda arm: None,
    warm: int = 0,
    seed: int = 0,
) -> Rounds:
    """Run every arm once a round, each round in another order.

    Args:
        arms: what is run, by name.
        rounds: how often each is run.
        before: called with an arm's name before each run, outside the clock.
        warm: rounds that are run first and not kept.
        seed: of the orders.
    """
    shuffle, measured = random.Random(seed), Rounds({name: [] for name in arms})
    for number in range(-warm, rounds):
        for name in shuffle.sample(list(arms), len(arms)):
            before(name)
            cpu, started = time.process_time(), time.perf_counter()
            own = arms[name]()
            timing = Timing(time.perf_counter() - started, time.process_time() - cpu)
            if number >= 0:
                measured.arms[name].append(own if isinstance(own, Timing) else timing)
    return measured


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def estimate(values: Sequence[float], draws: int = 2000) -> Estimate:
    """Return the median of `values`, one of each round, and its 90 % interval by the bootstrap."""
    resampled = random.Random(0)
    medians = sorted(statistics.median(resampled.choices(values, k=len(values))) for _ in range(draws))
    return Estimate(
        statistics.median(values), medians[draws // 20], medians[-(draws // 20) - 1], tuple(values)
    )


def summary(values: Sequence[float], digits: int = 3) -> dict[str, object]:
    """Return the estimate of what each round told, as JSON."""
    return estimate(values).to_json(digits)
