"""Sets of rows as runs."""

from __future__ import annotations

import numpy as np
import pytest
from layertap.capture.rowset import RowSet

N = 60
RNG = np.random.default_rng(0)
MASKS = [
    np.zeros(N, bool),
    np.ones(N, bool),
    np.arange(N) % 2 == 0,
    (np.arange(N) > 3) & (np.arange(N) < 9),
    *(RNG.random((6, N)) < RNG.random((6, 1))),
]


def of_mask(mask: np.ndarray) -> RowSet:
    return RowSet.of_rows(RNG.permutation(np.flatnonzero(mask)))


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask.sum()))
def test_rows_and_positions_lead_to_each_other(mask):
    rows, numbers = of_mask(mask), np.flatnonzero(mask)
    assert len(rows) == len(numbers)
    assert rows[np.arange(len(rows))].tolist() == numbers.tolist()
    asked = np.arange(-3, N + 3)
    assert rows.below(asked).tolist() == [int((numbers < row).sum()) for row in asked]


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask.sum()))
def test_rows_of_two_sets_are_those_in_both(mask):
    for other in MASKS:
        both = of_mask(mask) & of_mask(other)
        assert both[np.arange(len(both))].tolist() == np.flatnonzero(mask & other).tolist()


def test_spans_that_touch_are_one_run_and_empty_ones_none():
    rows = RowSet.of_spans([0, 4, 4, 9], [4, 4, 7, 9])
    assert (rows.starts.tolist(), rows.lengths.tolist()) == ([0], [7])
    assert RowSet.of_rows([3, 3, 1])[[0, 1]].tolist() == [1, 3]
