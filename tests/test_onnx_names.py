"""Nodes of an ONNX graph are found by any of their names, and called by the one that found them."""

from __future__ import annotations

from typing import Any

import layertap as lt
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models as models  # noqa: E402
from layertap.backends.onnx_graph import Graph  # noqa: E402
from layertap.backends.onnx_layers import chosen, layers_of  # noqa: E402
from layertap.capture.testing import inputs  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from onnx_models import node  # noqa: E402

SCOPES, CLASSES = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"


def traced(made: Any, scopes: list[str], classes: list[str]) -> Any:
    """A node with the metadata that torch's dynamo exporter gives it; the operation is added."""
    for key, texts in ((SCOPES, ["", *scopes, "call"]), (CLASSES, ["m.Model", *classes, "aten.call"])):
        entry = made.metadata_props.add()
        entry.key, entry.value = key, repr(texts)
    return made


def exported() -> Any:
    """A stage of a convolution and a Relu, a Relu that is called twice, and a block that is."""
    stage, block = ["stage", "stage.0"], ["block"]
    kinds = ["torch.nn.Sequential", "torch.nn.Conv2d"]
    return models.model(
        [
            traced(node("Conv", "x stage.0.weight", "conv2d", "node_conv2d", pads=[1] * 4), stage, kinds),
            traced(node("Relu", "conv2d", "relu", "node_relu"), ["stage", "stage.1"], ["S", "torch.nn.ReLU"]),
            traced(node("Relu", "relu", "relu_1", "node_relu_1"), ["act"], ["torch.nn.ReLU"]),
            traced(node("Sub", "relu_1 half", "sub", "node_sub"), [], []),
            traced(node("Relu", "sub", "relu_2", "node_relu_2"), ["act"], ["torch.nn.ReLU"]),
            traced(node("Conv", "relu_2 block.weight", "b1", "node_b1", pads=[1] * 4), block, ["m.Block"]),
            traced(node("Conv", "b1 block.weight", "b2", "node_b2", pads=[1] * 4), block, ["m.Block"]),
            node("Identity", "b2", "out", "node_out"),
        ],
        {"stage.0.weight": models.kernel(), "block.weight": models.kernel(), "half": np.float32([0.5])},
    )


def names_of(made: Any, patterns: Any) -> list[str]:
    return [choice.layer.name for choice in chosen(Graph(made), patterns)]


def test_layers_are_the_nodes_in_their_order_without_constants():
    two = node("Constant", "", "k", "number", value_float=2.0)
    made = models.model([two, node("Mul", "x k", "m"), node("Relu", "m", "out")])
    assert [(layer.name, layer.type) for layer in layers_of(Graph(made))] == [
        (".", "Graph"),
        ("Mul_1", "Mul"),
        ("Relu_2", "Relu"),
    ]


def test_two_nodes_of_one_name_are_told_apart_by_their_places():
    made = models.model([node("Relu", "x", "a", "relu"), node("Relu", "a", "out", "relu")])
    assert [layer.name for layer in layers_of(Graph(made))] == [".", "relu", "relu_1"]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("node_conv2d", ["node_conv2d"]),
        ("conv2d", ["conv2d"]),
        ("stage.0", ["stage.0"]),
        ("stage", ["stage"]),
        ("stage.*", ["stage.0", "stage.1"]),
        ("node_relu*", ["node_relu", "node_relu_1", "node_relu_2"]),
        ("re:relu_[12]", ["relu_1", "relu_2"]),
        ("type:Conv", ["stage.0", "node_b1", "node_b2"]),
        ("type:Conv2d", ["stage.0"]),
        ("type:ReLU", ["stage.1"]),
        (["type:Relu", "stage"], ["stage", "node_relu_1", "node_relu_2"]),
        (["**", "!type:Conv", "!.", "!node_out"], ["stage.1", "node_relu_1", "node_sub", "node_relu_2"]),
        (lambda name, made: made.op_type == "Sub", ["node_sub"]),
    ],
)
def test_a_node_is_called_by_the_name_that_chose_it(patterns, names):
    assert names_of(exported(), patterns) == names


def test_a_module_that_is_called_twice_names_no_node():
    """What leaves it may be its last call's, and by its name its first is meant."""
    with pytest.raises(lt.SelectionError):
        names_of(exported(), "act")
    with pytest.raises(lt.SelectionError):
        names_of(exported(), "block")


def test_the_other_names_of_a_tap_find_it_in_the_store(tmp_path):
    run = lt.record_dataset(exported(), inputs(4), tmp_path / "s", "stage")
    assert list(run.taps) == ["stage"]
    for name in ("stage.1", "node_relu", "relu"):
        assert np.array_equal(run[name][...], run["stage"][...])


