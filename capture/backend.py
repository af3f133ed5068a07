"""What a framework's backend must give the engine, with working defaults for what most have alike.

A backend finds layers and hands out a `Session`, which takes values out of one model. Everything else
(rows, blocks, files) is the engine's. A backend is one file; its framework is imported there alone, and
only where the user has imported it already or asked for the backend by name.
"""

from __future__ import annotations

import importlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .axes import dims_of
from .columns import check_cast
from .data import Batch, Source, as_source, prefetched
from .dtypes import DType
from .errors import CaptureError, MissingPackageError, PlanError, SelectionError
from .layout import Layout
from .pipeline import Memory, Piece, Slab
from .plugins import announced, made
from .ragged import Form, Varying
from .reduce import Cast, Chain, Rows
from .reduce_arrays import apply
from .score import Score, logits_of
from .spans import Spans
from .taps import OUTPUT, Layer, Patterns, TapName

Json = dict[str, Any]

#: Backends of this package: name -> (framework or frameworks, class), in the order in which they are asked.
BACKENDS: dict[str, tuple[str | tuple[str, ...] | None, str]] = {
    # Before those that run it: its layers are theirs too.
    "keras": ("keras", "layertap.backends.keras:KerasBackend"),
    "torch": ("torch", "layertap.backends.torch:TorchBackend"),
    "jax": ("jax", "layertap.backends.jax:JaxBackend"),
    "onnx": (("onnxruntime", "onnx"), "layertap.backends.onnx:OnnxBackend"),
    "arrays": (None, "layertap.backends.arrays:ArraysBackend"),
}

#: Suffix of a model's file -> the backend that takes its path for a model.
MODEL_FILES: dict[str, str] = {".onnx": "onnx"}


@dataclass(frozen=True)
class Learned:
    """What the first step showed of one tap."""

    tap: TapName
    """Its name."""
    type: str
    """Type of its layer."""
    shape: tuple[int, ...]
    """Shape of one row."""
    dtype: DType
    """Element type, as the layer gives it."""
    aliases: tuple[str, ...] = ()
    """The tap's name under other names of the layer."""
    dims: tuple[str, ...] = ()
    """Names of the axes of one row (`channel`, `y`, `x`, `token`, `feature`), where the framework tells."""

    @property
    def rows(self) -> Rows:
        """The form of one row."""
        dims = self.dims or dims_of(self.shape, self.tap.kind)[1:]
        return Rows(self.shape, dims, self.dtype)

    @property
    def name(self) -> str:
        """The tap's name as text."""
        return str(self.tap)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Surveyed:
    """What one forward showed of one layer."""

    layer: Layer
    """The layer."""
    calls: int
    """How often it was called."""
    outputs: tuple[tuple[TapName, tuple[int, ...], str], ...]
    """Taps of its calls, with the shape of the whole batch and the element type."""
    kinds: tuple[str, ...] = (OUTPUT,)
    """What it can be tapped for, of `taps.KINDS`."""
    refused: Mapping[TapName, str] = field(default_factory=dict)
    """Those of them that cannot be captured, with the reason."""
    overwritten: frozenset[TapName] = frozenset()
    """Those of them that are overwritten in place later in the forward, so that a reference is no copy."""
    compiled: bool = False
    """Whether it runs in compiled code."""


class Sink(Protocol):
    """What a session tells of the steps that pass through its model."""

    def begin(self, n_rows: int) -> list[Piece] | None:
        """Open a step; None: nothing is planned yet, keep copies; an empty list: take nothing."""

    def done(self) -> None:
        """Say that the forward of the step has ended well."""


