"""What a capture costs, stage by stage and tap by tap, measured here; and what would make it cheaper.

    1. a dry run lists the taps: calls, shapes, bytes, which are overwritten in place, which run compiled
    2. a calibration times what this machine does alone: copies, transfers, codecs on the taps' values, disk
    3. a ladder of interleaved arms adds one stage after the other to the model (`ladder`)
    4. costs: what each stage takes of a row, and what other plans would take (`costs`)
    5. a real capture is held against what that foretold

Nothing is left behind but what is asked for.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .backend import Backend, Surveyed, backend_for, backend_named
from .calibration import Calibration, Encoded, copy_rate, copy_s, disk_rate, encodings, total
from .costs import Advice, Costs, TapCosts, advise
from .data import Batch, Source
from .errors import PlanError
from .forecast import loaded_batches, probe_of, tried_layout
from .journal import versions
from .ladder import COPY, DATA, ENCODE, NO_OP, OFF, TRANSFER, WRITE, Ladder, Rung
from .layout import Layout
from .machine import n_cores
from .paired import Estimate
from .place import place_of
from .plan import DEFAULT_MEMORY, PlannedTap, Settings, plan_taps
from .ragged import Padded, Ragged, varying
from .reader import Run, open_run
from .record import settings_of, source_of
from .recorder import Facts, Recorder, column_specs, tried
from .reduce import Reductions
from .rehearsal import Rehearsal, Spent, rehearsing
from .score import Score
from .spans import Spans
from .statistics import Choice, plan_statistics
from .taps import Patterns, TapName

Json = dict[str, Any]

_RUN_S, _READ_S = 5.0, 2.0  # that the real capture takes, and reading of it, about
_SURVEYED_ROWS = 3
_SEEN = 0.02  # of the model: less cannot be told from it in a picture
_NOISE_ROWS = 64
_PICTURE = (3, 224, 224)
_NOISE_OF = 10_000  # rows


class NoiseSource(Source):
    """Noise that a model takes, as many rows as are asked for: a few that come again and again."""

    name = "noise"

    def __init__(self, example: Batch, n_rows: int) -> None:
        self.n_rows = n_rows
        self._example = example

    @classmethod
    def of(cls, backend: Backend, model: Any, size: Sequence[int] | None, n_rows: int) -> NoiseSource:
        """Return noise of the shape that is said, else of what the model tells, else of pictures."""
        example = backend.example(model, _NOISE_ROWS) if size is None else None
        if example is None:
            shape = (_NOISE_ROWS, *(size or _PICTURE))
            values = np.random.default_rng(0).standard_normal(shape, np.float32)
            example = Batch(range(_NOISE_ROWS), (values,))
        return cls(example, n_rows)

    def batch(self, rows: range) -> Batch:
        """Return rows that come again after a while."""
        at = np.arange(rows.start, rows.stop) % len(self._example.rows)
        inputs = tuple(values[at] for values in self._example.inputs)
        return Batch(rows, inputs, {name: values[at] for name, values in self._example.kwargs.items()})


@dataclass(frozen=True)
class TapProfile:
    """What one tap is and costs."""

    name: str
    """Its name."""
    type: str
    """Type of its layer."""
    shape: tuple[int, ...]
    """Shape of a row as stored."""
    dtype: str
    """Element type as stored."""
    call: int
    """Which call of its layer in a forward."""
    calls: int
    """How often its layer is called in a forward."""
    overwritten: bool
    """Whether the layer's output is overwritten in place later in the forward."""
    compiled: bool
    """Whether it runs in compiled code."""
    source_bytes: int
    """Bytes of a row as the layer gives it."""
    stored_bytes: int
    """Bytes of a row after the reduction."""
    disk_bytes: float
    """Bytes of a row on disk."""
    stages_s: Mapping[str, float]
    """Seconds of a row in each stage, each alone: `copy`, `transfer`, `encode` (of one thread), `write`."""
    share: float
    """Its share of those seconds, of all taps."""
    marginal_s: float
    """By how much a row of the capture would be shorter without it, predicted."""


