"""Inputs, gradients and attention of torch models equal what plain torch gives."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import layertap as lt
import numpy as np
import pytest
from layertap.capture.testing import contents

torch = pytest.importorskip("torch")

from layertap.backends.torch_attention import weights_of  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Answer(OrderedDict):
    """As the outputs of transformers are: a dict whose keys are attributes too."""

    logits: Tensor
    hidden: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        for key in ("logits", "hidden"):
            super().__setitem__(key, self.__dict__[key])

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Mixes(nn.Module):
    """Takes a position, a name and a container, and changes what it got."""

    def forward(self, x: Tensor, pair: Pair, *, mask: Tensor, flag: bool = True) -> dict[str, Any]:
        y = x * mask + pair.left
        x.zero_()
        return {"sum": y, "parts": [pair.right * 2, y + 1]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.mixes = Mixes()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Answer:
        y = self.relu(self.stem(x))
        z = self.relu(y - 0.3)
        mixed = self.mixes(z.clone(), Pair(y * 2, y * 3), mask=z > 0)
        y = y + mixed["parts"][0] + mixed["sum"]
        return Answer(self.head(y), (y, z))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def rows(n: int = 22) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((n, 4), np.float32)


def whole(values: list[Tensor]) -> np.ndarray[Any, Any]:
    return torch.cat(values).numpy()


# Inputs


def given(model: nn.Module, values: Any) -> dict[str, list[Tensor]]:
    """What each layer gets, cloned by plain pre-hooks, in batches of 4."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            parts = {"": args[0]}
            if name == "mixes":
                parts = {"[0]": args[0], "[1][left]": args[1].left, "[1][right]": args[1].right}
                parts["[mask]"] = kwargs["mask"]
            call = calls[name] = calls.get(name, 0) + 1
            for path, value in parts.items():
                tap = f"{name}{f'#{call}' if call > 1 else ''}:input{path}"
                found.setdefault(tap, []).append(value.detach().clone())

        return hook

    handles = [
        module.register_forward_pre_hook(keep(name or "."), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    for batch in torch.from_numpy(values).split(4):
        calls: dict[str, int] = {}
        with torch.no_grad():
            model(batch)
    for handle in handles:
        handle.remove()
    return found


INPUTS = [
    *(".:input", "stem:input", "relu:input", "relu#2:input", "head:input"),
    *("mixes:input[0]", "mixes:input[1][left]", "mixes:input[1][right]", "mixes:input[mask]"),
]


def test_inputs_are_those_before_the_layer_changes_them(tmp_path):
    model = net()
    expected = given(model, rows())
    run = lt.record_dataset(model, rows(), tmp_path / "s", "**:input", batch_size=4)
    assert sorted(run.taps) == sorted(INPUTS) == sorted(expected)
    for name, values in expected.items():
        assert np.array_equal(run[name][...], whole(values)), name
        assert run[name].kind == "input"
    assert run["mixes:input[mask]"].dtype == np.bool_
    assert not np.array_equal(run["relu:input"][...], relu_of(model))  # the ReLU overwrites what it got


def relu_of(model: Net) -> Any:
    with torch.no_grad():
        return torch.relu(model.stem(torch.from_numpy(rows()))).numpy()


@pytest.mark.parametrize(
    ("patterns", "taps"),
    [
        (["mixes:input[1]"], ["mixes:input[1][left]", "mixes:input[1][right]"]),
        (["mixes:input[mask]"], ["mixes:input[mask]"]),
        (["relu#2:input"], ["relu#2:input"]),
        (["re:re.u:input", "relu"], ["relu:input", "relu#2:input", "relu", "relu#2"]),
        (["type:Linear:input"], ["stem:input", "head:input"]),
        ([(lambda name, module: name == "head", ":input"), "head"], ["head:input", "head"]),
        ((lambda name, module: name == "head", ":input"), ["head:input"]),
        (["*:input", "!type:Linear", "!mixes:input", "!relu:output"], ["relu:input", "relu#2:input"]),
        (["head", "head:input", "!head:input"], ["head"]),
        (["mixes[parts][1]", "mixes:input[1][right]"], ["mixes:input[1][right]", "mixes[parts][1]"]),
    ],
)
def test_a_kind_stands_behind_any_pattern(tmp_path, patterns, taps):
    run = lt.record_dataset(net(), rows(6), tmp_path / "s", patterns, batch_size=4)
    assert list(run.taps) == taps


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("stem:inputs", "no layer matches 'stem:inputs'.*Behind a colon comes input, attention"),
        ("sten:input", "no layer matches 'sten:input'. The closest are: stem"),
        ((lambda name, module: True, ":gradient"), "':gradient' is no kind of tap"),
        ("type:Conv2d:input", "no layer has the type of 'type:Conv2d:input'"),
    ],
)
def test_a_kind_or_layer_that_is_not_there_is_named(tmp_path, pattern, words):
    with pytest.raises(lt.SelectionError, match=words):
        lt.record_dataset(net(), rows(4), tmp_path / "s", [pattern])