class Session(ABC):
    """One model with its taps attached: between `attach` and `detach`.

    In each step the session calls `sink.begin`, copies each tap's rows to where the pieces say *at once*
    (later operations may overwrite them in place), and calls `sink.done`. In the first step it keeps
    copies of its own, from which `learned` and `replay` serve the engine.
    """

    #: How a model can run without its taps, and what to do then, as the end of a sentence; empty: it cannot.
    unseen: str = ""
    #: What is asked for of taps whose rows differ in shape; set before `attach`.
    varying: Varying = Varying()
    #: What gets a span of each copy in a hook; set before `attach`.
    spans: Spans | None = None
    #: Tokens of the first step's mask; None where it had none.
    n_tokens: int | None = None
    #: Whether gradients are among the taps.
    gradients: bool = False
    #: What patterns chose and cannot be captured, by its name, with the reason; known after `learned`.
    left_out: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def attach(self, sink: Sink) -> None:
        """Attach all taps, or none and raise."""

    @abstractmethod
    def detach(self) -> None:
        """Remove every trace from the model; may be called at any time, more than once."""

    @abstractmethod
    def forward(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model on a batch and return what it returns."""

    def backward(  # noqa: B027 (most have no gradients)
        self, output: Any, score: Score, labels: Any
    ) -> None:
        """Run the backward pass of `score` of the model's output, for taps of gradients; without, do nothing.

        Raises:
            DataError: the score is that of the label, and the rows have none.
            CaptureError: the output has no such score.
        """

    @abstractmethod
    def learned(self) -> list[Learned]:
        """Return what the first step showed, in the order of the model.

        Raises:
            CaptureError: a layer that was asked for by name did not run, or gave nothing that can be
                captured; or nothing is left of what was chosen.
        """

    @abstractmethod
    def sample(self, i: int) -> NDArray[Any]:
        """Return some rows of tap `i` of `learned`, from the first step."""

    def reduce(self, reductions: Sequence[tuple[Chain, Rows]]) -> None:
        """Reduce each tap from now on by a chain that is bound to its rows; called once, before `prepare`.

        A backend whose copies cast, and that can do no more, need not have this.

        Raises:
            PlanError: it cannot.
        """
        for chain, _ in reductions:
            if not all(isinstance(step, Cast) for step in chain.steps):
                raise PlanError(f"{type(self).__name__} only casts: it cannot do {chain}")

    def fit(self, forms: Sequence[Form]) -> None:
        """Know how the rows of each tap may vary from now on; called once, before `prepare`.

        Raises:
            PlanError: some may, and this backend takes rows of one shape alone.
        """
        if any(form.rule is not None for form in forms):
            raise PlanError(
                f"{type(self).__name__} takes rows of one shape alone: leave out ragged= and pad="
            )

    @property
    def lacks_mask(self) -> bool:
        """Whether `mask` may still say which tokens of the step are the rows' own."""
        return False

    def mask(self, mask: Any) -> None:
        """Say which tokens of the step's rows are their own, where its forward was not told.

        Raises:
            CaptureError: the mask does not say that, or comes too late for a tap.
        """
        raise CaptureError(f"{type(self).__name__} takes no mask after the forward")

    def reduced(self, i: int, chain: Chain, rows: Rows) -> tuple[NDArray[Any], ...]:
        """Return what `chain` makes of some rows of tap `i` of the first step: values, then further parts."""
        return apply(chain, self.sample(i), rows)

    @abstractmethod
    def prepare(self, layout: Layout, memory: Memory, slabs: Sequence[Slab]) -> None:
        """Make ready for copies into `slabs`, which lie in `memory`; called once, before `replay`."""

    @abstractmethod
    def replay(self, pieces: Sequence[Piece]) -> None:
        """Copy what the first step kept to where it belongs, and forget it."""

    def transfer(self, pieces: Sequence[Piece]) -> Callable[[], None] | None:
        """Start moving the step's rows to the host; return what waits for them, None if they are there."""
        return None

    def remarks(self, thorough: bool = False) -> list[str]:
        """Return what the backend alone knows of what taps cost, in sentences: compilations, fusions lost.

        Args:
            thorough: find out also what takes seconds.
        """
        return []

    def wait(self) -> None:  # noqa: B027 (a host computes at once)
        """Wait until a device has done all that it was asked for."""

    def inference(self) -> AbstractContextManager[Any]:
        """Return the context in which a whole data set is run: no training, no gradients."""
        return nullcontext()

    def separate(self) -> AbstractContextManager[Any]:
        """Return the context in which a value depends on no more of the input than the layers say.

        Fast convolutions (Winograd's, or by FFT) are worked out in tiles, in which one NaN spoils all.
        """
        return nullcontext()

    def put(self, view: NDArray[Any], values: Any) -> None:
        """Copy the values of a column, in whatever type the user gave them, into host memory."""
        array = self.to_numpy(values)
        check_cast(array.dtype, view.dtype, np.can_cast(array.dtype, view.dtype, "safe"))
        np.copyto(view, array)

    def to_numpy(self, values: Any) -> NDArray[Any]:
        """Return `values` as a numpy array on the host."""
        return np.asarray(values)

    def prediction(self, output: Any, n_classes: int | None) -> Any:
        """Return the label that the model gives each row, where `output` is (or holds) logits, else None.

        Logits are floating-point and of shape (rows, classes); where the number of classes is known, it
        must be theirs. The result stays where the logits lie: a copy to the host would wait for a device.
        """
        logits = logits_of(output)
        shape = tuple(getattr(logits, "shape", ()))
        if len(shape) != 2 or shape[1] < 2 or n_classes not in (None, shape[1]):
            return None
        kind = str(logits.dtype)
        return logits.argmax(1) if "float" in kind and "float8" not in kind else None


class Backend(ABC):
    """One framework."""

    name: str
    """What the user calls it, and what the store says."""
    packages: tuple[str, ...] = ()
    """Packages whose versions the store keeps; the one of the backend's name where this is empty."""

    @abstractmethod
    def accepts(self, model: Any) -> bool:
        """Return whether `model` is one of this framework's."""

    @abstractmethod
    def layers(self, model: Any) -> list[Layer]:
        """Return all places that can be tapped, in the order of the model, itself first."""

    @abstractmethod
    def session(self, model: Any, layers: Patterns) -> Session:
        """Choose `layers` of `model`.

        Raises:
            SelectionError: a pattern matches nothing.
        """

    def describe(self, model: Any) -> Json:
        """Return what identifies the model: type, fingerprint of its weights, and name if it has one."""
        return {"type": type(model).__name__}

    def batches(self, source: Source, steps: Iterable[range], workers: int) -> Iterator[Batch]:
        """Yield the batch of each step, in order; ask for steps only as they are due."""
        return prefetched(source, steps, workers)

    def source(self, data: Any) -> Source:
        """Return a source for `data`; a backend adds its framework's own kinds of data set.

        Raises:
            DataError: it cannot be read by index.
        """
        return as_source(data)

    def place(self, model: Any, device: str | None) -> Any:
        """Return `model` on `device`; None: on the fastest that there is.

        Raises:
            PlanError: there is no such device.
        """
        if device not in (None, "cpu"):
            raise PlanError(f"the backend {self.name!r} has no device {device!r}")
        return model

    def transfer_rates(self, model: Any) -> dict[str, float]:
        """Return the bytes a second from the model's device to the host, `pageable` and `pinned`.

        Empty where the model runs on the host: there is nothing to transfer.
        """
        return {}

    def example(self, model: Any, n_rows: int) -> Batch | None:
        """Return up to `n_rows` rows of noise that `model` takes; None where it does not say what that is."""
        return None

    @abstractmethod
    def survey(self, model: Any, batch: Batch) -> list[Surveyed]:
        """Run `model` once and return what can be captured, in the order of the model."""


def backend_named(name: str) -> Backend:
    """Return the backend called `name`.

    Raises:
        SelectionError: there is none of that name.
        MissingPackageError: its framework is not installed.
        PluginError: it is another package's, and cannot be loaded.
    """
    found = announced("backend")
    if name in BACKENDS:
        framework, target = BACKENDS[name]
        try:
            return _load(target)
        except ModuleNotFoundError as error:
            if error.name not in _frameworks(framework):
                raise
            raise MissingPackageError(
                f"the backend {name!r} needs {error.name}; install it with: pip install 'layertap[{name}]'"
            ) from error
    if name in found:
        backend: Backend = made("backend", found[name])
        return backend
    raise SelectionError(f"there is no backend {name!r}; there are {', '.join([*BACKENDS, *found])}")


def backend_for(model: Any) -> Backend:
    """Return the backend that accepts `model`, asking only those whose framework is imported already.

    A path is asked for by its suffix, whatever is imported.

    Raises:
        PlanError: none does.
        MissingPackageError: what a file of that suffix needs is not installed.
    """
    if isinstance(model, str | os.PathLike) and (suffix := Path(model).suffix.lower()) in MODEL_FILES:
        return backend_named(MODEL_FILES[suffix])
    for name, (framework, _) in BACKENDS.items():
        if any(package in sys.modules for package in _frameworks(framework)):
            backend = backend_named(name)
            if backend.accepts(model):
                return backend
    for point in announced("backend").values():
        if point.module.split(".")[0] in sys.modules or point.name in sys.modules:
            theirs: Backend = made("backend", point)
            if theirs.accepts(model):
                return theirs
    arrays = backend_named("arrays")
    if arrays.accepts(model):
        return arrays
    raise PlanError(
        f"no backend takes a {type(model).__name__}; a model is a torch.nn.Module, a Flax or Keras model, "
        f"the path of a file ({', '.join(MODEL_FILES)}), or a function that takes a batch and returns a dict "
        "of arrays"
    )


def _frameworks(said: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if said is None else (said,) if isinstance(said, str) else said


def _load(target: str) -> Backend:
    module, name = target.split(":")
    backend: Backend = getattr(importlib.import_module(module), name)()
    return backend
