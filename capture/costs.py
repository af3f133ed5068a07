"""How long a capture takes by what was measured, and what other plans would take: pure arithmetic.

The thread of the model loads (unless others do), runs the model and copies; beside it copies come from the
device, and writers encode and write. A capture takes as long as the longest of these, and no less than the
processor time of all of them over the processors there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .calibration import HALF, Encoded
from .codecs import CODECS

#: What is not worth saying: plans that are quicker by less than this.
LEAST_GAIN = 1.05

_POOLED = 7
_BOUND = {
    "data": "loading sets the pace",
    "forward": "the model sets the pace",
    "transfer": "the copies from the device set the pace",
    "write": "writing sets the pace",
    "processors": "all processors are busy",
}


@dataclass(frozen=True)
class TapCosts:
    """What one tap costs a row."""

    name: str
    """Its name."""
    type: str
    """Type of its layer."""
    dtype: str
    """Element type as stored."""
    space: tuple[int, ...]
    """Sizes of its maps as stored; empty where it has none."""
    source_bytes: int
    """Bytes of the layer's output."""
    stored_bytes: int
    """Bytes after the reduction."""
    copy_s: float
    """Seconds of the copy in the hook."""
    encoded: Mapping[tuple[str, str], Encoded]
    """What codecs make of it, by element type and codec."""
    codec: str = "none"
    """The codec that is used."""
    statistics_s: float = 0.0
    """Seconds in which one thread computes the cheap statistics."""

    @property
    def now(self) -> Encoded:
        """What the codec in use makes of it."""
        return self.encoded[self.dtype, self.codec]

    def cast(self, dtype: str) -> TapCosts:
        """Return the tap cast to another type."""
        if (dtype, self.codec) not in self.encoded or dtype == self.dtype:
            return self
        plain = self.encoded
        share = plain[dtype, "none"].bytes_a_row / plain[self.dtype, "none"].bytes_a_row
        stored = round(self.stored_bytes * share)
        moved = (self.source_bytes + stored) / max(1, self.source_bytes + self.stored_bytes)
        return replace(
            self,
            dtype=dtype,
            stored_bytes=stored,
            copy_s=self.copy_s * moved,
            statistics_s=self.statistics_s * share,
        )

    def pooled(self, size: int) -> TapCosts:
        """Return the tap with its maps pooled to `size` in each direction, where they are larger."""
        if len(self.space) != 2 or min(self.space) <= size:
            return self
        share = size * size / math.prod(self.space)
        encoded = {
            key: Encoded(one.bytes_a_row * share, one.seconds_a_row * share)
            for key, one in self.encoded.items()
        }
        return replace(
            self,
            space=(size, size),
            stored_bytes=max(1, round(self.stored_bytes * share)),
            encoded=encoded,
            statistics_s=self.statistics_s * share,
        )


@dataclass(frozen=True)
class Costs:
    """What a row of a capture costs in each stage."""

    taps: tuple[TapCosts, ...]
    """What is captured."""
    forward_s: float
    """Seconds of the model alone."""
    forward_cpu_s: float
    """Its processor seconds."""
    hooks_s: float
    """Seconds of its hooks, without what they copy."""
    load_s: float
    """Seconds in which one thread loads."""
    load_cpu_s: float
    """Processor seconds of that."""
    workers: int
    """Threads or processes that load ahead; 0: the thread of the model loads."""
    n_writers: int
    """Writer threads."""
    n_cores: int
    """Processors."""
    disk_rate: float | None
    """Bytes a second that become durable."""
    transfer_rate: float | None
    """Bytes a second from the device; None: there is no device, and hooks copy to the host."""
    column_bytes: float = 0.0
    """Bytes of the columns on disk."""
    values: bool = True
    """Whether activations are written; else the cheap statistics alone."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of all taps after the reduction."""
        return sum(tap.stored_bytes for tap in self.taps)

    @property
    def disk_bytes(self) -> float:
        """Bytes on disk."""
        return self.column_bytes + sum(tap.now.bytes_a_row for tap in self.taps) * self.values

    @property
    def writers_s(self) -> float:
        """Seconds in which one writer prepares a row."""
        if not self.values:
            return sum(tap.statistics_s for tap in self.taps)
        return sum(tap.now.seconds_a_row for tap in self.taps)

    @property
    def stages_s(self) -> dict[str, float]:
        """Seconds of each stage alone: data, forward (with hooks and copies), transfer, write, processors."""
        copies_s = sum(tap.copy_s for tap in self.taps)
        forward_s = self.forward_s + self.hooks_s + copies_s
        load_s = self.load_s if not self.workers else max(0.0, self.load_s / self.workers - forward_s)
        transfer_s = self.stored_bytes / self.transfer_rate if self.transfer_rate else 0.0
        disk_s = self.disk_bytes / self.disk_rate if self.disk_rate else 0.0
        cpu_s = self.forward_cpu_s + self.hooks_s + copies_s + self.load_cpu_s + self.writers_s
        return {
            "data": load_s,
            "forward": forward_s,
            "transfer": transfer_s,
            "write": self.writers_s / min(self.n_writers, self.n_cores) + disk_s,
            "processors": cpu_s / self.n_cores,
        }

    @property
    def seconds(self) -> float:
        """Seconds of a row."""
        s = self.stages_s
        return max(s["data"] + s["forward"], s["transfer"], s["write"], s["processors"])

    @property
    def bound(self) -> str:
        """Which stage sets the pace."""
        s = self.stages_s
        model_s = s["data"] + s["forward"]
        if self.seconds == model_s:
            return "data" if s["data"] > s["forward"] else "forward"
        return next(name for name in ("transfer", "write", "processors") if s[name] == self.seconds)

    @property
    def floor_s(self) -> float:
        """Seconds of a row with nothing captured."""
        return replace(self, taps=(), hooks_s=0.0, column_bytes=0.0).seconds

    def without(self, name: str) -> Costs:
        """Return what is left without a tap."""
        share = 1 - 1 / max(1, len(self.taps))
        left = tuple(tap for tap in self.taps if tap.name != name)
        return replace(self, taps=left, hooks_s=self.hooks_s * share)