def test_a_part_of_an_input_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        lt.CaptureError, match=r"no mixes:input\[2\] in the first forward; it gave mixes:input"
    ):
        lt.record_dataset(net(), rows(4), tmp_path / "s", ["mixes:input[2]"])


def test_a_layer_that_gets_no_tensor_says_so(tmp_path):
    class Constant(nn.Module):
        def forward(self) -> Tensor:
            return torch.ones(4, 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant = Constant()

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2] + self.constant()

    with pytest.raises(lt.CaptureError, match=r"constant \(Constant\) got no tensor"):
        lt.record_dataset(Model(), rows(4), tmp_path / "s", ["constant:input"])


def test_an_output_that_is_dict_and_dataclass_at_once_has_paths_for_every_kind(tmp_path):
    run = lt.record_dataset(net(), rows(6), tmp_path / "s", [".", ".:grad[logits]"], batch_size=4, score=1)
    assert list(run.taps) == [".[logits]", ".[hidden][0]", ".[hidden][1]", ".:grad[logits]"]
    assert run[".:grad[logits]"][...].tolist() == [[0, 1, 0]] * 6
    assert run.rows["prediction"].shape == (6,)


# Gradients


class Cam(nn.Module):
    """In-place operations and a view behind the tapped layers, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Linear(4, 6)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.early(x)))
        y = self.relu(y - 0.1)
        y = y * 2
        y += 1
        out, (state, _) = self.lstm(y[:, None])
        return self.head(out[:, 0] * state[0].tanh())


def cam() -> Cam:
    torch.manual_seed(1)
    return Cam().eval()


GRADS = ["early:grad", "relu:grad", "relu#2:grad", "norm:grad", "lstm:grad[0]", "head:grad"]


def gradients(model: nn.Module, values: Any, score: Any) -> dict[str, list[Tensor]]:
    """Gradients by plain tensor hooks and backward(), in batches of 4."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if name == "lstm" else output
            call = calls[name] = calls.get(name, 0) + 1
            tap = f"{name}{f'#{call}' if call > 1 else ''}:grad{'[0]' if name == 'lstm' else ''}"
            tensor.register_hook(lambda g: found.setdefault(tap, []).append(g.clone()))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    start = 0
    for batch in torch.from_numpy(values).split(4):
        calls: dict[str, int] = {}
        score(model(batch), slice(start, start + 4)).sum().backward()
        start += 4
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return found


LABELS = np.arange(22) % 3


@pytest.mark.parametrize(
    ("score", "plain"),
    [
        (None, lambda out, rows: out.amax(1)),
        ("prediction", lambda out, rows: out.amax(1)),
        (2, lambda out, rows: out[:, 2]),
        (0, lambda out, rows: out[:, 0]),
        ("label", lambda out, rows: out.gather(1, torch.as_tensor(LABELS[rows])[:, None])),
        (lambda out: out.square().sum(1), lambda out, rows: out.square().sum(1)),
    ],
)
def test_gradients_of_a_data_set_are_those_of_a_plain_backward_pass(tmp_path, score, plain):
    model = cam()
    expected = gradients(model, rows(), plain)
    patterns = ["early:grad", "relu:grad", "norm:grad", "lstm:grad[0]", "head:grad", "relu"]
    run = lt.record_dataset(model, (rows(), LABELS), tmp_path / "s", patterns, batch_size=4, score=score)
    assert set(expected) == set(GRADS) == set(run.taps) - {"relu", "relu#2"}
    for name in GRADS:
        assert np.allclose(run[name][...], whole(expected[name]), atol=1e-7), name
    assert np.array_equal(run["early:grad"][...], whole(expected["early:grad"]))


