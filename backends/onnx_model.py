"""An ONNX model with how it is run: its file or graph, providers, options, and its inputs' types.

The file is read and never written. Weights that lie in files beside it stay there: the runtime reads them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto

from ..capture.errors import FormatError, PlanError, StoreNotFoundError
from .onnx_graph import Graph, with_outputs
from .onnx_inputs import Inputs
from .onnx_run import Runner, result
from .onnx_weights import fingerprint, lie_in_files

Values = NDArray[Any]
Json = dict[str, Any]
Provider = str | tuple[str, dict[str, Any]]

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class OnnxModel:
    """An ONNX model that can be captured; called with a batch, it runs.

    Args:
        model: path of a `.onnx` file, or an `onnx.ModelProto`.
        providers: execution providers, as `onnxruntime.InferenceSession` takes them; by default CUDA's where
            the installed runtime has it, and the CPU's.
        session_options: options of every session that is made. If weights lie in files of their own, their
            folder is added to them.
        folder: where those files lie; by default beside the model's.

    Raises:
        StoreNotFoundError: there is no such file.
        FormatError: it is no ONNX model.
        PlanError: the runtime that is installed has no such provider.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | ModelProto,
        *,
        providers: Sequence[Provider] | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = None if isinstance(model, ModelProto) else Path(model)
        self.proto = model if isinstance(model, ModelProto) else _read(Path(model))
        self.providers = _fastest() if providers is None else _checked(providers)
        self.session_options = session_options
        self.folder = Path(folder) if folder else self.path.parent if self.path else None

    @classmethod
    def of(cls, model: Any) -> OnnxModel:
        """Return `model`, whatever it is of what a user may give, as an `OnnxModel`.

        Raises:
            PlanError: it is a session that does not tell its model.
        """
        if isinstance(model, OnnxModel):
            return model
        if isinstance(model, onnxruntime.InferenceSession):
            return cls._of_session(model)
        return cls(model)

    @classmethod
    def _of_session(cls, session: onnxruntime.InferenceSession) -> OnnxModel:
        path, data = getattr(session, "_model_path", None), getattr(session, "_model_bytes", None)
        options = {"providers": session.get_providers(), "session_options": session.get_session_options()}
        if path and Path(path).is_file():
            return cls(path, **options)
        if data:
            return cls(_parsed(data, "the bytes that the session was made of"), **options)
        raise PlanError(
            "an InferenceSession gives no tensors from inside, and does not say here what it was made of: "
            "give the path of the .onnx file, or an OnnxModel with the session's providers and options"
        )

    def on(self, device: str | None) -> OnnxModel:
        """Return the model on `device` (`cpu`, `cuda`, `cuda:1`); itself for None.

        Raises:
            PlanError: the installed runtime has no such device.
        """
        if device is None:
            return self
        kind, _, number = device.partition(":")
        known: dict[str, list[Provider]] = {
            "cpu": [_CPU],
            "cuda": [(_CUDA, {"device_id": number or "0"}), _CPU],
        }
        if kind not in known or not (number or "0").isdecimal():
            raise PlanError(f"there is no device {device!r}; ONNX Runtime has cpu, cuda and cuda:N here")
        model: ModelProto | Path = self.path or self.proto
        return OnnxModel(
            model, providers=known[kind], session_options=self.session_options, folder=self.folder
        )

    @cached_property
    def graph(self) -> Graph:
        """The nodes of the graph."""
        return Graph(self.proto)

    @cached_property
    def inputs(self) -> Inputs:
        """The inputs of the graph."""
        return Inputs(self.proto.graph)

    @cached_property
    def runner(self) -> Runner:
        """The session without taps."""
        return self.runner_with(())

    def runner_with(self, tensors: Iterable[str]) -> Runner:
        """Return a new session whose results are those of the graph, and then `tensors`.

        Raises:
            PlanError: the runtime does not take the model.
        """
        options = self.session_options or onnxruntime.SessionOptions()
        if self.folder is not None and lie_in_files(self.proto):
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self.folder.resolve())
            )
        elif lie_in_files(self.proto):
            raise PlanError(
                f"the weights of {self.name} lie in files: say where, OnnxModel(model, folder=...)"
            )
        data = with_outputs(self.proto, tensors).SerializeToString()
        try:
            session = onnxruntime.InferenceSession(data, options, providers=list(self.providers))
        except Exception as error:
            raise PlanError(f"ONNX Runtime does not take {self.name}: {error}") from error
        return Runner(self, session)

    @property
    def name(self) -> str:
        """What it is called: its file, or its graph."""
        return self.path.name if self.path else self.proto.graph.name or "the model"

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model on a batch: its one result, or a dict of its results by their names."""
        return result(self, self.runner(self.feeds(inputs, kwargs)))

    def run(self, session: onnxruntime.InferenceSession, binding: onnxruntime.IOBinding) -> None:
        """Run `session`; all runs of the model come through here."""
        session.run_with_iobinding(binding)

    def feeds(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Values]:
        """Return what goes into each input; see `Inputs.taken`.

        Raises:
            DataError: an input is missing, unknown, or of a type that is not cast.
        """
        return self.inputs.taken(inputs, kwargs)

    def describe(self) -> Json:
        """Return what identifies the model: name, graph, producer, operator sets, size, and a checksum."""
        proto = self.proto
        producer = f"{proto.producer_name} {proto.producer_version}".strip()
        return {
            "name": self.name,
            "type": proto.graph.name or "ONNX graph",
            **({"producer": producer} if producer else {}),
            "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
            "parameters": sum(math.prod(tensor.dims) for tensor in proto.graph.initializer),
            "weights": fingerprint(proto, self.folder),
        }


def _read(path: Path) -> ModelProto:
    if not path.is_file():
        raise StoreNotFoundError(f"there is no file {path}")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise FormatError(f"{path} is no ONNX model: {error}") from error


def _parsed(data: bytes, what: str) -> ModelProto:
    try:
        return onnx.load_model_from_string(data)
    except Exception as error:
        raise FormatError(f"{what} are no ONNX model: {error}") from error


def _fastest() -> tuple[Provider, ...]:
    return (_CUDA, _CPU) if _CUDA in onnxruntime.get_available_providers() else (_CPU,)


def _checked(providers: Sequence[Provider]) -> tuple[Provider, ...]:
    there = onnxruntime.get_available_providers()
    for provider in providers:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in there:
            hint = "; in place of onnxruntime, install onnxruntime-gpu" if name == _CUDA else ""
            raise PlanError(f"the ONNX Runtime that is installed has no {name}, but {', '.join(there)}{hint}")
    return tuple(providers)
