"""A model run with its taps attached and nothing stored: to measure, or to learn from its first rows."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backend import Backend, Learned, Session
from .columns import column_values
from .data import Batch, Source
from .errors import CaptureError
from .layout import Layout, array_view
from .measure import forget_scratch, measure
from .pipeline import Piece, Slab
from .plan import PlannedTap
from .ragged import Varying
from .score import PREDICTION, Score
from .taps import Patterns


@dataclass(frozen=True, order=True)
class Spent:
    """What passed from one instant to another; the shorter is the lesser."""

    wall_s: float
    """Seconds."""
    cpu_s: float
    """Seconds of all processors that this process had."""

    @classmethod
    def until_now(cls) -> Spent:
        """Return what passed until now, from an instant that is always the same."""
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, before: Spent) -> Spent:
        return Spent(self.wall_s - before.wall_s, self.cpu_s - before.cpu_s)


class Rehearsal:
    """A session whose steps are kept as a first step is, or go round and round in one slab."""

    def __init__(self, session: Session, score: Score | None = None) -> None:
        self.session = session
        self._score: Score = PREDICTION if score is None else score
        self._layout: Layout | None = None
        self._slab: Slab | None = None
        self._takes = True

    def begin(self, n_rows: int) -> list[Piece] | None:
        """Open a step (called by the session)."""
        if self._slab is None:
            return None
        return self._pieces(n_rows) if self._takes else []

    def done(self) -> None:
        """Say that the forward has ended (called by the session)."""

    def learn(self, batch: Batch) -> list[Learned]:
        """Run a batch and return what it showed; its values stay until the next."""
        self.run(batch)
        return self.session.learned()

    def prepare(self, layout: Layout, taps: Sequence[PlannedTap], n_rows: int) -> None:
        """Take memory for one step, and put there what was learned from `n_rows` rows."""
        layout = replace(layout, block_rows=layout.step_rows)
        memory: NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, layout.slab_bytes), np.uint8)
        self._layout, self._slab = layout, Slab(0, memory)
        if any(tap.chain.steps for tap in taps):
            self.session.reduce([(tap.chain, tap.rows) for tap in taps])
        self.session.fit([tap.form for tap in taps])
        self.session.prepare(layout, memory, [self._slab])
        self.session.replay(self._pieces(n_rows))
        self._move(n_rows)

    def take_nothing(self) -> None:
        """Let hooks run from now on, and copy nothing."""
        self._takes = False

    def timed(self, batch: Batch) -> Spent:
        """Run a batch with all that its hooks and copies do; return what passes until its rows are there."""
        start = Spent.until_now()
        self.run(batch)
        self._move(len(batch.rows))
        return Spent.until_now() - start

    def put_columns(self, batch: Batch) -> None:
        """Put a batch's columns beside its taps."""
        assert self._layout is not None
        assert self._slab is not None
        for i, column in enumerate(self._layout.columns, start=len(self._layout.moved)):
            view = array_view(self._layout, i, self._slab.memory)[: len(batch.rows)]
            self.session.put(view, column_values(column, batch.columns[column.name]))

    def stored(self, i: int, n_rows: int) -> NDArray[Any]:
        """Return the first rows of array `i` of the layout as they would be stored."""
        assert self._layout is not None
        assert self._slab is not None
        return array_view(self._layout, i, self._slab.memory)[:n_rows]

    def measured(self, n_rows: int) -> tuple[float, NDArray[np.float64]]:
        """Compute the statistics of what `stored` gives; return seconds of one thread, and the entries."""
        layout = self._layout
        assert layout is not None
        assert layout.statistics is not None
        assert self._slab is not None
        entries = np.zeros(layout.statistics.block_bytes // 8)
        times = []
        for _ in range(2):  # the first brings the memory that is used again
            start = time.perf_counter()
            for i in range(len(layout.taps)):
                measure(layout, i, [self._slab.memory], n_rows, 0, entries)
            times.append(time.perf_counter() - start)
        forget_scratch()
        return min(times), entries

    def run(self, batch: Batch) -> None:
        """Run a batch with what its hooks do; what they copied on a device stays there."""
        output = self.session.forward(batch.inputs, batch.kwargs)
        if self.session.gradients:
            self.session.backward(output, self._score, batch.columns.get("label"))

    def _move(self, n_rows: int) -> None:
        ready = self.session.transfer(self._pieces(n_rows))
        if ready is not None:
            ready()

    def _pieces(self, n_rows: int) -> list[Piece]:
        assert self._slab is not None
        return [Piece(self._slab, 0, slice(0, n_rows))]


@contextlib.contextmanager
def rehearsing(
    backend: Backend,
    model: Any,
    layers: Patterns,
    score: Score | None = None,
    varying: Varying | None = None,
) -> Iterator[Rehearsal]:
    """Attach the taps, run the block without gradients, and remove every trace."""
    session = backend.session(model, layers)
    session.varying = varying or Varying()
    rehearsal = Rehearsal(session, score)
    session.attach(rehearsal)
    try:
        with session.inference():
            yield rehearsal
    finally:
        session.detach()


def batches(source: Source, batch_size: int, n_rows: int) -> Iterator[Batch]:
    """Yield batches of the first `n_rows` rows.

    Raises:
        CaptureError: there are no rows.
    """
    n_rows = min(n_rows, source.n_rows)
    if n_rows < 1:
        raise CaptureError(f"{source.name} has no rows")
    for first in range(0, n_rows, batch_size):
        yield source.batch(range(first, min(first + batch_size, n_rows)))