def test_a_data_sets_gradients_leave_the_model_as_it_was(tmp_path):
    model = cam().train()
    model.head.bias.requires_grad_(False)
    model.early.weight.grad = torch.ones_like(model.early.weight)
    learn = [p.requires_grad for p in model.parameters()]
    lt.record_dataset(model, rows(), tmp_path / "s", ["**:grad", "!lstm", "!."], batch_size=4)
    assert [p.requires_grad for p in model.parameters()] == learn
    assert model.training
    assert torch.equal(model.early.weight.grad, torch.ones_like(model.early.weight))
    assert all(p.grad is None for p in model.parameters() if p is not model.early.weight)
    with pytest.raises(lt.DataError, match="has no labels"):
        lt.record_dataset(model, rows(), tmp_path / "t", ["head:grad"], score="label")
    assert [p.requires_grad for p in model.parameters()] == learn


def test_the_graph_of_a_data_set_begins_at_the_tapped_layer(tmp_path):
    """Counted: no backward function of what runs before it is made, and nothing is saved for it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.tapped, self.after = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.before(x)
            made.append(y.grad_fn is not None)
            return self.after(self.tapped(y))

    made: list[bool] = []
    saved: list[Tensor] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    model = Model()
    with keep:
        lt.record_dataset(model, rows(8), tmp_path / "s", ["tapped:grad"], batch_size=4)
    assert made == [False, False]
    assert all(
        t is model.after.weight or t.data_ptr() == model.after.weight.data_ptr() or t.ndim == 2 for t in saved
    )
    assert sum(t.shape == (4, 4) for t in saved) == 0


def test_a_graph_is_gone_before_the_next_forward(tmp_path):
    """Counted: what graphs have saved, as the next forward begins."""

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            saved.add(self)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tapped, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            alive.append(len(saved))
            return self.head(self.tapped(x).tanh())

    saved: weakref.WeakSet[Saved] = weakref.WeakSet()
    alive: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda one: one.tensor):
        lt.record_dataset(Model(), rows(40), tmp_path / "s", ["tapped:grad"], batch_size=4)
    assert alive == [0] * 10


def test_a_model_of_frozen_weights_and_tokens_has_gradients(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> dict[str, Tensor]:
            y = self.embed(tokens)
            y *= 2  # in place, on what is a leaf of the graph
            return {"logits": self.head(y.mean(1))}

    model = Model().eval().requires_grad_(False)
    tokens = np.arange(18).reshape(6, 3) % 10
    run = lt.record_dataset(model, tokens, tmp_path / "s", ["embed:grad"], batch_size=4, score=1)
    expected = (2 * model.head.weight[1] / 3).expand(6, 3, 4).numpy()
    assert np.allclose(run["embed:grad"][...], expected)


@pytest.mark.parametrize("options", [{}, {"dtype": "float16", "codec": "zstd"}])
def test_gradients_of_a_loop_are_captured_as_the_loop_runs_backward(tmp_path, options):
    plain, tapped = cam(), cam()
    expected = gradients(plain, rows(), lambda out, rows: out.square().sum(1))
    optimizer = torch.optim.SGD(tapped.parameters(), lr=0.0)
    layers = ["early", "early:grad", "relu:grad", "lstm:grad[0]"]
    with lt.record(tapped, tmp_path / "s", layers, memory="4MiB", **options) as rec:
        for batch in torch.from_numpy(rows()).split(4):
            optimizer.zero_grad()
            out = rec(batch)
            out.square().sum().backward()
            rec.annotate(prediction=out.argmax(1))
            optimizer.step()
            assert tapped.head.weight.grad is not None
    run = lt.open(tmp_path / "s")
    assert run.info["score"] is None
    for name in ("early:grad", "relu:grad", "relu#2:grad", "lstm:grad[0]"):
        values = whole(expected[name])
        assert np.array_equal(run[name][...], values.astype(run[name].dtype)), name


def test_a_loop_without_a_backward_pass_names_the_tap(tmp_path):
    for n in (1, 2):
        with (
            pytest.raises(
                lt.CaptureError, match=r"no gradient came to early:grad in its step: call backward"
            ),
            lt.record(cam(), tmp_path / str(n), ["early:grad"]) as rec,
        ):
            for i in range(3):
                out = rec(torch.from_numpy(rows(4)))
                if i < n - 1:
                    out.sum().backward()


def test_a_loop_under_no_grad_is_told_so(tmp_path):
    with (
        pytest.raises(lt.CaptureError, match=r"early:grad can have no gradient.*under torch.no_grad"),
        torch.no_grad(),
        lt.record(cam(), tmp_path / "s", ["early:grad"]) as rec,
    ):
        rec(torch.from_numpy(rows(4)))


@pytest.mark.parametrize("first", [True, False])
def test_two_backward_passes_in_one_step_are_refused(tmp_path, first):
    with (
        pytest.raises(lt.CaptureError, match=r"early:grad came a second time in one step"),
        lt.record(cam(), tmp_path / "s", ["early:grad"]) as rec,
    ):
        if not first:
            rec(torch.from_numpy(rows(4))).sum().backward()
        out = rec(torch.from_numpy(rows(4)))
        out[:, 0].sum().backward(retain_graph=True)
        out[:, 1].sum().backward()


def test_a_backward_pass_after_the_recording_or_a_step_later_changes_nothing(tmp_path):
    x = torch.from_numpy(rows(4))
    old = []
    with lt.record(cam(), tmp_path / "s", ["early:grad"]) as rec:
        for factor in (1, 2, 3):
            out = rec(x * factor)
            out.sum().backward(retain_graph=True)
            for before in old:
                before.sum().backward(retain_graph=True)
            old.append(out)
    out.sum().backward()
    got = lt.open(tmp_path / "s")["early:grad"]
    for i, factor in enumerate((1, 2, 3)):
        expected = gradients(cam(), (x * factor).numpy(), lambda out, rows: out)["early:grad"][0]
        assert np.array_equal(got[4 * i : 4 * i + 4], expected.numpy())


@pytest.mark.parametrize(
    ("score", "error", "words"),
    [
        (7, lt.CaptureError, "has no class 7: it gives 3 logits a row"),
        (-1, lt.PlanError, "no score -1"),
        ("labels", lt.PlanError, "no score 'labels'; it is 'prediction', 'label', the number of a class"),
        (lambda out: out, lt.CaptureError, r"gave a tensor of shape \(4, 3\).*one value a row"),
        (lambda out: out.detach().sum(1), lt.CaptureError, "depends on none of the layers"),
    ],
)
def test_a_score_that_cannot_be_is_refused(tmp_path, score, error, words):
    with pytest.raises(error, match=words):
        lt.record_dataset(cam(), rows(4), tmp_path / "s", ["early:grad"], score=score)
    assert not (tmp_path / "s").exists()


def test_a_score_without_a_gradient_is_refused(tmp_path):
    with pytest.raises(lt.PlanError, match="no layer is tapped for its gradient"):
        lt.record_dataset(cam(), rows(4), tmp_path / "s", ["early"], score=1)


def test_a_model_without_logits_needs_a_score_of_its_own(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    images = np.random.default_rng(0).standard_normal((4, 1, 8, 8), np.float32)
    with pytest.raises(
        lt.CaptureError, match=r"gives a tensor of shape \(4, 2, 6, 6\).*give score= a callable"
    ):
        lt.record_dataset(model, images, tmp_path / "s", ["0:grad"])
    run = lt.record_dataset(model, images, tmp_path / "s", ["0:grad"], score=lambda out: out.sum((1, 2, 3)))
    with torch.no_grad():
        on = model[0](torch.from_numpy(images)) > 0
    assert np.array_equal(run["0:grad"][...], on.numpy())


def test_gradients_that_the_score_does_not_need_or_that_are_cut_off_are_named(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.cut, self.head = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.side(x)
            with torch.no_grad():
                y = self.cut(x)
            return self.head(y)

    with pytest.raises(
        lt.CaptureError, match="no gradient came to side:grad: the score does not depend on it"
    ):
        lt.record_dataset(Model(), rows(4), tmp_path / "s", ["side:grad", "head:grad"])
    with pytest.raises(lt.CaptureError, match=r"cut:grad can have no gradient: the model runs .*no_grad"):
        lt.record_dataset(Model(), rows(4), tmp_path / "s", ["cut:grad"])


def test_the_score_is_part_of_the_plan_and_killed_captures_go_on(tmp_path):
    def capture(path: Path, **options: Any) -> lt.Run:
        return lt.record_dataset(
            cam(), (rows(), LABELS), path, ["relu:grad"], batch_size=4, memory="1100KiB", **options
        )

    run = capture(tmp_path / "s", score="label")
    assert run.info["score"] == "label"
    with pytest.raises(lt.StoreExistsError, match=r"score of the gradients: label there, prediction now"):
        capture(tmp_path / "s")
    before = contents(tmp_path / "s")
    assert run.manifest.n_blocks > 1
    for part in ("2/2", "1/2"):
        capture(tmp_path / "parts", score="label", part=part)
    assert contents(tmp_path / "parts") == before
    (tmp_path / "s" / "commits" / "c.1.0").unlink()
    capture(tmp_path / "s", score="label")
    assert contents(tmp_path / "s") == before


# Attention


class Attends(nn.Module):
    """Attention of every kind that torch has."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(8, 4, dropout=0.3, **options)
        self.plain = Plain()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        pad = torch.zeros(len(x), 5, dtype=torch.bool)
        pad[:, 4] = True
        y = x if self.heads.batch_first else x.transpose(0, 1)
        y = self.heads(y, y * 2, value=y, attn_mask=mask, key_padding_mask=pad, need_weights=False)[0]
        y = y if self.heads.batch_first else y.transpose(0, 1)
        return self.head(self.plain(y).mean(1))


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.view(len(x), 5, 4, 2).transpose(1, 2)
        k = v = q[:, :2]
        y = F.scaled_dot_product_attention(q, q * 2, q, is_causal=True)
        mask = torch.arange(5) != 3
        bias = torch.linspace(-1, 1, 25).view(5, 5)
        y = y + F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], scale=0.7, enable_gqa=True)
        y = y + F.scaled_dot_product_attention(query=q, key=q, value=q, attn_mask=bias, dropout_p=0.0)
        return y.transpose(1, 2).reshape(x.shape)


