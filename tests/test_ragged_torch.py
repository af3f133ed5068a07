"""Rows that differ in shape, in torch: sequences, detections and pictures, against clones taken in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
import torch
from layertap.capture.testing import contents
from layertap.capture.verify import verify
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

LENGTHS = [(5, 2, 7, 1), (3, 3), (9, 4, 6, 8), (1, 2, 1)]


class Encoder(nn.Module):
    """A transformer of one's own: tokens, two layers, and a line that changes an output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, 8)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.head(x)
        x += 1
        return x


class Convolutions(nn.Module):
    """Takes pictures of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.relu(self.conv(pictures))


def batches(left: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for lengths in LENGTHS:
        longest = max(lengths)
        ids = torch.randint(1, 40, (len(lengths), longest), generator=generator)
        mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
        yield ids, (mask.flip(1) if left else mask).long()


class Clones:
    """What modules give, cloned in place by hooks of the test's own."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for name in names:
            model.get_submodule(name if name != "." else "").register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            self.rows[name] += list(tensor.detach().clone())

        return keep


def record(model: nn.Module, path: Path, layers: list[str], left: bool = False, **options: Any) -> lt.Run:
    with torch.no_grad(), lt.record(model.eval(), path, layers, **options) as rec:
        for ids, mask in batches(left):
            rec(ids, attention_mask=mask)
            rec.annotate(n=mask.sum(1))
    assert not list(verify(path))
    return lt.open(path)


def same(found: np.ndarray, true: Tensor) -> bool:
    array = true.numpy()
    return found.shape == array.shape and found.dtype == array.dtype and found.tobytes() == array.tobytes()


def masks(left: bool = False) -> list[Tensor]:
    return [row.bool() for _, mask in batches(left) for row in mask]


@pytest.mark.parametrize("left", [False, True])
def test_hidden_states_are_those_of_each_rows_own_tokens(tmp_path, left):
    model, names = Encoder(), ["embed", "layers.0", "layers.1", "head"]
    clones = Clones(model, names)
    run = record(model, tmp_path / "run", names, left, ragged="**:9")
    for name in names:
        for i, (row, mask) in enumerate(zip(clones.rows[name], masks(left), strict=True)):
            assert same(run[name][i], row[mask]), (name, i)


def test_a_padded_tap_keeps_all_and_marks_what_is_the_rows_own(tmp_path):
    model = Encoder()
    clones = Clones(model, ["head"])
    tap = record(model, tmp_path / "run", ["head"], True, pad="head:12,-1")["head"]
    for i, (row, mask) in enumerate(zip(clones.rows["head"], masks(True), strict=True)):
        assert same(tap[i][: len(row)], row)
        assert (tap[i][len(row) :] == -1).all()
        assert tap.mask[i].tolist() == mask.tolist() + [False] * (12 - len(mask))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("which", ["first", "last", "mean"])
def test_tokens_are_those_that_the_mask_leaves(tmp_path, which, left):
    model = Encoder()
    clones = Clones(model, ["head"])
    tap = record(model, tmp_path / "run", ["head"], left, reduce=f"tokens:{which}")["head"]
    of: dict[str, Callable[[Tensor], Tensor]] = {
        "first": lambda x: x[0],
        "last": lambda x: x[-1],
        "mean": lambda x: x.double().mean(0),
    }
    for i, (row, mask) in enumerate(zip(clones.rows["head"], masks(left), strict=True)):
        assert np.allclose(tap[i], of[which](row[mask]).numpy(), rtol=1e-5, atol=1e-6), i
        if which != "mean":
            assert same(tap[i], of[which](row[mask])), i


def test_without_a_mask_tokens_are_those_of_the_batch(tmp_path):
    model = Encoder()
    clones = Clones(model, ["head"])
    tap = record(model, tmp_path / "run", ["head"], reduce="tokens:last", mask=None)["head"]
    assert all(same(tap[i], row[-1]) for i, row in enumerate(clones.rows["head"]))


