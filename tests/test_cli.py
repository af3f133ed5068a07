"""The commands: what they print, what they refuse, and how."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.error import URLError

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner, Result
from layertap.__main__ import COMMANDS, main
from layertap.capture.cli import split_patterns, table
from PIL import Image

MODEL = """
import numpy as np

def build():
    def model(batch):
        batch = np.asarray(batch, np.float32)
        return {"maps": np.maximum(batch, 0), "logits": batch.mean((2, 3))}
    return model

def data():
    return np.ones((6, 3, 8, 8), np.float32), np.arange(6)

broken = 3
"""


NETWORK = """
import layertap as lt
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.same = self.head

    def forward(self, x):
        return lt.tap("raw", self.head(self.attn(x, x, x, need_weights=False)[0])).mean(1)

def build():
    torch.manual_seed(0)
    return Net()
"""


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fails(*arguments: Any) -> str:
    """Return the message of a command that fails as it should: exit code 1, one message, no traceback."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ")
    return result.stderr


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model.py").write_text(MODEL)
    return f"{tmp_path}/model.py:build"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", "dog/3.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def test_the_overview_lists_every_command_with_its_own_first_sentence():
    overview = run("--help").output
    for name, (target, sentence) in COMMANDS.items():
        module, attribute = target.split(":")
        command = getattr(import_module(module), attribute)
        assert command.help.splitlines()[0] == sentence
        assert name in overview


def test_every_command_has_an_example_that_names_it():
    for name in COMMANDS:
        assert f"layertap {name}" in run(name, "--help").output
    for name in ("grid", "montage"):
        assert f"layertap render {name}" in run("render", name, "--help").output


def test_examples_are_shown_line_by_line():
    for name in ("", *COMMANDS):
        output = run(*([name] if name else []), "--help").output
        assert "\\b" not in output
        assert "\b" not in output
    lines = [line.strip() for line in run("capture", "--help").output.splitlines()]
    assert "layertap capture model.py:build test.npz run.zarr --layers type:Conv2d --dtype float16" in lines


def test_an_unknown_command_is_refused():
    assert "No such command" in run("paint").output


def test_the_version_is_the_packages():
    assert lt.__version__ in run("--version").output


def test_capture_info_and_the_values(model, pictures, tmp_path):
    done = run(
        "capture", model, f"folder:{pictures}", tmp_path / "s", "--layers", "maps,logits", "--batch-size", 2
    )
    assert done.exit_code == 0, done.output
    assert "5 rows: writes " in done.stderr
    assert " free." in done.stderr
    assert "5 rows x 2 taps, complete" in done.stdout
    opened = lt.open(tmp_path / "s")
    assert opened.classes == ("cat", "dog")
    assert "prediction" not in opened.rows  # three logits say nothing of two classes
    assert list(opened.rows["id"][...]) == ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", "dog/3.png"]
    info = run("info", tmp_path / "s").output
    for words in (
        "maps",
        "3 x 8 x 8",
        "float32",
        "768B",
        "classes  2: cat, dog",
        "columns  id, picture, label\n",
    ):
        assert words in info
    assert json.loads(run("info", tmp_path / "s", "--json").output)["rows"] == 5


def test_the_same_command_again_says_that_all_is_done(model, pictures, tmp_path):
    arguments = ("capture", model, pictures, tmp_path / "s", "--layers", "maps")
    run(*arguments)
    again = run(*arguments)
    assert again.exit_code == 0
    assert "is complete already; nothing is changed" in again.stderr


def test_another_plan_is_refused_and_overwrite_is_the_way_out(model, pictures, tmp_path):
    run("capture", model, pictures, tmp_path / "s", "--layers", "maps")
    message = fails("capture", model, pictures, tmp_path / "s", "--layers", "maps", "--dtype", "float16")
    assert "tap maps: dtype float32 there, float16 now" in message
    assert "--overwrite" in message
    done = run(
        "capture", model, pictures, tmp_path / "s", "--layers", "maps", "--dtype", "float16", "--overwrite"
    )
    assert done.exit_code == 0
    assert lt.open(tmp_path / "s")["maps"].dtype == np.float16


