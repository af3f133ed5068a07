"""Recording: from the steps of a model to a store.

    begin (waits for a slot) -> forward, hooks copy -> done -> annotate -> the next begin, or the end

A step is handed to the writers when the next one begins, so that what `annotate` says of its rows is there.
The first step is kept aside: its shapes make the plan, the plan makes the store, and then it is copied in
like any other, so no forward is spent on looking.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import constants
from .backend import Backend, Learned, Session
from .columns import column_spec, column_values
from .data import Batch, Preprocess, Source
from .dtypes import DTYPES, DType
from .errors import CaptureError, DataError, LeftOutWarning, PlanError, StoreError, StoreExistsError
from .fields import ReceptiveField
from .journal import versions, write_log
from .layout import ArraySpec, Layout, array_view
from .left_out import told
from .parts import Part
from .pipeline import Piece, Pipeline, Stages, explained
from .place import PathLike, Place, place_of
from .plan import (
    PlannedTap,
    Settings,
    check_memory,
    check_space,
    plan_layout,
    plan_taps,
    slots_of,
    store_bytes,
)
from .progress import Progress
from .ragged import Form
from .reader import Run, open_run
from .reduce import Chain, Rows
from .report import StageReport
from .score import PREDICTION, Score, score_text
from .spans import Spans
from .stages import Laps
from .statistics import plan_statistics
from .store import (
    Json,
    Manifest,
    StoreWriter,
    check_removable,
    committed_blocks,
    mend,
    plan_differences,
    read_manifest,
    read_record,
)
from .taps import Patterns, distinct_folders


@dataclass(frozen=True)
class Facts:
    """What the store should say of where its rows came from."""

    preprocess: Preprocess = field(default_factory=Preprocess)
    """How pictures became inputs; also how inputs become pictures again."""
    classes: tuple[str, ...] | None = None
    """Class names by label."""
    data: Json = field(default_factory=dict)
    """Name and fingerprint of the data set."""
    model_name: str | None = None
    """What the user calls the model."""
    text_bytes: Mapping[str, int] = field(default_factory=dict)
    """Longest text of each text column, where it is known."""
    fields: Mapping[str, ReceptiveField] = field(default_factory=dict)
    """Receptive fields of taps by their names, where they were looked for."""


def tried(session: Session, i: int, chain: Chain, rows: Rows) -> tuple[tuple[int, ...], DType]:
    """Return shape and type of a row of what `chain` makes of tap `i` of the first step.

    Raises:
        PlanError: it does not keep the rows.
    """
    made, n_rows = session.reduced(i, chain, rows)[0], len(session.sample(i))
    if made.ndim == 0 or len(made) != n_rows:
        raise PlanError(
            f"{chain.steps[-1]} gave shape {made.shape} of {n_rows} rows; a reduction keeps the rows, first"
        )
    if made.dtype not in DTYPES.values():
        raise PlanError(f"{chain.steps[-1]} gave {made.dtype}, which a store cannot hold")
    return made.shape[1:], made.dtype


def column_specs(columns: Mapping[str, Any], session: Session, facts: Facts) -> list[ArraySpec]:
    """Return how the columns of the first batch are stored."""
    folders = distinct_folders(list(columns))
    return [
        column_spec(name, folder, values, session.to_numpy, facts.text_bytes.get(name))
        for (name, values), folder in zip(columns.items(), folders, strict=True)
    ]


def about_tap(tap: PlannedTap) -> Json:
    """Return what the manifest says of a tap beside its arrays."""
    chain, rows = tap.chain, tap.rows
    reduction = {"text": str(chain), "error": chain.said(rows), "steps": chain.to_json()}
    return {
        "layer": tap.learned.tap.layer,
        "type": tap.learned.type,
        "kind": tap.learned.tap.kind,
        "aliases": list(tap.learned.aliases),
        "source_dtype": str(tap.learned.dtype),
        "source_shape": list(tap.learned.shape),
        **({"source_dims": list(tap.learned.dims)} if tap.learned.dims else {}),
        "reduction": reduction if chain.steps else None,
        "constants": constants.describe(tap.values.group, chain.constants(rows)),
        **about_varying(tap.form),
    }


def about_varying(form: Form) -> Json:
    """Return what the manifest says of a tap whose rows vary."""
    if form.rule is None:
        return {}
    pad = {} if form.rule.pad is None or not form.varies else {"pad": f"{form.rule.pad:g}"}
    return {"masked": form.masked, **pad}


def as_begun(form: Form, manifest: Manifest) -> Form:
    """Return `form` with the same tokens masked as when the store was begun."""
    return replace(form, masked=manifest.facts["taps"][form.name].get("masked"))


def constant_values(taps: Sequence[PlannedTap]) -> dict[str, NDArray[Any]]:
    """Return the arrays without rows by their paths."""
    return {
        f"{tap.values.group}/{name}": values
        for tap in taps
        for name, (_, values) in tap.chain.constants(tap.rows).items()
    }


def encoded_bytes(array: ArraySpec, values: NDArray[Any], layout: Layout) -> tuple[int, int]:
    """Return the bytes of one inner chunk of `values` as they are, and encoded."""
    chunk = np.ascontiguousarray(values[: layout.chunk_rows(array)].astype(array.dtype, copy=False))
    data = chunk.reshape(-1).view(np.uint8).data
    return chunk.nbytes, len(array.encoding.encode(data))


class Recorder:
    """Captures what passes through a model while its block is open; made by `record`.

    Calling it calls the model. With a framework that has hooks, calling the model itself does the same.
    """

    def __init__(
        self,
        model: Any,
        path: PathLike | Place,
        layers: Patterns,
        *,
        settings: Settings,
        facts: Facts,
        backend: Backend,
        score: Score | None = None,
        n_rows: int | None = None,
        batch_size: int | None = None,
        part: Part | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
        on_plan: Callable[[Manifest, int], None] | None = None,
        spans: Spans | None = None,
    ) -> None:
        self.place = place_of(path)
        #: Rows that have passed so far, those that were committed by an earlier run included.
        self.row = 0
        #: Whether all of this part's blocks were committed before; nothing is captured then.
        self.finished = False
        #: What patterns chose and is not captured, with the reason; known once the first batch has passed.
        self.left_out: dict[str, str] = {}
        self._remarks: list[str] = []
        self._thread: int | None = None
        self._backend, self._model, self._layers = backend, model, layers
        self._settings = replace(settings, upload_bytes=self.place.upload_bytes)
        self._facts = facts
        self._n_rows, self._batch_size, self._overwrite = n_rows, batch_size, overwrite
        self._score = score
        self._part = part or Part()
        if self._part.n > 1 and overwrite:
            raise PlanError(
                f"part {self._part} cannot overwrite {self.place}: it would take away what the others write. "
                "Remove the store first"
            )
        self._progress, self._on_plan, self._spans = progress, on_plan, spans
        self._session: Session | None = None
        self._pipeline: Pipeline | None = None
        self._existing: Manifest | None = None
        self._done: set[int] = set()
        self._created = False
        self._step: tuple[int, int] | None = None
        self._ended = False
        self._kept_row_bytes = 0
        self._planned: list[PlannedTap] = []
        self._committed_run: Run | None = None
        self._pieces: list[Piece] = []
        self._columns: dict[str, Any] = {}
        self._store: StoreWriter | None = None
        self._started = 0.0
        self._stages = Stages()
        self._laps = Laps(self._stages, spans)

    def __enter__(self) -> Recorder:
        self._started, self._laps = time.time(), Laps(self._stages, self._spans)
        if self.place.exists():
            self._look_at_existing()
        self._session = self._backend.session(self._model, self._layers)
        self._session.varying, self._session.spans = self._settings.varying, self._spans
        if self._score is not None and not self._session.gradients:
            raise PlanError(
                f"a score ({score_text(self._score)}) is what gradients are of, and no layer is tapped for "
                "its gradient: add :grad to a layer's name, or leave the score out"
            )
        self._session.attach(self)
        self._laps.lap("start")
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        failed = kind is not None
        try:
            self._laps.lap("data")
            if not failed:
                self._finish_step()
                self._check_end()
                if self._pipeline is not None and self._n_rows is None:
                    self._pipeline.flush()
        except BaseException:
            failed = True
            raise
        finally:
            self._release(failed)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model on a batch, capture its taps, and return what it returns."""
        assert self._session is not None, "a recorder is called inside its with block"
        if self._thread not in (None, threading.get_ident()):
            raise CaptureError(
                "this recording is called in two threads, whose batches would mix: let one call it, or give "
                "each thread a part of the data and a recording of its own"
            )
        self._thread = threading.get_ident()
        return self._session.forward(inputs, kwargs)

    @property
    def committed_rows(self) -> int:
        """Rows from the start on that need not be run again; a loop may go on there with `seek`."""
        n_blocks = 0
        while n_blocks in self._done:
            n_blocks += 1
        return n_blocks * self._block_rows

    @property
    def stages(self) -> Stages:
        """Where the time went so far."""
        return self._stages

    @property
    def report(self) -> StageReport:
        """Where the time went, what set the pace, and what would help; whole once the block is left."""
        return StageReport(self.stages, self.left_out, self._remarks)

    def seek(self, row: int) -> None:
        """Say that the next step starts at `row`.

        Raises:
            CaptureError: rows between are not committed, so the store would have a hole for ever; or `row`
                lies behind.
        """
        self._finish_step()
        last = max(self.row, self.committed_rows)
        if row > last:
            raise CaptureError(f"cannot go on at row {row}: rows {last} to {row - 1} are not captured")
        if row < self.row:
            raise CaptureError(f"cannot go back to row {row}: the next row is {self.row}")
        self.row = row

    def annotate(self, **columns: Any) -> None:
        """Keep facts about the rows of the batch that just went through the model.

        Args:
            columns: one value for each row: numbers, texts or arrays of one shape, in numpy or in the model's
                framework. `label` and `prediction` are class numbers and `id` a name; `picture` is uint8
                (rows, height, width, 1 or 3); `input` is what the model got, of which the picture is made
                with the `mean` and `std` that `record` was given. Where taps are ragged or padded and the
                model got no mask, `attention_mask` (or what `record` calls `mask`) is that of its tokens.

        Raises:
            DataError: a column is not as long as the batch, or was not there in the first batch.
        """
        if self._step is None or not self._ended:
            raise CaptureError("annotate() comes after the forward of its batch, and before the next")
        n_rows = self._step[1]
        for name, values in columns.items():
            length = len(values) if hasattr(values, "__len__") else None
            if length != n_rows:
                has = "is one value" if length is None else f"has {length} values"
                raise DataError(
                    f"{name!r} {has}; the batch has {n_rows} rows "
                    f"({self._step[0]} to {self._step[0] + n_rows - 1})"
                )
        mask = self._settings.varying.mask
        if mask in columns and self._session is not None and self._session.lacks_mask:
            self._session.mask(columns.pop(mask))
        picture = self._picture(columns.pop("input")) if "input" in columns else None
        if picture is not None:
            columns.setdefault("picture", picture)
        self._columns.update(columns)

    def run(self, source: Source, workers: int) -> None:
        """Run the model over the rows of `source` that are not committed yet."""
        # Closed on every way out, so that no thread or process goes on loading.
        with self.inference(), contextlib.closing(self._batches(source, workers)) as batches:
            for batch in batches:
                self.row = batch.rows.start
                self.step(batch)
                self._finish_step()
                if self.finished:
                    return

    def inference(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which a whole data set is run: no training, no gradients."""
        assert self._session is not None
        return self._session.inference()

    def step(self, batch: Batch) -> None:
        """Run the model on a batch of a data set, with its backward pass where gradients are tapped."""
        assert self._session is not None
        n_classes = None if self._facts.classes is None else len(self._facts.classes)
        output = self(*batch.inputs, **batch.kwargs)
        score = PREDICTION if self._score is None else self._score
        self._session.backward(output, score, batch.columns.get("label"))
        columns = dict(batch.columns)
        prediction = self._session.prediction(output, n_classes)
        if prediction is not None:
            columns["prediction"] = prediction
        self.annotate(**columns)

    def _batches(self, source: Source, workers: int) -> Generator[Batch, None, None]:
        for steps in self._rounds(source.n_rows):
            yield from self._backend.batches(source, steps, workers)

    def _rounds(self, n_rows: int) -> Iterator[Iterable[range]]:
        """Yield the rows of the steps to run: first one that makes the plan, where it is not known yet."""
        size = self._batch_size or 1
        # Made as they are asked for: a list of them would grow with the data set.
        steps = (range(i, min(i + size, n_rows)) for i in range(0, n_rows, size))
        if self._existing is None and self._part.n == 1:
            yield steps
            return
        if self._existing is None:
            # Which blocks are this part's follows from their length, which the first step shows.
            yield [next(steps)]
            if self._pipeline is not None:
                yield filter(self._is_missing, steps)
            return
        mine = self._part.blocks(self._existing.n_blocks)
        yield [next(steps)] if self._done.issuperset(mine) else filter(self._is_missing, steps)

    def _is_missing(self, step: range) -> bool:
        manifest = self._pipeline.store.manifest if self._pipeline else self._existing
        assert manifest is not None
        block = step.start // manifest.layout.block_rows
        return block not in self._done and block in self._part.blocks(manifest.n_blocks)

    def begin(self, n_rows: int) -> list[Piece] | None:
        """Open a step (called by the session)."""
        self._laps.lap("data")
        self._finish_step()
        if n_rows < 1:
            raise CaptureError("the batch has no rows")
        row = self.row
        if self._n_rows is not None and row + n_rows > self._n_rows:
            raise CaptureError(f"rows beyond the {self._n_rows} of the data set went through the model")
        self._step, self._ended, self._columns = (row, n_rows), False, {}
        if self._pipeline is None:
            return [] if self.finished else None
        self._pieces = self._pipeline.begin(row, n_rows)
        self._laps.lap("wait")
        return self._pieces

    def done(self) -> None:
        """Say that the step's forward has ended well (called by the session)."""
        self._ended = True
        self._laps.lap("forward")

    def _check_end(self) -> None:
        """Hold what passed against what should have passed."""
        if self._n_rows is None and self._done and self.row < (max(self._done) + 1) * self._block_rows:
            raise CaptureError(
                f"the loop ended after {self.row} rows, and an earlier run committed more; run the same loop "
                "again, or overwrite=True"
            )
        if self._pipeline is None and not self.finished and not self._all_committed_before():
            unseen = self._session.unseen if self._session else ""
            raise CaptureError(
                "no batch went through the model, so there is nothing to store"
                + (f". If one did, {unseen}" if unseen else "")
            )

    def _all_committed_before(self) -> bool:
        """Return whether a loop skipped all of its rows, because an earlier run had committed them."""
        return self._n_rows is None and 0 < self.row == self.committed_rows

    @property
    def _block_rows(self) -> int:
        return self._existing.layout.block_rows if self._existing else 0

    def _look_at_existing(self) -> None:
        if self._overwrite:
            check_removable(self.place)
            return
        manifest = read_manifest(self.place)
        self._done = committed_blocks(self.place, manifest.n_blocks)
        if manifest.n_rows is None:
            # A loop's last block may be short; where the loop did not end, it is made again.
            n_arrays = len(manifest.layout.stored)
            full = manifest.layout.block_rows
            self._done = {b for b in self._done if read_record(self.place, b, n_arrays)[0] == full}
        elif self._n_rows is None:
            raise StoreExistsError(
                f"{self.place} holds a finished capture of {manifest.n_rows} rows. Choose another name, or "
                "overwrite=True (--overwrite) to make it anew"
            )
        self._existing = manifest
        self.left_out = dict(manifest.facts.get("left_out", {}))

    def _finish_step(self) -> None:
        if self._step is None:
            return
        (row, n_rows), self._step = self._step, None
        if not self._ended:  # its forward failed: the rows were never whole
            return
        assert self._session is not None
        self.row = row + n_rows
        if self.finished:
            return
        if self._pipeline is None:
            self._laps.lap("forward")
            self._start(row, n_rows)
            self._laps.lap("start")
            if self._pipeline is None:
                return
        if not self._pieces and self._n_rows is None:
            self._compare_columns(row, n_rows)
        if self._pieces:
            self._put_columns(row, n_rows)
            ready = self._session.transfer(self._pieces)
            self._pipeline.end(row, n_rows, ready)
        self._laps.lap("forward")

    def _start(self, row: int, n_rows: int) -> None:
        """Plan from the first step, make or open the store, and put the step where it belongs."""
        session = self._session
        assert session is not None
        store = self._open_store(self._manifest(session.learned(), n_rows))
        if self.left_out and self._on_plan is None:  # which shows it
            lines = [f"{self.place} does not hold all that was chosen:", *told(self.left_out)]
            warnings.warn("\n  ".join(lines), LeftOutWarning, stacklevel=2)
        if store is None:
            return
        manifest = store.manifest
        others = set(range(manifest.n_blocks)) - set(self._part.blocks(manifest.n_blocks))
        if self._progress is not None:
            mine = set(self._part.blocks(manifest.n_blocks)) - self._done
            self._progress.start(sum(map(manifest.rows_of, mine)))
        pipeline = Pipeline(
            store,
            self._done | others,
            n_slots=self._slots(manifest.layout),
            n_writers=self._settings.n_writers,
            on_commit=self._progress.show if self._progress else None,
            stages=self._stages,
            staging_bytes=self._settings.staging_bytes,
            spans=self._spans,
        )
        self._pipeline = pipeline
        if any(tap.chain.steps for tap in self._planned):
            session.reduce([(tap.chain, tap.rows) for tap in self._planned])
        session.fit([as_begun(tap.form, manifest) for tap in self._planned])
        session.prepare(manifest.layout, pipeline.memory, pipeline.slabs)
        self._pieces = pipeline.begin(row, n_rows)
        session.replay(self._pieces)

    def _open_store(self, planned: Manifest) -> StoreWriter | None:
        """Make the store, or join the one that is there; None where this part of it is complete."""
        if self._existing is None:
            self._slots(planned.layout)
            if self._on_plan is not None:
                self._on_plan(planned, 0)
            if planned.n_rows is not None:
                check_space(self.place, self.planned_bytes(planned))
            try:
                return self._create_store(planned)
            except StoreExistsError:
                if self._overwrite:
                    raise
                self._look_at_existing()  # another process was quicker
            except OSError as error:
                if isinstance(error, StoreError):
                    raise
                raise explained(error, self.place) from error
        assert self._existing is not None
        manifest = self._same_plan(self._existing, planned)
        mine = set(self._part.blocks(manifest.n_blocks))
        self.finished = manifest.n_rows is not None and mine <= self._done
        if self._on_plan is not None:
            self._on_plan(manifest, sum(map(manifest.rows_of, self._done)))
        if self.finished:
            mend(self.place, manifest)
            return None
        self._slots(manifest.layout)
        self._store = StoreWriter.join(self.place, manifest, self._blocks_of(manifest))
        self._look_at_existing()  # what was committed until the lock was ours
        return self._store

    def _slots(self, layout: Layout) -> int:
        """Return how many blocks are held at once, or refuse what memory does not hold."""
        n_slots = slots_of(layout, self._settings, self._kept_row_bytes)
        check_memory(layout, n_slots, self._settings)
        return n_slots

    def _create_store(self, planned: Manifest) -> StoreWriter:
        self._store = StoreWriter.create(self.place, planned, self._blocks_of(planned), self._overwrite)
        self._created = self._part.n == 1
        return self._store

    def _blocks_of(self, manifest: Manifest) -> range | None:
        """Return the blocks to lock: this part's; all where nobody knows yet how many there will be."""
        return self._part.blocks(manifest.n_blocks) if manifest.n_rows is not None else None

    def _manifest(self, learned: Sequence[Learned], n_rows: int) -> Manifest:
        assert self._session is not None
        self.left_out = dict(self._session.left_out)
        self._planned = plan_taps(
            learned, self._settings, partial(tried, self._session), self._session.n_tokens
        )
        columns = column_specs(self._columns, self._session, self._facts)
        step_rows = self._batch_size or n_rows
        self._kept_row_bytes = sum(tap.row_bytes for tap in learned)
        taps = [tap.values for tap in self._planned]
        statistics = plan_statistics(taps, columns, self._settings.statistics, self._facts.classes)
        self._settings = replace(self._settings, kept=statistics)
        layout = plan_layout(
            taps,
            columns,
            step_rows,
            self._n_rows,
            self._settings,
            self._kept_row_bytes,
            [part for tap in self._planned for part in tap.parts],
        )
        about = {tap.learned.name: about_tap(tap) for tap in self._planned}
        for name, its in self._facts.fields.items():
            about[name]["field"] = its.to_json()
        preprocess = self._facts.preprocess
        model = dict(self._backend.describe(self._model))
        name = model.pop("name", model["type"])
        facts: Json = {
            "taps": about,
            "left_out": self.left_out,
            "model": {
                "name": self._facts.model_name or name,
                "backend": self._backend.name,
                **model,
            },
            "data": dict(self._facts.data),
            "preprocess": {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in vars(preprocess).items()
                if value is not None
            },
            "classes": None if self._facts.classes is None else [str(name) for name in self._facts.classes],
            "score": self._score_text(),
            "versions": versions(*(self._backend.packages or (self._backend.name,))),
        }
        return Manifest(layout, self._n_rows, facts, constant_values(self._planned))

    def _score_text(self) -> str | None:
        """Return what the gradients of a data set are of; of a loop's own, nobody knows."""
        assert self._session is not None
        if not self._session.gradients or self._n_rows is None:
            return None
        return score_text(PREDICTION if self._score is None else self._score)

    def _same_plan(self, existing: Manifest, planned: Manifest) -> Manifest:
        """Return the plan of the store that is there, which decides the block length.

        Raises:
            StoreExistsError: it was made by another plan.
        """
        blocks = existing.layout.block_rows
        ours = replace(planned, layout=replace(planned.layout, block_rows=blocks))
        differences = plan_differences(existing.to_json(), ours.to_json())
        if differences:
            raise StoreExistsError(
                f"{self.place} was captured by another plan:\n  "
                + "\n  ".join(differences)
                + "\nChoose another name, or overwrite=True (--overwrite) to make it anew"
            )
        return replace(existing, constants=planned.constants)

    def _put_columns(self, row: int, n_rows: int) -> None:
        assert self._pipeline is not None
        assert self._session is not None
        layout = self._pipeline.layout
        names = {column.name for column in layout.columns}
        for problem, words in (
            (names - set(self._columns), "is missing"),
            (set(self._columns) - names, "is new"),
        ):
            if problem:
                raise DataError(
                    f"the column {min(problem)!r} {words} for rows {row} to {row + n_rows - 1}: every batch "
                    f"has the columns of the first ({', '.join(sorted(names)) or 'none'})"
                )
        for i, column in enumerate(layout.columns, start=len(layout.moved)):
            values = column_values(column, self._columns[column.name])
            for piece in self._pieces:
                view = array_view(layout, i, piece.slab.memory)
                self._session.put(view[piece.rows], values[piece.batch])

    def _compare_columns(self, row: int, n_rows: int) -> None:
        """Hold what an earlier run committed against this one: a shuffled loop brings other rows."""
        if self._committed_run is None:
            self._committed_run = open_run(self.place)
        assert self._session is not None
        for column in self._committed_run.manifest.layout.columns:
            if column.name not in self._columns or column.name == "picture":
                continue
            known = self._committed_run.rows[column.name].stored(slice(row, row + n_rows))
            given = self._session.to_numpy(column_values(column, self._columns[column.name]))
            if known.tobytes() != given.astype(column.dtype, copy=False).tobytes():
                raise CaptureError(
                    f"rows {row} to {row + n_rows - 1} come with another {column.name!r} than those that an "
                    "earlier run committed. A capture goes on with the same rows in the same order: do not "
                    "shuffle, or overwrite=True"
                )

    def planned_bytes(self, manifest: Manifest) -> int:
        """Return the bytes that the finished store will take; with a codec, judged by its first chunk."""
        assert self._session is not None
        encoded = raw = 1
        if self._settings.codec != "none" and manifest.layout.values:
            for i, tap in enumerate(self._planned):
                if tap.form.rule is not None:
                    continue  # judged by the others
                parts = self._session.reduced(i, tap.chain, tap.rows)
                for array, values in zip((tap.values, *tap.parts), parts, strict=True):
                    n_bytes, n_encoded = encoded_bytes(array, values, manifest.layout)
                    raw, encoded = raw + n_bytes, encoded + n_encoded
        n_rows = manifest.n_rows or 0
        spare = sum(tap.values.row_bytes - tap.made_bytes for tap in self._planned if tap.values.is_ragged)
        return store_bytes(manifest.layout, n_rows, raw / encoded) - int(spare * n_rows * encoded / raw)

    def _picture(self, inputs: Any) -> NDArray[np.uint8] | None:
        assert self._session is not None
        return self._facts.preprocess.pictures(self._session.to_numpy(inputs))

    def _release(self, failed: bool) -> None:
        """Let go of model, threads and lock on every way out; leave nothing half-made."""
        try:
            try:
                if self._session is not None:
                    self._remarks = self._session.remarks()
                    self._session.detach()
            finally:
                self._close_pipeline(failed)
        except BaseException as error:
            failed = True
            if isinstance(error, OSError) and not isinstance(error, StoreError):
                raise explained(error, self.place) from error
            raise
        finally:
            if self._progress is not None:
                self._progress.stop()
            if self._pipeline is None or not self._pipeline.at_work:  # else the lock ends with the process
                with contextlib.suppress(OSError):  # the error on its way says more than this one would
                    if failed and self._created and not self._committed():
                        self.place.remove()
                if self._store is not None:
                    self._store.release()

    def _committed(self) -> set[int]:
        assert self._store is not None
        return committed_blocks(self.place, self._store.manifest.n_blocks)

    def _check_committed(self) -> None:
        """Hold what is committed against what this part of the data set should have come to."""
        if self._pipeline is None:
            return
        n_blocks = self._pipeline.store.manifest.n_blocks
        missing = set(self._part.blocks(n_blocks)) - self._committed()
        if missing:
            raise CaptureError(
                f"{len(missing)} of {n_blocks} blocks were not captured, block {min(missing)} first: fewer "
                f"rows went through the model than the {self._n_rows} of the data set"
            )

    def _close_pipeline(self, failed: bool) -> None:
        pipeline = self._pipeline
        if pipeline is not None:
            try:
                pipeline.close(failed=failed)
            finally:
                self._laps.lap("drain")
            write_log(self.place, self._started, pipeline.stages, failed)
        if failed:
            return
        if self._n_rows is not None:
            self._check_committed()
        elif pipeline is not None:
            pipeline.store.close_rows(self.row)
        elif self._existing is not None and self._all_committed_before():
            self._store = StoreWriter.join(self.place, self._existing, None)
            self._store.close_rows(self.row)