def test_a_mask_is_found_by_position_and_by_another_name(tmp_path):
    class Other(Encoder):
        def forward(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(ids)

    model = Other().eval()
    with torch.no_grad(), lt.record(model, tmp_path / "run", ["head"], ragged="**:9", mask="keep") as rec:
        for ids, mask in batches():
            rec(ids, mask)
    lengths = [n for some in LENGTHS for n in some]
    assert [len(row) for row in lt.open(tmp_path / "run")["head"][:]] == lengths


def test_a_mask_of_another_form_is_refused(tmp_path):
    for n in (1, 2):  # of the first batch, and of a later one
        refused = pytest.raises(lt.CaptureError, match=r"attention_mask has shape \(4, 1, 7\)|\(2, 1, 3\)")
        with refused, torch.no_grad(), lt.record(Encoder(), tmp_path / "run", ["head"], ragged="**:9") as rec:
            for ids, mask in list(batches())[:n]:
                odd = len(LENGTHS[0]) if n == 1 else len(LENGTHS[1])
                rec(ids, attention_mask=mask[:, None] if len(ids) == odd else mask)


def test_a_mask_that_comes_only_later_is_refused(tmp_path):
    refused = pytest.raises(lt.CaptureError, match="the first batch had no mask")
    with refused, torch.no_grad(), lt.record(Encoder(), tmp_path / "run", ["head"], ragged="**:9") as rec:
        for i, (ids, mask) in enumerate(batches()):
            rec(ids, attention_mask=mask if i else None)


@pytest.mark.parametrize("how", [{"ragged": "**:9"}, {"pad": "**:9"}])
@pytest.mark.parametrize("left", [False, True])
def test_a_mask_may_be_annotated_where_the_model_takes_none(tmp_path, how, left):
    model = Encoder().eval()
    record(model, tmp_path / "argument", ["embed", "head"], left, **how)
    with torch.no_grad(), lt.record(model, tmp_path / "annotated", ["embed", "head"], **how) as rec:
        for ids, mask in batches(left):
            rec(ids)
            rec.annotate(attention_mask=mask, n=mask.sum(1))
    assert contents(tmp_path / "annotated") == contents(tmp_path / "argument")


def test_a_batch_is_one_copy_into_its_room(tmp_path):
    class Copies(TorchDispatchMode):
        n_bytes = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.copy_.default and args[0].dtype == torch.float32:
                Copies.n_bytes += args[0].nbytes
            return function(*args, **(kwargs or {}))

    model = Encoder().eval()
    with torch.no_grad(), lt.record(model, tmp_path / "run", ["head"], ragged="**:64") as rec:
        rec(*next(batches()))
        for ids, mask in [next(batches())] * 3:
            rec.annotate(n=mask.sum(1))
            Copies.n_bytes = 0
            with Copies():
                rec(ids, attention_mask=mask)
            # The first of them puts the step before, whose values were kept, in its place as well.
            assert Copies.n_bytes in (ids.numel() * 8 * 4, 2 * ids.numel() * 8 * 4)
        assert Copies.n_bytes == ids.numel() * 8 * 4
        rec.annotate(n=mask.sum(1))


def test_batches_that_do_not_fill_a_slab_lie_behind_each_other(tmp_path):
    model = Convolutions().eval()
    clones = Clones(model, ["conv"])
    sizes = [(4, 8, 9), (3, 5, 12), (4, 9, 4), (1, 3, 3), (2, 12, 12), (6, 7, 7)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), lt.record(model, tmp_path / "run", ["conv"], ragged="conv:12") as rec:
        for n, height, width in sizes:
            rec(torch.randn(n, 3, height, width, generator=generator))
    tap = lt.open(tmp_path / "run")["conv"]
    assert all(same(tap[i], row) for i, row in enumerate(clones.rows["conv"]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ragged_rows_are_cast_in_the_copy(tmp_path, dtype):
    model = Encoder()
    clones = Clones(model, ["head"])
    tap = record(model, tmp_path / "run", ["head"], ragged="**:9", dtype=dtype)["head"]
    assert str(tap.dtype) == dtype
    for i, (row, mask) in enumerate(zip(clones.rows["head"], masks(), strict=True)):
        assert np.array_equal(tap[i].astype(np.float32), row[mask].to(getattr(torch, dtype)).float().numpy())


def test_a_fully_convolutional_net_over_a_data_set_of_two_sizes(tmp_path):
    class Two(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 14

        def __getitem__(self, row: int) -> Tensor:
            size = (3, 10, 8) if row < 8 else (3, 6, 12)
            return torch.full(size, float(row)) + torch.arange(size[2])

    model = Convolutions().eval()
    clones = Clones(model, ["conv", "relu"])
    options: dict[str, Any] = {"batch_size": 4, "ragged": "conv:10x12", "pad": "relu:10x12"}
    run = lt.record_dataset(model, Two(), tmp_path / "run", ["conv", "relu"], **options)
    for i, (conv, relu) in enumerate(zip(clones.rows["conv"], clones.rows["relu"], strict=True)):
        assert same(run["conv"][i], conv)
        _, height, width = relu.shape
        assert same(run["relu"][i][:, :height, :width], relu)
        own = run["relu"].mask[i]
        assert own[:height, :width].all()
        assert own.sum() == height * width
    assert "picture" not in run.rows, "pictures of several sizes make no column"


def test_detections_and_pictures_of_several_sizes(tmp_path):
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=48, max_size=64, box_score_thresh=0.2
    ).eval()

    class Pictures(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, row: int) -> Tensor:
            return torch.rand(3, 40 + 3 * row, 60 - 2 * row, generator=torch.Generator().manual_seed(row))

    pictures, found = Pictures(), []
    with torch.no_grad():
        for first in (0, 2, 4):
            found += model([pictures[row] for row in range(first, min(first + 2, 5))])
    names = [".[boxes]", ".[labels]", ".[scores]"]
    run = lt.record_dataset(
        model, pictures, tmp_path / "run", [".:input", "."], batch_size=2, ragged=[".:64", ".:input:3x64x64"],
        pad=".[scores]:100,-1",
    )  # fmt: skip
    assert list(run) == [".:input", *names] or set(run) == {".:input", *names}
    assert any(len(one["boxes"]) for one in found)
    for row, one in enumerate(found):
        n = len(one["boxes"])
        assert same(run[".:input"][row], pictures[row])
        assert same(run[".[boxes]"][row], one["boxes"])
        assert same(run[".[labels]"][row], one["labels"])
        assert same(run[".[scores]"][row][:n], one["scores"])
        assert run[".[scores]"].mask[row].sum() == n


def test_a_list_of_tensors_that_may_be_rows_or_parts_is_refused(tmp_path):
    class Parts(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, x * 2]

    refused = pytest.raises(lt.CaptureError, match="which may be rows, or parts")
    with refused, lt.record(Parts(), tmp_path / "run", ["."], ragged=".:5") as rec:
        rec(torch.zeros(2, 3))


def test_attention_weights_and_inputs_vary_too(tmp_path):
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 8)
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.embed(ids)
            attended: Tensor = self.attend(x, x, x, need_weights=False)[0]
            return attended

    model = Attends().eval()
    clones = Clones(model, ["embed"])
    layers, ragged = ["attend:attention", "attend:input[0]"], ["**:attention:2x9x9", "**:input:9"]
    run = record(model, tmp_path / "run", layers, ragged=ragged)
    for i, (row, mask) in enumerate(zip(clones.rows["embed"], masks(), strict=True)):
        assert same(run["attend:input[0]"][i], row[mask])
        weights = model.attend(row[None], row[None], row[None], average_attn_weights=False)[1][0]
        assert np.allclose(run["attend:attention"][i], weights.detach().numpy(), atol=1e-6)


def test_in_compiled_code_the_mask_is_seen_too(tmp_path):
    model = Encoder().eval()
    record(model, tmp_path / "plain", ["head"], ragged="**:9")
    step = torch.compile(lambda ids, mask: model(ids, attention_mask=mask), backend="eager", dynamic=True)
    with torch.no_grad(), lt.record(model, tmp_path / "run", ["head"], ragged="**:9") as rec:
        for ids, mask in batches():
            step(ids, mask)
            rec.annotate(n=mask.sum(1))
    assert contents(tmp_path / "run") == contents(tmp_path / "plain")
    compiled = torch.compile(model, backend="eager", dynamic=True)
    run = record(compiled, tmp_path / "wrapped", ["head"], ragged="**:9")
    assert run["head"].shapes.tolist() == lt.open(tmp_path / "plain")["head"].shapes.tolist()


def transformer(name: str, config: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**options))
    return model


BERT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
GPT2: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("name", "config", "options", "layers"),
    [
        ("BertModel", "BertConfig", BERT, ["embeddings", "encoder.layer.0", "encoder.layer.1"]),
        ("GPT2Model", "GPT2Config", GPT2, ["wte", "h.0.mlp", "h.1", "ln_f"]),
    ],
)
def test_transformers_over_batches_of_different_lengths(tmp_path, name, config, options, layers, left):
    model = transformer(name, config, **options).eval()
    clones = Clones(model, layers)
    run = record(model, tmp_path / "run", [*layers, ".[last_hidden_state]"], left, ragged="**:16")
    taps = {tap.layer: tap for tap in run.taps.values()}
    for layer in layers:
        for i, (row, mask) in enumerate(zip(clones.rows[layer], masks(left), strict=True)):
            assert same(taps[layer][i], row[mask]), (layer, i)
    last = record(model, tmp_path / "last", [".[last_hidden_state]"], left, reduce="tokens:last")
    tap = last[".[last_hidden_state]"]
    assert all(tap[i].tolist() == run[".[last_hidden_state]"][i][-1].tolist() for i in range(len(tap)))


