"""Arms are interleaved, compared round by round, and told with an interval."""

from __future__ import annotations

import random

import pytest
from layertap.capture.paired import Rounds, Timing, estimate, interleaved, ratios


def test_every_round_runs_every_arm_once_in_an_order_of_its_own():
    ran: list[str] = []
    arms = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    measured = interleaved(arms, 20, warm=2, before=lambda name: ran.append(f"before {name}"))
    names = ran[1::2]
    assert ran[::2] == [f"before {name}" for name in names]
    rounds = [tuple(names[i : i + 3]) for i in range(0, len(names), 3)]
    assert len(rounds) == 22
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 3
    assert {name: len(timings) for name, timings in measured.arms.items()} == {"a": 20, "b": 20, "c": 20}
    again: list[str] = []
    interleaved({name: (lambda name=name: again.append(name)) for name in "abc"}, 20, warm=2)
    assert again == names


def test_drift_that_falls_on_a_whole_round_is_not_taken_for_a_difference():
    drift = [1.0, 1.5, 3.0, 1.1, 2.2, 0.9, 4.0]
    measured = Rounds({"off": [Timing(d, d) for d in drift], "on": [Timing(1.1 * d, d) for d in drift]})
    found = measured.over("on", "off")
    assert (found.median, found.low, found.high) == pytest.approx((1.1, 1.1, 1.1))
    assert measured.more("on", "off").median == pytest.approx(0.15)
    assert ratios(measured.cpu("on"), measured.cpu("off")) == [1.0] * 7


def test_an_interval_holds_the_median_as_often_as_it_says():
    rng = random.Random(1)
    held = sum(
        estimate([rng.gauss(1.0, 0.1) for _ in range(15)], draws=300).includes(1.0) for _ in range(200)
    )
    assert 160 <= held <= 196


def test_an_estimate_of_equal_rounds_is_one_number():
    assert estimate([2.0, 2.0, 2.0]).to_json() == {
        "median": 2.0,
        "interval_90": [2.0, 2.0],
        "all": [2.0, 2.0, 2.0],
    }
