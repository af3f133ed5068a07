"""Receptive fields: what marking with NaN finds is what pixels one by one, or sums on paper, say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture.errors import FormatError, PlanError, StoreExistsError
from layertap.capture.fields import ReceptiveField, places_of
from layertap.capture.marking import _evenly

PAGE = (Path(__file__).parents[1] / "FORMAT.md").read_text()


def pictures(height: int, width: int, n: int = 3, channels: int = 3) -> Any:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, channels), np.uint8)


def capture(model: Any, data: Any, path: Path, layers: Any = "**", **options: Any) -> lt.Run:
    return lt.record_dataset(model, data, path, layers, **{"fields": True, "batch_size": 64, **options})


def smooth(batch: Any) -> dict[str, Any]:
    """Means of 3 x 3 pixels, every second of them, in numpy."""
    padded = np.pad(batch, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = sum(padded[:, :, i : i + batch.shape[2]] for i in range(3))
    sums = sum(rows[..., i : i + batch.shape[3]] for i in range(3))
    return {
        "smooth": sums[:, :, ::2, ::2] / 9,
        "whole": sums - sums.mean((2, 3), keepdims=True),
        "n": sums > 0,
    }


# Against pixels one by one


def one_by_one(model: Any, layers: list[str], height: int, width: int) -> dict[str, ReceptiveField]:
    """Return the fields by a forward for each line and column of pixels, with that alone marked."""
    import torch

    kept: dict[str, Any] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: kept.__setitem__(name, output.detach().isnan().any(1)[0])
        )
        for name in layers
    ]
    hits: dict[str, list[list[Any]]] = {name: [[], []] for name in layers}
    model.eval()
    for axis, size in enumerate((height, width)):
        for i in range(size):
            inputs = torch.zeros(1, 3, height, width)
            inputs.select(2 + axis, i)[:] = math.nan
            with torch.no_grad():
                model(inputs)
            for name in layers:
                hits[name][axis].append(kept[name].any(1 - axis).numpy())
    for handle in handles:
        handle.remove()

    def pixels(seen: list[Any]) -> Any:
        seen = np.array(seen)
        return np.stack([seen.argmax(0), len(seen) - seen[::-1].argmax(0)], -1)

    return {
        name: ReceptiveField((height, width), *(pixels(seen) for seen in by_axis))
        for name, by_axis in hits.items()
    }


def network() -> Any:
    """Strides, padding, dilation, both kinds of pooling, a branch, growth, and a ReLU that is dead."""
    torch = pytest.importorskip("torch")
    from torch import nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 5, 2, 2)
            self.dead = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True))
            self.pool = nn.MaxPool2d(2)
            self.wide = nn.Conv2d(4, 4, 3, dilation=2)
            self.narrow = nn.AvgPool2d(3, 1, 1)
            self.sum = nn.Identity()
            self.up = nn.ConvTranspose2d(4, 4, 4, 2, 1)
            self.bilinear = nn.Upsample(scale_factor=3, mode="bilinear")
            self.adaptive = nn.AdaptiveAvgPool2d((5, 3))
            self.gate = nn.AdaptiveAvgPool2d(1)
            self.gated = nn.Identity()
            nn.init.constant_(self.conv.bias, -1e6)

        def forward(self, x: Any) -> Any:
            x = self.pool(self.dead(self.conv(x)))
            x = self.sum(torch.nn.functional.pad(self.wide(x), (2, 2, 2, 2)) + self.narrow(x))
            self.bilinear(self.up(x))
            self.adaptive(x)
            return self.gated(x * self.gate(x).sigmoid())

    torch.manual_seed(0)
    return Network()


LAYERS = ["conv", "dead", "pool", "wide", "narrow", "sum", "up", "bilinear", "adaptive", "gate", "gated"]


def test_fields_are_those_that_pixels_one_by_one_show(tmp_path):
    model = network()
    run = capture(model, pictures(40, 24), tmp_path / "run.zarr", LAYERS)
    expected = one_by_one(model, LAYERS, 40, 24)
    for name in LAYERS:
        found = run[name].field
        assert found.input == (40, 24)
        assert np.array_equal(found.y, expected[name].y), name
        assert np.array_equal(found.x, expected[name].x), name
    assert (run["gated"].field.y == (0, 40)).all()
    assert len({tuple(pair) for pair in run["adaptive"].field.y.tolist()}) == 5


def test_of_a_large_picture_regular_fields_are_exact_and_others_within_the_lines_tried(tmp_path):
    model = network()
    run = capture(model, pictures(144, 96), tmp_path / "run.zarr", LAYERS)
    expected = one_by_one(model, LAYERS, 144, 96)
    for name in LAYERS:
        for axis, step in (("y", 5), ("x", 3)):
            found, true = (getattr(one, axis) for one in (run[name].field, expected[name]))
            assert np.abs(found - true).max() < step, name
            if name in ("conv", "dead", "pool", "narrow", "gate", "gated"):
                assert np.array_equal(found, true), name


# Against what is published


def by_arithmetic(layers: list[tuple[int, int, int]], size: int) -> list[tuple[int, int, int]]:
    """Return start, stride and size of the fields after each of (kernel, stride, padding)."""
    start, jump, field = 0, 1, 1
    found = []
    for kernel, stride, padding in layers:
        start, field, jump = start - padding * jump, field + (kernel - 1) * jump, jump * stride
        found.append((start, jump, field))
    return found


def check_published(run: lt.Run, fields: dict[str, tuple[int, int, int]], size: int) -> None:
    for name, (start, stride, field) in fields.items():
        first = start + stride * np.arange(run[name].shape[2])
        pixels = np.stack([first, first + field], -1).clip(0, size)
        assert np.array_equal(run[name].field.y, pixels), name
        assert np.array_equal(run[name].field.x, pixels), name


def test_the_fields_of_resnet_18_are_the_published_ones(tmp_path):
    torch = pytest.importorskip("torch")
    block, down = [(3, 1, 1), (3, 1, 1)], [(3, 2, 1), (3, 1, 1)]
    stages = [[(7, 2, 3)], [(3, 2, 1)], block + block, down + block, down + block, down + block]
    model, flat = torch.nn.Sequential(), []
    for i, stage in enumerate(stages):  # its longest way, with one channel
        flat += stage
        kinds = [
            torch.nn.MaxPool2d(*one) if i == 1 else torch.nn.Conv2d(3 if not i else 1, 1, *one)
            for one in stage
        ]
        model.add_module(f"stage{i}", torch.nn.Sequential(*kinds))
    run = capture(model, pictures(224, 224, 2), tmp_path / "run.zarr", "stage*")
    fields = by_arithmetic(flat, 224)
    ends = np.cumsum([len(stage) for stage in stages]) - 1
    assert [fields[end][2] for end in ends] == [7, 11, 43, 99, 211, 435]
    check_published(run, {f"stage{i}": fields[end] for i, end in enumerate(ends[:-1])}, 224)
    assert (run["stage5"].field.y == (0, 224)).all()


def test_the_fields_of_mobilenet_v2_are_those_that_arithmetic_gives(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    strides = [2, 1, 2, 1, 2, 1, 1, 2]
    fields = by_arithmetic([(3, stride, 1) for stride in strides], 96)
    assert [field for _, _, field in fields] == [3, 7, 11, 19, 27, 43, 59, 75]
    run = capture(
        torchvision.models.mobilenet_v2(), pictures(96, 96, 2), tmp_path / "run.zarr", "re:features.[0-7]"
    )
    check_published(run, {f"features.{i}": one for i, one in enumerate(fields)}, 96)


def test_each_token_of_a_patch_embedding_sees_its_patch_and_after_attention_everything(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32)
    layers = ["encoder.dropout", "encoder.layers.encoder_layer_0"]
    run = capture(model, pictures(32, 32), tmp_path / "run.zarr", layers)
    tokens = run[layers[0]].field
    assert tokens.y[0].tolist() == tokens.x[0].tolist() == [0, 0]
    assert tokens.y[1:].tolist() == [[8 * (i // 4), 8 * (i // 4) + 8] for i in range(16)]
    assert tokens.x[1:].tolist() == [[8 * (i % 4), 8 * (i % 4) + 8] for i in range(16)]
    assert (run[layers[1]].field.y == (0, 32)).all()


# What it costs, and what it leaves alone


def test_it_costs_a_forward_for_every_full_batch_of_marks_and_changes_no_byte_of_a_row(tmp_path):
    calls = []

    def model(batch: Any) -> dict[str, Any]:
        calls.append(len(batch))
        return smooth(batch)

    data = pictures(12, 10, 7)
    plain = capture(model, data, tmp_path / "plain.zarr", ["smooth"], fields=False, batch_size=4)
    n_plain = len(calls)
    run = capture(model, data, tmp_path / "run.zarr", ["smooth"], batch_size=4)
    marks = 2 + 2 * 11 + 2 * 9
    assert calls[n_plain:] == [4] * math.ceil(marks / 4) + calls[:n_plain]
    files = {
        file.relative_to(run.path)
        for file in run.path.rglob("*")
        if file.is_file() and "log" not in str(file)
    }
    differ = {f for f in files if (run.path / f).read_bytes() != (plain.path / f).read_bytes()}
    assert differ == {Path("zarr.json")}
    assert plain["smooth"].field is None


def test_the_model_is_left_as_it_was(tmp_path):
    torch = pytest.importorskip("torch")
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cudnn = torch.backends.cudnn.enabled
    capture(model, pictures(40, 24), tmp_path / "run.zarr", ["dead"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.backends.cudnn.enabled == cudnn


def test_convolutions_are_worked_out_without_tiles_meanwhile(tmp_path):
    torch = pytest.importorskip("torch")
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            seen.append((torch.backends.cudnn.enabled, bool(x.isnan().any())))
            return x + 1

    capture(Model(), pictures(8, 8), tmp_path / "run.zarr", ["."])
    assert {enabled for enabled, is_marked in seen if is_marked} == {False}
    assert {enabled for enabled, is_marked in seen[-1:] if not is_marked} == {True}


def test_pictures_may_have_their_channels_last_and_other_arguments_beside_them(tmp_path):
    class Data(lt.ArraySource):
        def batch(self, rows: range) -> lt.Batch:
            batch = super().batch(rows)
            batch.kwargs = {"image": batch.inputs[0].transpose(0, 2, 3, 1), "scale": np.ones((len(rows), 1))}
            batch.inputs = ()
            return batch

    def model(image: Any, scale: Any) -> dict[str, Any]:
        return smooth(image.transpose(0, 3, 1, 2) * scale[..., None, None])

    run = capture(model, Data(pictures(12, 10)), tmp_path / "run.zarr")
    assert run["smooth"].field.x.tolist() == [[0, 2], [1, 4], [3, 6], [5, 8], [7, 10]]


# What cannot be found


def test_what_hides_nan_or_holds_none_has_no_field(tmp_path):
    def model(batch: Any) -> dict[str, Any]:
        hidden = np.nan_to_num(batch)
        return smooth(batch) | {"hidden": hidden, "spoilt": batch * np.nan, "vector": batch.mean((2, 3))}

    run = capture(model, pictures(12, 10), tmp_path / "run.zarr")
    fields = {name: tap.field for name, tap in run.taps.items()}
    assert [name for name, field in fields.items() if field is not None] == ["smooth", "whole"]
    assert (run["whole"].field.y == (0, 12)).all()
    assert (run["whole"].field.x == (0, 10)).all()


@pytest.mark.parametrize(
    ("model", "data", "options", "words"),
    [
        (smooth, pictures(12, 10), {"layers": ["n"]}, "no tap has a receptive field"),
        (smooth, np.zeros((3, 5, 12, 10), np.float32), {}, "gets none"),
        (lambda batch: {"n": batch}, np.zeros((3, 3, 12, 10), np.uint8), {}, "whole numbers"),
        (smooth, pictures(12, 10), {"ragged": "smooth:9x9"}, "differ in shape"),
    ],
)
def test_where_there_is_nothing_to_find_that_is_an_error(tmp_path, model, data, options, words):
    with pytest.raises(PlanError, match=words):
        capture(model, data, tmp_path / "run.zarr", **options)
    assert not (tmp_path / "run.zarr").exists()


def test_a_model_that_fails_on_nan_is_an_error_that_says_so(tmp_path):
    def model(batch: Any) -> dict[str, Any]:
        if np.isnan(batch).any():
            raise ValueError("not a number")
        return smooth(batch)

    with pytest.raises(PlanError, match=r"fails on these: not a number\. Leave out fields="):
        capture(model, pictures(12, 10), tmp_path / "run.zarr")


# In the store


def test_the_same_call_again_finds_nothing_anew_and_a_store_without_fields_gets_none(tmp_path):
    calls = []

    def model(batch: Any) -> dict[str, Any]:
        calls.append(len(batch))
        return smooth(batch)

    data = pictures(12, 10, 7)
    first = capture(model, data, tmp_path / "run.zarr", batch_size=7)
    calls.clear()
    again = capture(model, data, tmp_path / "run.zarr", batch_size=7)
    assert len(calls) <= 1
    assert again.info == first.info
    capture(model, data, tmp_path / "plain.zarr", batch_size=7, fields=False)
    with pytest.raises(StoreExistsError, match=r"captured without receptive fields\..*overwrite=True"):
        capture(model, data, tmp_path / "plain.zarr", batch_size=7)
    assert (
        capture(model, data, tmp_path / "plain.zarr", batch_size=7, overwrite=True)["smooth"].field
        is not None
    )


def test_processes_that_share_the_work_make_the_same_store(tmp_path):
    data, options = pictures(40, 40, 48), {"batch_size": 4, "memory": "1MiB", "writers": 1}
    one = capture(smooth, data, tmp_path / "one.zarr", ["smooth"], **options)
    assert one.manifest.n_blocks > 1
    for part in ("2/2", "1/2"):
        both = capture(smooth, data, tmp_path / "both.zarr", ["smooth"], part=part, **options)
    assert both.complete
    assert (both.path / "zarr.json").read_bytes() == (one.path / "zarr.json").read_bytes()
    assert both["smooth"].field is not None


def test_the_page_says_what_the_manifest_has(tmp_path):
    run = capture(smooth, pictures(12, 10), tmp_path / "run.zarr")
    said = next(tap["field"] for tap in run.info["taps"] if tap["name"] == "smooth")
    section = PAGE.split("## Receptive fields\n")[1].split("\n## ")[0]
    assert all(f"`{key}`" in section for key in ("field", *said))
    assert ReceptiveField.from_json(said, (3, 6, 5)).to_json() == said
    assert json.loads(json.dumps(said)) == said


GOOD = {"input": [4, 2], "y": [[0, 1], [3, 4]], "x": [[0, 2]]}


@pytest.mark.parametrize(
    "bad",
    [
        [],
        {"input": [4, 2], "y": [[0, 1], [3, 4]]},
        GOOD | {"input": [4]},
        GOOD | {"input": [0, 2]},
        GOOD | {"y": [[0, 1]]},
        GOOD | {"y": [[0, 1], [3, 5]]},
        GOOD | {"y": [[-1, 1], [3, 4]]},
        GOOD | {"x": [[2, 2]]},
        GOOD | {"x": [[0.0, 2]]},
        GOOD | {"x": [0]},
        GOOD | {"x": "0"},
    ],
)
def test_what_a_store_says_of_fields_is_held_to_what_can_be(bad):
    assert ReceptiveField.from_json(GOOD, (3, 2, 1)).to_json() == GOOD
    with pytest.raises(FormatError):
        ReceptiveField.from_json(bad, (3, 2, 1))
    with pytest.raises(FormatError):
        ReceptiveField.from_json(GOOD, (9,))


def test_a_store_with_a_bad_field_is_refused(tmp_path):
    from hostile import edit

    run = capture(smooth, pictures(12, 10), tmp_path / "run.zarr", ["smooth"])
    edit(run.path, lambda manifest: manifest["taps"][0]["field"]["y"].pop())
    with pytest.raises(FormatError, match="for each of 6 places"):
        lt.open(run.path)


def test_fields_follow_from_lines_that_were_tried_where_places_are_evenly_apart():
    true = np.maximum(0, -13 + 8 * np.arange(12))
    tried = np.concatenate([[0], np.arange(5, 96, 5), [96]])
    at = np.searchsorted(tried, true, "right") - 1
    low, high = tried[at], tried[at + 1] - 1
    assert (low < true).any()
    places = np.arange(12)
    assert _evenly(low, high, places, 96).tolist() == true.tolist()
    uneven = true + np.array([0] * 6 + [8] + [0] * 5)
    at = np.searchsorted(tried, uneven, "right") - 1
    assert _evenly(tried[at], tried[at + 1] - 1, places, 96).tolist() == tried[at].tolist()
    assert places_of((3, 4, 5)) == (4, 5)
    assert places_of((9, 3)) == (9,)
    assert places_of((9,)) == ()


def test_the_command_finds_them_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("test.npz", inputs=pictures(12, 10))
    Path("model.py").write_text("def build():\n    return lambda batch: {'maps': batch[:, :, ::2] * 2}\n")
    command = ["capture", "model.py:build", "test.npz", "run.zarr", "--layers", "maps", "--fields"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert lt.open("run.zarr")["maps"].field.y.tolist() == [[2 * i, 2 * i + 1] for i in range(6)]
    assert "--fields" in CliRunner().invoke(main, [*command, "--dry-run"]).output