@dataclass(frozen=True)
class RealRun:
    """A capture that was run, beside what was foretold of it."""

    n_rows: int
    """Rows."""
    predicted_s: float
    """Seconds that were foretold, without planning and making the store."""
    measured_s: float
    """Seconds that it took."""
    stages_s: Mapping[str, float]
    """Where the time went, by its own report."""
    slowest: str
    """What set the pace, by its own report."""
    read_s: float
    """Seconds in which a row of all that it stored was read again."""

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_s / max(self.measured_s, 1e-9)


@dataclass(frozen=True)
class Profile:
    """What a capture costs, where, and what would make it cheaper; as text, tables."""

    model: str
    """What the model is called."""
    backend: str
    """Its framework."""
    data: str
    """Name of the data."""
    n_rows: int
    """Rows of the data set."""
    batch_size: int
    """Rows of a step."""
    n_cores: int
    """Processors of this process."""
    versions: Mapping[str, str]
    """Versions of what was measured."""
    taps: tuple[TapProfile, ...]
    """What would be captured."""
    left_out: Mapping[str, str]
    """What was chosen and cannot be captured, with the reason."""
    remarks: Sequence[str]
    """What the backend alone knows of what the taps cost, in sentences."""
    calibration: Calibration
    """What this machine does alone."""
    rungs: tuple[Rung, ...]
    """The ladder."""
    n_rounds: int
    """Rounds of the ladder."""
    n_steps: int
    """Steps of each arm."""
    costs: Costs
    """Seconds of a row in each stage."""
    advice: tuple[Advice, ...]
    """Plans that would be quicker, the quickest first."""
    real: RealRun | None
    """A capture that was run; None where none was asked for."""
    points: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of this plan and others: bytes a row on disk and rows a second."""

    @property
    def forward_s(self) -> float:
        """Seconds of a row of the model alone."""
        return self.rung(OFF).step_s.median / self.batch_size

    @property
    def capture_s(self) -> float:
        """Seconds of a row of the capture, by the ladder."""
        return self.rung(DATA).step_s.median / self.batch_size

    @property
    def slowdown(self) -> float:
        """The capture over the model alone."""
        return self.capture_s / self.forward_s

    @property
    def read_s(self) -> float | None:
        """Seconds of reading a row of all taps back from the store."""
        return None if self.real is None else self.real.read_s

    @property
    def n_readings(self) -> int | None:
        """How many readings make the store cheaper than running the model again; None: none do."""
        if self.read_s is None or self.read_s >= self.forward_s:
            return None
        return math.ceil(self.capture_s / (self.forward_s - self.read_s))

    def rung(self, name: str) -> Rung:
        """Return an arm of the ladder."""
        return next(rung for rung in self.rungs if rung.name == name)

    def to_json(self) -> Json:
        """Return all of it as JSON."""
        return {
            "model": self.model,
            "backend": self.backend,
            "data": {"name": self.data, "n_rows": self.n_rows},
            "batch_size": self.batch_size,
            "n_cores": self.n_cores,
            "versions": dict(self.versions),
            "taps": [{**asdict(tap), "shape": list(tap.shape)} for tap in self.taps],
            "left_out": dict(self.left_out),
            "remarks": list(self.remarks),
            "calibration": self.calibration.to_json(),
            "ladder": {
                "n_rounds": self.n_rounds,
                "n_steps": self.n_steps,
                "arms": [rung.to_json() for rung in self.rungs],
            },
            "stages_s": dict(self.costs.stages_s),
            "bottleneck": self.costs.bound,
            "forward_s": self.forward_s,
            "capture_s": self.capture_s,
            "advice": [{**asdict(one), "text": str(one)} for one in self.advice],
            "real": None if self.real is None else {**asdict(self.real), "ratio": self.real.ratio},
            "read_s": self.read_s,
            "n_readings": self.n_readings,
            "roofs": _roofs(self),
            "points": {name: list(point) for name, point in self.points.items()},
        }

    def __str__(self) -> str:
        from .profile_text import show

        return show(self)


def profile(
    model: Any,
    data: Any = None,
    layers: Patterns = "**",
    *,
    size: Sequence[int] | None = None,
    batch_size: int = 16,
    workers: int | None = None,
    score: Score | None = None,
    reduce: Reductions = None,
    ragged: Ragged = None,
    pad: Padded = None,
    mask: str | None = "attention_mask",
    dtype: str | None = None,
    codec: str = "none",
    stats: str | Sequence[str] | None = None,
    memory: str | int = DEFAULT_MEMORY,
    writers: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
    backend: str | None = None,
    at: str | Path = ".",
    rows: int | None = None,
    seconds: float = 20.0,
    run: bool = True,
    trace: Spans | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Measure what `record_dataset` with the same arguments costs here, and what would make it cheaper.

    Args:
        model: see `record_dataset`.
        data: likewise; None is noise.
        layers: likewise; all that can be captured.
        size: shape of one input where there are no data; None is what the model tells, or (3, 224, 224).
        batch_size: see `record_dataset`.
        workers: likewise.
        score: likewise.
        reduce: likewise.
        ragged: likewise.
        pad: likewise.
        mask: likewise.
        dtype: likewise.
        codec: likewise.
        stats: likewise.
        memory: likewise.
        writers: likewise.
        mean: likewise.
        std: likewise.
        name: likewise.
        backend: likewise.
        at: the folder where the store would be: the disk that is measured.
        rows: rows of the real capture at most; None is what takes about five seconds.
        seconds: about how long the ladder takes; three rounds of it at least.
        run: whether a real capture is run and held against what was foretold.
        trace: what gets the spans of the real capture.
        say: told what is being done.

    Returns:
        A `Profile`; as text, tables.

    Raises:
        PlanError: it cannot be captured so, or there is no such folder.
        SelectionError: a pattern matches nothing.
    """
    chosen = backend_named(backend) if backend else backend_for(model)
    if batch_size < 1:
        raise PlanError(f"a batch has at least one row; {batch_size} were asked for")
    if not Path(at).is_dir():
        raise PlanError(f"there is no folder {at} whose disk could be measured")
    given = NoiseSource.of(chosen, model, size, _NOISE_OF) if data is None else data
    source = source_of(chosen, given, mean, std, lists=bool(ragged or pad))
    batch_size = min(batch_size, source.n_rows)
    how = varying(ragged, pad, mask)
    settings = settings_of(dtype, codec, memory, writers, stats, True, reduce, how)
    job = _Job(chosen, model, layers, source, batch_size, settings, score)
    n_workers = source.default_workers if workers is None else workers
    with TemporaryDirectory(prefix=".layertap-", dir=at) as folder:
        return _profiled(job, Path(folder), n_workers, name, rows, seconds, run, trace, say)


