"""The torch backend holds the contract, and leaves a module as it found it."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

import layertap as lt
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from layertap.capture.dtypes import BFLOAT16  # noqa: E402
from layertap.capture.testing import BackendContract, StopError, Subject, inputs  # noqa: E402
from torch import Tensor, nn  # noqa: E402


class Parts(NamedTuple):
    low: Tensor
    high: Tensor


class Split(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"parts": Parts(x[:, :2], x[:, 2:]), "count": 3, "mask": x > 0}


class Rounds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


class Awkward(nn.Module):
    """In-place operations behind taps, a layer that runs twice, a nested output, one in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.rounded = Rounds()
        self.split = Split()
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Linear(2, 2)
        self.failing = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        y = self.relu(y - 0.1)
        if self.failing:
            raise StopError
        self.rounded(y).mul_(2)
        parts = self.split(y)["parts"]
        y += 1
        parts.low.mul_(2)
        return self.drop(y).mean((2, 3))


def awkward() -> Awkward:
    torch.manual_seed(0)
    return Awkward().eval()


def clones(model: nn.Module, x: Tensor, **names: str) -> dict[str, Any]:
    """Every output of every module, cloned in place by plain hooks."""
    found: dict[str, list[Any]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = torch.utils._pytree.tree_map(
                lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, output
            )
            found.setdefault(name, []).append(output)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def hooks_of(model: nn.Module) -> list[Any]:
    return [
        (name, list(m._forward_hooks.values()), list(m._forward_pre_hooks.values()), m.training)
        for name, m in model.named_modules()
    ]


def references(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What `Awkward` gives for `x` where the contract taps it."""
    found = clones(model, x)
    split = found["split"][0]
    tensors = {
        "conv": found["conv"][0],
        "relu": found["relu"][0],
        "relu#2": found["relu"][1],
        "rounded": found["rounded"][0],
        "split[parts][low]": split["parts"].low,
        "split[parts][high]": split["parts"].high,
        "split[mask]": split["mask"],
    }
    return {name: in_numpy(tensor.cpu()) for name, tensor in tensors.items()}


def in_numpy(tensor: Tensor) -> Any:
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)


def alive() -> int:
    """Bytes of all tensors that there are."""
    return sum(found.nbytes for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter))


class TestTorch(BackendContract):
    def subject(self) -> Subject:
        model = awkward()
        return Subject(
            model,
            ["conv", "re:relu", "rounded", "type:Split"],
            torch.from_numpy,
            lambda values: references(model, torch.from_numpy(values)),
            lambda output: output.detach().numpy(),
            lambda: hooks_of(model),
            lambda on: setattr(model, "failing", on),
            held=alive,
        )


def test_gradients_are_those_of_the_model_alone(tmp_path):
    def gradients(model: nn.Module, run: Any) -> list[Tensor]:
        run(torch.from_numpy(inputs(4))).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))

    plain, tapped = network(), network()
    expected = gradients(plain, plain)
    with lt.record(tapped, tmp_path / "s", "**") as rec:
        tapped(torch.from_numpy(inputs(4, 1)))
        got = gradients(tapped, rec)
    assert len(got) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_captured_memory_takes_no_part_in_the_graph(tmp_path):
    model = awkward()
    with lt.record(model, tmp_path / "s", ["conv"]) as rec:
        for seed in range(3):
            rec(torch.from_numpy(inputs(4, seed)))
        views = [view for views in rec._session._memory._views.values() for view in views]
        assert views
        assert not any(view.requires_grad or view.grad_fn for view in views)


def test_the_models_mode_is_given_back_module_by_module(tmp_path):
    model = awkward().train()
    model.conv.eval()
    lt.record_dataset(model, inputs(4), tmp_path / "s", ["conv"])
    assert model.training
    assert model.drop.training
    assert not model.conv.training
    with pytest.raises(lt.PlanError):
        lt.record_dataset(model, inputs(4), tmp_path / "t", ["conv"], memory="1KiB")
    assert model.training


def test_a_data_set_is_run_in_evaluation_mode_and_a_loop_in_the_models_own(tmp_path):
    model = awkward().train()
    run = lt.record_dataset(model, inputs(4), tmp_path / "s", ["drop"])
    assert np.array_equal(
        run["drop"][...], clones(model.eval(), torch.from_numpy(inputs(4)))["drop"][0].numpy()
    )
    model.train()
    with lt.record(model, tmp_path / "t", ["drop"]) as rec:
        rec(torch.from_numpy(inputs(4)))
    assert (lt.open(tmp_path / "t")["drop"][...] == 0).mean() > 0.3


def test_calling_the_model_itself_is_captured_and_calling_a_part_of_it_is_not(tmp_path):
    model = awkward()
    x = torch.from_numpy(inputs(4))
    with lt.record(model, tmp_path / "s", ["conv"]) as rec:
        model(x)
        rec.annotate(label=[0, 1, 2, 3])
        model.conv(x * 2)
        model(x)
        rec.annotate(label=[4, 5, 6, 7])
    run = lt.open(tmp_path / "s")
    assert run.rows["label"][...].tolist() == list(range(8))
    assert np.array_equal(run["conv"][:4], run["conv"][4:])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 16])
def test_any_batch_size_gives_the_same_rows(tmp_path, batch_size):
    model, values = awkward(), inputs(10)
    run = lt.record_dataset(model, values, tmp_path / "s", ["split[parts][high]"], batch_size=batch_size)
    batches = [values[i : i + batch_size] for i in range(0, 10, batch_size)]
    expected = [clones(model, torch.from_numpy(b))["split"][0]["parts"].high for b in batches]
    assert np.array_equal(run["split[parts][high]"][...], torch.cat(expected).numpy())


def test_no_hook_is_there_where_nothing_is_chosen(tmp_path):
    model = awkward()
    before = hooks_of(model)
    with (
        pytest.raises(lt.SelectionError, match="no layers were asked for"),
        lt.record(model, tmp_path / "s", []),
    ):
        pass
    assert hooks_of(model) == before


def test_hooks_go_on_all_or_none(tmp_path, monkeypatch):
    model = awkward()
    before = hooks_of(model)

    def refuses(hook: Any) -> None:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(model.relu, "register_forward_hook", refuses)
    with (
        pytest.raises(RuntimeError, match="no hooks here"),
        lt.record(model, tmp_path / "s", ["conv", "relu"]),
    ):
        pass
    assert hooks_of(model) == before


def test_a_layer_that_does_not_run_is_named_with_a_remedy(tmp_path):
    with pytest.raises(lt.CaptureError, match=r"unused \(Linear\) did not run"):
        lt.record_dataset(awkward(), inputs(4), tmp_path / "s", ["conv", "unused"])
    assert not (tmp_path / "s").exists()


def test_a_call_or_a_part_that_is_not_there_is_named(tmp_path):
    with pytest.raises(lt.CaptureError, match=r"no relu#3 .* it gave relu, relu#2"):
        lt.record_dataset(awkward(), inputs(4), tmp_path / "s", ["relu#3"])
    with pytest.raises(lt.CaptureError, match=r"no split\[logits\]"):
        lt.record_dataset(awkward(), inputs(4), tmp_path / "s", ["split[logits]"])


def test_one_call_of_a_layer_can_be_chosen(tmp_path):
    run = lt.record_dataset(awkward(), inputs(4), tmp_path / "s", ["relu#2"])
    assert list(run.taps) == ["relu#2"]


class Loops(nn.Module):
    """Calls its layer as often as its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ReLU()
        self.once = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x[0, 0])):
            x = self.layer(x)
        if x[0, 1] > 0:
            x = self.once(x)
        return x