def sequences(n: int = 6) -> np.ndarray[Any, Any]:
    return np.random.default_rng(2).standard_normal((n, 5, 8), np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"batch_first": False},
        {"batch_first": True, "bias": False, "add_bias_kv": True, "add_zero_attn": True},
        {"batch_first": True, "kdim": 8, "vdim": 8},
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_weights_of_multihead_attention_are_those_that_torch_gives(tmp_path, options, training):
    torch.manual_seed(0)
    model = Attends(**options).train(training)
    got: list[Tensor] = []

    def ask(module: Any, args: Any, kwargs: Any) -> None:
        was, module.training = module.training, False
        kwargs = {**kwargs, "need_weights": True, "average_attn_weights": False}
        got.append(module.forward(*args, **kwargs)[1])
        module.training = was

    handle = model.heads.register_forward_pre_hook(ask, with_kwargs=True)
    with torch.no_grad():
        for batch in torch.from_numpy(sequences()).split(4):
            model(batch)
    handle.remove()
    with torch.no_grad(), lt.record(model, tmp_path / "s", ["heads:attention"]) as rec:
        state = torch.get_rng_state()
        for batch in torch.from_numpy(sequences()).split(4):
            rec(batch)
        with_taps = torch.rand(())
    run = lt.open(tmp_path / "s")
    assert np.array_equal(run["heads:attention"][...], whole(got))
    assert run["heads:attention"].shape[:3] == (6, 4, 5)
    assert run["heads:attention"].dims == ("row", "head", "query", "key")
    torch.set_rng_state(state)
    with torch.no_grad():
        for batch in torch.from_numpy(sequences()).split(4):
            model(batch)
    assert torch.equal(with_taps, torch.rand(()))  # the weights drew no random number