@dataclass(frozen=True)
class Advice:
    """Another plan, and what it would come to."""

    change: str
    """What to change."""
    options: str
    """How to say so on the command line; empty where there is no option."""
    seconds: float
    """Seconds of a row, predicted."""
    factor: float
    """How many times faster than now, predicted."""
    bytes_a_row: float
    """Bytes of a row on disk."""
    bound: str
    """What would set the pace, in words."""

    def __str__(self) -> str:
        options = f" ({self.options})" if self.options else ""
        return f"{self.change}{options}: {self.factor:.2g} times faster; {self.bound}"


def advise(costs: Costs, measured_s: float | None = None) -> list[Advice]:
    """Return the plans that would be quicker, the quickest first, and nothing that would not.

    Args:
        costs: the plan as it is.
        measured_s: seconds of a row as they were measured; what a plan costs above the model alone is held
            against that, because stages that share a machine slow each other.
    """
    now_s = measured_s or costs.seconds
    floor_s = min(costs.floor_s, now_s)
    above_s = costs.seconds - floor_s
    scale = (now_s - floor_s) / above_s if above_s > 0 else 1.0
    found = []
    for change, options, other in _others(costs):
        seconds = other.floor_s + (other.seconds - other.floor_s) * scale
        if now_s / seconds >= LEAST_GAIN:
            found.append(
                Advice(change, options, seconds, now_s / seconds, other.disk_bytes, _BOUND[other.bound])
            )
    return sorted(found, key=lambda one: -one.factor)


def _others(costs: Costs) -> list[tuple[str, str, Costs]]:
    found: list[tuple[str, str, Costs]] = []
    taps = costs.taps
    cast = tuple(tap.cast(HALF) for tap in taps)
    if cast != taps:
        found.append(("cast to float16", "--dtype float16", replace(costs, taps=cast)))
    codecs = [codec for codec in CODECS if any(tap.codec != codec for tap in taps)]
    for codec in codecs:
        words = f"encode with {codec}" if codec != "none" else "do not encode"
        others = tuple(replace(tap, codec=codec) for tap in taps)
        found.append((words, f"--codec {codec}", replace(costs, taps=others)))
    found += _pools(costs, taps)
    if len(taps) > 1:
        largest = max(taps, key=lambda tap: costs.seconds - costs.without(tap.name).seconds)
        found.append(
            (f"leave out {largest.name}", f"--layers '...,!{largest.name}'", costs.without(largest.name))
        )
    if costs.values and any(tap.statistics_s for tap in taps):
        found.append(("keep statistics alone", "--stats-only", replace(costs, values=False)))
    if costs.n_writers < costs.n_cores:
        found.append((f"{costs.n_cores} writers", "", replace(costs, n_writers=costs.n_cores)))
    if costs.bound == "data":
        more = max(2, 2 * costs.workers)
        found.append((f"{more} workers", f"--workers {more}", replace(costs, workers=more)))
    return found


def _pools(costs: Costs, taps: Sequence[TapCosts]) -> list[tuple[str, str, Costs]]:
    """Return pooling of the largest tap, and of all that are larger than the pool."""
    pools = [tap for tap in taps if tap.pooled(_POOLED) != tap]
    if not pools:
        return []
    largest = max(pools, key=lambda tap: tap.stored_bytes)
    one = tuple(tap.pooled(_POOLED) if tap.name == largest.name else tap for tap in taps)
    every = tuple(tap.pooled(_POOLED) for tap in taps)
    found = [
        (
            f"pool {largest.name} to {_POOLED}",
            f"--reduce '{largest.name}=pool:{_POOLED}'",
            replace(costs, taps=one),
        )
    ]
    if len(pools) > 1:
        found.append(
            (f"pool {len(pools)} layers to {_POOLED}", f"--reduce pool:{_POOLED}", replace(costs, taps=every))
        )
    return found