def test_a_picture_that_does_not_decode_is_named_and_can_be_left_out(model, pictures, tmp_path):
    (pictures / "cat" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    message = fails("capture", model, pictures, tmp_path / "s", "--layers", "maps")
    assert "cat/2.png does not decode" in message
    assert "--skip-bad" in message
    assert not (tmp_path / "s").exists()
    done = run("capture", model, pictures, tmp_path / "s", "--layers", "maps", "--skip-bad")
    assert "left out 1 pictures that do not decode: cat/2.png" in done.stderr
    assert list(lt.open(tmp_path / "s").rows["id"][...]) == [
        "cat/1.png",
        "dog/1.png",
        "dog/2.png",
        "dog/3.png",
    ]


def test_arrays_and_factories_are_data_too(model, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((6, 3, 8, 8), np.float32))
    np.savez(tmp_path / "xy.npz", images=np.zeros((6, 8, 8, 3), np.uint8), labels=np.arange(6))
    for i, data in enumerate((tmp_path / "x.npy", tmp_path / "xy.npz", f"{tmp_path}/model.py:data")):
        done = run("capture", model, data, tmp_path / str(i), "--layers", "maps")
        assert done.exit_code == 0, done.output
    assert lt.open(tmp_path / "1").rows["label"][...].tolist() == list(range(6))
    np.savez(tmp_path / "odd.npz", things=np.ones(3))
    assert "holds things" in fails("capture", model, tmp_path / "odd.npz", tmp_path / "s", "--layers", "maps")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}, {}], object))
    assert "Object arrays cannot be loaded" in fails(
        "capture", model, tmp_path / "pickled.npz", tmp_path / "s", "--layers", "maps"
    )


def test_what_is_not_there_is_named(model, pictures, tmp_path):
    store = tmp_path / "s"
    for arguments, words in (
        ((model, pictures, store, "--layers", "mops"), "no layer matches 'mops'. The closest are: maps"),
        ((model, tmp_path / "nothing", store, "--layers", "maps"), "is no data set"),
        ((f"folder:{tmp_path}", pictures, store, "--layers", "maps"), "is no model"),
        ((f"{tmp_path}/no.py:build", pictures, store, "--layers", "maps"), "there is no file"),
        (
            (f"{tmp_path}/model.py:biuld", pictures, store, "--layers", "maps"),
            "no function 'biuld'; it has build",
        ),
        ((f"{tmp_path}/model.py:broken", pictures, store, "--layers", "maps"), "no function 'broken'"),
        ((model, pictures, store, "--layers", "maps", "--mean", "a,b"), "--mean takes numbers"),
        ((model, pictures, store, "--layers", "maps", "--memory", "lots"), "'lots' is no amount of memory"),
        ((model, pictures, store, "--layers", "maps", "--device", "cuda"), "has no device 'cuda'"),
    ):
        assert words in fails("capture", *arguments)
    assert not store.exists()
    assert "there is no store at" in fails("info", store)
    assert "is not a layertap store" in fails("info", tmp_path)


def test_info_says_how_far_an_unfinished_store_is(model, pictures, tmp_path):
    run("capture", model, pictures, tmp_path / "s", "--layers", "maps")
    (tmp_path / "s" / "commits" / "c.0.0").unlink()
    output = run("info", tmp_path / "s").output
    assert "unfinished, 0 rows are captured; run the same capture again to go on" in output


def test_not_finite_values_are_reported(tmp_path):
    (tmp_path / "model.py").write_text("def build():\n    return lambda batch: {'a': batch}\n")
    values = np.ones((6, 3), np.float32)
    values[1, 1], values[2, 2] = np.nan, np.inf
    np.save(tmp_path / "x.npy", values)
    done = run("capture", f"{tmp_path}/model.py:build", tmp_path / "x.npy", tmp_path / "s", "--layers", "a")
    assert "a: 1 NaN and 1 infinite values, stored as they are" in done.stdout
    assert "a: 1 NaN and 1 infinite" in run("info", tmp_path / "s").output


