"""What an ONNX model may be: files with weights beside them, sessions, types, fixed batches, named inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import layertap as lt
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture.testing import inputs

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import onnx_models as models  # noqa: E402
from layertap.backends.onnx_model import OnnxModel  # noqa: E402
from onnx import TensorProto  # noqa: E402
from onnx_models import node  # noqa: E402


def saved(path: Path, made: Any = None, *, beside: bool = False) -> Path:
    """The file of a model, with its weights beside it if asked for."""
    path.parent.mkdir(exist_ok=True)
    onnx.save(made or plain(), str(path), save_as_external_data=beside, location="w.bin", size_threshold=256)
    return path


def plain(**weights: Any) -> Any:
    """A convolution, a Relu, and the mean of it."""
    return models.model(
        [
            node("Conv", "x w", "c", "conv", pads=[1] * 4),
            node("Relu", "c", "r", "relu"),
            node("ReduceMean", "r axes", "out", "mean", keepdims=0),
        ],
        {"w": models.kernel(), "axes": np.array([2, 3]), **weights},
    )


def expected(values: Any) -> Any:
    return models.values_of(plain(), ["c"], x=values)["c"]


def invoke(*arguments: Any) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("beside", [False, True])
def test_a_file_is_captured_by_its_path_and_not_touched(tmp_path, beside):
    path = saved(tmp_path / "m" / "model.onnx", beside=beside)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    assert len(before) == 1 + beside
    for i, given in enumerate((str(path), path)):
        run = lt.record_dataset(given, inputs(10), tmp_path / str(i), ["conv"], batch_size=4)
        assert np.allclose(run["conv"][...], expected(inputs(10)), atol=1e-5)
        assert run.info["model"]["name"] == "model.onnx"
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_weights_beside_the_file_count_as_weights(tmp_path):
    store = tmp_path / "s"
    lt.record_dataset(saved(tmp_path / "a" / "model.onnx", beside=True), inputs(4), store, ["conv"])
    lt.record_dataset(saved(tmp_path / "b" / "model.onnx", beside=True), inputs(4), store, ["conv"])
    lt.record_dataset(saved(tmp_path / "c" / "model.onnx"), inputs(4), store, ["conv"])
    other = saved(tmp_path / "d" / "model.onnx", plain(w=models.kernel(seed=1)), beside=True)
    with pytest.raises(lt.StoreExistsError, match="weights"):
        lt.record_dataset(other, inputs(4), store, ["conv"])


def test_a_graph_whose_weights_lie_in_files_needs_their_folder(tmp_path):
    path = saved(tmp_path / "m" / "model.onnx", beside=True)
    made = onnx.load(str(path), load_external_data=False)
    with pytest.raises(lt.PlanError, match="folder="):
        lt.record_dataset(made, inputs(4), tmp_path / "s", ["conv"])
    model = OnnxModel(made, folder=path.parent)
    run = lt.record_dataset(model, inputs(4), tmp_path / "s", ["conv"])
    assert np.allclose(run["conv"][...], expected(inputs(4)), atol=1e-5)
    (path.parent / "w.bin").unlink()
    with pytest.raises(lt.LayertapError):
        lt.record_dataset(path, inputs(4), tmp_path / "t", ["conv"])


def test_the_store_says_what_the_model_is(tmp_path):
    run = lt.record_dataset(saved(tmp_path / "net.onnx"), inputs(4), tmp_path / "s", ["relu"], name="mine")
    about = run.info["model"]
    assert about["name"] == "mine"
    assert about["type"] == "small"
    assert about["producer"] == "tests"
    assert about["opset"] == {"ai.onnx": 18}
    assert about["parameters"] == 4 * 4 * 9 + 2
    assert run.info["versions"]["onnxruntime"] == onnxruntime.__version__
    assert run.taps["relu"].type == "Relu"


def test_a_session_is_captured_by_what_it_was_made_of(tmp_path):
    path = saved(tmp_path / "model.onnx")
    for i, source in enumerate((str(path), path.read_bytes())):
        session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
        run = lt.record_dataset(session, inputs(4), tmp_path / str(i), ["conv"])
        assert np.allclose(run["conv"][...], expected(inputs(4)), atol=1e-5)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    path.unlink()
    with pytest.raises(lt.PlanError, match=r"give the path of the \.onnx file"):
        lt.record_dataset(session, inputs(4), tmp_path / "s", ["conv"])


def test_options_and_providers_are_those_of_every_session(tmp_path, monkeypatch):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    seen = []
    start = onnxruntime.InferenceSession.__init__

    def noted(self: Any, model: Any, options: Any = None, **kwargs: Any) -> None:
        seen.append((options.intra_op_num_threads, kwargs["providers"]))
        start(self, model, options, **kwargs)

    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", noted)
    model = OnnxModel(plain(), providers=["CPUExecutionProvider"], session_options=options)
    with lt.record(model, tmp_path / "s", ["conv"]) as rec:
        rec(inputs(4))
    model(inputs(4))
    assert seen == [(1, ["CPUExecutionProvider"])] * 2


def test_what_the_runtime_has_not_is_refused_with_what_it_has(tmp_path):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this runtime has CUDA")
    with pytest.raises(lt.PlanError, match=r"no CUDAExecutionProvider, but .*CPU.*onnxruntime-gpu"):
        OnnxModel(plain(), providers=["CUDAExecutionProvider"])
    with pytest.raises(lt.PlanError, match="onnxruntime-gpu"):
        OnnxModel(plain()).on("cuda:1")
    with pytest.raises(lt.PlanError, match="no device 'tpu'"):
        OnnxModel(plain()).on("tpu")
    assert OnnxModel(plain()).on("cpu").providers == ("CPUExecutionProvider",)


def test_files_that_are_not_there_or_no_models_are_named(tmp_path):
    with pytest.raises(lt.StoreNotFoundError, match=r"there is no file .*model\.onnx"):
        lt.record_dataset(tmp_path / "model.onnx", inputs(4), tmp_path / "s", ["conv"])
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(lt.FormatError, match=r"model\.onnx is no ONNX model"):
        lt.record_dataset(tmp_path / "model.onnx", inputs(4), tmp_path / "s", ["conv"])
    with pytest.raises(lt.PlanError, match=r"the path of a file \(\.onnx"):
        lt.record_dataset("model.pth", inputs(4), tmp_path / "s", ["conv"])


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(tmp_path, missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
import layertap as lt, numpy as np
try:
    lt.record_dataset("model.onnx", np.ones((4, 3)), "s", ["a"])
except lt.MissingPackageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"needs {missing}; install it with: pip install 'layertap[onnx]'" in done.stdout


def typed(element: int) -> Any:
    """A model that scales its input and casts it."""
    return models.model(
        [
            node("Mul", "x fifty", "m"),
            node("Cast", "m", "t", "cast", to=element),
            node("Identity", "m", "out"),
        ],
        {"fifty": np.float32(50)},
        opset=19,
    )


@pytest.mark.parametrize(
    ("element", "dtype"),
    [
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
        (TensorProto.FLOAT, np.float32),
        (TensorProto.DOUBLE, np.float64),
        (TensorProto.INT8, np.int8),
        (TensorProto.UINT8, np.uint8),
        (TensorProto.INT16, np.int16),
        (TensorProto.INT32, np.int32),
        (TensorProto.INT64, np.int64),
        (TensorProto.BOOL, np.bool_),
        (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
        (TensorProto.FLOAT8E5M2, ml_dtypes.float8_e5m2),
    ],
)
def test_every_element_type_comes_back_bit_equal(tmp_path, element, dtype):
    values = np.clip(inputs(10) / 50, 0, 2)
    run = lt.record_dataset(typed(element), values, tmp_path / "s", ["cast"], batch_size=4)
    scaled = values * np.float32(50)
    assert run["cast"].dtype == np.dtype(dtype)
    assert run["cast"][...].tobytes() == scaled.astype(dtype).tobytes()


def test_texts_and_sequences_are_left_out_with_their_types(tmp_path):
    made = models.model(
        [
            node("Cast", "x", "text", "text", to=TensorProto.STRING),
            node("SequenceConstruct", "x x", "both", "both"),
            node("Relu", "x", "out", "relu"),
        ]
    )
    with pytest.warns(lt.LeftOutWarning, match="cannot hold"):
        run = lt.record_dataset(made, inputs(4), tmp_path / "s", ["re:text|both|relu"])
    assert list(run.taps) == ["relu"]
    assert run.left_out == {
        "text": "holds tensor(string), which a store cannot hold",
        "both": "holds seq(tensor(float)), which a store cannot hold",
    }
    with pytest.raises(lt.CaptureError, match="text holds"):
        lt.record_dataset(made, inputs(4), tmp_path / "t", ["text"])


def quantized() -> Any:
    """A convolution of int8, as quantization tools write it."""
    rng = np.random.default_rng(0)
    weights = {
        "scale": np.float32(0.02),
        "zero": np.int8(0),
        "w": rng.integers(-127, 128, (4, 4, 3, 3)).astype(np.int8),
        "w_scale": np.float32(0.01),
        "out_scale": np.float32(0.05),
    }
    return models.model(
        [
            node("QuantizeLinear", "x scale zero", "q", "quantize"),
            node("QLinearConv", "q scale zero w w_scale zero out_scale zero", "c", "conv", pads=[1] * 4),
            node("DequantizeLinear", "c out_scale zero", "out", "dequantize"),
        ],
        weights,
    )


def test_a_quantized_model_gives_its_codes_and_what_they_stand_for(tmp_path):
    layers = ["quantize", "conv", "dequantize"]
    run = lt.record_dataset(quantized(), inputs(10), tmp_path / "s", layers, batch_size=4)
    codes, values = models.values_of(quantized(), ["c", "out"], x=inputs(10)).values()
    assert run["conv"].dtype == np.int8
    assert np.array_equal(run["conv"][...], codes)
    assert np.array_equal(run["dequantize"][...], values)


def test_half_precision_inputs_are_cast_from_what_is_given(tmp_path):
    for element, dtype in ((TensorProto.FLOAT16, np.float16), (TensorProto.BFLOAT16, ml_dtypes.bfloat16)):
        made = models.model(
            [node("Identity", "x", "a", "same"), node("Cast", "a", "out", to=TensorProto.FLOAT)],
            inputs={"x": (element, ["batch", 4, 16, 16])},
        )
        for given in (inputs(6), inputs(6).astype(np.float64)):
            run = lt.record_dataset(made, given, tmp_path / "s", ["same"], batch_size=4, overwrite=True)
            assert run["same"][...].tobytes() == given.astype(dtype).tobytes()


def two_inputs() -> Any:
    rows = {"tokens": (TensorProto.INT64, ["batch", 5]), "mask": (TensorProto.FLOAT, ["batch", 5])}
    return models.model(
        [
            node("Gather", "table tokens", "e", "embed"),
            node("Unsqueeze", "mask last", "m"),
            node("Mul", "e m", "out", "masked"),
        ],
        {"table": np.arange(30, dtype=np.float32).reshape(10, 3), "last": np.array([2])},
        rows,
    )


def test_inputs_are_given_by_position_or_by_name(tmp_path):
    tokens, mask = np.arange(20).reshape(4, 5) % 10, np.float32(np.arange(20).reshape(4, 5) % 2)
    samples = [{"tokens": tokens[i], "mask": mask[i], "label": i} for i in range(4)]
    run = lt.record_dataset(two_inputs(), samples, tmp_path / "s", ["masked"], batch_size=2)
    table = np.arange(30, dtype=np.float32).reshape(10, 3)
    assert np.array_equal(run["masked"][...], table[tokens] * mask[..., None])
    ways = (
        lambda rec: rec(tokens, mask),
        lambda rec: rec({"tokens": tokens, "mask": mask}),
        lambda rec: rec(tokens=tokens.astype(np.int32), mask=mask.astype(np.float16)),
        lambda rec: rec(tokens, mask=mask),
    )
    for i, way in enumerate(ways):
        with lt.record(two_inputs(), tmp_path / str(i), ["masked"]) as rec:
            way(rec)
        assert np.array_equal(lt.open(tmp_path / str(i))["masked"][...], run["masked"][...])


@pytest.mark.parametrize(
    ("given", "named", "words"),
    [
        ((), {"tokens": [[1] * 5]}, "the input 'mask' is missing; the model's inputs are tokens, mask"),
        ((1, 2, 3), {}, "the model's inputs are tokens, mask, and 3 were given"),
        (([[1] * 5],), {"tokens": [[1] * 5]}, "'tokens' was given twice"),
        (([[1] * 5], [[1.0] * 5]), {"tooken": 1}, "there is no input 'tooken'"),
        (([[1.5] * 5], [[1.0] * 5]), {}, "'tokens' takes int64 and got float64"),
        (([[1] * 5], [[1] * 5]), {}, "'mask' takes float32 and got int64"),
    ],
)
def test_inputs_that_do_not_fit_are_named(given, named, words):
    with pytest.raises(lt.DataError, match=words):
        OnnxModel(two_inputs()).feeds(given, named)


def test_whole_numbers_are_cast_only_where_all_of_them_fit():
    made = models.model([node("Identity", "x", "out")], inputs={"x": (TensorProto.UINT8, ["batch", 2])})
    assert OnnxModel(made)(np.array([[0, 255]])).dtype == np.uint8
    with pytest.raises(lt.DataError, match="takes uint8 and got int64"):
        OnnxModel(made)(np.array([[0, 256]]))


def fixed(size: int = 4) -> Any:
    return models.model(
        [
            node("Relu", "x", "r", "relu"),
            node("ReduceMean", "r axes", "out", "mean", keepdims=0),
            node("ReduceMean", "r rows", "all", "of_all", keepdims=0),
        ],
        {"axes": np.array([2, 3]), "rows": np.array([0, 1])},
        {"x": (TensorProto.FLOAT, [size, 4, 16, 16])},
        "out all",
    )


def test_a_fixed_batch_is_filled_up_and_its_results_are_cut(tmp_path):
    run = lt.record_dataset(fixed(), inputs(10), tmp_path / "s", ["relu", "mean"], batch_size=4)
    assert run.n_rows == 10
    assert np.array_equal(run["relu"][...], np.maximum(inputs(10), 0))
    assert np.allclose(run["mean"][...], np.maximum(inputs(10), 0).mean((2, 3)), atol=1e-6)
    with pytest.raises(lt.CaptureError, match="of_all has no rows on its first axis"):
        lt.record_dataset(fixed(), inputs(10), tmp_path / "t", ["of_all"], batch_size=4)


def test_rows_that_a_batch_lacks_are_its_last_one_again():
    both = OnnxModel(fixed())(inputs(3))
    padded = inputs(3)[[0, 1, 2, 2]]
    assert both["out"].shape == (3, 4)
    assert np.allclose(both["all"], np.maximum(padded, 0).mean((0, 1)), atol=1e-6)


def test_a_batch_that_is_larger_than_the_model_takes_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(lt.PlanError, match=r"batches of 4 rows, and 8 were given: use batch_size=4"):
        lt.record_dataset(fixed(), inputs(10), tmp_path / "s", ["relu"], batch_size=8)
    assert not (tmp_path / "s").exists()


def test_maps_are_told_from_their_operators_where_shape_would_mislead(tmp_path):
    """16 channels of 16 x 32 look like a map of 16 x 16 with 32 channels, and are not; nor the other way."""
    made = models.model(
        [
            node("Conv", "x w", "c", "conv", pads=[1] * 4),
            node("Relu", "c", "r", "relu"),
            node("Transpose", "r", "t", "last", perm=[0, 2, 3, 1]),
            node("Mul", "t two", "m", "scaled"),
            node("Flatten", "m", "out", "flat"),
        ],
        {"w": models.kernel(16), "two": np.float32(2)},
    )
    wide = np.random.default_rng(0).standard_normal((6, 4, 16, 32), np.float32)
    layers = ["relu", "last", "scaled"]
    run = lt.record_dataset(made, wide, tmp_path / "s", layers, reduce="pool:8x16", stats="all")
    assert run["relu"].dims == ("row", "channel", "y", "x")
    assert run["relu"].shape == (6, 16, 8, 16)
    assert run["scaled"].dims == ("row", "y", "x", "feature")
    assert run["scaled"].shape == (6, 8, 16, 16)
    assert np.allclose(run["scaled"][...], 2 * run["relu"][...].transpose(0, 2, 3, 1), atol=1e-5)
    assert np.allclose(run.stats["last"].mean, run.stats["relu"].mean, atol=1e-5)


def test_the_commands_take_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "model.onnx", fixed())
    np.savez(tmp_path / "data.npz", x=inputs(10), y=np.arange(10) % 4)
    for arguments in (("model.onnx",), ("model.onnx", "data.npz")):
        rows = [line.split() for line in invoke("layers", *arguments).splitlines()]
        assert ["relu", "Relu", "4", "x", "16", "x", "16", "float32", "4KiB", "1", ":input"] in rows
        assert any(row[:4] == ["of_all", "ReduceMean", "not", "captured:"] for row in rows)
    options = ("--layers", "re:re.u", "--layers", "mean", "--batch-size", 4, "--device", "cpu")
    said = invoke("capture", "model.onnx?providers=CPUExecutionProvider", "data.npz", "s.zarr", *options)
    assert "10 rows x 2 taps" in said
    assert np.array_equal(lt.open("s.zarr")["relu"][...], np.maximum(inputs(10), 0))
    done = CliRunner().invoke(main, ["layers", "model.onnx?threads=2"])
    assert "has no option 'threads'" in done.output
