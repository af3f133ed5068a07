"""The weights of an ONNX model, wherever they lie, and a checksum of what it computes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from ..capture.checksum import crc32c
from ..capture.errors import DataError, PlanError


def weights_of(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield the weights of a graph, and those of the bodies of its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from weights_of(attribute.g)
            elif attribute.type == AttributeProto.TENSOR and node.op_type == "Constant":
                yield attribute.t


def lie_in_files(model: ModelProto) -> bool:
    """Return whether some of the weights lie in files of their own."""
    return any(map(uses_external_data, weights_of(model.graph)))


def fingerprint(model: ModelProto, folder: Path | None) -> str:
    """Return a text that differs where the weights, or what is computed with them, differ.

    Weights are read one after the other.

    Raises:
        PlanError: they lie in files, and nobody said where.
        DataError: a file of them cannot be read.
    """
    digest = hashlib.sha256()
    for tensor in weights_of(model.graph):
        data = _bytes(tensor, folder)
        crc = crc32c(data) if data else 0
        digest.update(f"{tensor.name}:{tensor.data_type}:{tuple(tensor.dims)}:{crc:08x}\n".encode())
    for sparse in model.graph.sparse_initializer:
        digest.update(sparse.SerializeToString(deterministic=True))
    for node in model.graph.node:
        digest.update(_computed(node))
    for function in model.functions:
        digest.update(f"{function.domain}.{function.name}\n".encode())
        for node in function.node:
            digest.update(_computed(node))
    return digest.hexdigest()[:32]


def _computed(node: NodeProto) -> bytes:
    """Return a node's bytes without what it says of itself."""
    bare = NodeProto()
    bare.CopyFrom(node)
    bare.ClearField("doc_string")
    bare.ClearField("metadata_props")
    return bytes(bare.SerializeToString(deterministic=True))


def _bytes(tensor: TensorProto, folder: Path | None) -> bytes:
    if not uses_external_data(tensor):
        return tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
    if folder is None:
        raise PlanError("the model's weights lie in files: say where, OnnxModel(model, folder=...)")
    whole = TensorProto()
    whole.CopyFrom(tensor)
    try:
        load_external_data_for_tensor(whole, str(folder))
    except Exception as error:
        raise DataError(f"the file of the weights {tensor.name!r} cannot be read: {error}") from error
    return bytes(whole.raw_data)
