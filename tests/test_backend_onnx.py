"""The ONNX backend holds the contract, writes where it should, and leaves the model as it is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import layertap as lt
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import onnx_models as models  # noqa: E402
from layertap.backends import onnx as backend  # noqa: E402
from layertap.backends.onnx_model import OnnxModel  # noqa: E402
from layertap.capture.dtypes import BFLOAT16  # noqa: E402
from layertap.capture.testing import BackendContract, StopError, Subject, inputs  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from onnx_models import node  # noqa: E402


class Failing(OnnxModel):
    """Fails half-way through its graph when it is told to: a Gather finds nothing at 1."""

    failing = False

    def feeds(self, given: Any, kwargs: Any) -> Any:
        return super().feeds(given, {**kwargs, "index": np.array(int(self.failing))})

    def run(self, session: Any, binding: Any) -> None:
        try:
            super().run(session, binding)
        except Exception as error:
            if "out of data bounds" in str(error):
                raise StopError from error
            raise


def network_with_bfloat16() -> Any:
    """`models.network`, with its Relu in bfloat16 too, and that in float32, which numpy has."""
    made = models.network()
    made.graph.node.append(node("Cast", "r", "b", "rounded", to=TensorProto.BFLOAT16))
    made.graph.node.append(node("Cast", "b", "wide", "wide", to=TensorProto.FLOAT))
    return made


class TestOnnx(BackendContract):
    def subject(self) -> Subject:
        made = network_with_bfloat16()
        model = Failing(made)

        def reference(values: Any) -> dict[str, Any]:
            found = models.values_of(made, ["c", "r", "low", "high", "positive", "wide"], x=values)
            names = ("conv", "relu", "split[0]", "split[1]", "mask", "rounded")
            named = dict(zip(names, found.values(), strict=True))
            return {**named, "rounded": named["rounded"].astype(BFLOAT16)}

        return Subject(
            model,
            ["conv", "type:Relu", "split", "mask", "rounded"],
            lambda values: values,
            reference,
            lambda output: output,
            lambda: made.SerializeToString(deterministic=True),
            lambda on: setattr(model, "failing", on),
            lacks={"calls": "a graph has a node for each call"},
        )


@pytest.fixture
def made(monkeypatch):
    """The results of each session that is made."""
    sessions: list[list[str]] = []
    start = onnxruntime.InferenceSession.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        sessions.append([output.name for output in self.get_outputs()])

    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", counted)
    return sessions


@pytest.fixture
def copies(monkeypatch):
    """How often the rows of each tap were copied by the engine."""
    counts: Counter[str] = Counter()
    copy = backend.OnnxSession.copy

    def counted(self: Any, i: int, *args: Any) -> None:
        counts[str(self.taps[i])] += 1
        copy(self, i, *args)

    monkeypatch.setattr(backend.OnnxSession, "copy", counted)
    return counts


def test_a_plan_has_one_session_and_it_gives_the_chosen_tensors_alone(tmp_path, made):
    lt.record_dataset(models.network(), inputs(12), tmp_path / "s", ["conv", "split[1]"], batch_size=4)
    assert made == [["out", "c", "high"]]


def test_what_is_left_out_is_no_result_of_the_session_any_more(tmp_path, made):
    with pytest.warns(lt.LeftOutWarning, match="factor|gather"):
        lt.record_dataset(models.network(), inputs(12), tmp_path / "s", "re:relu|gather", batch_size=4)
    assert made == [["out", "r", "factor"], ["out", "r"]]


def test_rows_that_are_kept_as_they_are_lie_where_the_runtime_wrote_them(tmp_path, copies):
    """The first batch is kept aside, and so it is copied; no other is."""
    made = models.network()
    run = lt.record_dataset(made, inputs(14), tmp_path / "s", ["conv", "split", "mask"], batch_size=4)
    assert copies == {"conv": 1, "split[0]": 1, "split[1]": 1, "mask": 1}
    expected = models.values_of(made, ["c", "low"], x=inputs(14))
    assert np.allclose(run["conv"][...], expected["c"], atol=1e-5)
    assert np.allclose(run["split[0]"][...], expected["low"], atol=1e-5)


def test_rows_are_copied_where_they_are_reduced_or_straddle_blocks_or_belong_to_the_caller(tmp_path, copies):
    lt.record_dataset(
        models.network(),
        inputs(12),
        tmp_path / "s",
        ["conv", "relu", "."],
        batch_size=4,
        reduce="relu=pool:2",
    )
    assert copies == {"conv": 1, "relu": 3, ".": 3}
    copies.clear()
    with lt.record(models.network(), tmp_path / "t", "conv") as rec:
        for cut in (inputs(4), inputs(3), inputs(4)):
            rec(cut)
    assert copies == {"conv": 2}  # the first batch, and the last, of which rows go to two slabs


def test_a_result_that_the_caller_keeps_is_not_overwritten(tmp_path):
    kept = []
    with lt.record(models.network(), tmp_path / "s", ["conv", "."]) as rec:
        for seed in range(6):
            output = rec(inputs(4, seed))
            kept.append((output, output.copy()))
    assert all(np.array_equal(output, copy) for output, copy in kept)
    assert len({output.tobytes() for output, _ in kept}) == 6


def test_a_tensor_that_is_tapped_twice_is_the_same_in_both(tmp_path):
    run = lt.record_dataset(
        models.network(), inputs(12), tmp_path / "s", ["conv", "relu:input", "conv:input"], batch_size=4
    )
    assert list(run.taps) == ["conv:input", "conv", "relu:input"]
    assert np.array_equal(run["conv"][...], run["relu:input"][...])
    assert np.array_equal(run["conv:input"][...], inputs(12))


def test_views_of_one_tensor_are_written_each_to_its_own_memory(tmp_path):
    made = models.model(
        [
            node("Identity", "x", "a", "same"),
            node("Flatten", "a", "b", "flat"),
            node("Relu", "b", "c", "relu"),
            node("Identity", "c", "out", "last"),
        ]
    )
    run = lt.record_dataset(made, inputs(12), tmp_path / "s", ["same", "flat", "relu"], batch_size=4)
    assert np.array_equal(run["same"][...], inputs(12))
    assert np.array_equal(run["flat"][...], inputs(12).reshape(12, -1))
    assert np.array_equal(run["relu"][...], np.maximum(inputs(12), 0).reshape(12, -1))


def cut_by_its_input() -> Any:
    """A model whose result is as long as an input says."""
    nodes = [node("Slice", "x zero n one", "s", "slice"), node("Identity", "s", "out", "last")]
    weights = {"zero": np.array([0]), "one": np.array([2])}
    rows = {"x": (TensorProto.FLOAT, ["batch", 3, "tokens"]), "n": (TensorProto.INT64, [1])}
    return models.model(nodes, weights, rows)


def test_a_shape_that_follows_from_a_value_is_refused_when_it_changes_and_kept_where_it_may(tmp_path):
    x = np.ones((4, 3, 6), np.float32)
    with (
        pytest.raises(lt.CaptureError, match=r"slice has shape \(4, 3, 5\)"),
        lt.record(cut_by_its_input(), tmp_path / "s", "slice") as rec,
    ):
        for n in (3, 3, 5):
            rec(x, np.array([n]))
    with lt.record(cut_by_its_input(), tmp_path / "t", "slice", ragged="slice:3x6") as rec:
        for n in (3, 3, 5):
            rec(x, np.array([n]))
    run = lt.open(tmp_path / "t")
    assert [run["slice"][row].shape for row in (0, 7, 11)] == [(3, 3), (3, 3), (3, 5)]


def test_gradients_and_attention_are_refused_with_what_there_is(tmp_path):
    with pytest.raises(lt.SelectionError, match="conv has no grad to capture; it has input, output"):
        lt.record_dataset(models.network(), inputs(4), tmp_path / "s", ["conv:grad"])


def test_statistics_and_reductions_are_those_of_the_values(tmp_path):
    made = models.network()
    expected = models.values_of(made, ["r"], x=inputs(12))["r"]
    run = lt.record_dataset(
        made, inputs(12), tmp_path / "s", "relu", batch_size=4, reduce="pool:4|float16", stats="all"
    )
    pooled = expected.reshape(12, 4, 4, 4, 4, 4).mean((3, 5))
    assert run["relu"].dtype == np.float16
    assert np.allclose(run["relu"][...], pooled, rtol=2e-3, atol=1e-3)
    assert np.allclose(run.stats["relu"].mean, pooled.mean((0, 2, 3)), rtol=2e-3, atol=1e-3)


def test_predictions_are_those_of_the_logits(tmp_path):
    made = models.model(
        [
            node("ReduceMean", "x axes", "logits", "mean", keepdims=0),
            node("Relu", "x", "maps", "relu"),
        ],
        {"axes": np.array([2, 3])},
        outputs="maps logits",
    )
    run = lt.record_dataset(made, inputs(6), tmp_path / "s", ["relu", ".[logits]"], batch_size=4)
    assert np.array_equal(run.rows["prediction"][...], inputs(6).mean((2, 3)).argmax(1))
    assert np.allclose(run[".[logits]"][...], inputs(6).mean((2, 3)), atol=1e-6)


def test_other_weights_are_another_run(tmp_path):
    made = models.network()
    lt.record_dataset(made, inputs(4), tmp_path / "s", "conv")
    made.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(models.kernel(seed=1), "w"))
    with pytest.raises(lt.StoreExistsError, match="weights"):
        lt.record_dataset(made, inputs(4), tmp_path / "s", "conv")


def test_another_attribute_is_another_run_and_a_comment_is_not(tmp_path):
    made = models.network()
    lt.record_dataset(made, inputs(4), tmp_path / "s", "relu")
    made.graph.node[0].doc_string = "the first"
    lt.record_dataset(made, inputs(4), tmp_path / "s", "relu")
    made.graph.node[0].attribute.append(helper.make_attribute("dilations", [1, 1]))
    with pytest.raises(lt.StoreExistsError, match="weights"):
        lt.record_dataset(made, inputs(4), tmp_path / "s", "relu")