def test_by_way_of_a_device_the_store_is_the_same(tmp_path, monkeypatch):
    from layertap.backends import torch_slabs

    class Host:
        """A device on the host, whose copies are done at once."""

        def __init__(self, device: Any) -> None:
            pass

        def capturing(self) -> bool:
            return False

        def allocate(self, n_bytes: int) -> Tensor:
            return torch.full((n_bytes,), 7, dtype=torch.uint8)

        def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
            for host, device in pairs:
                host.copy_(device)
            return self

        def follow(self) -> Callable[[Tensor, Tensor], Any]:
            return lambda host, device: host.copy_(device)

        def now(self) -> Any:
            return self

        def nothing(self, *args: Any) -> None:
            pass

        synchronize = wait = finish = lock = unlock = nothing

    model = Encoder()
    options: dict[str, Any] = {"ragged": "**:9", "pad": "embed:9"}
    record(model, tmp_path / "plain", ["embed", "head"], **options)
    monkeypatch.setattr(torch_slabs, "DEVICES", {"cpu": Host})
    record(model, tmp_path / "device", ["embed", "head"], **options)
    assert contents(tmp_path / "device") == contents(tmp_path / "plain")


# Reductions


BASIS = np.random.default_rng(3).standard_normal((3, 8)).astype(np.float32)
REDUCTIONS: list[Any] = [
    *("channels:6,0,3", "channels:stride=2|bfloat16", "norm:l2", "norm:max|float8_e4m3fn", "project:3"),
    *(lt.reduce.Pca(None, BASIS, BASIS[0]), "pool:global", "pool:global,max|float16", "tokens:mean"),
    *(
        "tokens:last",
        "topk:4,space",
        "channels:0,1|topk:12,space|float16",
        "pool:global|int8",
        "float8_e4m3fn",
    ),
]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("reduce", REDUCTIONS, ids=str)
def test_rows_that_vary_are_reduced_as_numpy_does_it(tmp_path, reduce, left):
    """The same hidden states go through torch's reductions, and through the reference's."""
    model, names = Encoder(), ["head"]
    clones = Clones(model, names)
    whole = record(model, tmp_path / "torch", names, left, ragged="head:9", reduce=reduce)
    given = [
        np.stack([clones.rows["head"][i].numpy() for i in range(first, first + len(lengths))])
        for first, lengths in zip(np.cumsum([0, *map(len, LENGTHS)]), LENGTHS, strict=False)
    ]
    with lt.record(
        lambda batch, attention_mask: {"head": batch}, tmp_path / "numpy", ["head"], ragged="head:9",
        reduce=reduce,
    ) as rec:  # fmt: skip
        for batch, (_, mask) in zip(given, batches(left), strict=True):
            rec(batch, attention_mask=mask.numpy())
    reference = lt.open(tmp_path / "numpy")["head"]
    tap = whole["head"]
    assert type(tap) is type(reference)
    assert (tap.dtype, tap.dims) == (reference.dtype, reference.dims)
    for row in range(len(tap)):
        found, true = (np.asarray(one[row], np.float64) for one in (tap, reference))
        assert found.shape == true.shape
        assert np.allclose(found, true, rtol=0.02, atol=1e-5, equal_nan=True), row
    for name, part in reference.parts.items():
        if name == "positions":
            assert np.array_equal(tap.parts[name][:], part[:])