def test_a_layer_that_is_called_more_often_than_at_first_is_an_error(tmp_path):
    model = Loops()
    with (
        pytest.raises(lt.CaptureError, match="called 3 times"),
        lt.record(model, tmp_path / "s", "layer") as rec,
    ):
        rec(torch.full((4, 2), 2.0))
        rec(torch.full((4, 2), 3.0))


def test_a_layer_that_stops_firing_is_an_error_and_committed_rows_stay(tmp_path):
    model = Loops()
    with (
        pytest.raises(lt.CaptureError, match="layer#2 fired in the first forward"),
        lt.record(model, tmp_path / "s", "layer") as rec,
    ):
        rec(torch.full((4, 2), 2.0))
        rec(torch.full((4, 2), 1.0))


def test_an_output_that_is_no_tensor_any_more_is_named(tmp_path):
    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Wraps()

        def forward(self, x: Tensor) -> Any:
            return self.inner(x)

    class Wraps(nn.Module):
        wrap = False

        def forward(self, x: Tensor) -> Any:
            return (x,) if self.wrap else x

    model = Gives()
    with (
        pytest.raises(lt.CaptureError, match="inner is a tuple this time, not a tensor"),
        lt.record(model, tmp_path / "s", "inner") as rec,
    ):
        rec(torch.ones(4, 2))
        rec(torch.ones(4, 2))
        model.inner.wrap = True
        rec(torch.ones(4, 2))