def older(**weights: str) -> Any:
    """What torch's older exporter writes: modules are in the names, and a batch norm may be folded in."""
    weight = weights.get("weight", "layer1.0.conv1.weight")
    made = models.model(
        [
            node("Conv", f"x {weight}", "c", "/layer1/layer1.0/conv1/Conv", pads=[1] * 4),
            node("Relu", "c", "r", "/layer1/layer1.0/Relu"),
            node("Relu", "r", "s", "/layer1/layer1.1/Relu"),
            node("Identity", "s", "out", "/Identity"),
        ],
        {weight: models.kernel()},
    )
    made.producer_name = "pytorch"
    return made


def test_modules_are_read_from_the_names_of_the_older_exporter():
    assert names_of(older(), "layer1.0.conv1") == ["layer1.0.conv1"]
    assert names_of(older(), "layer*.?") == ["layer1.0", "layer1.1"]
    assert names_of(older(), "layer1") == ["layer1"]
    assert names_of(older(), "/layer1/layer1.0/*") == ["/layer1/layer1.0/conv1/Conv", "/layer1/layer1.0/Relu"]


def test_a_convolution_with_a_batch_norm_folded_in_does_not_pass_for_the_convolution():
    with pytest.raises(lt.SelectionError):
        names_of(older(weight="onnx::Conv_27"), "layer1.0.conv1")
    assert names_of(older(weight="onnx::Conv_27"), "layer1.0") == ["layer1.0"]


def test_names_with_slashes_of_other_tools_are_no_modules():
    made = older()
    made.producer_name = "tf2onnx"
    with pytest.raises(lt.SelectionError):
        names_of(made, "layer1.0.conv1")


def test_a_result_of_several_is_named_by_its_tensor_or_its_place(tmp_path):
    made = models.network()
    run = lt.record_dataset(made, inputs(4), tmp_path / "s", ["high"])
    assert list(run.taps) == ["split[1]"]
    assert np.array_equal(run["high"][...], run["split[1]"][...])
    run = lt.record_dataset(made, inputs(4), tmp_path / "t", ["low", "split[1]"])
    assert list(run.taps) == ["split[0]", "split[1]"]
    with pytest.raises(lt.CaptureError, match=r"split\[2\] is not there: there is split\[0\], split\[1\]"):
        lt.record_dataset(made, inputs(4), tmp_path / "u", ["split[2]"])


def test_what_a_node_gets_is_named_by_place_where_it_gets_several(tmp_path):
    made = models.model([node("Relu", "x", "r", "relu"), node("Add", "x r", "out", "add")])
    run = lt.record_dataset(made, inputs(4), tmp_path / "s", ["relu:input", "add:input"])
    assert list(run.taps) == ["relu:input", "add:input[0]", "add:input[1]"]
    assert np.array_equal(run["add:input[1]"][...], np.maximum(inputs(4), 0))


def with_branches() -> Any:
    """A model that takes one of two ways."""

    def branch(kind: str, gives: str) -> Any:
        return helper.make_graph(
            [node(kind, "x", gives, f"{kind.lower()}_inside")],
            gives,
            [],
            [helper.make_tensor_value_info(gives, TensorProto.FLOAT, None)],
        )

    branches = {"then_branch": branch("Relu", "a"), "else_branch": branch("Neg", "b")}
    nodes = [
        node("ReduceSum", "x", "sum", "sum", keepdims=0),
        node("Greater", "sum zero", "positive", "positive"),
        node("If", "positive", "y", "choice", **branches),
        node("Identity", "y", "out", "last"),
    ]
    return models.model(nodes, {"zero": np.float32(0)})


def test_nodes_in_bodies_are_left_out_with_the_reason_and_refused_by_name(tmp_path):
    with pytest.warns(lt.LeftOutWarning, match="lies in the body of a node"):
        layers = ["choice", "type:Relu", "type:Neg"]
        run = lt.record_dataset(with_branches(), inputs(4), tmp_path / "s", layers)
    assert list(run.taps) == ["choice"]
    assert run.left_out.keys() == {"choice.then_branch.relu_inside", "choice.else_branch.neg_inside"}
    with pytest.raises(lt.CaptureError, match="that of choice"):
        lt.record_dataset(with_branches(), inputs(4), tmp_path / "t", ["relu_inside"])


def test_a_tensor_whose_length_is_that_of_the_batch_by_chance_is_not_taken_for_rows(tmp_path):
    """The shape of four axes is as long as a batch of four rows."""
    made = models.model([node("Shape", "x", "s", "shape"), node("Reshape", "x s", "out", "reshape")])
    with pytest.warns(lt.LeftOutWarning, match="no rows on its first axis"):
        run = lt.record_dataset(made, inputs(6), tmp_path / "s", "re:(re)?shape", batch_size=4)
    assert list(run.taps) == ["reshape"]
    with pytest.raises(lt.CaptureError, match="whatever the batch, it has 4 there"):
        lt.record_dataset(made, inputs(6), tmp_path / "t", "shape", batch_size=4)