@dataclass(frozen=True)
class _Job:
    """What is captured, and how."""

    backend: Backend
    model: Any
    layers: Patterns
    source: Source
    batch_size: int
    settings: Settings
    score: Score | None


@dataclass(frozen=True)
class _Rehearsed:
    """What one forward and the calibration showed."""

    planned: Sequence[PlannedTap]
    layout: Layout
    batches: Sequence[Batch]
    load: Spent
    step: Spent
    copies_s: Sequence[float]
    encoded: Sequence[Mapping[tuple[str, str], Encoded]]
    statistics_s: Sequence[float]
    calibration: Calibration
    left_out: Mapping[str, str]
    remarks: Sequence[str]


def _profiled(
    job: _Job,
    folder: Path,
    workers: int,
    name: str | None,
    rows: int | None,
    seconds: float,
    run: bool,
    trace: Spans | None,
    say: Callable[[str], None],
) -> Profile:
    say("dry run: what can be captured")
    first = job.source.batch(range(min(_SURVEYED_ROWS, job.source.n_rows)))
    surveyed = job.backend.survey(job.model, first)
    say("calibration: copies, codecs and the disk of this machine")
    seen = _rehearse(job, folder)
    say(f"ladder: what each stage costs a step of {job.batch_size} rows, for about {seconds:.0f} s")
    ladder = _ladder(job, seen, folder, workers)
    measured = ladder.climb(seconds)
    rungs = ladder.rungs(measured)
    costs = _costs(job, seen, rungs, workers)
    real = None
    if run:
        say("a real capture, to hold against what was foretold")
        real = _run(job, seen, costs, rungs, folder, workers, rows, trace)
    step = {rung.name: rung.step_s.median / job.batch_size for rung in rungs}
    advice = advise(costs, step[DATA])
    described = job.backend.describe(job.model)
    return Profile(
        model=name or str(described["type"]),
        backend=job.backend.name,
        data=job.source.name,
        n_rows=job.source.n_rows,
        batch_size=job.batch_size,
        n_cores=n_cores(),
        versions=versions(*(job.backend.packages or (job.backend.name,))),
        taps=_taps(seen, surveyed, costs),
        left_out=seen.left_out,
        remarks=seen.remarks,
        calibration=seen.calibration,
        rungs=tuple(rungs),
        n_rounds=len(measured.arms[OFF]),
        n_steps=ladder.n_steps,
        costs=costs,
        advice=tuple(advice),
        real=real,
        points=_points(costs, step[DATA], advice),
    )


