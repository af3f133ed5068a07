"""What each stage of a capture costs a step: arms that do one thing more each, run interleaved.

    off, control    the model alone, twice: how far two arms lie apart that do not differ
    no-op           with hooks that take nothing
    copy            hooks reduce and copy their layers' outputs
    transfer        and what was copied comes to the host; there only where a device is
    encode          writers sum and encode it, beside the model, and write it nowhere
    write           and make it durable
    data            and load the rows instead of having them: all of a capture

An arm's clock runs over some steps of its own, after what it made ready: the first step, which makes the
plan, and the first blocks, so that writers are as busy when the clock stops as when it started. Where a block
has more steps than an arm, the end of the block is counted by the share of it that ran.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .backend import Backend
from .data import Batch, Source
from .discard import DiscardPlace
from .paired import Estimate, Rounds, Timing, interleaved
from .pipeline import Piece
from .place import Place, place_of
from .plan import Settings
from .recorder import Facts, Recorder
from .rehearsal import Rehearsal, rehearsing
from .score import Score
from .taps import Patterns

OFF, CONTROL, NO_OP, COPY, TRANSFER, ENCODE, WRITE, DATA = (
    *("off", "control", "no-op", "copy", "transfer", "encode", "write", "data"),
)

#: Seconds that an arm should run, and that making its writers busy may take.
_ARM_S, _WARM_S = 0.5, 0.8
_MOST_STEPS = 200

#: Makes ready a rehearsal for which its first step is learned.
Prepare = Callable[[Rehearsal, Batch], None]


class _TakesNothing:
    """A sink whose steps are taken by hooks and copied nowhere."""

    def begin(self, n_rows: int) -> list[Piece]:
        """Take nothing."""
        return []

    def done(self) -> None:
        """Nothing is done."""


@dataclass(frozen=True)
class Rung:
    """One arm of the ladder, beside the one below it."""

    name: str
    """What it does."""
    step_s: Estimate
    """Seconds of a step."""
    more_s: Estimate
    """By how many seconds a step is longer than in the rung below; of `control`, than in `off`."""
    cpu_s: float
    """Processor seconds of a step."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "arm": self.name,
            "step_s": self.step_s.to_json(6),
            "more_s": self.more_s.to_json(6),
            "cpu_s": round(self.cpu_s, 6),
        }