def test_tensors_that_a_store_cannot_hold_are_refused_with_the_reason(tmp_path):
    class Gives(nn.Module):
        def __init__(self, make: Any) -> None:
            super().__init__()
            self.inner = nn.Identity()
            self.make = make

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.make(x))

    for make, words in (
        (lambda x: x.to_sparse(), "sparse"),
        (lambda x: x.to("meta"), "meta device"),
        (lambda x: x.sum(), r"shape \(\)"),
        (lambda x: x[:1], "4 rows"),
        (lambda x: x.to(torch.float8_e5m2fnuz), "float8"),
    ):
        with pytest.raises(lt.CaptureError, match=words):
            lt.record_dataset(Gives(make), np.ones((4, 3), np.float32), tmp_path / "s", ["inner"])
    run = lt.record_dataset(
        Gives(torch.view_as_complex), np.ones((4, 3, 2), np.float32), tmp_path / "c", ["inner"]
    )
    assert run["inner"].dtype == np.complex64


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.int64,
        torch.uint8,
        torch.bool,
    ],
)
def test_every_element_type_comes_back_bit_equal(tmp_path, dtype):
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((x * 50).to(dtype))

    model, values = Cast(), inputs(6)
    run = lt.record_dataset(model, values, tmp_path / "s", ["inner"], batch_size=4)
    expected = (torch.from_numpy(values) * 50).to(dtype)
    assert str(run["inner"].dtype) == str(dtype).removeprefix("torch.")
    assert run["inner"][...].tobytes() == expected.view(torch.uint8).numpy().tobytes()


def test_outputs_that_are_not_contiguous_are_stored_by_their_values(tmp_path):
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(1, 3).to(memory_format=torch.channels_last))

    values = inputs(6)
    run = lt.record_dataset(Turns(), values, tmp_path / "s", ["inner"], batch_size=4)
    assert np.array_equal(run["inner"][...], values.transpose(0, 3, 2, 1))


def test_a_torch_data_set_brings_its_labels_classes_and_normalisation(tmp_path):
    class Normalize:
        mean, std = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]

    class Compose:
        transforms = (Normalize(),)

    class Pictures(torch.utils.data.Dataset):
        classes = ("cat", "dog", "frog")
        transform = Compose()

        def __len__(self) -> int:
            return 7

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            picture = torch.full((3, 8, 8), i / 7)
            return (picture - 0.5) / 0.25, i % 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x).flatten(1)

    run = lt.record_dataset(Model(), Pictures(), tmp_path / "s", ["pool"], batch_size=4)
    assert run.classes == ("cat", "dog", "frog")
    assert run.mean == (0.5, 0.5, 0.5)
    assert run.rows["label"][...].tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert run.rows["prediction"].shape == (7,)
    assert run.rows["picture"][:, 0, 0, 0].tolist() == [round(i / 7 * 255) for i in range(7)]