def test_what_a_users_own_code_raises_is_one_message_and_a_traceback_on_request(
    tmp_path, pictures, monkeypatch
):
    (tmp_path / "model.py").write_text(
        "def fails():\n    raise RuntimeError('no weights')\n"
        "def needs(x):\n    pass\n"
        "def build():\n    def model(batch):\n        raise ValueError('wrong height')\n    return model\n"
    )
    for factory, words in (
        ("fails", "model.py:fails() failed: RuntimeError: no weights"),
        ("needs", "A factory is called without arguments"),
        ("build", "failed: ValueError: wrong height"),
    ):
        arguments = ("capture", f"{tmp_path}/model.py:{factory}", pictures, tmp_path / "s", "--layers", "a")
        assert words in fails(*arguments)
    monkeypatch.setenv("LAYERTAP_TRACEBACK", "1")
    assert isinstance(run(*arguments).exception.__cause__, ValueError)
    assert not (tmp_path / "s").exists()


def test_layers_of_a_function_are_listed_with_its_data(model, pictures):
    output = run("layers", model, pictures).output
    assert "maps" in output
    assert "3 x 8 x 8 float32" in output


def test_the_memory_that_the_command_gives_is_that_of_the_function():
    from layertap.capture.cli import capture
    from layertap.capture.plan import DEFAULT_MEMORY

    assert {option.name: option.default for option in capture.params}["memory"] == DEFAULT_MEMORY


def test_lists_are_split_at_commas_and_regular_expressions_are_not():
    assert split_patterns(["a, b", "re:x{1,2}", "c,"]) == ["a", "b", "re:x{1,2}", "c"]


def test_tables_align_their_columns():
    assert table(("a", "n"), [("x", 1), ("long", 100)], right=(1,)) == "a       n\nx       1\nlong  100"


