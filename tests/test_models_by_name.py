"""Models by name and by file: what the command line's MODEL may be."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.specs import LoadedModel, load_data, load_model
from PIL import Image

torch = pytest.importorskip("torch")
nn = torch.nn

from test_cli import fails, run  # noqa: E402

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))

def build():
    return Net()
"""


def captured(store: Path, *arguments: Any) -> lt.Run:
    done = run("capture", arguments[0], arguments[1], store, *arguments[2:])
    assert done.exit_code == 0, done.output
    return lt.open(store)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        picture = rng.integers(0, 256, (50, 40 + 8 * i, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


class TestTimm:
    @pytest.fixture(autouse=True)
    def _needs_timm(self) -> None:
        pytest.importorskip("timm")

    def test_a_model_is_the_same_when_it_is_built_again_and_leaves_the_generator_alone(self):
        torch.manual_seed(7)
        expected = torch.rand(1)
        torch.manual_seed(7)
        first, again = (load_model("timm:test_resnet?num_classes=3").model for _ in range(2))
        assert torch.equal(torch.rand(1), expected)
        assert not first.training
        assert first.num_classes == 3
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))

    def test_its_values_are_those_of_its_own_forward_and_preprocessing(self, pictures, tmp_path):
        timm_data = pytest.importorskip("timm.data")
        opened = captured(tmp_path / "s", "timm:test_vit", pictures, "--layers", "blocks.0,head")
        loaded = load_model("timm:test_vit")
        config = timm_data.resolve_model_data_config(loaded.model)
        transform = timm_data.create_transform(**config)
        files = sorted(pictures.iterdir())
        inputs = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        with torch.no_grad():
            logits = loaded.model(inputs)
        assert config["interpolation"] == "bicubic"
        assert opened["head"].shape == (4, 1000)
        assert np.allclose(opened["head"][...], logits.numpy(), atol=1e-5)
        assert opened.mean == config["mean"]
        assert opened.info["preprocess"]["interpolation"] == "bicubic"
        assert opened.classes is None  # classes of random weights are nothing

    @pytest.mark.parametrize(("mode", "size"), [("center", 96), ("squash", 96)])
    def test_its_resizing_is_that_of_its_own_transform(self, mode, size, pictures):
        from layertap.backends.timm import _preprocess

        timm_data = pytest.importorskip("timm.data")
        config: dict[str, Any] = {
            "input_size": (3, size, size),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": mode,
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.3, 0.4),
        }
        transform = timm_data.create_transform(**config)
        theirs = torch.stack([transform(Image.open(f).convert("RGB")) for f in sorted(pictures.iterdir())])
        ours = lt.PictureFolder(pictures, _preprocess(config)).batch(range(4)).inputs[0]
        assert np.abs(ours - theirs.numpy()).max() < 1e-5

    @pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
    def test_weights_of_a_local_file_are_loaded_with_class_names(self, suffix, tmp_path):
        timm = pytest.importorskip("timm")
        torch.manual_seed(1)
        model = timm.create_model("test_resnet").eval()
        save(model, tmp_path / f"w{suffix}")
        loaded = load_model(f"timm:test_resnet?file={tmp_path}/w{suffix}")
        assert same_weights(loaded.model, model)
        assert loaded.classes is not None
        assert loaded.classes[0].startswith("tench")
        assert len(loaded.classes) == 1000

    def test_weights_that_do_not_fit_or_are_not_there_are_refused(self, tmp_path):
        timm = pytest.importorskip("timm")
        save(timm.create_model("test_vit"), tmp_path / "w.safetensors")
        message = fails("layers", f"timm:test_resnet?file={tmp_path}/w.safetensors")
        assert "w.safetensors does not fit timm:test_resnet: RuntimeError: Error" in message
        assert "there is no file" in fails("layers", f"timm:test_resnet?file={tmp_path}/none.safetensors")

    def test_a_download_that_cannot_be_says_which_file_to_put_where(self, offline):
        message = fails("layers", "timm:test_resnet?weights=true")
        assert "cannot be downloaded" in message
        assert "model.safetensors of https://huggingface.co/timm/test_resnet.r160_in1k" in message
        assert "'timm:test_resnet?file=PATH'" in message

    def test_a_misspelt_model_weight_or_option_is_shown_the_closest(self):
        assert "timm has no model 'resnet81'. The closest are: resnet18" in fails("layers", "timm:resnet81")
        message = fails("layers", "timm:resnet18?weights=a1_in2k")
        assert "timm has no weights 'a1_in2k' for resnet18. The closest are: a1_in1k" in message
        assert "timm has no weights 'x'" in fails("layers", "timm:resnet18.x")
        message = fails("layers", "timm:test_resnet?num_clases=3")
        assert "num_clases" in message
        assert "There are weights, file, block, layers, num_classes" in message
        assert "write weights=true" in fails("layers", "timm:test_resnet?pretrained=true")

    def test_its_layers_are_listed_without_data_at_the_size_that_it_takes(self):
        output = run("layers", "timm:test_vit").output
        assert "patch_embed.proj" in output
        assert "64 x 10 x 10 float32" in output