def test_loader_processes_give_the_same_store(tmp_path):
    from layertap.capture.testing import contents

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 11

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return torch.from_numpy(inputs(1, i)[0]), i

    model = awkward()
    for name, workers in (("a", 0), ("b", 2)):
        lt.record_dataset(model, Samples(), tmp_path / name, ["conv"], batch_size=4, workers=workers)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_dicts_of_inputs_go_to_the_model_by_name(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add = nn.Identity()

        def forward(self, *, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
            return {"logits": self.add(tokens * mask).float()}

    samples = [{"tokens": np.arange(5) + i, "mask": np.arange(5) % 2, "label": i} for i in range(6)]
    run = lt.record_dataset(Model(), samples, tmp_path / "s", ["add"], batch_size=4)
    assert run["add"][2].tolist() == [0, 3, 0, 5, 0]
    assert run.rows["label"][...].tolist() == list(range(6))
    assert run.rows["prediction"][0] == 3


def test_a_stream_is_refused_with_the_way_out(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            yield torch.zeros(3)

    with pytest.raises(lt.DataError, match=r"record\(\) with a loop"):
        lt.record_dataset(awkward(), Stream(), tmp_path / "s", ["conv"])


def test_other_weights_are_another_run(tmp_path):
    model = awkward()
    lt.record_dataset(model, inputs(4), tmp_path / "s", ["conv"])
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] += 1
    with pytest.raises(lt.StoreExistsError, match="weights"):
        lt.record_dataset(model, inputs(4), tmp_path / "s", ["conv"])


def test_one_copy_for_each_tap_and_step_and_none_of_the_whole(tmp_path, monkeypatch):
    """Counted: what a step copies is its taps, once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counts(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.copies: list[int] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default:
                self.copies.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    model, values = awkward(), torch.from_numpy(inputs(16))
    with lt.record(model, tmp_path / "s", ["conv", "relu"]) as rec:
        for i in range(0, 8, 4):
            rec(values[i : i + 4])
        with Counts() as counts, torch.no_grad():
            rec(values[8:12])
            model(values[12:16])
    assert counts.copies == [4 * 4 * 16 * 16] * 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestTorchOnCuda(TestTorch):
    def subject(self) -> Subject:
        on_host = super().subject()
        model = on_host.model.cuda()
        return Subject(
            model,
            on_host.layers,
            lambda values: torch.from_numpy(values).cuda(),
            lambda values: references(model, torch.from_numpy(values).cuda()),
            lambda output: output.detach().cpu().numpy(),
            on_host.traces,
            on_host.fail,
            held=alive,
        )


def test_columns_may_be_tensors(tmp_path):
    with lt.record(awkward(), tmp_path / "s", ["conv"], mean=[0.5] * 3, std=[0.25] * 3) as rec:
        for seed in range(2):
            logits = rec(torch.from_numpy(inputs(4, seed)))
            pictures = (torch.full((4, 3, 5, 5), 0.2) - 0.5) / 0.25
            rec.annotate(
                label=torch.arange(4), prediction=logits.argmax(1), score=logits.half(), input=pictures
            )
    run = lt.open(tmp_path / "s")
    assert run.rows["label"][...].tolist() == [0, 1, 2, 3] * 2
    assert run.rows["label"].dtype == np.int64
    assert run.rows["score"].shape == (8, 4)
    assert run.rows["score"].dtype == np.float16
    assert (run.rows["picture"][...] == 51).all()


def test_a_model_that_keeps_something_from_a_capture_can_be_trained_after_it(tmp_path):
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)
            self.table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.ones(16) * 2
            return self.layer(x.flatten(1)[:, :16] * self.table)

    model = Caches()
    lt.record_dataset(model, inputs(4), tmp_path / "s", ["layer"])
    x = torch.from_numpy(inputs(4)).requires_grad_()
    model(x).sum().backward()
    assert model.layer.weight.grad is not None


def test_a_model_of_several_inputs_in_a_tuple_counts_the_rows_of_the_first(tmp_path):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add = nn.Identity()

        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return self.add(pair[0] + pair[1])

    with lt.record(Pair(), tmp_path / "s", "add") as rec:
        rec((torch.ones(5, 3), torch.ones(5, 3)))
    assert lt.open(tmp_path / "s")["add"].shape == (5, 3)


def test_an_output_whose_rows_do_not_come_first_names_the_way_to_choose(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    data = np.ones((6, 5, 4), np.float32)
    with pytest.raises(lt.CaptureError, match=r"layers on its first axis.*Choose lstm\[0\]"):
        lt.record_dataset(Recurrent(), data, tmp_path / "s", ["lstm"])
    assert lt.record_dataset(Recurrent(), data, tmp_path / "s", ["lstm[0]"])["lstm[0]"].shape == (6, 5, 3)