def test_lists_and_maps_of_any_size_are_reduced_as_numpy_does_it(tmp_path):
    rng = np.random.default_rng(0)
    maps = [
        rng.standard_normal((4, int(h), int(w))).astype(np.float32) for h, w in rng.integers(1, 7, (10, 2))
    ]
    maps[3] = np.zeros((4, 0, 2), np.float32)

    class Lists(nn.Module):
        def forward(self, numbers: Tensor) -> list[Tensor]:
            return [torch.from_numpy(maps[i]) for i in numbers.tolist()]

    reductions = ["norm:l1", "project:2", "pool:global", "pool:global,max", "topk:5,space", "channels:3,0"]
    for i, reduce in enumerate(reductions):
        for name, model in (
            ("torch", Lists()),
            ("numpy", lambda numbers: {".": [maps[i] for i in numbers.tolist()]}),
        ):
            options: dict[str, Any] = {"batch_size": 3, "ragged": ".:6", "reduce": reduce}
            rows = torch.arange(10) if name == "torch" else np.arange(10)
            lt.record_dataset(model, np.asarray(rows), tmp_path / f"{name}{i}", ["."], **options)
        ours, reference = (lt.open(tmp_path / f"{name}{i}")["."] for name in ("torch", "numpy"))
        for row in range(10):
            assert ours[row].shape == reference[row].shape
            assert np.allclose(ours[row], reference[row], rtol=1e-5, atol=1e-6, equal_nan=True), (reduce, row)
        if "topk" in reduce:
            assert np.array_equal(ours.positions[:], reference.positions[:])
            assert (ours.positions[3] == -1).all()


def test_pictures_of_two_sizes_are_reduced_where_they_lie(tmp_path):
    model = Convolutions().eval()
    clones = Clones(model, ["conv"])
    generator = torch.Generator().manual_seed(1)
    with (
        torch.no_grad(),
        lt.record(model, tmp_path / "run", ["conv"], ragged="conv:12", reduce="project:2") as rec,
    ):
        for n, height, width in [(4, 8, 9), (3, 5, 12), (2, 12, 12)]:
            rec(torch.randn(n, 3, height, width, generator=generator))
    tap = lt.open(tmp_path / "run")["conv"]
    for i, row in enumerate(clones.rows["conv"]):
        expected = np.einsum("kc,cyx->kyx", tap.constants["basis"], row.numpy())
        assert np.allclose(tap[i], expected, rtol=1e-4, atol=1e-5)
