"""Where the time of a capture went, what set its pace, and what would help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .left_out import told
from .plan import show_bytes
from .stages import Stages


@dataclass(frozen=True)
class StageReport:
    """What one run of a capture says of itself; as text, a table of its stages and what would help."""

    stages: Stages
    """Seconds of each stage, and what passed through."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """What patterns chose and was not captured, with the reason."""
    remarks: Sequence[str] = ()
    """What the backend alone knows of what the taps cost, in sentences."""

    @classmethod
    def of_log(cls, entry: Mapping[str, Any]) -> StageReport:
        """Return the report of an entry of a store's log; what it does not know is 0."""
        known = {one.name for one in fields(Stages)}
        numbers = {key: value for key, value in entry.items() if key in known and type(value) in (int, float)}
        return cls(Stages(**numbers))

    @property
    def slowest(self) -> str:
        """What set the pace: `data`, `forward`, `transfer` or `write`."""
        return self.stages.slowest()

    @property
    def slowest_s(self) -> float:
        """Seconds of what set the pace, as long as it took in this run, beside all the rest."""
        s = self.stages
        return max(s.data_s + s.forward_s, s.moving_s, s.writing_s)

    @property
    def overlap(self) -> float:
        """The wall over `slowest_s`: 1 where everything else was hidden behind it."""
        return self.stages.wall_s / self.slowest_s if self.slowest_s else 1.0

    def hint(self) -> str:
        """Return what would make such a run faster, worked out from its numbers."""
        s = self.stages
        if not s.n_rows:
            return "no block was written"
        if s.start_s + s.drain_s > 0.5 * s.wall_s:
            return f"a short run: its start and its end took {_share(s.start_s + s.drain_s, s.wall_s)}"
        if self.slowest == "data":
            floor_s = max(s.forward_s, s.writing_s)
            return f"the data set the pace: loaded ahead by more workers, {self._would(s.data_s, floor_s)}"
        if self.slowest == "forward":
            free = self._would(s.start_s + s.wait_s + s.drain_s)
            return f"the model sets the pace: with a store that costs nothing, {free}"
        if self.slowest == "transfer":
            return f"the copies from the device set the pace: {self._cast(s.moving_s)}"
        durable_s = s.sync_s + s.commit_s
        work_s = s.checksum_s + s.encode_s + s.write_s + durable_s + s.statistics_s
        if s.statistics_s > 0.5 * work_s:
            rate = _rate(s.measured_bytes, s.statistics_s)
            gain_s = min(s.writing_s * s.statistics_s / work_s, s.wait_s + s.drain_s)
            return f"statistics set the pace, {rate} a writer: without them, {self._would(gain_s)}"
        if s.encode_s > 0.5 * work_s:
            return (
                f"encoding sets the pace, {_rate(s.raw_bytes, s.encode_s)} a writer for "
                f"{_share(s.n_bytes, s.raw_bytes)} of the bytes: {self._cast(s.writing_s)}"
            )
        if durable_s > 0.5 * work_s and s.n_bytes < 2**20 * s.n_shards:
            size = show_bytes(s.n_bytes / s.n_shards)
            return f"{s.n_shards:,} syncs set the pace, of {size} each: more memory makes larger shards"
        return f"writing sets the pace: {self._cast(s.writing_s)}"

    def _cast(self, busy_s: float) -> str:
        """Return what a cast would save of `busy_s`, which goes with the bytes."""
        s = self.stages
        saved = s.castable_bytes / max(1, s.raw_bytes)
        if saved < 0.05:
            return "the values are narrow already, so fewer layers would help"
        left = _share(s.raw_bytes - s.castable_bytes, s.raw_bytes)
        gain_s = min(busy_s * saved, s.wait_s + s.drain_s)  # no more than the model waited
        return f"a cast to float16 leaves {left} of the bytes, {self._would(gain_s)}"

    def _would(self, gain_s: float, floor_s: float = 0.0) -> str:
        """Return what the wall would come to."""
        wall_s = self.stages.wall_s
        return f"about {max(wall_s - gain_s, floor_s):.3g} s in place of {wall_s:.3g}"

    def lines(self) -> list[tuple[str, str, str, str, str]]:
        """Return the table: stage, seconds, share of the wall, bytes, rate; of writers, seconds of each."""
        s = self.stages
        n = max(1, s.n_writers)
        stages = [
            ("wall", s.wall_s, s.n_bytes),
            ("data", s.data_s, 0),
            ("forward, copies", s.forward_s, s.raw_bytes),
            ("waiting for a slot", s.wait_s, 0),
            ("start, end", s.start_s + s.drain_s, 0),
            ("transfer", s.moving_s, s.raw_bytes),
            ("encode", s.encode_s / n, s.raw_bytes),
            ("checksum", s.checksum_s / n, s.raw_bytes),
            ("statistics", s.statistics_s / n, s.measured_bytes),
            ("write", s.write_s / n, s.n_bytes),
            ("sync, commit", (s.sync_s + s.commit_s) / n, 0),
        ]
        return [
            (
                name,
                f"{seconds:.2f} s",
                _share(seconds, s.wall_s),
                show_bytes(n_bytes) if n_bytes else "",
                _rate(n_bytes, seconds) if n_bytes and seconds else "",
            )
            for name, seconds, n_bytes in stages
            if seconds >= 0.005 or name not in ("transfer", "encode", "statistics")
        ]

    def __str__(self) -> str:
        """Return the table, and below it what set the pace and what would help."""
        lines = self.lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in lines
        ]
        last = f"wall / slowest ({self.slowest}) {self.overlap:.2f}; {self.hint()}"
        return "\n".join([*text, last, *self.remarks, *told(self.left_out)])


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def _rate(n_bytes: float, seconds: float) -> str:
    return f"{show_bytes(n_bytes / seconds)}/s"
