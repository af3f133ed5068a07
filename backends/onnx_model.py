"""An ONNX model with how it is run: its file or graph, providers, options, and its inputs' types.

The file is read and never written. Weights that lie in files beside it stay there: the runtime reads them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from ..capture.checksum import crc32c
from ..capture.dtypes import DTYPES, DType, dtype_name
from ..capture.errors import DataError, FormatError, PlanError, StoreNotFoundError
from ..capture.returned import to_numpy
from .onnx_graph import Graph, with_outputs

Values = NDArray[Any]
Json = dict[str, Any]
Provider = str | tuple[str, dict[str, Any]]

#: ONNX element type -> name of the same type in a store; onnx's own table lacks some before 1.19.
_DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT8E4M3FN: "float8_e4m3fn",
    TensorProto.FLOAT8E5M2: "float8_e5m2",
    TensorProto.INT8: "int8",
    TensorProto.INT16: "int16",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.UINT8: "uint8",
    TensorProto.UINT16: "uint16",
    TensorProto.UINT32: "uint32",
    TensorProto.UINT64: "uint64",
    TensorProto.BOOL: "bool",
    TensorProto.COMPLEX64: "complex64",
    TensorProto.COMPLEX128: "complex128",
}

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
        self.providers = tuple(providers) if providers is not None else _fastest()
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
            "an InferenceSession gives no tensors from inside, and this one does not say which file it was "
            "made of: give the path of the .onnx file, or an OnnxModel with the session's providers and options"
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
        if kind == "cuda" and _CUDA not in onnxruntime.get_available_providers():
            raise PlanError(
                "the ONNX Runtime that is installed has no CUDA; in place of onnxruntime, install "
                "onnxruntime-gpu"
            )
        model: ModelProto | Path = self.path or self.proto
        return OnnxModel(
            model, providers=known[kind], session_options=self.session_options, folder=self.folder
        )

    @cached_property
    def graph(self) -> Graph:
        """The nodes of the graph."""
        return Graph(self.proto)

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        """The session without taps."""
        return self.session_with(())

    def session_with(self, tensors: Iterable[str]) -> onnxruntime.InferenceSession:
        """Return a new session whose results are those of the graph, and then `tensors`.

        Raises:
            PlanError: the runtime does not take the model.
        """
        options = self.session_options or onnxruntime.SessionOptions()
        if self.folder is not None and self._has_files:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self.folder.resolve())
            )
        proto = with_outputs(self.proto, tensors)
        try:
            return onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=list(self.providers)
            )
        except Exception as error:
            files = " Its weights lie in files: say where, OnnxModel(model, folder=...)." * (
                self.folder is None and self._has_files
            )
            raise PlanError(f"ONNX Runtime does not take {self.name}: {error}.{files}") from error

    @property
    def name(self) -> str:
        """What it is called: its file, or its graph."""
        return self.path.name if self.path else self.proto.graph.name or "the model"

    @cached_property
    def batch_size(self) -> int | None:
        """How many rows a batch has; None where the model leaves that open."""
        sizes = {first for value in self.graph.inputs if (first := _first_axis(value)) is not None}
        return sizes.pop() if len(sizes) == 1 else None

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model on a batch: its one result, or a dict of its results by their names."""
        from .onnx_run import result, run

        return result(self, run(self, self.session, self.feeds(inputs, kwargs)))

    def run(self, session: onnxruntime.InferenceSession, binding: onnxruntime.IOBinding) -> None:
        """Run `session`; all runs of the model come through here."""
        session.run_with_iobinding(binding)

    def feeds(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Values]:
        """Return what goes into each input, by position or by name, in the type that the model takes.

        Floating-point values are cast to other floating-point types and whole numbers to other types of whole
        numbers, if they fit; nothing else is.

        Raises:
            DataError: an input is missing, unknown, or of a type that is not cast.
        """
        if len(inputs) == 1 and isinstance(inputs[0], dict):
            inputs, kwargs = (), {**inputs[0], **kwargs}
        names = [value.name for value in self.graph.inputs]
        if len(inputs) > len(names):
            raise DataError(f"{self.name} has the inputs {', '.join(names)}, and {len(inputs)} were given")
        given = dict(zip(names, inputs, strict=False))
        types = {value.name: value.type.tensor_type.elem_type for value in self.proto.graph.input}
        for name, value in kwargs.items():
            if name not in types or name in given:
                raise DataError(f"{self.name} has no further input {name!r}; it has {', '.join(names)}")
            given[name] = value
        if missing := [name for name in names if name not in given]:
            raise DataError(f"{self.name} has the inputs {', '.join(names)}; {missing[0]} is missing")
        return {name: _cast(name, value, types[name]) for name, value in given.items()}

    def describe(self) -> Json:
        """Return what identifies the model: name, graph, producer, operator sets, size, and a checksum."""
        proto = self.proto
        producer = f"{proto.producer_name} {proto.producer_version}".strip()
        tensors = list(self._weights())
        return {
            "name": self.name,
            "type": proto.graph.name or "ONNX graph",
            **({"producer": producer} if producer else {}),
            "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
            "parameters": sum(int(np.prod(tensor.dims, dtype=np.int64)) for tensor in tensors),
            "weights": self._fingerprint(tensors),
        }

    @property
    def _has_files(self) -> bool:
        return any(uses_external_data(tensor) for tensor in self._weights())

    def _weights(self) -> Iterator[TensorProto]:
        yield from self.proto.graph.initializer

    def _fingerprint(self, tensors: Sequence[TensorProto]) -> str:
        """Return a text that differs where the weights, or what is computed with them, differ."""
        digest = hashlib.sha256()
        for tensor in tensors:
            data = self._bytes(tensor)
            crc = crc32c(data) if data else 0
            digest.update(f"{tensor.name}:{tensor.data_type}:{tuple(tensor.dims)}:{crc:08x}\n".encode())
        for node in self.proto.graph.node:
            bare = onnx.NodeProto()
            bare.CopyFrom(node)
            bare.ClearField("doc_string")
            bare.ClearField("metadata_props")
            digest.update(bare.SerializeToString(deterministic=True))
        return digest.hexdigest()[:32]

    def _bytes(self, tensor: TensorProto) -> bytes:
        if uses_external_data(tensor):
            if self.folder is None:
                raise PlanError(
                    f"the weights of {self.name} lie in files: say where, OnnxModel(model, folder=...)"
                )
            whole = TensorProto()
            whole.CopyFrom(tensor)
            load_external_data_for_tensor(whole, str(self.folder))
            return whole.raw_data
        return tensor.raw_data or numpy_helper.to_array(tensor).tobytes()


