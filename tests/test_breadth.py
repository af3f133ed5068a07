"""One of each family of models is captured whole and right, and docs/models.md says so of all.

`make breadth` runs all of them and writes that page; `pytest -m breadth` runs all of them as tests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import layertap as lt
import pytest

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

import breadth  # noqa: E402
from layertap.backends import torch as backend  # noqa: E402

PAGE = breadth.PAGE.read_text()
CASES = {case.name: case for case in breadth.cases()}
SAID = dict(re.findall(r"(\w+) ([\d.]+)", PAGE.split("Run with ")[1].splitlines()[0]))


def is_the_pages(collection: str) -> bool:
    """Whether what is installed is what the page was written with."""
    here = breadth.versions()
    return all(here.get(package) == SAID[package] for package in ("torch", collection) if package in SAID)


def check(case: breadth.Case, folder: Path) -> None:
    found = breadth.measure(case, folder)
    collection = case.name.partition(":")[0]
    if collection not in breadth.PACKAGES or is_the_pages(collection):
        assert found.line() in PAGE, f"make breadth writes docs/models.md anew; now it is {found.line()}"


@pytest.mark.parametrize("name", [*breadth.ALWAYS, "a U-Net"])
def test_one_of_each_family_is_captured_bit_for_bit_as_the_page_says(tmp_path, name):
    check(CASES[name if name in CASES else f"torchvision:{name}"], tmp_path)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_some_of_timm_are_captured_bit_for_bit(tmp_path, name):
    pytest.importorskip("timm")
    check(CASES[f"timm:{name}"], tmp_path)


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "LlamaForCausalLM", "T5ForConditionalGeneration"]
)
def test_some_of_transformers_are_captured_bit_for_bit(tmp_path, name):
    pytest.importorskip("transformers")
    check(CASES[f"transformers:{name}"], tmp_path)


@pytest.mark.breadth
@pytest.mark.parametrize("name", CASES)
def test_every_model_is_captured_bit_for_bit(tmp_path, name):
    check(CASES[name], tmp_path)


def test_the_page_has_every_model_that_torchvision_builds():
    if not is_the_pages("torchvision"):
        pytest.skip(f"the page was written with torchvision {SAID['torchvision']}")
    lines = re.findall(r"^\| torchvision:(\S+) ", PAGE, re.MULTILINE)
    assert {line.partition("?")[0] for line in lines} == set(torchvision.models.list_models())
    n_models = len(re.findall(r"^\| (?!model |---)", PAGE, re.MULTILINE))
    assert f"\n{n_models} models, " in PAGE


def test_a_value_that_is_not_the_layers_own_is_found(tmp_path, monkeypatch):
    """Without the copy at once, the U-Net's activation changes what the layer before it gave."""
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor, **options: tensor)
    with pytest.raises(AssertionError, match="is not what the layer gave"):
        breadth.measure(CASES["a U-Net"], tmp_path)


def test_what_is_dropped_silently_is_found(tmp_path, monkeypatch):
    def forgets(session: Any, hook: Any, seen: Any, silent_too: bool) -> list[Any]:
        return [tap for tap in seen if tap in session._kept]

    monkeypatch.setattr(backend.TorchSession, "_taken", forgets)
    with pytest.raises(AssertionError, match=r"down .container. is neither captured nor left out"):
        breadth.measure(CASES["a U-Net"], tmp_path)


def test_what_is_left_out_for_no_reason_is_found(tmp_path, monkeypatch):
    refusal = backend.refusal

    def refuses(layer: Any, tap: Any, *others: Any) -> str | None:
        return "gives no values: none" if tap.layer == "head" else refusal(layer, tap, *others)

    monkeypatch.setattr(backend, "refusal", refuses)
    with pytest.raises(AssertionError, match="head was not captured and nothing stands against it"):
        breadth.measure(CASES["a U-Net"], tmp_path)


def test_a_data_set_gives_what_a_loop_gives(tmp_path):
    case = CASES["torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"]
    with breadth.quick_init():
        model = case.build().eval()
    pictures = torch.stack(case.inputs(4, torch.Generator().manual_seed(0))[0][0])
    with pytest.warns(lt.LeftOutWarning, match="rows on its first axis"):
        run = lt.record_dataset(model, pictures.numpy(), tmp_path / "a", "**", batch_size=2)
    with pytest.warns(lt.LeftOutWarning), torch.no_grad(), lt.record(model, tmp_path / "b", "**") as rec:
        for batch in pictures.split(2):
            rec(batch)
    other = lt.open(tmp_path / "b")
    assert list(run) == list(other)
    assert len(run) == 290
    assert all(run[name][...].tobytes() == other[name][...].tobytes() for name in run)
    assert run.left_out == other.left_out
    assert "roi_heads.box_head.fc6" in run.left_out