class Ladder:
    """The arms of one model, its data and what is captured of it."""

    def __init__(
        self,
        backend: Backend,
        model: Any,
        layers: Patterns,
        source: Source,
        batches: Sequence[Batch],
        settings: Settings,
        *,
        workers: int,
        folder: Path,
        step_s: float,
        steps_per_block: int,
        prepare: Prepare,
        transfers: bool,
        score: Score | None = None,
    ) -> None:
        """Take what is measured.

        Args:
            backend: the model's.
            model: what runs.
            layers: what is captured of it.
            source: the data.
            batches: some batches of it of one length, which go round.
            settings: how it is captured.
            workers: threads or processes that load ahead in `data`.
            folder: where `write` writes, and takes away again.
            step_s: about how long a step takes.
            steps_per_block: steps of a block, with these settings.
            prepare: makes a rehearsal ready that has learned from a batch.
            transfers: whether copies lie on a device first.
            score: what gradients are of, where some are tapped.
        """
        self._backend, self._model, self._layers, self._batches = backend, model, layers, batches
        self._settings, self._folder, self._score = settings, folder, score
        self._source, self._workers = source, workers
        self._prepare, self._steps_per_block = prepare, steps_per_block
        self.n_steps = min(_MOST_STEPS, max(2, round(_ARM_S / max(step_s, 1e-6))))
        if steps_per_block <= self.n_steps:
            self.n_steps = -(-self.n_steps // steps_per_block) * steps_per_block
        n_warm = 3 * steps_per_block
        self._n_warm = n_warm if n_warm * step_s <= _WARM_S else min(n_warm, 1)
        self.arms: dict[str, Callable[[], Timing]] = {
            OFF: self._alone,
            CONTROL: self._alone,
            NO_OP: partial(self._rehearsed, NO_OP),
            COPY: partial(self._rehearsed, COPY),
            **({TRANSFER: partial(self._rehearsed, TRANSFER)} if transfers else {}),
            ENCODE: partial(self._captured, ENCODE),
            WRITE: partial(self._captured, WRITE),
            DATA: partial(self._captured, DATA),
        }

    def climb(self, budget_s: float, least: int = 3, most: int = 15) -> Rounds:
        """Run all arms, round by round, for about so many seconds."""
        started = time.perf_counter()
        interleaved(self.arms, 1)  # what is made once is made
        round_s = time.perf_counter() - started
        rounds = round(budget_s / max(round_s, 1e-3))
        return interleaved(self.arms, max(least, min(most, rounds)))

    def rungs(self, measured: Rounds) -> list[Rung]:
        """Return what each arm took a step, beside the one below."""
        found, below = [], OFF
        for name in self.arms:
            more = measured.more(name, below).scaled(1 / self.n_steps)
            step = measured.seconds(name).scaled(1 / self.n_steps)
            cpu = sorted(measured.cpu(name))[len(measured.cpu(name)) // 2] / self.n_steps
            found.append(Rung(name, step, more, cpu))
            below = below if name == CONTROL else name
        return found

    def _alone(self) -> Timing:
        session = self._backend.session(self._model, self._layers)
        with session.inference():
            batches = self._going_round()
            session.forward((first := next(batches)).inputs, first.kwargs)
            session.wait()
            clock = _Clock()
            for batch in islice(batches, self.n_steps):
                session.forward(batch.inputs, batch.kwargs)
            session.wait()
            return clock.read()

    def _rehearsed(self, arm: str) -> Timing:
        with rehearsing(
            self._backend, self._model, self._layers, self._score, self._settings.varying
        ) as rehearsal:
            batches = self._going_round()
            first = next(batches)
            rehearsal.learn(first)
            self._prepare(rehearsal, first)
            run: Callable[[Batch], object] = rehearsal.timed if arm == TRANSFER else rehearsal.run
            if arm == NO_OP:
                rehearsal.take_nothing()
            run(next(batches))
            rehearsal.session.wait()
            clock = _Clock()
            for batch in islice(batches, self.n_steps):
                run(batch)
            rehearsal.session.wait()
            return clock.read()

    def _captured(self, arm: str) -> Timing:
        with TemporaryDirectory(prefix=".layertap-", dir=self._folder) as folder:
            place: Place = DiscardPlace() if arm == ENCODE else place_of(Path(folder) / "run.zarr")
            recorder = Recorder(
                self._model,
                place,
                self._layers,
                settings=self._settings,
                facts=Facts(),
                backend=self._backend,
                score=self._score,
            )
            with (
                recorder,
                recorder.inference(),
                contextlib.closing(self._loaded() if arm == DATA else self._going_round()) as batches,
            ):
                for batch in islice(batches, 2 + self._n_warm):  # the second one makes the plan
                    recorder.step(batch)
                clock = _Clock()
                for batch in islice(batches, self.n_steps):
                    recorder.step(batch)
                seen = clock.read()
            return seen.plus(recorder.stages.drain_s * self._unfinished)

    @property
    def _unfinished(self) -> float:
        """The share of the end of a capture that belongs to the steps of an arm which fill no block."""
        n = self.n_steps
        return 0.0 if self._steps_per_block <= n else n / self._steps_per_block

    def _going_round(self) -> Generator[Batch]:
        yield from cycle(self._batches)

    def _loaded(self) -> Generator[Batch]:
        """Yield batches as they are loaded, from the first row on, and round again."""
        size = len(self._batches[0].rows)
        steps = (range(first, first + size) for first in range(0, self._source.n_rows - size + 1, size))
        yield from self._backend.batches(self._source, cycle(steps), self._workers)


class _Clock:
    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Timing:
        return Timing(time.perf_counter() - self._wall, time.process_time() - self._cpu)
