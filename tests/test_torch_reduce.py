"""Reductions in torch: equal to numpy's, on the device, in the hook, and written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import test_device_slabs  # noqa: E402
from layertap.backends import torch as torch_backend  # noqa: E402
from layertap.backends import torch_reduce, torch_slabs  # noqa: E402
from layertap.backends.torch_reduce import Reducer  # noqa: E402
from layertap.backends.torch_slabs import TORCH_DTYPES  # noqa: E402
from layertap.capture.axes import dims_of  # noqa: E402
from layertap.capture.dtypes import DTYPES, dtype_name  # noqa: E402
from layertap.capture.reduce import Chain, Pca, Rows, as_chain  # noqa: E402
from layertap.capture.reduce_arrays import apply  # noqa: E402
from layertap.capture.testing import contents, inputs  # noqa: E402
from test_reduce import LAST, MAPS, TOKENS, VECTOR, adversarial, check_bound  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

#: Bit for bit the reference's: selections, roundings, maxima, and what is summed in float64 and then rounded.
EXACT = [
    *("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "int8", "pool:2,max", "pool:3x4,max"),
    *("channels:0,3,1", "channels:stride=2", "channels:random=3", "crop:2", "topk:2", "topk:3,space"),
    *("norm:max", "tokens:last", "tokens:first", "crop:3|float8_e5m2", "channels:stride=2|pool:2,max|int8"),
]
#: Within the stated error of the truth: sums in another order.
CLOSE = [
    "pool:2",
    "pool:3",
    "pool:global",
    "norm:l1",
    "norm:l2",
    "project:3",
    "project:3,sparse",
    "tokens:mean",
]


def rows(shape: tuple[int, ...], dtype: Any = np.float32) -> Rows:
    return Rows(shape, dims_of(shape)[1:], np.dtype(dtype))


def to_torch(values: Any) -> Tensor:
    raw = np.array(values).reshape(-1).view(np.uint8)  # a copy: torch knows no ml_dtypes
    return torch.from_numpy(raw).view(TORCH_DTYPES[dtype_name(values.dtype)]).reshape(values.shape)


def to_numpy(tensor: Tensor) -> Any:
    return torch_backend._to_numpy(tensor)


def in_torch(chain: Chain, values: Any, form: Rows) -> tuple[Any, ...]:
    """What the hook writes into prepared views, which must be what it gives by itself."""
    reducer, tensor = Reducer(chain, form), to_torch(values)
    views = [
        torch.full((len(values), *one.shape), 7, dtype=TORCH_DTYPES[dtype_name(one.dtype)])
        for one in chain.after(form).values()
    ]
    reducer.into(views, tensor)
    for view, part in zip(views, reducer.stored(tensor), strict=True):
        assert to_numpy(view).tobytes() == to_numpy(part).tobytes()
    return tuple(map(to_numpy, views))


def samples(shape: tuple[int, ...], dtype: Any) -> Any:
    if shape == MAPS:
        return adversarial(dtype)
    values = np.random.default_rng(3).standard_normal((6, *shape))
    values[0, ..., 0], values[1] = np.nan, 0
    return values.astype(dtype)


def same(a: Any, b: Any) -> bool:
    """Equal bits, but for the sign and payload of NaN and the sign of zero."""
    wide = [x.astype(np.float64) if x.dtype.kind not in "iub" else x for x in (a, b)]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and np.array_equal(*wide, equal_nan=a.dtype.kind not in "iub")
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("text", EXACT)
def test_torch_and_numpy_agree_bit_for_bit_where_nothing_is_summed(text, dtype):
    for shape in (MAPS, TOKENS, VECTOR):
        form = rows(shape, DTYPES[dtype])
        if "3x4" in text and shape != MAPS:
            continue
        chain, values = as_chain(text).bind(form), samples(shape, DTYPES[dtype])
        for ours, theirs in zip(in_torch(chain, values, form), apply(chain, values, form), strict=True):
            assert same(ours, theirs), (shape, ours, theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("text", CLOSE)
def test_sums_in_torch_are_within_the_stated_error(text, dtype):
    for shape in (MAPS, TOKENS):
        form = rows(shape, DTYPES[dtype])
        values = samples(shape, DTYPES[dtype])
        finite = np.isfinite(values.astype(np.float64)).all(tuple(range(1, values.ndim)))
        chain = as_chain(text).bind(form)
        made = in_torch(chain, values, form)
        if chain.steps:
            check_bound(chain.steps[0], form, values[finite], tuple(part[finite] for part in made))
        expected = apply(chain, values, form)[0].astype(np.float64)
        assert np.array_equal(np.isnan(made[0].astype(np.float64)), np.isnan(expected))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int64", "bool"])
@pytest.mark.parametrize(
    "text", ["channels_first", "channels_first|float16", "channels_first|int8", "crop:3|channels_first"]
)
def test_channels_come_first_as_numpys_do(text, dtype):
    form = Rows(LAST.shape, LAST.dims, DTYPES[dtype])
    values = adversarial(DTYPES[dtype]) if dtype not in ("int64", "bool") else adversarial() > 0
    values = values.transpose(0, 2, 3, 1).astype(DTYPES[dtype])
    chain = as_chain(text).bind(form)
    for ours, theirs in zip(in_torch(chain, values, form), apply(chain, values, form), strict=True):
        assert same(ours, theirs)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_whole_numbers_are_reduced_like_numpys(dtype):
    values = np.random.default_rng(0).integers(0, 2, (5, *MAPS)).astype(dtype)
    form = rows(MAPS, dtype)
    for text in ("pool:2", "pool:2,max", "topk:2", "norm:l1", "channels:1,2", "int8", "float16"):
        chain = as_chain(text).bind(form)
        for ours, theirs in zip(in_torch(chain, values, form), apply(chain, values, form), strict=True):
            assert ours.dtype == theirs.dtype, text
            assert np.allclose(ours, theirs, rtol=1e-6), text


def test_principal_components_of_a_sequence_and_of_maps_agree():
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0][:3]
    for shape in (MAPS, (9, 6), (6,)):
        form, values = rows(shape), np.random.default_rng(1).standard_normal((4, *shape)).astype(np.float32)
        chain = Chain((Pca(None, basis, np.arange(6.0)),)).bind(form)
        check_bound(chain.steps[0], form, values, in_torch(chain, values, form))


class Counts(TorchDispatchMode):
    """Notes every operation that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("text", "n_copies"),
    [
        ("pool:4", 0),  # the mean is written where it belongs
        ("tokens:mean", 0),
        ("channels:0,3,1", 0),
        ("project:3", 0),
        ("crop:2", 1),  # a view, and the one copy
        ("channels:stride=2", 1),
        ("crop:2|float16", 1),  # which casts too
        ("pool:4|float16", 1),
    ],
)
def test_what_is_reduced_is_written_once(text, n_copies):
    shape = TOKENS if text.startswith("tokens") else (6, 8, 8)
    form = rows(shape)
    chain = as_chain(text).bind(form)
    reducer = Reducer(chain, form)
    made = chain.after(form)["values"]
    view = torch.empty(4, *made.shape, dtype=TORCH_DTYPES[dtype_name(made.dtype)])
    tensor = torch.randn(4, *shape)
    with Counts() as counts:
        reducer.into([view], tensor)
    copies = [name for name in counts.names if any(op in name for op in ("copy_", "_to_copy", "clone"))]
    assert len(copies) == n_copies, counts.names