def test_a_collection_of_models_has_no_data(tmp_path):
    pytest.importorskip("timm")
    with pytest.raises(lt.SelectionError, match="timm has models alone"):
        load_data("timm:resnet18", None)


def save(model: Any, path: Path) -> None:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_model

        save_model(model, path)
    else:
        torch.save(model.state_dict(), path)


def same_weights(a: Any, b: Any) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


class TestHuggingFace:
    @pytest.fixture(autouse=True)
    def _needs_transformers(self) -> None:
        pytest.importorskip("transformers")

    @pytest.fixture
    def vit(self, tmp_path: Path) -> Path:
        import transformers

        names = {0: "cat", 1: "dog", 2: "frog"}
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            id2label=names,
        )
        torch.manual_seed(3)
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
        about = {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 32, "width": 32},
            "resample": 3,
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.2, 0.2, 0.2],
        }
        (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(about))
        return tmp_path / "vit"

    @pytest.fixture
    def bert(self, tmp_path: Path) -> Path:
        import transformers

        config = transformers.BertConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=50,
            max_position_embeddings=16,
        )
        torch.manual_seed(3)
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
        return tmp_path / "bert"

    def test_a_folder_gives_the_class_that_it_names_with_its_weights_and_class_names(self, vit):
        import transformers

        loaded = load_model(f"hf:{vit}")
        assert type(loaded.model) is transformers.ViTForImageClassification
        assert not loaded.model.training
        assert same_weights(loaded.model, transformers.ViTForImageClassification.from_pretrained(vit))
        assert loaded.classes == ("cat", "dog", "frog")
        assert loaded.preprocess == lt.Preprocess(
            (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 32, None, "bicubic", stretch=True
        )

    def test_pictures_give_the_values_of_its_own_forward(self, vit, pictures, tmp_path):
        import transformers

        opened = captured(tmp_path / "s", f"hf:{vit}", pictures, "--layers", "vit.layernorm,classifier")
        model = transformers.ViTForImageClassification.from_pretrained(vit)
        files = sorted(pictures.iterdir())
        images = [np.asarray(Image.open(f).resize((32, 32), Image.Resampling.BICUBIC)) for f in files]
        inputs = np.stack(images).transpose(0, 3, 1, 2) / 255 - np.array([0.5, 0.4, 0.3])[:, None, None]
        with torch.no_grad():
            out = model(torch.as_tensor(inputs / 0.2, dtype=torch.float32), output_hidden_states=True)
            logits, hidden = out.logits, model.vit.layernorm(out.hidden_states[-1])
        assert np.allclose(opened["vit.layernorm"][...], hidden.numpy(), atol=1e-5)
        assert np.allclose(opened["classifier"][...], logits.numpy(), atol=1e-5)
        assert np.array_equal(opened.rows["prediction"][...], logits.argmax(1).numpy())
        assert opened.classes == ("cat", "dog", "frog")

    def test_tokens_and_their_mask_come_by_name_from_an_npz_file(self, bert, tmp_path):
        import transformers

        rng = np.random.default_rng(0)
        ids = rng.integers(0, 50, (6, 7))
        mask = (np.arange(7) < rng.integers(2, 8, (6, 1))).astype(np.int64)
        np.savez(tmp_path / "t.npz", input_ids=ids, attention_mask=mask, labels=np.arange(6) % 2)
        data, layers = tmp_path / "t.npz", "**.layer.0.output,classifier"
        opened = captured(tmp_path / "s", f"hf:{bert}", data, "--layers", layers, "--batch-size", 3)
        model = transformers.BertForSequenceClassification.from_pretrained(bert)
        with torch.no_grad():
            out = model(torch.as_tensor(ids), torch.as_tensor(mask), output_hidden_states=True)
        assert np.allclose(
            opened["bert.encoder.layer.0.output"][...], out.hidden_states[1].numpy(), atol=1e-5
        )
        assert np.allclose(opened["classifier"][...], out.logits.numpy(), atol=1e-5)
        assert opened.rows["label"][...].tolist() == [0, 1, 0, 1, 0, 1]
        ragged = captured(
            *(tmp_path / "r", f"hf:{bert}", data, "--layers", "bert.embeddings"),
            *("--ragged", "bert.embeddings:16"),
        )
        assert [len(row) for row in ragged["bert.embeddings"][...]] == mask.sum(1).tolist()

    def test_a_class_is_chosen_and_what_its_weights_lack_is_an_error_or_random_by_choice(self, bert):
        import transformers

        loaded = load_model(f"hf:{bert}?class=AutoModel")
        assert type(loaded.model) is transformers.BertModel
        message = fails("layers", f"hf:{bert}?class=BertForMaskedLM")
        assert "lack" in message
        assert "cls.predictions" in message
        assert "class=BertForSequenceClassification" in message
        first, again = (load_model(f"hf:{bert}?class=BertForMaskedLM&missing=random").model for _ in range(2))
        assert same_weights(first, again)

    def test_random_weights_are_the_same_each_time_and_need_the_config_alone(self, vit):
        (vit / "model.safetensors").unlink()
        first, again = (load_model(f"hf:{vit}?random=true&dtype=float16").model for _ in range(2))
        assert same_weights(first, again)
        assert first.dtype == torch.float16
        assert not first.training
        message = fails("layers", f"hf:{vit}")
        assert "has no model.safetensors that can be loaded" in message
        assert "random=true" in message

    def test_old_files_of_weights_load_as_tensors_alone(self, vit):
        from safetensors.torch import load_file

        state = load_file(vit / "model.safetensors")
        (vit / "model.safetensors").unlink()
        torch.save(state, vit / "pytorch_model.bin")
        assert load_model(f"hf:{vit}").classes == ("cat", "dog", "frog")
        torch.save(state | {"more": Loud()}, vit / "pytorch_model.bin")
        assert "cannot be loaded" in fails("layers", f"hf:{vit}")
        assert not Loud.ran

    def test_a_folder_without_its_files_says_which(self, tmp_path):
        assert "there is no folder" in fails("layers", f"hf:{tmp_path}/none")
        (tmp_path / "empty").mkdir()
        message = fails("layers", f"hf:{tmp_path}/empty")
        assert "has no config.json; put config.json, model.safetensors" in message

    def test_a_download_that_cannot_be_says_which_files_to_put_into_a_folder(self, offline):
        message = fails("layers", "hf:someone/something")
        assert "is no folder here, and cannot be downloaded: OSError" in message
        assert "preprocessor_config.json of https://huggingface.co/someone/something" in message
        assert "write hf:FOLDER" in message

    def test_code_that_comes_with_a_model_is_never_run(self, tmp_path):
        folder = tmp_path / "theirs"
        folder.mkdir()
        (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        about = {"model_type": "theirs", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
        (folder / "config.json").write_text(json.dumps(about))
        assert "needs code that comes with it, which is not run" in fails("layers", f"hf:{folder}")
        (folder / "config.json").write_text(json.dumps({"model_type": "brt"}))
        message = fails("layers", f"hf:{folder}")
        assert "has no models of the type 'brt'" in message
        assert "bert" in message
        assert not (tmp_path / "ran").exists()

    def test_unknown_options_and_classes_are_shown_the_closest(self, bert):
        assert "The closest are: class" in fails("layers", f"hf:{bert}?clas=AutoModel")
        assert "AutoModel" in fails("layers", f"hf:{bert}?class=AutoMdel")
        assert "float16" in fails("layers", f"hf:{bert}?dtype=float15")
        assert "missing=random" in fails("layers", f"hf:{bert}?missing=zeros")

    def test_its_layers_are_listed_without_data(self, vit, bert):
        assert "17 x 16 float32" in run("layers", f"hf:{vit}").output
        assert "8 x 16 float32" in run("layers", f"hf:{bert}").output

    @pytest.mark.parametrize(
        ("about", "expected"),
        [
            ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
             lt.Preprocess((0.5,) * 3, (0.5,) * 3, 40, 32)),
            ({"size": {"height": 32, "width": 48}}, lt.Preprocess((0.5,) * 3, (0.5,) * 3)),
            ({"do_normalize": False, "do_resize": False}, lt.Preprocess()),
            ({"rescale_factor": 1 / 127.5, "do_resize": False},
             lt.Preprocess((0.25,) * 3, (0.25,) * 3)),
        ],
    )  # fmt: skip
    def test_image_processors_become_preprocessing(self, about, expected, vit):
        base = {"image_processor_type": "ViTImageProcessor", "resample": 2}
        means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        kind = {"image_processor_type": "CLIPImageProcessor"} if "crop_size" in about else {}
        (vit / "preprocessor_config.json").write_text(json.dumps(base | means | kind | about))
        assert load_model(f"hf:{vit}").preprocess == expected


class Loud:
    ran = False

    def __reduce__(self) -> Any:
        return _ran, ()


def _ran() -> None:
    Loud.ran = True


class TestWeights:
    @pytest.fixture
    def factory(self, tmp_path: Path) -> str:
        (tmp_path / "net.py").write_text(FACTORY)
        return f"{tmp_path}/net.py:build"

    @pytest.fixture
    def net(self, factory: str) -> Any:
        torch.manual_seed(5)
        return load_model(factory).model.eval()

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((5, 3, 8, 8), np.float32))
        return tmp_path / "x.npy"

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
    def test_weights_go_into_what_a_factory_builds(self, suffix, factory, net, data, tmp_path):
        save(net, tmp_path / f"w{suffix}")
        opened = captured(
            tmp_path / "s", f"{tmp_path}/w{suffix}?model={factory}", data, "--layers", "conv,head"
        )
        with torch.no_grad():
            assert np.allclose(opened["head"][...], net(torch.as_tensor(np.load(data))).numpy(), atol=1e-6)
        assert opened.info["model"]["name"] == f"w{suffix}"

    @pytest.mark.parametrize("join", ["?", "&"])
    def test_options_of_the_model_are_passed_on(self, join, tmp_path):
        torchvision = pytest.importorskip("torchvision")
        torch.manual_seed(6)
        model = torchvision.models.resnet18(num_classes=4)
        save(model, tmp_path / "w.safetensors")
        loaded = load_model(f"{tmp_path}/w.safetensors?model=torchvision:resnet18{join}num_classes=4")
        assert same_weights(loaded.model, model)
        assert not loaded.model.training

    def test_checkpoints_are_looked_into(self, factory, net, tmp_path):
        wrapped = {f"module.{key}": value for key, value in net.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": wrapped, "ema": net.state_dict()}, tmp_path / "c.pt")
        for spec in (f"c.pt?model={factory}", f"c.pt?key=ema&model={factory}"):
            assert same_weights(load_model(f"{tmp_path}/{spec}").model, net)
        assert "The closest are: ema" in fails("layers", f"{tmp_path}/c.pt?key=em&model={factory}")
        torch.save({"epoch": 3, "best": 0.5}, tmp_path / "d.pt")
        assert "holds no weights but epoch, best; say where" in fails("layers", f"{tmp_path}/d.pt")

    def test_tensors_of_two_names_need_one(self, tmp_path):
        (tmp_path / "tied.py").write_text(
            "from torch import nn\n"
            "class Tied(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)\n"
            "        self.b.weight = self.a.weight\n"
            "def build():\n    return Tied()\n"
        )
        model = load_model(f"{tmp_path}/tied.py:build").model
        save(model, tmp_path / "w.safetensors")
        assert same_weights(
            load_model(f"{tmp_path}/w.safetensors?model={tmp_path}/tied.py:build").model, model
        )

    def test_weights_that_do_not_fit_are_named_with_the_closest(self, factory, net, tmp_path):
        state = net.state_dict()
        state["haed.bias"] = state.pop("head.bias")
        state["conv.weight"] = torch.zeros(5, 3, 3, 3)
        torch.save(state, tmp_path / "w.pt")
        message = fails("layers", f"{tmp_path}/w.pt?model={factory}")
        assert "w.pt does not fit Net: 1 missing: head.bias (the closest is haed.bias); " in message
        assert "1 unexpected: haed.bias (the closest is head.bias); " in message
        assert "1 of another shape: conv.weight is 5 x 3 x 3 x 3 and the model's 4 x 3 x 3 x 3" in message

    def test_weights_alone_say_what_to_add(self, factory, net, tmp_path):
        save(net, tmp_path / "w.safetensors")
        message = fails("layers", tmp_path / "w.safetensors")
        assert f"{tmp_path}/w.safetensors?model=file.py:factory" in message
        assert "is a file, too" in fails("layers", f"{tmp_path}/w.safetensors?model={tmp_path}/w.safetensors")
        message = fails("layers", f"{tmp_path}/w.safetensors?model={factory}&depth=3")
        assert "called without arguments, and takes no option 'depth'" in message

    def test_what_holds_more_than_weights_is_never_unpickled(self, net, factory, tmp_path):
        torch.save({"weights": net.state_dict(), "more": Loud()}, tmp_path / "m.pt")
        message = fails("layers", f"{tmp_path}/m.pt?model={factory}")
        assert "holds objects beside weights, such as a whole module, and is not loaded" in message
        assert "GLOBAL" in message
        assert "torch.save(model.state_dict(), 'weights.pt')" in message
        assert not Loud.ran

    def test_files_that_are_something_else_are_refused_with_the_cause(self, factory, tmp_path):
        (tmp_path / "w.safetensors").write_bytes(b"no header")
        (tmp_path / "w.pt").write_bytes(b"no zip")
        torch.save(torch.ones(3), tmp_path / "t.pt")
        for file in ("w.safetensors", "w.pt"):
            assert f"{file} " in fails("layers", f"{tmp_path}/{file}?model={factory}")
        assert "holds a Tensor and no weights" in fails("layers", f"{tmp_path}/t.pt?model={factory}")
        assert "there is no file" in fails("layers", f"{tmp_path}/none.pt?model={factory}")

    def test_whole_models_under_the_same_suffix_are_told_apart(self, tmp_path):
        for name, words in (
            ("constants.pkl", "is a TorchScript archive"),
            ("models/model.json", "call it m.pt2"),
        ):
            with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
                archive.writestr(f"m/{name}", "")
            assert words in fails("layers", tmp_path / "m.pt")

    def test_a_plus_in_a_file_name_is_one(self, factory, net, tmp_path):
        folder = tmp_path / "a+b"
        folder.mkdir()
        (folder / "net.py").write_text(FACTORY)
        save(net, tmp_path / "w.pt")
        assert same_weights(load_model(f"{tmp_path}/w.pt?model={folder}/net.py:build").model, net)


class Two(nn.Module):
    """Two inputs, by name, and a module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5))
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        x = self.emb(input_ids) * attention_mask[..., None]
        x = self.block(self.block(x))
        return (x + self.attn(x, x, x, need_weights=False)[0]).mean(1)


class TestExported:
    def export(self, path: Path, *, fixed: bool = False, training: bool = False) -> Any:
        torch.manual_seed(2)
        model = Two().train(training)
        inputs = {"input_ids": torch.zeros(4, 5, dtype=torch.int64), "attention_mask": torch.ones(4, 5)}
        rows = None if fixed else {key: {0: torch.export.Dim("rows", min=1)} for key in inputs}
        torch.export.save(torch.export.export(model, (), inputs, dynamic_shapes=rows), path)
        return model

    def data(self, path: Path, n_rows: int) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 10, (n_rows, 5))
        mask = (np.arange(5) < rng.integers(1, 6, (n_rows, 1))).astype(np.float32)
        np.savez(path, input_ids=ids, attention_mask=mask)
        return {"input_ids": torch.as_tensor(ids), "attention_mask": torch.as_tensor(mask)}

    def test_every_layer_gives_what_that_of_the_model_gives(self, tmp_path):
        model = self.export(tmp_path / "m.pt2")
        inputs = self.data(tmp_path / "x.npz", 7)
        store = captured(tmp_path / "s", tmp_path / "m.pt2", tmp_path / "x.npz", "--layers", "**")
        plain = lt.record_dataset(model, inputs, tmp_path / "p", ["**", "!attn.out_proj"])
        for name in ("emb", "block", "block#2", "block.0", "block.0#2", "block.1"):
            assert np.array_equal(store[name][...], plain[name][...]), name
        # nn.MultiheadAttention has a faster kernel, which an export does without
        assert np.allclose(store["attn"][...], plain["attn[0]"][...], atol=1e-6)
        with torch.no_grad():
            flat = torch.export.load(tmp_path / "m.pt2").module()(**inputs)
        assert np.array_equal(store["."][...], flat.numpy())
        assert store.info["model"]["type"] == "Two"

    def test_layers_are_chosen_by_the_type_that_they_had(self, tmp_path):
        self.export(tmp_path / "m.pt2")
        self.data(tmp_path / "x.npz", 4)
        store = captured(tmp_path / "s", tmp_path / "m.pt2", tmp_path / "x.npz", "--layers", "type:Linear")
        assert "block.0" in store.taps
        assert "emb" not in store.taps
        assert "MultiheadAttention" in run("layers", tmp_path / "m.pt2").output

    def test_one_of_a_fixed_batch_runs_in_it_and_refuses_others(self, tmp_path):
        model = self.export(tmp_path / "m.pt2", fixed=True)
        inputs = self.data(tmp_path / "x.npz", 8)
        command = (tmp_path / "m.pt2", tmp_path / "x.npz", "--layers", ".")
        with torch.no_grad():
            expected = model(**inputs).numpy()
        assert np.allclose(captured(tmp_path / "s", *command)["."][...], expected, atol=1e-6)
        arguments = ("capture", tmp_path / "m.pt2", tmp_path / "x.npz", tmp_path / "t", "--layers", ".")
        message = fails(*arguments, "--batch-size", 2)
        assert "m.pt2 takes batches of exactly 4 rows: --batch-size 4, or none" in message
        self.data(tmp_path / "x.npz", 7)
        message = fails(*arguments)
        assert "the data has 7: 3 are left over" in message
        assert "dynamic_shapes" in message
        assert not (tmp_path / "t").exists()
        assert run("layers", tmp_path / "m.pt2", tmp_path / "x.npz").exit_code == 0

    def test_one_of_training_mode_is_refused(self, tmp_path):
        self.export(tmp_path / "m.pt2", training=True)
        message = fails("layers", tmp_path / "m.pt2")
        assert "exported in training mode (dropout is on, for good)" in message
        assert "model.eval()" in message

    def test_objects_beside_tensors_are_never_unpickled(self, tmp_path):
        self.export(tmp_path / "m.pt2")
        with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        table = next(name for name in files if name.endswith("_constants_config.json"))
        files[table] = json.dumps({"config": {"loud": {"path_name": "opaque_obj_0"}}}).encode()
        files[table.replace("model_constants_config.json", "opaque_obj_0")] = pickle.dumps(Loud())
        with zipfile.ZipFile(tmp_path / "n.pt2", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        message = fails("layers", tmp_path / "n.pt2")
        assert "holds loud, which is no tensor, and is not loaded" in message
        assert not Loud.ran

    def test_a_fixed_batch_is_foretold_and_not_profiled(self, tmp_path):
        self.export(tmp_path / "m.pt2", fixed=True)
        self.data(tmp_path / "x.npz", 8)
        command = (tmp_path / "m.pt2", tmp_path / "x.npz")
        done = run("capture", *command, tmp_path / "s", "--layers", "emb", "--dry-run")
        assert done.exit_code == 0, done.output
        assert "takes batches of exactly 4 rows, and profile tries others" in fails("profile", *command)

    def test_what_is_no_program_is_refused_with_the_cause(self, tmp_path):
        (tmp_path / "m.pt2").write_bytes(b"nothing")
        message = fails("layers", tmp_path / "m.pt2")
        assert "cannot be read as an exported program: " in message
        assert "has no option 'device'; it has none" in fails("layers", f"{tmp_path}/m.pt2?device=cpu")


class TestNamedArrays:
    def test_a_dict_of_arrays_goes_to_the_model_by_name(self, tmp_path):
        a, b = np.ones((3, 2), np.float32), np.arange(6, dtype=np.float32).reshape(3, 2)
        data = {"a": a, "b": b, "y": np.array([7, 8, 9])}
        run = lt.record_dataset(lambda a, b: {"sum": a + b}, data, tmp_path / "s", ["sum"], batch_size=2)
        assert np.array_equal(run["sum"][...], a + b)
        assert run.rows["label"][...].tolist() == [7, 8, 9]

    def test_arrays_of_several_lengths_and_labels_alone_are_refused(self):
        from layertap.capture.named_arrays import NamedArrays

        with pytest.raises(lt.DataError, match="they have a 3, b 2"):
            NamedArrays({"a": np.ones(3), "b": np.ones(2)})
        with pytest.raises(lt.DataError, match="at least; they have a 0"):
            NamedArrays({"a": np.ones((0, 2))})
        with pytest.raises(lt.DataError, match="labels alone"):
            NamedArrays({"y": np.ones(3)})

    def test_another_value_or_name_is_other_data(self):
        from layertap.capture.named_arrays import NamedArrays

        arrays = (
            {"a": np.ones(3)},
            {"b": np.ones(3)},
            {"a": np.zeros(3)},
            {"a": np.ones(3), "y": np.ones(3)},
        )
        assert len({NamedArrays(one).fingerprint() for one in arrays}) == 4


def test_a_model_of_any_batch_takes_64_rows_or_what_is_asked():
    model = LoadedModel(None, "m")
    assert model.rows_of_a_step(None, 10) == 64
    assert model.rows_of_a_step(3, 10) == 3


def test_resizing_may_stretch_and_has_the_interpolation_that_is_asked_for(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    preprocess = lt.Preprocess(resize=8, interpolation="lanczos", stretch=True)
    found = lt.PictureFolder(tmp_path, preprocess).batch(range(1)).columns["picture"][0]
    assert np.array_equal(found, np.asarray(picture.resize((8, 8), Image.Resampling.LANCZOS)))
    with pytest.raises(lt.DataError, match="no interpolation 'cubic'"):
        lt.Preprocess(interpolation="cubic")