class TestTorch:
    @pytest.fixture(autouse=True)
    def _needs_torch(self) -> None:
        pytest.importorskip("torch")

    def test_layers_lists_every_module_with_shape_bytes_and_calls(self):
        output = run("layers", "torchvision:resnet18", "--size", "3,64,64").output
        lines = {line.split()[0]: line.split() for line in output.splitlines()[1:]}
        assert lines["conv1"] == [
            *("conv1", "Conv2d", "64", "x", "32", "x", "32", "float32", "256KiB", "1", ":input", ":grad"),
        ]
        assert lines["layer1.0.relu#2"][-1] == "2"
        assert lines["fc"][2:4] == ["1000", "float32"]
        assert len(lines) == 68 + 8  # 68 modules; the ReLU of each of the 8 blocks runs twice

    def test_layers_shows_what_else_a_layer_offers_its_other_names_and_what_is_tapped(self, network):
        lines = [
            " ".join(line.split()) for line in run("layers", network, "--size", "4,8").output.splitlines()
        ]
        assert lines[1:] == [
            ". Net 3 float32 12B 1 :input :grad",
            "attn[0] MultiheadAttention 4 x 8 float32 128B 1 :input :attention :grad",
            "attn.out_proj NonDynamicallyQuantizableLinear not called 0",
            "head Linear 4 x 3 float32 48B 1 :input :grad",
            "same Linear is head",
            "raw tap 4 x 3 float32 48B 1 :grad",
        ]

    def test_gradients_of_a_score_are_captured(self, network, tmp_path):
        np.save(tmp_path / "x.npy", np.ones((6, 4, 8), np.float32))
        data, store = tmp_path / "x.npy", tmp_path / "s"
        done = run("capture", network, data, store, "--layers", "attn:attention,raw,.:grad", "--score", "2")
        assert done.exit_code == 0, done.output
        assert lt.open(store)[".:grad"][...].tolist() == [[0, 0, 1]] * 6
        assert lt.open(store)["attn:attention"].shape == (6, 2, 4, 4)
        assert run("verify", store).exit_code == 0
        again = fails("capture", network, data, store, "--layers", "attn:attention,raw,.:grad")
        assert "score of the gradients: 2 there, prediction now" in again
        assert "there is no score 'best'" in fails(
            "capture", network, data, tmp_path / "t", "--layers", ".:grad", "--score", "best"
        )

    @pytest.fixture
    def network(self, tmp_path):
        (tmp_path / "network.py").write_text(NETWORK)
        return f"{tmp_path}/network.py:build"

    def test_an_input_that_does_not_fit_is_an_error_that_names_size_and_data(self):
        message = fails("layers", "torchvision:resnet18", "--size", "1,64,64")
        assert "does not run on an input of shape 1,64,64" in message
        assert "--size" in message

    def test_a_misspelt_model_or_data_set_is_shown_the_closest(self, tmp_path):
        assert "resnet18" in fails("layers", "torchvision:resnet81")
        assert "CIFAR10" in fails(
            "capture", "torchvision:resnet18", "torchvision:CIFR10", tmp_path / "s", "--layers", "fc"
        )

    def test_a_data_set_without_its_files_says_where_they_belong(self, tmp_path):
        message = fails(
            "capture",
            "torchvision:resnet18",
            f"torchvision:CIFAR10?root={tmp_path}",
            tmp_path / "s",
            "--layers",
            "fc",
        )
        assert "Put its files there" in message

    def test_weights_that_cannot_be_downloaded_are_named_with_the_folder(self, monkeypatch):
        torchvision = pytest.importorskip("torchvision")

        def refuses(*args: Any, **kwargs: Any) -> Any:
            raise URLError("no network")

        monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuses, raising=False)
        monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", refuses)
        message = fails("layers", "torchvision:resnet18?weights=IMAGENET1K_V1")
        assert "Put resnet18-f37072fd.pth into" in message
        assert "no weights 'NONE'" in fails("layers", "torchvision:resnet18?weights=NONE")

    def test_a_torchvision_model_captures_a_folder(self, pictures, tmp_path):
        done = run(
            "capture",
            "torchvision:resnet18?num_classes=10",
            pictures,
            tmp_path / "s",
            "--layers",
            "conv1,layer*.1",
            "--resize",
            "32",
            "--batch-size",
            "2",
        )
        assert done.exit_code == 0, done.output
        opened = lt.open(tmp_path / "s")
        assert list(opened.taps) == ["conv1", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]
        assert opened["conv1"].shape == (5, 64, 16, 16)

    def test_a_torchvision_data_set_of_pictures_is_preprocessed(self, pictures, tmp_path):
        done = run(
            "capture",
            "torchvision:resnet18?num_classes=10",
            f"torchvision:ImageFolder?root={pictures}",
            tmp_path / "s",
            "--layers",
            "fc",
            "--resize",
            "32",
            "--mean",
            "0.5,0.5,0.5",
            "--std",
            "1,1,1",
        )
        assert done.exit_code == 0, done.output
        opened = lt.open(tmp_path / "s")
        assert opened.classes == ("cat", "dog")
        assert opened.mean == (0.5, 0.5, 0.5)
        assert opened.rows["picture"].shape == (5, 32, 32, 3)


def test_an_interrupt_keeps_what_is_committed_and_says_how_to_go_on(tmp_path):
    (tmp_path / "model.py").write_text(
        "seen = []\n"
        "def build():\n"
        "    def model(batch):\n"
        "        seen.append(1)\n"
        "        if len(seen) == 9:\n"
        "            raise KeyboardInterrupt\n"
        "        return {'a': batch}\n"
        "    return model\n"
    )
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((48, 4, 32, 32), np.float32))
    command = (
        "capture", f"{tmp_path}/model.py:build", tmp_path / "x.npy", tmp_path / "s", "--layers", "a",
        "--batch-size", 4, "--memory", "1400KiB",
    )  # fmt: skip
    stopped = run(*command)
    assert stopped.exit_code == 130
    assert "the same command goes on from there" in stopped.stderr
    done = lt.open(tmp_path / "s").committed()
    assert 0 < done.sum() < 48
    assert run(*command).exit_code == 0
    assert np.array_equal(lt.open(tmp_path / "s")["a"][...], np.load(tmp_path / "x.npy"))