def test_what_lies_on_another_device_is_copied_and_not_written_to():
    """One model may lie on several devices, and its slabs on one."""
    assert torch_reduce._takes(torch.empty(2), torch.empty(3))
    assert not torch_reduce._takes(torch.empty(2), torch.empty(3, device="meta"))


def test_autocast_of_the_forward_does_not_reach_a_projection():
    form = rows((64,))
    chain = as_chain("project:8").bind(form)
    values = torch.randn(16, 64)
    plain = Reducer(chain, form).made(values)[0]
    with torch.autocast("cpu", torch.bfloat16):
        within = Reducer(chain, form).made(values)[0]
    assert within.dtype == torch.float32
    assert torch.equal(plain, within)


class Net(nn.Module):
    """Overwrites what it gave, in place, as soon as it can."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu = nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        y *= 3
        return self.head(y.mean((2, 3)))


def reference(values: Any) -> dict[str, Any]:
    model = Net().eval()
    with torch.no_grad():
        conv = model.conv(torch.from_numpy(values))
        return {"conv": conv.numpy(), "relu": conv.relu().numpy()}


TEXTS = ["pool:4", "int8", "topk:3", "channels:0,5,2|pool:5|bfloat16", "project:4", "norm:l2", "float8_e5m2"]


def check(run: lt.Run, values: Any, text: str) -> None:
    for name, array in reference(values).items():
        form = rows(array.shape[1:])
        chain = as_chain(text).bind(form)
        assert run[name].reduction == chain
        for part, expected in zip(run[name].parts.values(), apply(chain, array, form), strict=True):
            got = part[...]
            assert got.dtype == expected.dtype
            assert np.allclose(got.astype(np.float64), expected.astype(np.float64), rtol=1e-2, atol=2e-6)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_values_are_reduced_before_they_are_overwritten(tmp_path, text, compiled):
    values = inputs(12)
    model: Any = Net().eval()
    if compiled:
        torch.compiler.reset()
        model = torch.compile(model, backend="eager")
    with torch.no_grad(), lt.record(model, tmp_path / "s", ["conv", "relu"], reduce=text) as rec:
        for i in range(0, 12, 4):
            model(torch.from_numpy(values[i : i + 4]))
    assert rec.row == 12
    check(lt.open(tmp_path / "s"), values, text)


def test_a_loop_that_trains_reduces_without_a_graph(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Tanh())
    with lt.record(model, tmp_path / "s", ["0"], reduce="project:2|int8") as rec:
        for _ in range(2):
            model(torch.from_numpy(inputs(4))).sum().backward()
    assert rec.row == 8
    assert model[0].weight.grad is not None


def test_batches_of_other_sizes_give_the_bytes_of_even_ones(tmp_path):
    values = inputs(24)
    for name, sizes in (("even", [4] * 6), ("odd", [4, 2, 6, 1, 7, 4])):
        at = 0
        with (
            torch.no_grad(),
            lt.record(nn.ReLU(), tmp_path / name, ["."], reduce="pool:4,max|int8") as r,
        ):
            for size in sizes:
                r(torch.from_numpy(values[at : at + size]))
                at += size
    even, odd = lt.open(tmp_path / "even"), lt.open(tmp_path / "odd")
    assert even["."].raw[...].tobytes() == odd["."].raw[...].tobytes()
    assert even["."].parts["scale"][...].tobytes() == odd["."].parts["scale"][...].tobytes()


@pytest.mark.parametrize("text", TEXTS)
def test_device_slabs_move_the_reduced_bytes_alone_in_one_copy_a_step(tmp_path, monkeypatch, text):
    values = inputs(20)

    def capture(path: Path) -> None:
        with (
            torch.no_grad(),
            lt.record(Net().eval(), path, ["conv", "relu"], reduce=text, memory="2MiB") as rec,
        ):
            for i in range(0, 20, 4):
                rec(torch.from_numpy(values[i : i + 4]))

    capture(tmp_path / "host")
    device = test_device_slabs.LateDevice()
    monkeypatch.setitem(torch_slabs.DEVICES, "cpu", lambda _: device)
    capture(tmp_path / "device")
    assert contents(tmp_path / "host") == contents(tmp_path / "device")
    layout = lt.open(tmp_path / "host").manifest.layout
    assert len(device.copies) == 5
    assert all(len(pairs) == 1 for pairs in device.copies)
    assert {host.nbytes for pairs in device.copies for host, _ in pairs} == {layout.device_bytes}
    assert len(layout.moved) == 2 * len(as_chain(text).bind(rows((8, 16, 16))).after(rows((8, 16, 16))))


def test_an_own_function_runs_on_tensors_and_must_keep_its_form(tmp_path):
    seen = []

    def brightest(batch: Tensor) -> Tensor:
        seen.append(type(batch))
        return batch.amax((2, 3))

    run = lt.record_dataset(Net(), inputs(8), tmp_path / "s", ["conv"], reduce=brightest, batch_size=4)
    assert set(seen) == {Tensor}
    assert run["conv"].dims == ("row", "feature")
    assert np.array_equal(run["conv"][...], reference(inputs(8))["conv"].max((2, 3)))
    calls = iter(range(100))
    changes = lambda batch: batch[:, : 1 + (next(calls) > 2)]  # noqa: E731
    with pytest.raises(lt.CaptureError, match="follows from the first batch"):
        lt.record_dataset(Net(), inputs(24), tmp_path / "t", ["conv"], reduce=changes, batch_size=4)
    with pytest.raises(lt.PlanError, match="keeps the rows"):
        lt.record_dataset(Net(), inputs(8), tmp_path / "u", ["conv"], reduce=lambda b: b.sum(0), batch_size=4)


def test_stated_errors_hold_for_the_activations_of_a_trained_network(cifar, tmp_path):
    """Of real pictures; every layer by every kind of error, against the layer's own values."""
    pytest.importorskip("safetensors")
    import resnet20

    pictures = lt.PictureFolder(cifar, lt.Preprocess(resnet20.MEAN, resnet20.STD))
    batch, network = pictures.batch(range(64)), resnet20.trained()
    names = ["conv1", "layer1", "layer2", "layer3", "linear"]
    kept: dict[str, Tensor] = {}
    for name in names:
        network.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: kept.__setitem__(name, output.clone())
        )
    with torch.no_grad():
        network(torch.from_numpy(np.asarray(batch.inputs[0])))
    n_checked = 0
    for name, tensor in kept.items():
        form = rows(tuple(tensor.shape[1:]))
        for text in (*EXACT, *CLOSE):
            if "|" in text or "pool:3x4" in text:
                continue
            chain = as_chain(text).bind(form)
            if not chain.steps:
                continue
            values = tensor.numpy()
            made = in_torch(chain, values, form)
            error = chain.steps[0].error(form)
            if error.exact:
                assert same(made[0], apply(chain, values, form)[0]), (name, text)
            else:
                check_bound(chain.steps[0], form, values, made)
            n_checked += 1
    assert n_checked > 60