def _rehearse(job: _Job, folder: Path) -> _Rehearsed:
    batches, load = loaded_batches(job.source, job.batch_size)
    settings = job.settings
    with rehearsing(job.backend, job.model, job.layers, job.score, settings.varying) as rehearsal:
        session = rehearsal.session
        learned = rehearsal.learn(batches[0])
        planned = plan_taps(learned, settings, partial(tried, session), session.n_tokens)
        columns = column_specs(batches[0].columns, session, Facts(text_bytes=job.source.text_bytes()))
        kept = sum(tap.row_bytes for tap in learned)
        layout, _, problem = tried_layout(planned, columns, job.batch_size, job.source.n_rows, settings, kept)
        if problem is not None:
            raise PlanError(problem)
        n_first = len(batches[0].rows)
        rehearsal.prepare(layout, planned, n_first)
        step = min(rehearsal.timed(batch) for batch in (batches[1:] or batches))
        n_last = len(batches[-1].rows)
        stored = [rehearsal.stored(i, n_last) for i in range(len(layout.moved))]
        encoded = [encodings(layout.arrays[i], values, layout) for i, values in enumerate(stored)]
        place = place_of(folder / "probe.zarr")
        calibration = Calibration(
            copy_rate(),
            disk_rate(place, probe_of(stored)),
            job.backend.transfer_rates(job.model),
            _codec_rates(layout, encoded),
        )
        return _Rehearsed(
            planned,
            layout,
            batches,
            load,
            step,
            [copy_s(values) for values in stored],
            encoded,
            _statistics_s(planned, layout, stored),
            calibration,
            dict(session.left_out),
            session.remarks(thorough=True),
        )


def _codec_rates(layout: Layout, encoded: Sequence[Mapping[tuple[str, str], Encoded]]) -> dict[str, float]:
    rates = {}
    for codec in ("none", "lz4", "zstd"):
        of = [
            (its[str(array.dtype), codec], array.row_bytes)
            for array, its in zip(layout.moved, encoded, strict=True)
        ]
        rates[codec] = total(of)
    return rates