def test_attention_inside_a_module_is_named_by_the_module_and_its_calls(tmp_path):
    torch.manual_seed(0)
    model = Attends(batch_first=True).eval()
    calls: list[tuple[Any, Any]] = []
    plain = F.scaled_dot_product_attention

    class Notes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is plain:
                calls.append((args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Notes():
        model(torch.from_numpy(sequences()))
    calls = [call for call in calls if "attn_mask" not in call[1] or call[1].get("dropout_p") is not None][
        -3:
    ]
    run = lt.record_dataset(model, sequences(), tmp_path / "s", ["plain:attention"], batch_size=4)
    names = ["plain:attention", "plain#2:attention", "plain#3:attention"]
    assert list(run.taps) == names
    for name in names:
        weights = run[name][...]
        assert weights.shape == (6, 4, 5, 5)
        assert np.allclose(weights.sum(-1), 1, atol=1e-6)
    assert (run[names[0]][...][:, :, 0, 1:] == 0).all()  # causal
    assert (run[names[1]][...][..., 3] == 0).all()  # masked
    one = lt.record_dataset(model, sequences(), tmp_path / "t", ["plain#2:attention"], batch_size=4)
    assert np.array_equal(one[names[1]][...], run[names[1]][...])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.arange(6)[None] != 2},
        {"attn_mask": torch.zeros(5, 6, dtype=torch.bool)},
        {"attn_mask": torch.linspace(-3, 3, 30).view(5, 6)},
        {"attn_mask": torch.arange(6).expand(3, 4, 1, 6) > 1},
        {"enable_gqa": True},
        {"enable_gqa": True, "is_causal": True, "scale": 2.0},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_recomputed_weights_give_the_output_and_are_those_of_torchs_own_formula(options, dtype):
    torch.manual_seed(0)
    heads = 2 if options.get("enable_gqa") else 4
    q = torch.randn(3, 4, 5, 8, dtype=dtype)
    k, v = torch.randn(3, heads, 6, 8, dtype=dtype), torch.randn(3, heads, 6, 8, dtype=dtype)
    options = dict(options)
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    weights = weights_of(q, k, v, **options)
    assert weights.shape == (3, 4, 5, 6)
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    theirs = torch._scaled_dot_product_attention_math(
        *(q, k, v, mask, 0.0, options.get("is_causal", False)),
        scale=options.get("scale"),
        enable_gqa=options.get("enable_gqa", False),
    )[1]
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    assert torch.allclose(weights, theirs, atol=tolerance)
    output = weights @ v.repeat_interleave(4 // heads, 1)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    assert torch.allclose(output, expected, atol=10 * tolerance)


def test_attention_that_is_not_there_says_where_some_is(tmp_path):
    model = Attends(batch_first=True).eval()
    with pytest.raises(lt.CaptureError, match=r"head \(Linear\) computed no attention that can be seen"):
        lt.record_dataset(model, sequences(), tmp_path / "s", ["head:attention"])
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    around = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3)).eval()
    run = lt.record_dataset(around, sequences(), tmp_path / "t", ["0.self_attn:attention"])
    assert run["0.self_attn:attention"].shape == (6, 2, 5, 5)
    with pytest.raises(
        lt.CaptureError, match=r"0 \(TransformerEncoderLayer\).*There is some in 0\.self_attn"
    ):
        lt.record_dataset(around, sequences(), tmp_path / "u", ["0:attention"])


