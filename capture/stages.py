"""Clocks of a capture: what each thread spends its time on.

The thread that runs the model divides the wall among five stages, which add up to it: `start`, `data`,
`forward`, `wait`, `drain`. Each writer thread divides the time that it works among `transfer`, `checksum`,
`encode`, `write`, `sync`, `commit` and `statistics`. Clocks are read a few times for each step and each inner
chunk, and never in a hook.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from .spans import Spans

#: The stages of a writer thread, in their order.
WRITER_STAGES = ("transfer", "checksum", "encode", "write", "sync", "commit", "statistics")


@dataclass
class Stages:
    """Seconds that each stage took, and what passed through."""

    start_s: float = 0.0
    """The thread of the model planning, and making or opening the store."""
    data_s: float = 0.0
    """The thread of the model outside the forwards: waiting for input, and what else a loop does."""
    forward_s: float = 0.0
    """The forwards, with the copies in their hooks and those of the columns."""
    wait_s: float = 0.0
    """The thread of the model waiting for a slot."""
    drain_s: float = 0.0
    """The thread of the model waiting for the writers after the last forward."""
    transfer_s: float = 0.0
    """Writer threads waiting for copies from the device."""
    checksum_s: float = 0.0
    """Writer threads summing bytes and counting what is not finite."""
    encode_s: float = 0.0
    """Writer threads encoding."""
    write_s: float = 0.0
    """Writer threads handing bytes to the disk."""
    sync_s: float = 0.0
    """Writer threads waiting until shards are durable."""
    commit_s: float = 0.0
    """Writer threads naming shards and recording blocks."""
    statistics_s: float = 0.0
    """Writer threads computing statistics."""
    writing_s: float = 0.0
    """Time in which at least one writer thread was at work on something else than a transfer."""
    n_writers: int = 1
    """Writer threads."""
    n_rows: int = 0
    """Rows committed in this run."""
    n_shards: int = 0
    """Shards committed in this run."""
    n_bytes: int = 0
    """Bytes of those shards."""
    raw_bytes: int = 0
    """Bytes of those rows before they were encoded."""
    measured_bytes: int = 0
    """Bytes that statistics were computed of."""
    castable_bytes: int = 0
    """Of `raw_bytes`, those that a cast to float16 would save."""

    @property
    def wall_s(self) -> float:
        """All of the time of the thread that runs the model."""
        return self.start_s + self.data_s + self.forward_s + self.wait_s + self.drain_s

    @property
    def moving_s(self) -> float:
        """A writer thread's share of the time that writers waited for copies from the device."""
        return self.transfer_s / max(1, self.n_writers)

    def add(self, other: Stages) -> None:
        """Add what writer threads spent in `other`."""
        for stage in WRITER_STAGES:
            name = f"{stage}_s"
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def slowest(self) -> str:
        """Name what sets the pace: `data` or `forward`, which alternate, or `transfer`, or `write`."""
        model_s = self.data_s + self.forward_s
        if self.writing_s > model_s and self.writing_s >= self.moving_s:
            return "write"
        if self.moving_s > model_s:
            return "transfer"
        return "data" if self.data_s > self.forward_s else "forward"


class Laps:
    """A clock of one thread that adds what passed since its last lap to a stage, and may keep the spans."""

    def __init__(self, stages: Stages, spans: Spans | None = None, **about: Any) -> None:
        """Start the clock; `about` is what its spans are of."""
        self.stages = stages
        self._spans, self._about = spans, about
        self._at = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to `stage`."""
        now, name = time.perf_counter(), f"{stage}_s"
        setattr(self.stages, name, getattr(self.stages, name) + now - self._at)
        if self._spans is not None:
            self._spans.add(stage, self._at, now, **self._about)
        self._at = now
