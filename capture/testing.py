"""The contract of a backend, as tests: inherit `BackendContract`, give it a `Subject`, run pytest.

It ships with the package so that other people's backends can hold themselves to it. What a framework does not
have is skipped, with a reason.
"""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .contract import ContractError, raises, require, skip
from .errors import CaptureError, DataError, SelectionError, StoreExistsError
from .reader import open_run
from .record import record, record_dataset
from .recorder import Recorder
from .testing_subject import (
    MEASURING_MEMORY,
    SMALL_MEMORY,
    Contract,
    StopError,
    Subject,
    Values,
    contents,
    inputs,
)
from .testing_taps import TapsContract

__all__ = [
    "SMALL_MEMORY",
    "BackendContract",
    "Contract",
    "ContractError",
    "StopError",
    "Subject",
    "Values",
    "contents",
    "inputs",
    "raises",
    "require",
    "skip",
]

#: What writers may happen to hold in one stretch and not in another. To keep a batch of 128 KiB, or a tap of
#: that size, at each of 4N steps of which N were allowed for, takes 3 MiB.
MEMORY_SLACK = 512 * 1024


class BackendContract(TapsContract):
    """What holds for every backend."""

    def test_batches_may_change_size(self, tmp_path: Path) -> None:
        """Smaller, larger, straddling blocks."""
        subject, values = self.subject(), inputs(41)
        cuts = [0, 4, 5, 8, 14, 20, 21, 22, 26, 33, 41]
        batches = [values[a:b] for a, b in pairwise(cuts)]
        run = self.capture(subject, tmp_path / "s", batches, memory="4MiB")
        expected = [subject.reference(batch) for batch in batches]
        for name in expected[0]:
            whole = np.concatenate([batch[name] for batch in expected])
            require(run[name][...].tobytes() == whole.tobytes(), f"{name} differs")

    def test_the_models_own_output_is_untouched(self, tmp_path: Path) -> None:
        """The same bits with and without taps."""
        subject, values = self.subject(), inputs(4)
        plain = subject.output(subject.model(subject.batch(values)))
        with record(subject.model, tmp_path / "s", subject.layers) as rec:
            captured = subject.output(rec(subject.batch(values)))
            again = subject.output(rec(subject.batch(values)))
        require(plain.tobytes() == captured.tobytes() == again.tobytes(), "the output changed")

    def test_nothing_is_left_behind(self, tmp_path: Path) -> None:
        """After a good run, a failing model, and a name that matches nothing."""
        subject, values = self.subject(), inputs(4)
        before = subject.traces()
        self.capture(subject, tmp_path / "good", [values])
        require(subject.traces() == before, "a run left something in the model")
        subject.fail(True)
        with raises(StopError, ""):
            self.capture(subject, tmp_path / "bad", [values])
        subject.fail(False)
        require(subject.traces() == before, "a failing model keeps something")
        require(not (tmp_path / "bad").exists(), "a run without a block left a store")
        with raises(SelectionError, ""), record(subject.model, tmp_path / "no", ["nosuchlayer"]) as rec:
            rec(subject.batch(values))
        require(subject.traces() == before, "a misspelt layer leaves something in the model")
        require(not (tmp_path / "no").exists(), "a misspelt layer left a store")

    def test_a_batch_that_fails_is_not_captured_and_the_loop_may_go_on(self, tmp_path: Path) -> None:
        """Its rows are left out whole."""
        subject, values = self.subject(), inputs(8)
        with record(subject.model, tmp_path / "s", subject.layers) as rec:
            rec(subject.batch(values[:4]))
            subject.fail(True)
            with raises(StopError, ""):
                rec(subject.batch(values[:4]))
            subject.fail(False)
            rec(subject.batch(values[4:]))
        run = open_run(tmp_path / "s")
        require(run.n_rows == 8, f"{run.n_rows} rows, not 8")
        for name, array in subject.reference(values[4:]).items():
            require(run[name][4:].tobytes() == array.tobytes(), f"{name} differs")

    def test_what_the_model_raises_ends_the_run_and_what_was_committed_stays(self, tmp_path: Path) -> None:
        """The caller gets the model's own exception, and the rows of whole blocks before it."""
        subject, values = self.subject(), inputs(28)
        batches = [values[i : i + 4] for i in range(0, 28, 4)]
        with (
            raises(StopError, ""),
            record(subject.model, tmp_path / "s", subject.layers, memory=SMALL_MEMORY, writers=1) as rec,
        ):
            for i, batch in enumerate(batches):
                subject.fail(i == 6)
                rec(subject.batch(batch))
        subject.fail(False)
        run = open_run(tmp_path / "s")
        require(0 < run.n_rows <= 24, f"{run.n_rows} rows are committed of 24 that were captured")
        expected = [subject.reference(batch) for batch in batches]
        for name in expected[0]:
            whole = np.concatenate([batch[name] for batch in expected])[: run.n_rows]
            require(run[name][...].tobytes() == whole.tobytes(), f"{name} differs")

    def test_a_shape_that_changes_is_refused(self, tmp_path: Path) -> None:
        """With both shapes; rows committed before are kept."""
        subject = self.subject()
        with raises(CaptureError, "shape"):
            self.capture(subject, tmp_path / "s", [inputs(4), inputs(4, 1), inputs(4, 2), inputs(4, side=8)])

    def test_the_same_run_twice_gives_the_same_bytes(self, tmp_path: Path) -> None:
        """Every file but the log."""
        subject, values = self.subject(), inputs(24)
        for name in ("a", "b"):
            self.capture_set(subject, tmp_path / name, values)
        require(contents(tmp_path / "a") == contents(tmp_path / "b"), "the stores differ")

    def test_a_run_that_died_goes_on_and_ends_byte_identical(self, tmp_path: Path) -> None:
        """The same call again captures what is missing, and a third changes nothing."""
        subject, values = self.subject(), inputs(40)

        self.capture_set(subject, tmp_path / "whole", values)
        begin, seen = Recorder.begin, []

        def dies(self: Recorder, n_rows: int) -> Any:
            seen.append(self.row)
            if self.row >= 24:
                raise StopError
            return begin(self, n_rows)

        Recorder.begin = dies  # type: ignore[method-assign]
        try:
            with raises(StopError, ""):
                self.capture_set(subject, tmp_path / "killed", values)
        finally:
            Recorder.begin = begin  # type: ignore[method-assign]
        run = open_run(tmp_path / "killed")
        done = int(run.committed().sum())
        require(0 < done < 40, f"{done} rows are committed; the test needs some and not all")
        self.capture_set(subject, tmp_path / "killed", values)
        require(contents(tmp_path / "killed") == contents(tmp_path / "whole"), "the resumed store differs")
        times = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed").rglob("c.*")}
        self.capture_set(subject, tmp_path / "killed", values)
        require(times == {file: file.stat().st_mtime_ns for file in times}, "a finished store was changed")

    def test_a_loop_that_died_goes_on(self, tmp_path: Path) -> None:
        """The same loop again: rows that are committed are not captured twice."""
        subject, values = self.subject(), inputs(40)
        batches = [values[i : i + 4] for i in range(0, 40, 4)]
        self.capture(subject, tmp_path / "whole", batches)
        with (
            raises(StopError, ""),
            record(subject.model, tmp_path / "killed", subject.layers, memory=SMALL_MEMORY, writers=1) as rec,
        ):
            for batch in batches[:7]:
                rec(subject.batch(batch))
            raise StopError
        require(0 < open_run(tmp_path / "killed").n_rows < 40, "nothing, or everything, was committed")
        self.capture(subject, tmp_path / "killed", batches)
        require(contents(tmp_path / "killed") == contents(tmp_path / "whole"), "the resumed store differs")

    def test_parts_of_a_data_set_make_the_store_that_one_process_makes(self, tmp_path: Path) -> None:
        """Byte for byte, in any order, statistics and all."""
        subject, values = self.subject(), inputs(40)
        options = {"stats": "channels", "memory": MEASURING_MEMORY}
        whole = self.capture_set(subject, tmp_path / "whole", values, part="1/1", **options)
        require(whole.manifest.n_blocks > 3, "there are too few blocks to share out")
        for part in ("3/3", "1/3", "2/3"):
            run = self.capture_set(self.subject(), tmp_path / "parts", values, part=part, **options)
        require(run.complete, "all parts together leave rows out")
        require(contents(tmp_path / "parts") == contents(tmp_path / "whole"), "the stores differ")

    def test_another_plan_is_refused_with_the_difference(self, tmp_path: Path) -> None:
        """And the store is left as it was."""
        subject, values = self.subject(), inputs(8)
        path = tmp_path / "s"
        record_dataset(subject.model, values, path, subject.layers, batch_size=4)
        before = contents(path)
        for difference, options in {
            "batch size": {"batch_size": 8},
            "dtype": {"batch_size": 4, "dtype": "float16"},
            "codec": {"batch_size": 4, "codec": "zstd"},
        }.items():
            with raises(StoreExistsError, difference):
                record_dataset(subject.model, values, path, subject.layers, **options)  # type: ignore[arg-type]
        with raises(StoreExistsError, "data"):
            record_dataset(subject.model, values + 1, path, subject.layers, batch_size=4)
        require(contents(path) == before, "a refused run changed the store")

    def test_columns_are_kept_and_must_fit_the_batch(self, tmp_path: Path) -> None:
        """Numbers, texts and arrays; a wrong length is an error that names the column."""
        subject, values = self.subject(), inputs(8)
        with record(subject.model, tmp_path / "s", subject.layers) as rec:
            for first in (0, 4):
                rec(subject.batch(values[first : first + 4]))
                rec.annotate(
                    label=np.arange(first, first + 4), id=[f"猫{i}" for i in range(first, first + 4)]
                )
        run = open_run(tmp_path / "s")
        require(run.rows["label"][...].tolist() == list(range(8)), "labels differ")
        require(list(run.rows["id"][...]) == [f"猫{i}" for i in range(8)], "texts differ")
        with raises(DataError, "label"), record(subject.model, tmp_path / "t", subject.layers) as rec:
            rec(subject.batch(values[:4]))
            rec.annotate(label=np.arange(3))

    def test_memory_does_not_grow_with_the_rows(self, tmp_path: Path) -> None:
        """Bytes are counted while N and then 4N rows go by: the peak of Python's and numpy's, and `held`."""
        subject, values, n = self.subject(), inputs(32), 4
        held = subject.held or (lambda: 0)
        with record(subject.model, tmp_path / "s", subject.layers, memory="8MiB", writers=1) as rec:

            def most(n_steps: int) -> tuple[int, int]:
                gc.collect()
                tracemalloc.reset_peak()
                for _ in range(n_steps):
                    rec(subject.batch(values))
                gc.collect()
                return tracemalloc.get_traced_memory()[1], held()

            with _traced():
                most(n)  # what is made once
                few, many = most(n), most(4 * n)
        for kind, before, after in zip(("in Python and numpy", "in the framework"), few, many, strict=True):
            require(
                after <= before + MEMORY_SLACK,
                f"{after - before} bytes more are held {kind} over {4 * n} batches than over {n}; "
                f"{MEMORY_SLACK} are allowed, and a batch has {values.nbytes}",
            )


@contextlib.contextmanager
def _traced() -> Iterator[None]:
    """Trace what Python and numpy allocate, for a while or for as long as it is traced anyhow."""
    traced = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        yield
    finally:
        if not traced:
            tracemalloc.stop()