def test_sequences_that_come_first_are_refused_and_their_weights_are_not(tmp_path):
    model = Attends(batch_first=False).eval()
    for tap in ("heads[0]", "heads:input[0]", "heads:grad[0]"):
        with pytest.raises(lt.CaptureError, match=r"steps on its first axis.*batch_first=True"):
            lt.record_dataset(model, sequences(5), tmp_path / "s", [tap])
    run = lt.record_dataset(
        model, sequences(5), tmp_path / "s", ["heads:attention", "heads:input[key_padding_mask]"]
    )
    assert run["heads:attention"].shape == (5, 4, 5, 5)


def test_a_forward_that_fails_or_is_interrupted_leaves_no_mode_and_no_forward(tmp_path):
    class Stops(Plain):
        error: type[BaseException] | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.error:
                raise self.error
            return super().forward(x)

    model = nn.Sequential(Stops())
    x = torch.from_numpy(sequences(4))
    before = torch.overrides._get_current_function_mode_stack()
    with lt.record(model, tmp_path / "s", ["0:attention"]) as rec:
        for error in (None, ValueError, KeyboardInterrupt):
            model[0].error = error
            try:
                rec(x)
            except (ValueError, KeyboardInterrupt):
                assert torch.overrides._get_current_function_mode_stack() == before
    assert "forward" not in vars(model[0])
    assert lt.open(tmp_path / "s").n_rows == 4


