"""ONNX Runtime: taps are further results of a copy of the graph, written straight into the store's memory.

What shaped it:

* A tensor inside a graph comes out only where it is a result of it. A result keeps the runtime from fusing
  what makes it with what follows, and does so even when nobody fetches it: so there is one session for each
  choice of taps, and the model without taps has its own.
* A result can be bound to memory that is there already. Where a tap is kept as it is, that is the store's,
  and no copy is made.
* The model's file is never written, and weights in files of their own stay there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
from onnx import ModelProto

from ..capture.backend import Backend, Json, Learned, Session, Surveyed
from ..capture.data import Batch
from ..capture.errors import PlanError
from ..capture.layout import array_view
from ..capture.pipeline import Piece
from ..capture.returned import Returned, ReturnedSession, Values, surveyed
from ..capture.specs import LoadedModel
from ..capture.taps import OUTPUT, Choice, Layer, Patterns, TapName
from .onnx_graph import Node
from .onnx_layers import chosen, layers_of, tensors_of
from .onnx_model import OnnxModel
from .onnx_run import Foreign, Named, Runner, result

SUFFIX = ".onnx"

_NOTHING: Named = {}


class OnnxBackend(Backend):
    """`.onnx` files, `onnx.ModelProto`s, `OnnxModel`s, and sessions that tell what they were made of."""

    name = "onnx"
    packages = ("onnx", "onnxruntime")

    def accepts(self, model: Any) -> bool:
        """Return whether `model` is one of these."""
        if isinstance(model, str | os.PathLike):
            return Path(model).suffix.lower() == SUFFIX
        return isinstance(model, OnnxModel | ModelProto | onnxruntime.InferenceSession)

    def layers(self, model: Any) -> list[Layer]:
        """Return the model, the nodes of its graph in their order, and those inside If, Loop and Scan."""
        return layers_of(OnnxModel.of(model).graph)

    def session(self, model: Any, layers: Patterns) -> Session:
        """Choose `layers` of `model`; a tap is called by the name that it was chosen by."""
        return OnnxSession(OnnxModel.of(model), layers)

    def describe(self, model: Any) -> Json:
        """Return name, graph, producer, operator sets, parameters, and a checksum of graph and weights."""
        return OnnxModel.of(model).describe()

    def place(self, model: Any, device: str | None) -> Any:
        """Return `model` as an `OnnxModel` that runs on `device`."""
        return OnnxModel.of(model).on(device)

    def example(self, model: Any, n_rows: int) -> Batch | None:
        """Return noise for the inputs of `model`, where it tells their shapes."""
        inputs = OnnxModel.of(model).inputs
        n_rows = min(n_rows, inputs.batch_size or n_rows)
        noise = inputs.noise(n_rows)
        return None if noise is None else Batch(range(n_rows), (), noise)

    def survey(self, model: Any, batch: Batch) -> list[Surveyed]:
        """Run `model` once with every tensor as a result."""
        return OnnxSession(OnnxModel.of(model), "**").survey(batch)


def load_file(path: Path, options: dict[str, Any]) -> LoadedModel:
    """Return the model of a file.

    Raises:
        PlanError: an option is unknown.
    """
    providers = options.pop("providers", None)
    if options:
        raise PlanError(f"a {SUFFIX} file has no option {min(options)!r}; it has providers=NAME,NAME")
    return LoadedModel(OnnxModel(path, providers=providers.split(",") if providers else None), path.name)


class OnnxSession(ReturnedSession):
    """One model with its chosen tensors as further results."""

    def __init__(self, model: OnnxModel, layers: Patterns) -> None:
        choices = chosen(model.graph, layers)
        super().__init__(choices)
        self._model = model
        self._choices = [choice for choice in choices if not self._is_inside(choice)]
        #: Of each layer and kind, the tensors by their paths.
        self._tensors = {_whole(choice): tensors_of(model.graph, choice) for choice in self._choices}
        #: The tensors that the session with taps gives.
        self._wanted = self._all_tensors()
        self._runners: dict[tuple[str, ...], Runner] = {}
        #: The shapes of the rows of the first batch's inputs.
        self._row_shapes: dict[str, tuple[int, ...]] = {}

    def detach(self) -> None:
        """Let go of the session with taps."""
        super().detach()
        self._runners.clear()

    def plain(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the session without taps."""
        return self._model(*inputs, **kwargs)

    def tapped(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Returned]:
        """Run the session with taps."""
        return self._run(self._model.feeds(inputs, kwargs))

    def dims(self, tap: TapName, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Return the axes of a map, where the operators tell which is the channel."""
        return self._model.graph.dims.get(self._tensor(tap), ()) if len(shape) == 3 else ()

    def step(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any], n_rows: int, pieces: Sequence[Piece] | None
    ) -> Any:
        """Run the model; what can be is written where it belongs, and the rest is copied there."""
        if pieces is not None and not pieces:
            return self.plain(inputs, kwargs)
        feeds = self._model.feeds(inputs, kwargs)
        shapes = {name: values.shape[1:] for name, values in feeds.items()}
        if pieces is None:
            self._row_shapes = shapes
            output, returned = self._run(feeds)
            self.learn(returned, n_rows)
            return output
        into = self._memory(n_rows, pieces) if shapes == self._row_shapes else {}
        try:
            output, returned = self._run(feeds, {self._tensor(self.taps[i]): v for i, v in into.items()})
        except Exception as error:
            if not into or "OrtValue" not in str(error):
                raise
            # A shape that follows from the values is another this time: no memory was meant for it.
            into = {}
            output, returned = self._run(feeds)
        for i, tap in enumerate(self.taps):
            values = self.find(returned, tap)
            if i not in into or not _is_there(values, into[i]):
                self.copy(i, values, n_rows, pieces)
        return output

    def learn(self, returned: Returned, n_rows: int) -> None:
        """Keep what was chosen of the first batch; from then on nothing else is a result."""
        for choice in self._choices:
            self._check_parts(choice)
            self._drop(choice, returned[_whole(choice)], n_rows)
        self._choices = [choice for choice in self._choices if self._tensors[_whole(choice)]]
        super().learn(returned, n_rows)
        self._wanted = tuple(dict.fromkeys(self._tensor(tap) for tap in self._learned))

    def learned(self) -> list[Learned]:
        """Return what the first batch gave, with the other names of each tap."""
        return [replace(one, aliases=self._aliases(one.tap)) for one in super().learned()]

    def survey(self, batch: Batch) -> list[Surveyed]:
        """Run the model once and return what every layer gave."""
        inputs, n_rows = self._model.inputs, len(batch.rows)
        n_rows = min(n_rows, inputs.batch_size or n_rows)
        feeds = inputs.taken(batch.inputs, batch.kwargs)
        _, returned = self._run(
            {name: values[:n_rows] if values.ndim else values for name, values in feeds.items()}
        )
        found = []
        for choice in self._choices:
            one = surveyed(_shown(choice.layer), [returned[_whole(choice)]], self)
            refused = {
                tap: reason
                for tap, shape, _ in one.outputs
                if (reason := self._without_rows(self._tensor(tap), shape, n_rows))
            }
            found.append(replace(one, kinds=choice.layer.kinds, refused=refused))
        return [*found, *map(_in_a_body, self._model.graph.bodies)]

    def _check_parts(self, choice: Choice) -> None:
        """Hold the parts that were asked for against those that there are.

        Raises:
            CaptureError: one was asked for by name and is not there.
        """
        there = [TapName(choice.layer.name, 1, path, choice.kind) for path in self._tensors[_whole(choice)]]
        for wanted in choice.only:
            if not any(Choice(choice.layer, frozenset((wanted,)), choice.kind).takes(tap) for tap in there):
                # The choice holds what was asked for alone, and all are to be shown.
                every = tensors_of(self._model.graph, replace(choice, only=frozenset()))
                names = ", ".join(str(replace(wanted, path=path)) for path in every)
                self.leave_out(choice, wanted, f"is not there: there is {names or 'nothing'}")

    def _drop(self, choice: Choice, value: Any, n_rows: int) -> None:
        """Leave out what a store cannot hold, and what has no rows.

        Raises:
            CaptureError: it was asked for by name.
        """
        taps = self._tensors[_whole(choice)]
        for path, tensor in list(taps.items()):
            leaf = value[path[0]] if path else value
            reason = (
                f"holds {leaf.kind}, which a store cannot hold"
                if isinstance(leaf, Foreign)
                else self._without_rows(tensor, leaf.shape, n_rows)
            )
            if reason is not None:
                self.leave_out(choice, TapName(choice.layer.name, 1, path, choice.kind), reason)
                del taps[path]

    def _without_rows(self, tensor: str, shape: tuple[int, ...], n_rows: int) -> str | None:
        """Return why a tensor has no rows; its length may be theirs by chance, and the graph know better."""
        said, inputs = self._runner().shapes[tensor], self._model.inputs
        if shape[:1] != (n_rows,):
            return f"has no rows on its first axis: it has shape {shape}, the batch has {n_rows} rows"
        if said and isinstance(said[0], int) and said[0] != inputs.batch_size and inputs.has_rows:
            return f"has no rows on its first axis: whatever the batch, it has {said[0]} there"
        return None

    def _run(self, feeds: Named, into: Named = _NOTHING) -> tuple[Any, Returned]:
        values = self._runner()(feeds, into)
        returned = {
            whole: values[taps[()]] if () in taps else {path[0]: values[name] for path, name in taps.items()}
            for whole, taps in self._tensors.items()
        }
        return result(self._model, values), returned

    def _runner(self) -> Runner:
        if self._wanted not in self._runners:
            self._runners = {self._wanted: self._model.runner_with(self._wanted)}
        return self._runners[self._wanted]

    def _memory(self, n_rows: int, pieces: Sequence[Piece]) -> dict[int, Values]:
        """Return the memory of those taps whose rows can be written where they belong, by their places."""
        assert self._layout is not None
        piece = pieces[0]
        if piece.batch != slice(0, n_rows) or self._model.inputs.batch_size not in (None, n_rows):
            return {}
        taken = set(self._model.graph.outputs)  # these are the caller's to keep
        found = {}
        for i, tap in enumerate(self.taps):
            if (tensor := self._tensor(tap)) not in taken and self._is_kept_whole(i):
                taken.add(tensor)
                number = self._layout.numbers[i][0]
                found[i] = array_view(self._layout, number, piece.slab.memory)[piece.rows]
        return found

    def _is_kept_whole(self, i: int) -> bool:
        reduced = bool(self._reductions) and bool(self._reductions[i][0].steps)
        return not reduced and (not self._forms or self._forms[i].rule is None)

    def _tensor(self, tap: TapName) -> str:
        return self._tensors[replace(tap, path=())][tap.path]

    def _all_tensors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for taps in self._tensors.values() for name in taps.values()))

    def _aliases(self, tap: TapName) -> tuple[str, ...]:
        layer = next(choice.layer for choice in self._choices if choice.layer.name == tap.layer)
        aliases = [alias for alias in layer.aliases if not tap.path or alias not in layer.module.output]
        names = [str(replace(tap, layer=alias)) for alias in aliases]
        if tap.path and tap.kind == OUTPUT:
            names.append(self._tensor(tap))
        return tuple(names)

    def _is_inside(self, choice: Choice) -> bool:
        """Return whether a layer lies in the body of a node, where nothing can be tapped; note that.

        Raises:
            CaptureError: it was asked for by name.
        """
        node = self._model.graph.all[id(choice.layer.module)]
        if node.inside:
            self.leave_out(choice, TapName(choice.layer.name), _of_a_body(node))
        return bool(node.inside)


def _whole(choice: Choice) -> TapName:
    """Return the name of all that a choice takes of its layer."""
    return TapName(choice.layer.name, kind=choice.kind)


def _of_a_body(node: Node) -> str:
    return f"lies in the body of a node, whose tensors do not come out: that of {node.inside}"


def _in_a_body(node: Node) -> Surveyed:
    """Return that a node in a body cannot be captured."""
    tap = TapName(node.name)
    layer = Layer(node.name, node.types, node.proto, kinds=(OUTPUT,))
    return Surveyed(layer, 0, ((tap, (), ""),), (OUTPUT,), {tap: _of_a_body(node)})


def _is_there(values: Values, memory: Values) -> bool:
    """Return whether `values` lie in `memory`: the runtime hands an input on as a result where it lies."""
    return bool(values.ctypes.data == memory.ctypes.data)


def _shown(layer: Layer) -> Layer:
    """Return `layer` with the names that a list shows: tensors are called like their nodes."""
    return replace(layer, aliases=tuple(name for name in layer.aliases if name not in layer.module.output))
