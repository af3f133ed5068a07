"""Odd models and tensors: each captured rightly, or refused with the reason."""

from __future__ import annotations

from typing import Any

import layertap as lt
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from layertap.backends.torch import TorchBackend  # noqa: E402
from torch import Tensor, nn  # noqa: E402


def rows(n: int = 6) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((n, 4), np.float32)


class Gives(nn.Module):
    """A layer that gives what a function makes of the input."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.make(x))


# Models


def test_a_model_that_returns_nothing_is_captured_inside_and_refused_itself(tmp_path):
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> None:
            self.layer(x)

    run = lt.record_dataset(Silent(), rows(), tmp_path / "s", ["layer"])
    assert run["layer"].shape == (6, 2)
    assert "prediction" not in run.rows
    with pytest.raises(lt.CaptureError, match=r"\. \(Silent\) gave no tensor: there is nothing to capture"):
        lt.record_dataset(Silent(), rows(), tmp_path / "t", ["."])


def test_layers_that_share_parameters_are_captured_each(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    run = lt.record_dataset(model, rows(), tmp_path / "s", ["type:Linear"])
    assert list(run.taps) == ["0", "2"]
    assert not np.array_equal(run["0"][...], run["2"][...])
    assert run.info["model"]["parameters"] == 16 + 4 + 4


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.decoder = self.encoder
        self.tied = self.encoder[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x) - 0.2)


def test_a_module_of_two_names_is_captured_once_under_the_first(tmp_path):
    model = Shared()
    run = lt.record_dataset(model, rows(), tmp_path / "s", ["**", "!."])
    assert list(run.taps) == [
        *("encoder", "encoder#2", "encoder.0", "encoder.0#2", "encoder.1", "encoder.1#2"),
    ]
    assert run["encoder.0#2"].aliases == ("decoder.0#2", "tied#2")
    assert run["decoder"].name == "encoder"
    assert "tied" in run
    assert np.array_equal(run["tied"][...], run["encoder.0"][...])
    assert run.info["taps"][0]["aliases"] == ["decoder"]


@pytest.mark.parametrize("pattern", ["decoder", "decoder#2", "dec*", "re:decod.r", "decoder:input"])
def test_its_other_names_choose_it_too(tmp_path, pattern):
    run = lt.record_dataset(Shared(), rows(), tmp_path / "s", [pattern])
    assert {tap.layer for tap in run.taps.values()} == {"encoder"}
    names = ["encoder:input", "encoder#2:input"] if ":input" in pattern else ["encoder", "encoder#2"]
    assert list(run.taps) == (names[1:] if "#" in pattern else names)


def test_a_survey_lists_it_once_with_its_other_names():
    found = TorchBackend().survey(Shared(), lt.Batch(range(6), (torch.from_numpy(rows()),), {}, {}))
    assert [(one.layer.name, one.layer.aliases, one.calls) for one in found] == [
        (".", (), 1),
        ("encoder", ("decoder",), 2),
        ("encoder.0", ("decoder.0", "tied"), 2),
        ("encoder.1", ("decoder.1",), 2),
    ]


def test_a_lazy_layer_is_refused_until_its_weights_are_made(tmp_path):
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with pytest.raises(lt.PlanError, match=r"0\.weight is not initialised yet.*run one batch"):
        lt.record_dataset(model, rows(), tmp_path / "s", ["0"])
    assert not (tmp_path / "s").exists()
    model(torch.from_numpy(rows()))
    assert lt.record_dataset(model, rows(), tmp_path / "s", ["0"])["0"].shape == (6, 3)


# Hooks of others


def sees(model: nn.Module, x: Tensor) -> Tensor:
    """What the head of the model gets."""
    got: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda module, args: got.append(args[0].clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return got[0]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


@pytest.mark.parametrize("when", ["before", "after", "between"])
def test_what_the_next_layer_sees_is_captured_whoever_changed_it_and_when(tmp_path, when):
    model, x = Two(), torch.from_numpy(rows(4))

    def put_on() -> None:
        model.stem.register_forward_hook(lambda module, args, output: output * 2)
        model.head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    if when == "before":
        put_on()
    taps = ["stem", "head:input", "stem:grad"]
    with lt.record(model, tmp_path / "s", taps) as rec:
        if when == "after":
            put_on()
        rec(x).sum().backward()
        if when == "between":
            put_on()
        rec(x).sum().backward()
    run = lt.open(tmp_path / "s")
    seen = sees(model, x).numpy()
    assert np.array_equal(run["head:input"][4:], seen)
    assert np.allclose(run["stem"][4:] + 1, seen)
    expected = model.head.weight.sum(0).detach().numpy()
    assert np.allclose(run["stem:grad"][4:], expected)
    assert np.array_equal(run["stem"][:4], run["stem"][4:]) == (when != "between")


def test_a_pre_hook_that_comes_late_to_the_model_itself_is_refused_where_its_input_is_tapped(tmp_path):
    model, x = Two(), torch.from_numpy(rows(4))
    with (
        pytest.raises(
            lt.CaptureError, match="a forward pre-hook was put on the model after the recording began"
        ),
        lt.record(model, tmp_path / "s", [".:input"]) as rec,
    ):
        model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        rec(x)
    with lt.record(model, tmp_path / "t", [".:input"]) as rec:
        rec(x)
    assert np.array_equal(lt.open(tmp_path / "t")[".:input"][...], (x * 2).numpy())


def test_hooks_of_others_are_neither_moved_nor_lost(tmp_path):
    model, x = Two(), torch.from_numpy(rows(4))
    calls: list[int] = []
    for i in range(3):
        model.stem.register_forward_hook(lambda module, args, output, i=i: calls.append(i))
    with torch.no_grad(), lt.record(model, tmp_path / "s", ["stem", "stem:input"]) as rec:
        rec(x)
        handle = model.stem.register_forward_hook(lambda module, args, output: calls.append(3))
        rec(x)
    handle.remove()
    assert calls == [0, 1, 2, 0, 1, 2, 3]
    assert len(model.stem._forward_hooks) == 3
    assert len(model.stem._forward_pre_hooks) == 0


# Tensors


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda x: x.to_sparse(),
            r"inner is sparse \(sparse_coo\), not a dense tensor.*lt.tap\('name', x.to_dense",
        ),
        (lambda x: torch.nested.nested_tensor(list(x)), r"inner is nested.*x.to_padded_tensor\(0\)"),
        (
            lambda x: x.to("meta"),
            r"inner lies on the meta device and has no values: load the model's weights",
        ),
        (lambda x: torch.zeros(6, 2, dtype=torch.complex32), "complex32, which a store cannot hold"),
        (lambda x: x.to(torch.float8_e5m2fnuz), "float8_e5m2fnuz"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_what_a_store_cannot_hold_is_refused_with_the_way_out(tmp_path, make, words):
    with pytest.raises(lt.CaptureError, match=words):
        lt.record_dataset(Gives(make), rows(), tmp_path / "s", ["inner"])
    with pytest.raises(lt.CaptureError, match=words.replace("inner", "inner:input")):
        lt.record_dataset(Gives(make), rows(), tmp_path / "s", ["inner:input"])
    assert not (tmp_path / "s").exists()


def test_the_way_out_of_a_sparse_tensor_works(tmp_path):
    def make(x: Tensor) -> Tensor:
        return lt.tap("dense", x.to_sparse().to_dense())

    assert np.array_equal(
        lt.record_dataset(Gives(make), rows(), tmp_path / "s", ["dense"])["dense"][...], rows()
    )


def test_a_model_on_the_meta_device_is_refused(tmp_path):
    with torch.device("meta"):
        model = Two()
    with pytest.raises(lt.CaptureError, match="stem lies on the meta device"):
        lt.record_dataset(model, rows(), tmp_path / "s", ["stem"])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("per_channel", [False, True])
def test_quantized_tensors_are_captured_by_the_values_that_they_stand_for(tmp_path, per_channel):
    def make(x: Tensor) -> Tensor:
        if per_channel:
            return torch.quantize_per_channel(
                x, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.zeros(4), 1, torch.qint8
            )
        return torch.quantize_per_tensor(x, 0.05, 3, torch.quint8)

    run = lt.record_dataset(Gives(make), rows(), tmp_path / "s", ["inner", "inner:input"], batch_size=4)
    expected = make(torch.from_numpy(rows())).dequantize().numpy()
    for name in ("inner", "inner:input"):
        assert run[name].dtype == np.float32
        assert np.array_equal(run[name][...], expected)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_complex_tensors_and_their_lazy_conjugates_are_captured(tmp_path, codec):
    def make(x: Tensor) -> Tensor:
        return torch.complex(x, x * 2).conj()

    run = lt.record_dataset(Gives(make), rows(), tmp_path / "s", ["inner"], batch_size=4, codec=codec)
    assert run["inner"].dtype == np.complex64
    assert np.array_equal(run["inner"][...], rows() - 2j * rows())
    with lt.record(Gives(make), tmp_path / "loop", ["inner"], codec=codec) as rec:
        column = rec(torch.from_numpy(rows()))
        rec.annotate(column=column)
    assert np.array_equal(lt.open(tmp_path / "loop").rows["column"][...], run["inner"][...])
    grad = lt.record_dataset(
        Gives(make), rows(), tmp_path / "g", ["inner:grad"], score=lambda out: out.abs().square().sum(1)
    )
    assert np.allclose(grad["inner:grad"][...], 2 * (rows() - 2j * rows()))


def test_float8_logits_are_stored_and_predict_nothing(tmp_path):
    class Eighths(nn.Module):
        def forward(self, x):
            return x.to(torch.float8_e4m3fn)

    rows = torch.randn(6, 5)
    run = lt.record_dataset(
        Eighths(), torch.utils.data.TensorDataset(rows), tmp_path / "s", ["."], batch_size=2
    )
    assert run["."].dtype == "float8_e4m3fn"
    assert (run["."][...].view(np.uint8) == rows.to(torch.float8_e4m3fn).view(torch.uint8).numpy()).all()
    assert "prediction" not in run.rows
