"""What the tests of a backend are about, a model and what is known of it, and how they capture it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backend import Backend, Surveyed, backend_for
from .contract import require, skip
from .data import Batch
from .reader import Run, open_run
from .record import record, record_dataset

Values = NDArray[Any]

#: Too little for more than a step or two in a block, for rows of 16 KiB and batches of 4.
SMALL_MEMORY = "800KiB"
#: The same where channels are measured, which takes memory of its own.
MEASURING_MEMORY = "1200KiB"

#: What not every framework has, by the key of `Subject.lacks`.
PARTS = {
    "calls": "a layer that is called twice in one forward (a tap `name#2`)",
    "nested": "an output with parts (a tap `name[path]`)",
    "bfloat16": "values in bfloat16",
    "reductions": "reductions beside casts (its session has no `reduce` of its own)",
}


class StopError(Exception):
    """What the suite makes a model raise."""


@dataclass
class Subject:
    """One model of a framework, and what is known of it without layertap."""

    model: Any
    """The model."""
    layers: Sequence[str]
    """Patterns that choose at least two taps, as the names of their layers do too. No test is skipped where
    one is of a layer that is called twice, one a part of a nested output, and one in bfloat16."""
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
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Why the framework has no `calls`, `nested` or `bfloat16` (see `PARTS`): the reason with which a test is
    skipped. By default, a test is skipped if `reference` has nothing for it, and says what that would be."""
    held: Callable[[], int] | None = None
    """Bytes of the framework's own arrays that are alive, where they are not Python's or numpy's, which are
    counted in any case; None: they are not looked at."""


def inputs(n_rows: int, seed: int = 0, side: int = 16) -> Values:
    """Return noise of shape (n_rows, 4, side, side), float32."""
    return np.random.default_rng(seed).standard_normal((n_rows, 4, side, side), np.float32)


def contents(path: Path) -> dict[str, bytes]:
    """Return every file of a store by its name inside it, but for the log."""
    files = (file for file in path.rglob("*") if file.is_file())
    names = {file.relative_to(path).as_posix(): file for file in files}
    return {name: file.read_bytes() for name, file in names.items() if "/log/" not in name}


class Contract(ABC):
    """A subject, and ways to capture it."""

    @abstractmethod
    def subject(self) -> Subject:
        """Return a fresh subject."""

    def backend(self, subject: Subject) -> Backend:
        """Return the backend under test: the one that takes the subject's model."""
        return backend_for(subject.model)

    def capture(self, subject: Subject, path: Path, batches: Sequence[Values], **options: Any) -> Run:
        """Capture `batches` with a loop; `layers` and other options of `record` may be others."""
        options = {"layers": subject.layers, "memory": SMALL_MEMORY, "writers": 1, **options}
        with record(subject.model, path, **options) as rec:
            for batch in batches:
                rec(subject.batch(batch))
        return open_run(path)

    def capture_set(self, subject: Subject, path: Path, values: Values, **options: Any) -> Run:
        """Capture `values` as a data set, in blocks of a step or two."""
        options = {"batch_size": 4, "memory": SMALL_MEMORY, "writers": 1, **options}
        return record_dataset(subject.model, values, path, subject.layers, **options)

    def survey(self, subject: Subject, values: Values) -> list[Surveyed]:
        """Return what one forward of `values` shows of each layer."""
        batch = Batch(range(len(values)), (subject.batch(values),))
        return self.backend(subject).survey(subject.model, batch)

    def listed(self, subject: Subject, values: Values) -> list[str]:
        """Return the names of all layers; where they show themselves in a forward alone, by a survey."""
        names = [layer.name for layer in self.backend(subject).layers(subject.model)]
        return names or [one.layer.name for one in self.survey(subject, values)]

    def skip_unless(self, there: Any, subject: Subject, part: str) -> None:
        """Skip the test where the subject has nothing of a `part`, one of `PARTS`."""
        if not there:
            skip(subject.lacks.get(part) or f"the subject of {type(self).__name__} lacks {PARTS[part]}")

    def check_tap(self, run: Run, name: str, expected: Values) -> None:
        """Require that a tap is `expected`, bit for bit."""
        require(name in run.taps, f"there is no tap {name}, but {', '.join(run.taps)}")
        got = run[name][...]
        require(got.dtype == expected.dtype, f"{name} is {got.dtype}, not {expected.dtype}")
        require(got.shape == expected.shape, f"{name} has shape {got.shape}, not {expected.shape}")
        require(got.tobytes() == expected.tobytes(), f"{name} differs from the framework's own values")

    def check_values(self, subject: Subject, run: Run, values: Values) -> None:
        """Require that `run` holds what the framework itself gives for `values`, bit for bit."""
        expected = subject.reference(values)
        require(list(run.taps) == list(expected), f"taps are {list(run.taps)}, not {list(expected)}")
        for name, array in expected.items():
            self.check_tap(run, name, array)
