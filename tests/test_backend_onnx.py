"""The ONNX backend holds the contract, and leaves the file and the graph as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from layertap.backends.onnx_model import OnnxModel  # noqa: E402
from layertap.capture.testing import BackendContract, StopError, Subject  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def graph(nodes: Any, weights: Any = None, ins: Any = None, outs: Any = ("out",), **about: Any) -> Any:
    """A model of `nodes` whose input `x` is float32 (batch, 4, height, width)."""
    ins = ins or {"x": (TensorProto.FLOAT, ["batch", 4, "height", "width"])}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info(name, *its) for name, its in ins.items()],
            [onnx.ValueInfoProto(name=name) for name in outs],
            [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        **about,
    )
    model.producer_name = model.producer_name or "tests"
    return model


def small() -> Any:
    """A convolution, a Relu, a Split, and a Gather that fails if the input `index` is 1 or more."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Gather", ["one", "index"], ["factor"]),
        helper.make_node("Mul", ["r", "factor"], ["m"], "scaled"),
        helper.make_node("Split", ["m"], ["low", "high"], "split", axis=1, num_outputs=2),
        helper.make_node("Greater", ["m", "zero"], ["positive"], "mask"),
        helper.make_node("ReduceMean", ["m"], ["out"], "mean", axes=[2, 3], keepdims=0),
    ]
    weights = {
        "w": rng.standard_normal((4, 4, 3, 3), np.float32),
        "one": np.ones(1, np.float32),
        "zero": np.zeros(1, np.float32),
        "index": np.zeros((), np.int64),
    }
    model = graph(nodes, weights)
    model.graph.input.append(helper.make_tensor_value_info("index", TensorProto.INT64, []))
    model.opset_import[0].version = 18
    model.graph.node[-1].ClearField("attribute")
    model.graph.node[-1].attribute.append(helper.make_attribute("keepdims", 0))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    model.graph.node[-1].input.append("axes")
    return model


class Failing(OnnxModel):
    """Fails inside the graph when it is told to: the Gather finds nothing at 1."""

    failing = False

    def feeds(self, inputs: Any, kwargs: Any) -> Any:
        return super().feeds(inputs, {**kwargs, "index": np.array(int(self.failing))})

    def run(self, session: Any, binding: Any) -> None:
        try:
            super().run(session, binding)
        except Exception as error:
            if "indices element out of data bounds" in str(error):
                raise StopError from error
            raise


class TestOnnx(BackendContract):
    def subject(self) -> Subject:
        model = Failing(small())
        reference = small()
        reference.graph.output.extend(
            onnx.ValueInfoProto(name=n) for n in ("c", "r", "low", "high", "positive")
        )
        session = onnxruntime.InferenceSession(
            reference.SerializeToString(), providers=["CPUExecutionProvider"]
        )

        def values_of(values: Any) -> dict[str, Any]:
            _, c, r, low, high, positive = session.run(None, {"x": values})
            return {"conv": c, "relu": r, "split[0]": low, "split[1]": high, "mask": positive}

        return Subject(
            model,
            ["conv", "type:Relu", "split", "mask"],
            lambda values: values,
            values_of,
            lambda output: output,
            lambda: model.proto.SerializeToString(deterministic=True),
            lambda on: setattr(model, "failing", on),
        )
