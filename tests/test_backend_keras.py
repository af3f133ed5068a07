"""The Keras backend holds the contract on JAX, and, in a process of its own, on PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main as cli
from layertap.capture.backend import backend_for
from layertap.capture.dtypes import BFLOAT16
from layertap.capture.testing import BackendContract, StopError, Subject, inputs

pytest.importorskip("jax")
pytest.importorskip("torch")
FRAMEWORK = os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras")


class Split(keras.Layer):
    """Gives a dict with a tuple inside, one part in bfloat16."""

    def call(self, x: Any) -> dict[str, Any]:
        return {"mask": x > 0, "parts": (x[..., :2] * 2, keras.ops.max(x, -1), keras.ops.cast(x, "bfloat16"))}


class Awkward(keras.Model):
    """A layer that runs twice, an output that is nested."""

    def __init__(self) -> None:
        super().__init__()
        self.first = keras.layers.Permute((2, 3, 1))
        self.conv = keras.layers.Conv2D(4, 3, padding="same")
        self.relu = keras.layers.ReLU()
        self.split = Split()
        self.failing = keras.layers.Identity()

    def call(self, x: Any) -> Any:
        y = self.relu(self.conv(self.first(x)))
        y = self.relu(y - 0.1)
        if not self.failing.trainable:
            raise StopError
        parts = self.split(y)["parts"]
        return keras.ops.mean(y, (1, 2)) + keras.ops.mean(parts[0])


def built() -> Awkward:
    keras.utils.set_random_seed(0)
    model = Awkward()
    model(np.zeros((2, 4, 16, 16), np.float32))
    return model


class TestKeras(BackendContract):
    def subject(self) -> Subject:
        model = built()
        given = keras.Input((4, 16, 16))
        every = keras.Model(given, _all(model, given))

        def reference(values: Any) -> dict[str, Any]:
            return {name: to_numpy(value) for name, value in _run(every, values).items()}

        def fail(on: bool) -> None:
            model.failing.trainable = not on

        return Subject(
            model,
            ["conv", "relu", "split"],
            keras.ops.convert_to_tensor,
            reference,
            to_numpy,
            lambda: (keras.Layer.__call__, sorted(vars(model.conv))),
            fail,
        )

    if FRAMEWORK == "jax":

        def test_the_models_own_output_is_untouched(self, tmp_path: Any) -> None:
            """What is compiled may round otherwise in its last bits than what is not."""
            subject, values = self.subject(), inputs(4)
            plain = subject.output(subject.model(subject.batch(values)))
            with lt.record(subject.model, tmp_path / "s", subject.layers) as rec:
                captured = subject.output(rec(subject.batch(values)))
                again = subject.output(rec(subject.batch(values)))
            np.testing.assert_allclose(captured, plain, rtol=1e-5, atol=1e-6)
            assert captured.tobytes() == again.tobytes()


def _all(model: Awkward, x: Any) -> dict[str, Any]:
    conv = model.conv(model.first(x))
    first = model.relu(conv)
    second = model.relu(first - 0.1)
    split = model.split(second)
    return {
        "conv": conv,
        "relu": first,
        "relu#2": second,
        "split[mask]": split["mask"],
        "split[parts][0]": split["parts"][0],
        "split[parts][1]": split["parts"][1],
        "split[parts][2]": split["parts"][2],
    }


def _run(model: Any, values: Any) -> Any:
    if FRAMEWORK == "jax":
        import jax

        return jax.jit(lambda x: model(x))(values)
    import torch

    with torch.no_grad():
        return model(keras.ops.convert_to_tensor(values))


def to_numpy(value: Any) -> Any:
    if FRAMEWORK == "jax":
        return np.asarray(value)
    if "bfloat16" in str(value.dtype):
        import torch

        return value.detach().contiguous().view(torch.int16).numpy().view(BFLOAT16)
    return value.detach().numpy()


def functional() -> Any:
    """A graph with a shared layer, a model inside, and a layer that is given two things."""
    keras.utils.set_random_seed(0)
    given = keras.Input((8, 8, 3), name="picture")
    shared = keras.layers.Conv2D(4, 3, padding="same", name="shared")
    inner_given = keras.Input((8, 8, 4))
    inner = keras.Model(inner_given, keras.layers.Conv2D(5, 1, name="deep")(inner_given), name="inner")
    first = shared(given)
    second = shared(keras.layers.Concatenate(name="both")([first[..., :2], first[..., 3:]]))
    return keras.Model(given, keras.layers.GlobalAveragePooling2D(name="pool")(inner(second)))


def pictures(n_rows: int = 6) -> Any:
    return np.random.default_rng(0).standard_normal((n_rows, 8, 8, 3), np.float32)


def names(model: Any) -> list[str]:
    return [layer.name for layer in backend_for(model).layers(model)]


def test_layers_of_a_graph_are_called_as_they_were_named(tmp_path):
    model = functional()
    assert backend_for(model).name == "keras"
    assert names(model)[0] == "."
    assert [n for n in names(model) if "get_item" not in n] == [
        ".",
        "shared",
        "both",
        "inner",
        "inner.deep",
        "pool",
    ]
    run = lt.record_dataset(
        model, pictures(), tmp_path / "s", ["shared", "both:input", "inner**", "pool", "."]
    )
    assert list(run.taps) == [
        *(".", "shared", "shared#2", "both:input[0][0]", "both:input[0][1]"),
        *("inner", "inner.deep", "pool"),
    ] or list(run.taps) == [
        *(".", "shared", "shared#2", "both:input[0]", "both:input[1]", "inner", "inner.deep", "pool"),
    ]
    assert run["shared"].dims == ("row", "y", "x", "feature")
    assert run["inner.deep"][...].tobytes() == run["inner"][...].tobytes()
    np.testing.assert_allclose(run["pool"][...], run["inner"][...].mean((1, 2)), rtol=1e-5, atol=1e-6)
    assert run.manifest.facts["model"]["backend"] == "keras"
    assert {"keras", FRAMEWORK} <= set(run.manifest.facts["versions"])


def test_layers_of_a_class_are_called_by_their_attributes_whatever_keras_counts(tmp_path):
    class Block(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(4)
            self.parts = [keras.layers.Dense(4), keras.layers.Dense(4)]
            self.attention = keras.layers.MultiHeadAttention(2, 4)

        def call(self, x: Any) -> Any:
            for layer in (self.dense, *self.parts):
                x = layer(x)
            return self.attention(x, x)

    for _ in range(2):
        block = Block()
        block(np.zeros((2, 3, 4), np.float32))
        listed = names(block)
        assert listed[:5] == [".", "dense", "parts.0", "parts.1", "attention"]
        assert {"attention.query", "attention.key", "attention.value"} <= set(listed)
    run = lt.record_dataset(
        block, np.ones((4, 3, 4), np.float32), tmp_path / "s", ["parts.*", "attention.query"]
    )
    assert list(run.taps) == ["parts.0", "parts.1", "attention.query"]


def test_layers_that_have_no_names_are_counted_in_the_model_and_not_in_the_process(tmp_path):
    class Hides(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self._dense = keras.layers.Dense(3, kernel_initializer="ones")

        def call(self, x: Any) -> Any:
            return self._dense(x)

    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    for _ in range(2):
        one = keras.Sequential([keras.Input((3,)), *(keras.layers.Dense(3, "relu") for _ in range(2))])
        assert names(one) == [".", "dense", "dense_1"]
        hides = Hides()
        hides(values)
        assert names(hides) == [".", "dense"]
    parts = [lt.record_dataset(_built(Hides), values, tmp_path / "s", "dense", part=f"{i}/2") for i in (1, 2)]
    assert parts[-1].complete


def _built(kind: Any) -> Any:
    model = kind()
    model(np.ones((2, 3), np.float32))
    return model


def test_a_model_of_several_inputs_takes_them_as_a_list(tmp_path):
    one, other = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([one, other], keras.layers.Add(name="sum")([one, other]))
    values = keras.ops.convert_to_tensor(np.arange(12, dtype=np.float32).reshape(4, 3))
    with lt.record(model, tmp_path / "s", "sum") as rec:
        rec([values, values])
    assert np.array_equal(lt.open(tmp_path / "s")["sum"][...], np.arange(12).reshape(4, 3) * 2)


def test_axes_are_those_of_volumes_and_of_attention(tmp_path):
    keras.utils.set_random_seed(0)
    volume = keras.Sequential([keras.Input((4, 6, 6, 2)), keras.layers.Conv3D(3, 3, name="conv")])
    run = lt.record_dataset(volume, np.ones((4, 4, 6, 6, 2), np.float32), tmp_path / "v", "conv")
    assert run["conv"].dims == ("row", "t", "y", "x", "feature")
    given = keras.Input((5, 4))
    model = keras.Model(given, keras.layers.MultiHeadAttention(2, 4, name="attention")(given, given))
    run = lt.record_dataset(model, np.ones((4, 5, 4), np.float32), tmp_path / "a", "attention.query")
    assert "feature" not in run["attention.query"].dims


def test_a_model_without_weights_says_what_to_do(tmp_path):
    with pytest.raises(lt.PlanError, match="has no weights yet: call it once"):
        lt.record_dataset(Awkward(), inputs(4), tmp_path / "s", "conv")


def test_tensorflow_is_refused_with_the_remedy(tmp_path, monkeypatch):
    model = functional()
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    with pytest.raises(lt.PlanError, match="set KERAS_BACKEND=jax or KERAS_BACKEND=torch"):
        lt.record_dataset(model, pictures(), tmp_path / "s", "shared")


def test_masks_of_padded_tokens_go_on_through_tapped_layers(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Embedding(10, 4, mask_zero=True, name="embed"),
            keras.layers.LSTM(3, name="lstm"),
        ]
    )
    tokens = np.array([[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0]], np.int32)
    expected = to_numpy(model(tokens))
    run = lt.record_dataset(model, tokens, tmp_path / "s", ["embed", "lstm"])
    np.testing.assert_allclose(run["lstm"][...], expected, rtol=1e-5, atol=1e-6)
    short = to_numpy(model(tokens[2:, :1]))
    np.testing.assert_allclose(run["lstm"][2], short[0], rtol=1e-5, atol=1e-6)


def test_a_loop_may_train_and_what_it_changes_is_kept(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="norm")])
    values = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32) + 5
    with lt.record(model, tmp_path / "s", "norm") as rec:
        rec(keras.ops.convert_to_tensor(values), training=True)
    assert abs(float(lt.open(tmp_path / "s")["norm"][...].mean())) < 1e-4
    assert float(np.abs(to_numpy(model.layers[0].moving_mean.value)).min()) > 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras's own saving
def test_a_keras_file_and_a_model_by_name_run_from_the_command_line(tmp_path):
    functional().save(tmp_path / "model.keras")
    np.save(tmp_path / "pictures.npy", pictures())
    args = [str(tmp_path / "model.keras"), str(tmp_path / "pictures.npy"), str(tmp_path / "s")]
    done = CliRunner().invoke(cli, ["capture", *args, "--layers", "shared"])
    assert done.exit_code == 0, done.output
    expected = lt.record_dataset(functional(), pictures(), tmp_path / "t", "shared")
    assert lt.open(tmp_path / "s")["shared"][...].tobytes() == expected["shared"][...].tobytes()
    done = CliRunner().invoke(cli, ["capture", "keras:ResNet5", *args[1:], "--layers", "shared"])
    assert done.exit_code != 0
    assert "keras.applications has no model 'ResNet5'. The closest are: ResNet50" in done.output


def test_a_keras_file_that_is_none_says_what_to_do(tmp_path):
    (tmp_path / "model.keras").write_bytes(b"nothing")
    np.save(tmp_path / "pictures.npy", pictures())
    args = [str(tmp_path / "model.keras"), str(tmp_path / "pictures.npy"), str(tmp_path / "s")]
    done = CliRunner().invoke(cli, ["capture", *args, "--layers", "shared"])
    assert done.exit_code != 0
    assert "write file.py:factory" in done.output


@pytest.mark.parametrize("name", ["MobileNetV2", "VGG16", "DenseNet121", "EfficientNetB0"])
def test_pictures_are_prepared_as_the_models_own_function_does(name):
    from layertap.backends.keras_models import preprocess_of

    build = getattr(keras.applications, name)
    own = sys.modules[build.__module__].preprocess_input
    preprocess = preprocess_of(build, 224)
    shown = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    expected = np.asarray(own(shown.astype(np.float32), data_format="channels_last"))
    assert preprocess.channels_last
    np.testing.assert_allclose(preprocess(shown), expected, rtol=1e-5, atol=1e-4)
    assert np.array_equal(preprocess.pictures(preprocess(shown)), shown)


def test_weights_that_cannot_be_downloaded_name_the_file_and_its_place(monkeypatch):
    from layertap.backends import keras_models

    def fails(**options: Any) -> Any:
        raise Exception("URL fetch failure on https://storage/x/mobilenet.h5: None -- no network")

    monkeypatch.setattr(keras.applications, "MobileNet", fails)
    with pytest.raises(lt.DataError, match=r"Put mobilenet.h5 into .*models"):
        keras_models.load_model("MobileNet", {"weights": "imagenet"})


@pytest.mark.skipif(FRAMEWORK == "torch", reason="this is that process")
def test_all_of_this_holds_on_pytorch():
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "KERAS_BACKEND": "torch"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
