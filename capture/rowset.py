"""Some rows of a store in increasing order, held as runs of consecutive ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowSet:
    """Rows without repeats; position `p` of them is row `rows[p]`."""

    starts: Rows
    """First row of each run; shape (runs,)."""
    lengths: Rows
    """Rows of each run, at least one; shape (runs,)."""

    @classmethod
    def of_spans(cls, starts: Any, stops: Any) -> RowSet:
        """Return the rows from each of `starts` up to its stop; spans increase and do not overlap."""
        first, stop = np.asarray(starts, np.int64), np.asarray(stops, np.int64)
        first, stop = first[stop > first], stop[stop > first]
        begins = np.append(True, first[1:] != stop[:-1]) if len(first) else np.zeros(0, bool)
        ends = np.append(begins[1:], True) if len(first) else begins
        return cls(first[begins], stop[ends] - first[begins])

    @classmethod
    def of_rows(cls, rows: Any) -> RowSet:
        """Return the rows that a list names, in any order; each counts once."""
        numbers = np.unique(np.asarray(rows, np.int64))
        return cls.of_spans(numbers, numbers + 1)

    @cached_property
    def ends(self) -> Rows:
        """How many rows there are up to the end of each run; shape (runs,)."""
        return np.cumsum(self.lengths)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, positions: Any) -> Rows:
        """Return the rows at `positions`, each from 0 to `len(self) - 1`."""
        at = np.asarray(positions, np.int64)
        run = np.searchsorted(self.ends, at, side="right")
        rows: Rows = self.starts[run] + at - (self.ends[run] - self.lengths[run])
        return rows

    def below(self, rows: Any) -> Rows:
        """Return how many of the set lie below each of `rows`."""
        asked = np.asarray(rows, np.int64)
        if not len(self.starts):
            return np.zeros(asked.shape, np.int64)
        run = np.searchsorted(self.starts, asked, side="right") - 1
        inside = np.clip(asked - self.starts[run], 0, self.lengths[run])
        counts: Rows = np.where(run < 0, 0, self.ends[run] - self.lengths[run] + inside)
        return counts

    def __and__(self, other: RowSet) -> RowSet:
        edges = np.unique(
            np.concatenate([a for s in (self, other) for a in (s.starts, s.starts + s.lengths)])
        )
        starts, stops = edges[:-1], edges[1:]
        both = np.ones(len(starts), bool)
        for one in (self, other):
            both &= one.below(stops) - one.below(starts) == stops - starts
        return RowSet.of_spans(starts[both], stops[both])