def dtype_of(element: int) -> DType | None:
    """Return the numpy type of an ONNX element type; None for texts and for what no store can hold."""
    return DTYPES.get(_DTYPES.get(element, ""))


def element_of(dtype: DType) -> int:
    """Return the ONNX element type of a numpy type that a store can hold."""
    name = dtype_name(dtype)
    return next(element for element, known in _DTYPES.items() if known == name)


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


def _first_axis(value: Any) -> int | None:
    shape = value.type.tensor_type.shape.dim
    return shape[0].dim_value if shape and shape[0].HasField("dim_value") else None


def _cast(name: str, value: Any, element: int) -> Values:
    values, wanted = to_numpy(value), dtype_of(element)
    if wanted is None or values.dtype == wanted:
        return np.ascontiguousarray(values)
    if values.size == 0 or _fits(values, wanted):
        return np.ascontiguousarray(values.astype(wanted))
    raise DataError(
        f"the input {name!r} takes {wanted}, and {values.dtype} was given, which is not cast to it"
    )


def _fits(values: Values, wanted: np.dtype[Any]) -> bool:
    """Return whether `values` may be cast: between floating-point types, or of whole numbers that fit."""
    if _is_float(values.dtype) and _is_float(wanted):
        return True
    if values.dtype.kind not in "iub" or wanted.kind not in "iu":
        return False
    limits = np.iinfo(wanted)
    return int(values.min()) >= limits.min and int(values.max()) <= limits.max


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or "float" in dtype.name
