"""The contract of a backend, as tests: inherit `BackendContract`, give it a `Subject`, run pytest.

It ships with the package so that other people's backends can hold themselves to it.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .errors import CaptureError, DataError, SelectionError, StoreExistsError
from .reader import Run, open_run
from .record import record, record_dataset
from .recorder import Recorder

Values = NDArray[Any]

#: Too little for more than a step or two in a block, for rows of 16 KiB and batches of 4.
SMALL_MEMORY = "800KiB"


class ContractError(AssertionError):
    """A backend breaks the contract."""


class StopError(Exception):
    """What the suite makes a model raise."""


@dataclass
class Subject:
    """One model of a framework, and what is known of it without layertap."""

    model: Any
    """The model."""
    layers: Sequence[str]
    """Patterns that choose at least two taps, one of them of a layer that is called twice or lies nested."""
    batch: Callable[[Values], Any]
    """Turns float32 (rows, 4, 16, 16) on the host into the framework's own input."""
    reference: Callable[[Values], dict[str, Values]]
    """The true value of every chosen tap for such an input, by means of the framework alone."""
    output: Callable[[Any], Values]
    """Turns what the model returns into a numpy array."""
    traces: Callable[[], Any]
    """A value that is equal before and after where nothing is left behind in the model."""
    fail: Callable[[bool], None]
    """Makes the model raise `StopError` half-way through its forward, or lets it run again."""


def inputs(n_rows: int, seed: int = 0, side: int = 16) -> Values:
    """Return noise of shape (n_rows, 4, side, side), float32."""
    return np.random.default_rng(seed).standard_normal((n_rows, 4, side, side), np.float32)


def contents(path: Path) -> dict[str, bytes]:
    """Return every file of a store by its name inside it, but for the log."""
    files = (file for file in path.rglob("*") if file.is_file())
    names = {file.relative_to(path).as_posix(): file for file in files}
    return {name: file.read_bytes() for name, file in names.items() if "/log/" not in name}


def require(truth: bool, message: str) -> None:
    """Raise `ContractError` unless `truth`; unlike `assert` it works in optimised runs too."""
    if not truth:
        raise ContractError(message)


@contextlib.contextmanager
def raises(kind: type[BaseException], words: str) -> Iterator[None]:
    """Require that the block raises `kind` and says `words`."""
    try:
        yield
    except kind as error:
        require(words in str(error), f"{kind.__name__} says {str(error)!r} and not {words!r}")
        return
    raise ContractError(f"no {kind.__name__} was raised")


class BackendContract(ABC):
    """What holds for every backend."""

    @abstractmethod
    def subject(self) -> Subject:
        """Return a fresh subject."""

    def capture(self, subject: Subject, path: Path, batches: Sequence[Values], **options: Any) -> Run:
        """Capture `batches` with a loop."""
        options = {"memory": SMALL_MEMORY, "writers": 1, **options}
        with record(subject.model, path, subject.layers, **options) as rec:
            for batch in batches:
                rec(subject.batch(batch))
        return open_run(path)

    def capture_set(self, subject: Subject, path: Path, values: Values) -> Run:
        """Capture `values` as a data set, in blocks of a step or two."""
        return record_dataset(
            subject.model, values, path, subject.layers, batch_size=4, memory=SMALL_MEMORY, writers=1
        )

    def check_values(self, subject: Subject, run: Run, values: Values) -> None:
        """Require that `run` holds what the framework itself gives for `values`, bit for bit."""
        expected = subject.reference(values)
        require(list(run.taps) == list(expected), f"taps are {list(run.taps)}, not {list(expected)}")
        for name, array in expected.items():
            got = run[name][...]
            require(got.dtype == array.dtype, f"{name} is {got.dtype}, not {array.dtype}")
            require(got.shape == array.shape, f"{name} has shape {got.shape}, not {array.shape}")
            require(got.tobytes() == array.tobytes(), f"{name} differs from the framework's own values")

    def test_values_are_bit_equal_to_the_frameworks_own(self, tmp_path: Path) -> None:
        """Over several blocks, the last one short."""
        subject, values = self.subject(), inputs(30)
        run = self.capture(subject, tmp_path / "s", [values[i : i + 4] for i in range(0, 30, 4)])
        require(run.complete, "the store is not complete")
        require(run.manifest.n_blocks > 2, "there are too few blocks for the test to tell")
        self.check_values(subject, run, values)

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

    def test_a_misspelt_layer_is_named_with_the_closest(self, tmp_path: Path) -> None:
        """The error shows a name that is there."""
        subject, values = self.subject(), inputs(4)
        name = next(iter(subject.reference(values))).split("[")[0].split("#")[0]
        wrong = name + "x"
        with raises(SelectionError, name), record(subject.model, tmp_path / "s", [wrong]) as rec:
            rec(subject.batch(values))

    def test_a_batch_that_fails_is_not_captured_and_the_loop_may_go_on(self, tmp_path: Path) -> None:
        """Its rows are left out whole."""
        subject, values = self.subject(), inputs(8)
        with record(subject.model, tmp_path / "s", subject.layers) as rec:
            rec(subject.batch(values[:4]))
            subject.fail(True)
            with contextlib.suppress(StopError):
                rec(subject.batch(values[:4]))
            subject.fail(False)
            rec(subject.batch(values[4:]))
        run = open_run(tmp_path / "s")
        require(run.n_rows == 8, f"{run.n_rows} rows, not 8")
        for name, array in subject.reference(values[4:]).items():
            require(run[name][4:].tobytes() == array.tobytes(), f"{name} differs")

    def test_a_shape_that_changes_is_refused(self, tmp_path: Path) -> None:
        """With both shapes; rows committed before are kept."""
        subject = self.subject()
        with raises(CaptureError, "shape"):
            self.capture(subject, tmp_path / "s", [inputs(4), inputs(4, 1), inputs(4, 2), inputs(4, side=8)])

    def test_casts_are_those_of_the_framework(self, tmp_path: Path) -> None:
        """Rounded to nearest, as numpy does."""
        subject, values = self.subject(), inputs(4)
        for name, dtype in (("float16", np.dtype(np.float16)), ("bfloat16", np.dtype(ml_dtypes.bfloat16))):
            run = self.capture(subject, tmp_path / name, [values], dtype=name)
            for tap, array in subject.reference(values).items():
                expected = array.astype(dtype) if array.dtype.kind == "f" else array
                got = run[tap][...]
                require(got.dtype == expected.dtype, f"{tap} is {got.dtype}")
                require(got.tobytes() == expected.tobytes(), f"{tap} is rounded otherwise")

    def test_not_finite_values_are_kept_and_counted(self, tmp_path: Path) -> None:
        """NaN and infinity pass through as they are."""
        subject, values = self.subject(), inputs(4)
        values[1, 2, 3, 4], values[2, 0, 0, 0] = np.nan, np.inf
        run = self.capture(subject, tmp_path / "s", [values])
        for name, array in subject.reference(values).items():
            if array.dtype.kind != "f":
                continue
            counts = {"nan": int(np.isnan(array).sum()), "inf": int(np.isinf(array).sum())}
            counted = {"nan": run.stats[name].nan, "inf": run.stats[name].inf}
            require(counted == counts, f"{name}: counted {counted}, not {counts}")
            require(np.array_equal(run[name][...], array, equal_nan=True), f"{name} differs")

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