# Compiled


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(8, 4, batch_first=True)
        self.relu = nn.ReLU(inplace=True)
        self.plain = Plain()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.heads(x, x, x, need_weights=False)[0] + 0.1)
        y = self.relu(lt.tap("shifted", y - 0.2))
        return self.head(self.plain(y).mean(1))


SEEN = ["heads:input", "heads:attention", "relu:input", "shifted", "head", "head:input"]


def compiled_model() -> Compiled:
    torch.manual_seed(0)
    return Compiled().eval()


@pytest.fixture
def _fresh():
    torch.compiler.reset()
    torch.backends.mha.set_fastpath_enabled(False)  # it rounds otherwise, and compiled code does not take it
    yield
    torch.backends.mha.set_fastpath_enabled(True)
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("called_before", [False, True])
def test_inputs_attention_and_lt_tap_work_in_compiled_models_in_as_many_graphs(tmp_path, called_before):
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.from_numpy(sequences(8)).split(4)
    plain = compiled_model()
    with torch.no_grad(), lt.record(plain, tmp_path / "plain", SEEN) as rec:
        for batch in x:
            rec(batch)
    model = compiled_model()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        if called_before:
            compiled(x[0])
        n = len(graphs)
        with lt.record(compiled, tmp_path / "s", SEEN) as rec:
            for batch in x:
                rec(batch)
        assert len(graphs) == n + 1
        compiled(x[0])
        assert len(graphs) == n + (1 if called_before else 2)
        assert not any(
            "layertap" in str(node.target) for node in graphs[0 if called_before else -1].graph.nodes
        )
    assert contents(tmp_path / "s") == contents(tmp_path / "plain")


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("tap", ["relu:grad", "plain:attention", "shifted:grad"])
def test_what_compiled_code_hides_is_refused_in_a_loop_and_captured_in_a_data_set(tmp_path, tap):
    compiled = torch.compile(compiled_model(), backend="eager")
    x = torch.from_numpy(sequences(4))
    with (
        pytest.raises(
            lt.CaptureError, match=r'is compiled, and .*not seen. Run the loop under .*"force_eager"'
        ),
        lt.record(compiled, tmp_path / "s", [tap]) as rec,
    ):
        rec(x).sum().backward()
    run = lt.record_dataset(compiled, sequences(), tmp_path / "a", [tap], batch_size=4)
    plain = lt.record_dataset(compiled_model(), sequences(), tmp_path / "b", [tap], batch_size=4)
    assert list(run.taps) == list(plain.taps)
    for name in run.taps:
        assert np.array_equal(run[name][...], plain[name][...])