def _statistics_s(planned: Sequence[PlannedTap], layout: Layout, stored: Sequence[Any]) -> list[float]:
    """Return the seconds in which one thread computes the cheap statistics of a row of each tap."""
    from .measure import forget_scratch, measure

    found = []
    for tap, values in zip(planned, stored, strict=False):
        statistics = plan_statistics([tap.values], [], Choice.parse("cheap"), None)
        assert statistics is not None
        n_rows = len(values)
        alone = Layout((tap.values,), (), n_rows, n_rows, statistics)
        slab = np.zeros(alone.slab_bytes, np.uint8)
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        slab[alone.offsets[0] : alone.offsets[0] + flat.size] = flat
        entries = np.zeros(statistics.block_bytes // 8)
        times = []
        for _ in range(2):  # the first brings the memory that is used again
            start = time.perf_counter()
            measure(alone, 0, [slab], n_rows, 0, entries)
            times.append(time.perf_counter() - start)
        found.append(min(times) / n_rows)
    forget_scratch()
    return found


def _ladder(job: _Job, seen: _Rehearsed, folder: Path, workers: int) -> Ladder:
    def prepare(rehearsal: Rehearsal, batch: Batch) -> None:
        planned = plan_taps(
            rehearsal.session.learned(),
            job.settings,
            partial(tried, rehearsal.session),
            rehearsal.session.n_tokens,
        )
        rehearsal.prepare(seen.layout, planned, len(batch.rows))

    return Ladder(
        job.backend,
        job.model,
        job.layers,
        job.source,
        seen.batches,
        job.settings,
        workers=workers,
        folder=folder,
        step_s=seen.step.wall_s,
        steps_per_block=seen.layout.steps_per_block,
        prepare=prepare,
        transfers=bool(seen.calibration.transfer_rates),
        score=job.score,
    )


def _costs(job: _Job, seen: _Rehearsed, rungs: Sequence[Rung], workers: int) -> Costs:
    by_name = {rung.name: rung for rung in rungs}
    size, layout = job.batch_size, seen.layout
    hooks_s, copies_s = (_told(by_name[name].more_s) / size for name in (NO_OP, COPY))
    alone_s = sum(seen.copies_s) or 1.0
    taps = []
    for i, tap in enumerate(seen.planned):
        numbers = layout.numbers[i]
        source, stored = tap.learned.row_bytes, sum(layout.arrays[n].row_bytes for n in numbers)
        # What all copies take in their hooks is measured; among taps it is shared as they take alone.
        share = sum(seen.copies_s[n] for n in numbers) / alone_s
        taps.append(
            TapCosts(
                tap.learned.name,
                tap.learned.type,
                str(tap.values.dtype),
                tuple(tap.values.shape[1:]) if len(tap.values.shape) == 3 else (),
                source,
                stored,
                max(copies_s, alone_s) * share,
                _joined([seen.encoded[n] for n in numbers], [layout.arrays[n] for n in numbers]),
                job.settings.codec,
                seen.statistics_s[i] if i < len(seen.statistics_s) else 0.0,
            )
        )
    columns = sum(column.row_bytes for column in layout.columns)
    rates = seen.calibration.transfer_rates
    return Costs(
        tuple(taps),
        by_name[OFF].step_s.median / size,
        by_name[OFF].cpu_s / size,
        hooks_s,
        seen.load.wall_s / size,
        seen.load.cpu_s / size,
        workers,
        job.settings.n_writers,
        n_cores(),
        seen.calibration.disk_rate,
        rates.get("pinned"),
        float(columns),
    )


def _joined(
    parts: Sequence[Mapping[tuple[str, str], Encoded]], arrays: Sequence[Any]
) -> dict[tuple[str, str], Encoded]:
    """Return what codecs make of a tap's values and what it holds beside them, by the values' types."""
    values, *beside = parts
    found = {}
    for (dtype, codec), one in values.items():
        more = [its[str(array.dtype), codec] for its, array in zip(beside, arrays[1:], strict=True)]
        found[dtype, codec] = Encoded(
            one.bytes_a_row + sum(other.bytes_a_row for other in more),
            one.seconds_a_row + sum(other.seconds_a_row for other in more),
        )
    return found


def _taps(seen: _Rehearsed, surveyed: Sequence[Surveyed], costs: Costs) -> tuple[TapProfile, ...]:
    by_layer = {one.layer.name: one for one in surveyed}
    stages = [_stages_of(tap, costs) for tap in costs.taps]
    every_s = sum(sum(its.values()) for its in stages) or 1.0
    found = []
    for planned, tap, its in zip(seen.planned, costs.taps, stages, strict=True):
        name = planned.learned.tap
        one = by_layer.get(name.layer)
        plain = TapName(name.layer, name.call, name.path)
        found.append(
            TapProfile(
                tap.name,
                tap.type,
                planned.values.shape,
                tap.dtype,
                name.call,
                one.calls if one is not None else 1,
                one is not None and plain in one.overwritten,
                one is not None and one.compiled,
                tap.source_bytes,
                tap.stored_bytes,
                tap.now.bytes_a_row,
                its,
                sum(its.values()) / every_s,
                max(0.0, costs.seconds - costs.without(tap.name).seconds),
            )
        )
    return tuple(found)


def _stages_of(tap: TapCosts, costs: Costs) -> dict[str, float]:
    transfer_s = {TRANSFER: tap.stored_bytes / costs.transfer_rate} if costs.transfer_rate else {}
    write_s = tap.now.bytes_a_row / costs.disk_rate if costs.disk_rate else 0.0
    return {COPY: tap.copy_s, **transfer_s, ENCODE: tap.now.seconds_a_row, WRITE: write_s}


def _points(costs: Costs, measured_s: float, advice: Sequence[Advice]) -> dict[str, tuple[float, float]]:
    found = {"this plan": (costs.disk_bytes, 1 / measured_s)}
    for one in islice(advice, 3):
        found[one.change] = (one.bytes_a_row, 1 / one.seconds)
    return found


def _roofs(profile: Profile) -> Json:
    """Return what bounds rows a second: `rows_a_s` as they are, `bytes_a_s` by the bytes of a row on disk."""
    costs = profile.costs
    bytes_a_s = {}
    if costs.transfer_rate:
        bytes_a_s["transfer"] = costs.transfer_rate * costs.disk_bytes / max(1, costs.stored_bytes)
    if costs.writers_s:
        codec = costs.taps[0].codec
        name = "checksums" if codec == "none" else codec
        n_threads = min(costs.n_writers, costs.n_cores)
        bytes_a_s[f"{name}, {n_threads} threads"] = n_threads * costs.disk_bytes / costs.writers_s
    if costs.disk_rate:
        bytes_a_s["disk"] = costs.disk_rate
    rows_a_s = {"the model alone": 1 / profile.forward_s}
    if not costs.workers and costs.load_s > _SEEN * profile.forward_s:
        rows_a_s["model and loading"] = 1 / (profile.forward_s + costs.load_s)
    return {"rows_a_s": rows_a_s, "bytes_a_s": bytes_a_s}


def _run(
    job: _Job,
    seen: _Rehearsed,
    costs: Costs,
    rungs: Sequence[Rung],
    folder: Path,
    workers: int,
    rows: int | None,
    trace: Spans | None,
) -> RealRun:
    size = job.batch_size
    step_s = next(rung for rung in rungs if rung.name == DATA).step_s.median
    n_rows = min(job.source.n_rows, rows or max(size, round(_RUN_S / step_s) * size))
    part = copy.copy(job.source)
    part.n_rows = n_rows
    recorder = Recorder(
        job.model,
        place_of(folder / "real.zarr"),
        job.layers,
        settings=job.settings,
        facts=Facts(part.preprocess, part.classes, text_bytes=part.text_bytes()),
        backend=job.backend,
        score=job.score,
        n_rows=n_rows,
        batch_size=size,
        spans=trace,
    )
    with recorder:
        recorder.run(part, workers)
    stages = recorder.stages
    read_s = _read_s(open_run(recorder.place), size)
    predicted_s = -(-n_rows // size) * step_s + _tail_s(seen.layout, costs, n_rows)
    spent = {key.removesuffix("_s"): value for key, value in vars(stages).items() if key.endswith("_s")}
    return RealRun(n_rows, predicted_s, stages.wall_s - stages.start_s, spent, stages.slowest(), read_s)


def _read_s(run: Run, size: int) -> float:
    """Return the seconds in which a row of all taps is read, by reading some."""
    start, n_read = time.perf_counter(), 0
    while n_read < run.n_rows and time.perf_counter() - start < _READ_S:
        rows = slice(n_read, min(n_read + size, run.n_rows))
        for tap in run.taps:
            run[tap][rows]
        n_read = rows.stop
    return (time.perf_counter() - start) / n_read


def _tail_s(layout: Layout, costs: Costs, n_rows: int) -> float:
    """Return the seconds in which the last block is written, beside nothing."""
    rows = n_rows % layout.block_rows or min(layout.block_rows, n_rows)
    return rows * costs.stages_s["write"]


def _told(more: Estimate) -> float:
    """Return a difference where its interval tells it from nothing, else 0."""
    return more.median if more.low > 0 else 0.0
