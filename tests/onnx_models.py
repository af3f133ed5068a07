"""Small ONNX models, built node by node, and the runtime's own values for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
PICTURES: Mapping[str, tuple[int, Sequence[Any]]] = {"x": (FLOAT, ["batch", 4, "height", "width"])}


def node(kind: str, gets: str, gives: str, name: str = "", **attributes: Any) -> NodeProto:
    """A node; names of tensors have spaces between them."""
    return helper.make_node(kind, gets.split(), gives.split(), name, **attributes)


def model(
    nodes: Sequence[NodeProto],
    weights: Mapping[str, Any] | None = None,
    inputs: Mapping[str, tuple[int, Sequence[Any]]] = PICTURES,
    outputs: str = "out",
    opset: int = 18,
) -> ModelProto:
    """A model of `nodes`; results have spaces between them."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, *its) for name, its in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs.split()],
        [
            value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), name)
            for name, value in (weights or {}).items()
        ],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9, producer_name="tests"
    )


def kernel(n_out: int = 4, n_in: int = 4, seed: int = 0) -> Any:
    """Weights of a 3 x 3 convolution."""
    return np.random.default_rng(seed).standard_normal((n_out, n_in, 3, 3), np.float32)


def network() -> ModelProto:
    """A convolution, a Relu, a Split, and a Gather that fails where the input `index` is 1 or more."""
    nodes = [
        node("Conv", "x w", "c", "conv", pads=[1] * 4),
        node("Relu", "c", "r", "relu"),
        node("Gather", "one index", "factor", "gather"),
        node("Mul", "r factor", "m", "scaled"),
        node("Split", "m", "low high", "split", axis=1, num_outputs=2),
        node("Greater", "m zero", "positive", "mask"),
        node("ReduceMean", "m axes", "out", "mean", keepdims=0),
    ]
    weights = {"w": kernel(), "one": np.ones(1, np.float32), "zero": np.zeros(1, np.float32)}
    weights |= {"index": np.array(0), "axes": np.array([2, 3])}
    made = model(nodes, weights)
    made.graph.input.append(helper.make_tensor_value_info("index", TensorProto.INT64, []))
    return made


def values_of(made: ModelProto, tensors: Sequence[str], **inputs: Any) -> dict[str, Any]:
    """What the runtime itself gives for `tensors`, as results of the graph."""
    copy = ModelProto()
    copy.CopyFrom(made)
    there = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in there)
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(tensors, session.run(list(tensors), inputs), strict=True))
