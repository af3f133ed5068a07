"""ONNX Runtime: taps are further outputs of a copy of the graph, written straight into the store's memory.

What shaped it:

* A tensor inside a graph comes out only where it is an output of it. An output keeps the runtime from fusing
  what makes it with what follows, and does so even when nobody fetches it: so there is one session for each
  choice of taps, and the model without taps has its own.
* A result can be bound to memory that is there already. Where a tap is neither reduced nor cut, that is the
  store's, and no copy is made.
* The model's file is never written, and weights in files of their own stay there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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
from ..capture.taps import Choice, Layer, Patterns, TapName
from .onnx_layers import chosen, layers_of, tensors_of
from .onnx_model import OnnxModel
from .onnx_run import result, run

SUFFIX = ".onnx"


class OnnxBackend(Backend):
    """`.onnx` files, `onnx.ModelProto`s, `OnnxModel`s, and sessions that tell which file they were made of."""

    name = "onnx"

    def accepts(self, model: Any) -> bool:
        """Return whether `model` is one of these."""
        if isinstance(model, str | os.PathLike):
            return Path(model).suffix.lower() == SUFFIX
        return isinstance(model, OnnxModel | ModelProto | onnxruntime.InferenceSession)

    def layers(self, model: Any) -> list[Layer]:
        """Return the model, and the nodes of its graph in their order; nodes inside If, Loop and Scan last."""
        return layers_of(OnnxModel.of(model).graph)

    def session(self, model: Any, layers: Patterns) -> Session:
        """Choose `layers` of `model`; a tap is called by the name that it was chosen by."""
        return OnnxSession(OnnxModel.of(model), layers)

    def describe(self, model: Any) -> Json:
        """Return graph, producer, operator sets, number of parameters, and a checksum of graph and weights."""
        return OnnxModel.of(model).describe()

    def place(self, model: Any, device: str | None) -> Any:
        """Return `model` as an `OnnxModel` that runs on `device`."""
        return OnnxModel.of(model).on(device)

    def survey(self, model: Any, batch: Batch) -> list[Surveyed]:
        """Run `model` once with every tensor as a result."""
        session = OnnxSession(OnnxModel.of(model), "**")
        return session.survey(batch)


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
        #: The tensor of each tap, by layer and kind.
        self._tensors = {
            TapName(choice.layer.name, kind=choice.kind): tensors_of(model.graph, choice)
            for choice in self._choices
        }
        self._wanted = tuple(dict.fromkeys(t for taps in self._tensors.values() for t in taps.values()))
        self._sessions: dict[tuple[str, ...], onnxruntime.InferenceSession] = {}
        #: The shapes of the rows of the first batch's inputs.
        self._row_shapes: dict[str, tuple[int, ...]] = {}

    def detach(self) -> None:
        """Let go of the sessions with taps."""
        super().detach()
        self._sessions.clear()

    def plain(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the session without taps."""
        return self._model(*inputs, **kwargs)

    def tapped(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Returned]:
        """Run the session with taps."""
        return self._run(self._model.feeds(inputs, kwargs), {})

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
            output, returned = self._run(feeds, {})
            self.learn(returned, n_rows)
            return output
        into = self._memory(n_rows, pieces) if shapes == self._row_shapes else {}
        try:
            output, returned = self._run(feeds, {self._tensor(self.taps[i]): v for i, v in into.items()})
        except Exception as error:
            if not into or "OrtValue" not in str(error):
                raise
            into = {}  # a shape that follows from the values is another: there is memory of its own for it
            output, returned = self._run(feeds, into)
        for i, tap in enumerate(self.taps):
            if i not in into:
                self.copy(i, self.find(returned, tap), n_rows, pieces)
        return output

    def learn(self, returned: Returned, n_rows: int) -> None:
        """Keep what was chosen of the first batch; from then on nothing else is a result."""
        super().learn(returned, n_rows)
        self._wanted = tuple(dict.fromkeys(self._tensor(tap) for tap in self._learned))

    def learned(self) -> list[Learned]:
        """Return what the first batch gave, with the other names of each tap."""
        return [replace(one, aliases=self._aliases(one.tap)) for one in super().learned()]

    def survey(self, batch: Batch) -> list[Surveyed]:
        """Run the model once and return what every layer gave."""
        _, returned = self._run(self._model.feeds(batch.inputs, batch.kwargs), {})
        return [
            surveyed(choice.layer, [returned[TapName(choice.layer.name, kind=choice.kind)]], self)
            for choice in self._choices
        ]

    def _run(self, feeds: Mapping[str, Values], into: Mapping[str, Values]) -> tuple[Any, Returned]:
        values = run(self._model, self._session(), feeds, into)
        returned = {
            tap: values.get(taps[()]) if () in taps else {path[0]: values.get(t) for path, t in taps.items()}
            for tap, taps in self._tensors.items()
        }
        return result(self._model, values), returned

    def _session(self) -> onnxruntime.InferenceSession:
        if self._wanted not in self._sessions:
            self._sessions.clear()
            self._sessions[self._wanted] = self._model.session_with(self._wanted)
        return self._sessions[self._wanted]

    def _memory(self, n_rows: int, pieces: Sequence[Piece]) -> dict[int, Values]:
        """Return the memory of the taps whose rows can be written where they belong."""
        assert self._layout is not None
        piece = pieces[0]
        if len(pieces) > 1 or piece.batch != slice(0, n_rows) or self._model.batch_size not in (None, n_rows):
            return {}
        taken = set(self._model.graph.outputs)  # these are the user's to keep
        found = {}
        for i, tap in enumerate(self.taps):
            tensor = self._tensor(tap)
            if tensor not in taken and self._is_whole(i):
                taken.add(tensor)
                found[i] = array_view(self._layout, self._layout.numbers[i][0], piece.slab.memory)[piece.rows]
        return found

    def _is_whole(self, i: int) -> bool:
        """Return whether tap `i` is stored as the model gives it."""
        reduced = bool(self._reductions) and bool(self._reductions[i][0].steps)
        return not reduced and (not self._forms or self._forms[i].rule is None)

    def _tensor(self, tap: TapName) -> str:
        return self._tensors[TapName(tap.layer, kind=tap.kind)][tap.path]

    def _aliases(self, tap: TapName) -> tuple[str, ...]:
        layer = next(choice.layer for choice in self._choices if choice.layer.name == tap.layer)
        return tuple(str(replace(tap, layer=alias)) for alias in layer.aliases)

    def _is_inside(self, choice: Choice) -> bool:
        """Return whether a layer lies in the body of a node, where nothing can be tapped; note that.

        Raises:
            CaptureError: it was asked for by name.
        """
        node = self._model.graph.named.get(id(choice.layer.module))
        if node is None or not node.inside:
            return False
        self.leave_out(
            choice, TapName(node.name), f"lies in the body of a node, whose tensors stay there: {node.inside}"
        )
        return True