def test_gradients_and_inputs_are_reduced_by_patterns_of_their_own(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    layers = ["0", "0:input", "0:grad"]
    reduce = {"0": "pca:2", "0:input": "crop:4", "0:grad": "pca:3|pool:2|int8"}
    options: dict[str, Any] = {"batch_size": 4, "reduce": reduce, "score": 1}
    forecast = lt.plan(model, inputs(12), tmp_path / "s", layers, **options)
    run = lt.record_dataset(model, inputs(12), tmp_path / "s", layers, **options)
    plain = lt.record_dataset(model, inputs(12), tmp_path / "t", layers, batch_size=4, score=1)
    assert [tap.name for tap in forecast.taps] == list(run)
    assert set(run) == set(layers)
    assert [run[name].shape[1:] for name in layers] == [(2, 14, 14), (4, 4, 4), (3, 2, 2)]
    assert np.array_equal(run["0:input"][...], plain["0:input"][:, :, 6:10, 6:10])
    basis, mean = (run["0:grad"].constants[name] for name in ("basis", "mean"))
    true = np.einsum("kc,ncyx->nkyx", basis, plain["0:grad"][...] - mean[:, None, None])
    pooled = true.reshape(12, 3, 2, 7, 2, 7).mean((3, 5))
    assert np.allclose(run["0:grad"][...], pooled, atol=np.abs(pooled).max() / 250)
    fitted = lt.fit_pca(model, inputs(12), ["0:input"], 2, batch_size=4)
    assert list(fitted) == ["0:input"]
    assert fitted["0:input"].steps[0].basis.shape == (2, 4)
