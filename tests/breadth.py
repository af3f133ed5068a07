"""Every model that torchvision can build, and samples of other collections, captured whole and compared.

    python tests/breadth.py                   # run all of them and say what differs from docs/models.md
    python tests/breadth.py --write           # and write docs/models.md
    python tests/breadth.py resnet18 'swin*'  # those alone; with --write, their lines are written anew

A model has random weights and small inputs. It runs two steps, of two rows and of one, while `**` is
recorded, and while plain hooks, which share nothing with layertap, clone at once what every module gives.
Then every captured value must be equal to its clone bit for bit, and what is not captured must be left
out with a reason that the clones bear out.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import layertap as lt
import numpy as np
import torch
import torchvision
from layertap.backends.torch import TorchBackend
from layertap.capture.left_out import by_reason
from torch import Tensor, nn

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
PACKAGES = ("torch", "torchvision", "timm", "transformers")

#: A reason, and the table's word for it.
WORDS = {
    "did not run as a module in this forward": "not run",
    "only holds others": "container",
    "gave no tensor": "no tensor",
    "is no tensor": "object",
    "has no rows on its first axis": "rows elsewhere",
    "has steps on its first axis": "rows elsewhere",
    "gives no values": "empty",
}

Inputs = Callable[[int, torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """One model, and what it is run on."""

    name: str
    """The collection and the model's name in it, with what it is built with."""
    build: Callable[[], nn.Module]
    """Makes it, without weights from anywhere."""
    inputs: Inputs
    """Makes the arguments of its forward for so many rows."""
    shown: str
    """The shape of one row's input, for the table."""
    steps: tuple[int, ...] = (2, 1)
    """Rows of each step."""
    memory: str = "256MiB"
    """What the engine may hold; where there is more, it prepares for more steps than these."""


@dataclass(frozen=True)
class Found:
    """What was found of one model; a line of the table."""

    name: str
    """Its case's name."""
    shown: str
    """The shape of one row's input."""
    modules: int
    """Modules, the model itself included."""
    leaves: int
    """Modules without others in them."""
    taps: int
    """Tensors captured, all equal to their clones."""
    left_out: str
    """How many modules and tensors were left out, for each reason."""

    def line(self) -> str:
        """Return its line of the table."""
        cells = (self.name, self.shown, self.modules, self.leaves, self.taps, self.left_out)
        return f"| {' | '.join(map(str, cells))} |"


class Clones:
    """What every module gives, cloned at once by hooks of its own."""

    def __init__(self, model: nn.Module) -> None:
        #: For each step: name of a tap -> its clone, or the type of what is no tensor.
        self.steps: list[dict[str, Any]] = []
        self.calls: Counter[str] = Counter()
        self.of: dict[str, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            module.register_forward_hook(partial(self._keep, name or "."))

    def begin(self) -> None:
        self.steps.append({})
        self.calls.clear()

    def _keep(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.calls[name] += 1
        label = name if self.calls[name] == 1 else f"{name}#{self.calls[name]}"
        for path, value in walk(output):
            self.steps[-1][label + path] = (
                value.detach().clone() if isinstance(value, Tensor) else type(value)
            )
            self.of[label + path] = name


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what lies in nested tuples, lists, dicts and dataclasses, with the way there as text."""
    if isinstance(value, dict):
        inside = list(value.items())
    elif hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__"):
        names = getattr(value, "_fields", None) or value.__dataclass_fields__
        inside = [(name, getattr(value, name)) for name in names]
    elif isinstance(value, list | tuple):
        inside = list(enumerate(value))
    else:
        yield "", value
        return
    for key, item in inside:
        for path, leaf in walk(item):
            yield f"[{key}]{path}", leaf


def measure(case: Case, folder: Path) -> Found:
    """Capture all of a model and hold it against the clones."""
    path = folder / "run.zarr"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the collections' own, and what is left out is looked at below
        with quick_init():
            model = case.build().eval()
        clones = Clones(model)
        with lt.record(model, path, "**", memory=case.memory) as rec:
            for step, n_rows in enumerate(case.steps):
                args, kwargs = case.inputs(n_rows, torch.Generator().manual_seed(step))
                clones.begin()
                rec(*args, **kwargs)
    run = lt.open(path)
    assert rec.left_out == run.left_out
    check_layers(model)
    check_values(run, clones)
    check_left_out(run, model, clones, case.steps[0])
    words = Counter[str]()
    for reason, names in by_reason(run.left_out.items()).items():
        words[WORDS[reason]] += len(names)
    modules = list(model.modules())
    return Found(
        case.name,
        case.shown,
        len(modules),
        sum(not any(module.children()) for module in modules),
        len(run),
        ", ".join(f"{n} {word}" for word, n in sorted(words.items())),
    )


def check_layers(model: nn.Module) -> None:
    """Every module is listed, under each of its names."""
    names = {name or "." for name, _ in model.named_modules(remove_duplicate=False)}
    listed = {
        n for layer in TorchBackend().layers(model) for n in (layer.name, *getattr(layer, "aliases", ()))
    }
    assert listed == names


def check_values(run: lt.Run, clones: Clones) -> None:
    """Every captured value is its clone, bit for bit."""
    for name in run:
        got = run[name][...]
        values = [step[name] for step in clones.steps]
        expected = np.concatenate([(v.dequantize() if v.is_quantized else v).numpy() for v in values])
        assert got.dtype == expected.dtype, name
        assert got.shape == expected.shape, name
        assert got.tobytes() == expected.tobytes(), f"{name} is not what the layer gave"


def check_left_out(run: lt.Run, model: nn.Module, clones: Clones, n_rows: int) -> None:
    """What is not captured is left out with a reason, which is true; and nothing else is."""
    expected: dict[str, str] = {}
    first = clones.steps[0]
    for name, value in first.items():
        if name in run:
            continue
        word = absent(value, n_rows)
        assert word or run.left_out.get(name, "").startswith("has steps on its first axis"), (
            f"{name} was not captured and nothing stands against it"
        )
        if word != "nothing":
            expected[name] = word or "rows elsewhere"
    gave = {clones.of[name] for name, value in first.items() if absent(value, n_rows) != "nothing"}
    for name, module in model.named_modules():
        if (name or ".") not in gave:
            word = "container" if type(module) in (nn.ModuleList, nn.ModuleDict) else "not run"
            expected[name or "."] = "no tensor" if clones.calls[name or "."] else word
    said = {name: WORDS[reason.partition(":")[0]] for name, reason in run.left_out.items()}
    for name in expected:
        assert name in said, f"{name} ({expected[name]}) is neither captured nor left out with a reason"
        assert said[name] == expected[name], f"{name} is {expected[name]}, and is said to be {said[name]}"
    names = dict(model.named_modules(remove_duplicate=False)).keys() - dict(model.named_modules()).keys()
    more = said.keys() - expected.keys() - names  # a module's other names may be left out too
    assert not more, f"{min(more)} is left out, and nothing stands against it"


def absent(value: Any, n_rows: int) -> str:
    """Return why a value cannot be captured, by a look of the test's own; empty where it can."""
    if not isinstance(value, Tensor):
        plain = value in (type(None), bool, int, float, str)
        return "nothing" if plain else "object"
    if value.ndim == 0 or len(value) != n_rows:
        return "rows elsewhere"
    return "" if value.numel() else "empty"


@contextlib.contextmanager
def quick_init() -> Iterator[None]:
    """Initialise by copies of some noise: torch's own takes minutes for the largest models.

    Values keep about the size that they come in with.
    """
    noise = (torch.rand(2**20 + 7, generator=torch.Generator().manual_seed(0)) - 0.5) * 12**0.5
    start = 0

    def fill(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal start
        scale = (2 / max(1, tensor[0].numel() if tensor.ndim > 1 else tensor.numel())) ** 0.5
        for part in tensor.detach().view(-1).split(2**19):
            start = (start + 7919) % 2**19
            torch.mul(noise[start : start + len(part)], scale, out=part)
        return tensor

    with contextlib.suppress(ImportError):
        import transformers.initialization  # noqa: F401 (it keeps torch's own functions when it is imported)
    names = ("uniform_", "normal_", "trunc_normal_", "orthogonal_")
    names += ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_")
    before = {name: getattr(nn.init, name) for name in names}
    torch.manual_seed(0)
    try:
        for name in names:
            setattr(nn.init, name, fill)
        yield
    finally:
        for name, function in before.items():
            setattr(nn.init, name, function)


# torchvision


def noise(*shape: int) -> Inputs:
    """Return what makes rows of noise of `shape`."""
    return lambda n_rows, generator: ((torch.randn(n_rows, *shape, generator=generator),), {})


def pictures(*shape: int) -> Inputs:
    """Return what makes a list of pictures."""
    return lambda n_rows, generator: ((list(torch.rand(n_rows, *shape, generator=generator)),), {})


def two_frames(*shape: int) -> Inputs:
    """Return what makes two frames, and as few updates of the flow as show a second call."""

    def make(n_rows: int, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        frames = torch.rand(2, n_rows, *shape, generator=generator)
        return tuple(frames), {"num_flow_updates": 2}

    return make


FEW_BOXES = {"box_score_thresh": 0.0, "box_detections_per_img": 5, "rpn_post_nms_top_n_test": 20}
FEW_ANCHORS = {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 20}
SMALL = {"min_size": 64, "max_size": 64}

#: Names of torchvision's models -> what they are built with, and their input; the first that fits counts.
OPTIONS: tuple[tuple[str, dict[str, Any], tuple[int, ...], Callable[..., Inputs]], ...] = (
    ("vit_h_14", {"image_size": 28}, (3, 28, 28), noise),
    ("vit_*", {"image_size": 32}, (3, 32, 32), noise),
    ("maxvit_t", {"input_size": (224, 224)}, (3, 224, 224), noise),
    ("*inception_v3", {}, (3, 75, 75), noise),
    ("alexnet", {}, (3, 64, 64), noise),
    ("quantized_shufflenet_*", {}, (3, 64, 64), noise),  # torch fails on the mean of one quantized pixel
    ("*rcnn_*", {**SMALL, **FEW_BOXES}, (3, 64, 64), pictures),
    ("ssd*", FEW_ANCHORS, (3, 300, 300), pictures),
    ("retinanet_*", {**SMALL, **FEW_ANCHORS}, (3, 64, 64), pictures),
    ("fcos_*", {**SMALL, **FEW_ANCHORS}, (3, 64, 64), pictures),
    ("raft_*", {}, (3, 128, 128), two_frames),
    ("mvit_*", {}, (3, 16, 224, 224), noise),
    ("s3d", {}, (3, 16, 224, 224), noise),
    ("swin3d_*", {}, (3, 4, 32, 32), noise),
    ("r3d_18", {}, (3, 4, 32, 32), noise),
    ("mc3_18", {}, (3, 4, 32, 32), noise),
    ("r2plus1d_18", {}, (3, 4, 32, 32), noise),
    ("*", {}, (3, 32, 32), noise),
)


def of_torchvision(name: str, **more: Any) -> Case:
    """Return the case of one of torchvision's models."""
    _, options, shape, make = next(entry for entry in OPTIONS if fnmatch.fnmatch(name, entry[0]))

    def build() -> nn.Module:
        entry = torchvision.models.get_model_builder(name)
        backbone = {"weights_backbone": None} if "weights_backbone" in entry.__annotations__ else {}
        return torchvision.models.get_model(name, weights=None, **backbone, **options, **more)

    said = "&".join(f"{key}={value}" for key, value in more.items())
    shown = " x ".join(map(str, shape))
    case = Case(f"torchvision:{name}{f'?{said}' if said else ''}", build, make(*shape), shown)
    if name.startswith("mvit_"):  # whose input cannot be smaller, and which gives 1.5 GiB a row
        return replace(case, shown=f"{shown}, one row", steps=(1, 1), memory="5GiB")
    return replace(case, memory="6GiB" if max(shape) > 200 else "512MiB")


def torchvision_cases() -> list[Case]:
    """Return a case for each of torchvision's models; of those that can be quantized, a quantized one too."""
    names = torchvision.models.list_models()
    quantized = [of_torchvision(name, quantize=True) for name in names if name.startswith("quantized_")]
    return [*map(of_torchvision, names), *quantized]


# timm

TIMM = {
    "convnext_atto": ({}, 32),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32}, 32),
    "edgenext_xx_small": ({}, 64),
    "efficientnet_b0": ({}, 32),
    "ghostnet_050": ({}, 32),
    "hrnet_w18_small": ({}, 64),
    "levit_128s": ({"img_size": 224}, 224),
    "mixer_s32_224": ({"img_size": 64}, 64),
    "mobilenetv3_small_050": ({}, 32),
    "mobilevit_xxs": ({}, 64),
    "regnetx_002": ({}, 32),
    "resnet18": ({}, 32),
    "swin_tiny_patch4_window7_224": ({"img_size": 112}, 112),
    "vit_tiny_patch16_224": ({"img_size": 32}, 32),
    "xcit_nano_12_p16_224": ({"img_size": 32}, 32),
}


def timm_cases() -> list[Case]:
    """Return a case for each of a sample of timm's families, none where it is not installed."""
    try:
        import timm
    except ImportError:
        return []
    return [
        Case(
            f"timm:{name}",
            partial(timm.create_model, name, pretrained=False, **options),
            noise(3, side, side),
            f"3 x {side} x {side}",
        )
        for name, (options, side) in TIMM.items()
    ]


# transformers

LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS_OF = {"vocab_size": 50, "max_position_embeddings": 16}
SEEING = {**LAYERS, "image_size": 32, "patch_size": 8}

#: Model -> its configuration and what it is given.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "BertForSequenceClassification": ("BertConfig", {**LAYERS, **WORDS_OF}, ("input_ids",)),
    "CLIPModel": (
        "CLIPConfig",
        {"text_config": {**LAYERS, **WORDS_OF}, "vision_config": SEEING, "projection_dim": 16},
        ("input_ids", "pixel_values"),
    ),
    "ConvNextModel": (
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
        ("pixel_values",),
    ),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 16},
        ("input_ids",),
    ),
    "LlamaForCausalLM": ("LlamaConfig", {**LAYERS, **WORDS_OF, "num_key_value_heads": 2}, ("input_ids",)),
    "MixtralForCausalLM": (
        "MixtralConfig",
        {**LAYERS, **WORDS_OF, "num_key_value_heads": 2, "num_local_experts": 3},
        ("input_ids",),
    ),
    "SwinModel": (
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        ("pixel_values",),
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50},
        ("input_ids", "decoder_input_ids"),
    ),
    "ViTForImageClassification": ("ViTConfig", SEEING, ("pixel_values",)),
}


def given(names: Sequence[str]) -> Inputs:
    """Return what makes tokens and pictures by the names of a transformer's arguments."""

    def make(n_rows: int, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        made: dict[str, Tensor] = {}
        for name in names:
            if name == "pixel_values":
                made[name] = torch.randn(n_rows, 3, 32, 32, generator=generator)
            else:
                made[name] = torch.randint(
                    3, 50, (n_rows, 5 if "decoder" in name else 7), generator=generator
                )
        return (), made

    return make


def transformers_cases() -> list[Case]:
    """Return a case for each of a sample of small models, none where it is not installed."""
    try:
        import transformers
    except ImportError:
        return []

    def build(name: str, config: str, options: dict[str, Any]) -> nn.Module:
        return getattr(transformers, name)(getattr(transformers, config)(**options))

    shapes = {"input_ids": "7 tokens", "decoder_input_ids": "5 tokens", "pixel_values": "3 x 32 x 32"}
    return [
        Case(
            f"transformers:{name}",
            partial(build, name, config, options),
            given(names),
            " and ".join(shapes[one] for one in names),
            (2, 2) if name == "CLIPModel" else (2, 1),  # it holds each picture of a batch against each text
        )
        for name, (config, options, names) in TRANSFORMERS.items()
    ]


# Of the test's own


class UNet(nn.Module):
    """Down, up, and across; one activation for all, in place."""

    def __init__(self, widths: Sequence[int] = (4, 8, 16)) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        pairs = list(pairwise(widths))
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in reversed(pairs))
        self.join = nn.ModuleList(nn.Conv2d(2 * a, a, 3, padding=1) for a, _ in reversed(pairs))
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.relu(self.first(x))
        across = []
        for layer in self.down:
            across.append(x)
            x = self.relu(layer(self.pool(x)))
        for up, join in zip(self.up, self.join, strict=True):
            x = self.relu(join(torch.cat([up(x), across.pop()], 1)))
        logits = self.head(x)
        return {"logits": logits, "classes": logits.argmax(1), "sure": logits.amax(1) > 0, "aux": None}


OWN = [Case("a U-Net", UNet, noise(3, 16, 16), "3 x 16 x 16")]

#: One of each family, which every run of the tests goes through.
ALWAYS = (
    *("alexnet", "convnext_tiny", "deeplabv3_mobilenet_v3_large", "densenet121", "efficientnet_b0"),
    *("fasterrcnn_mobilenet_v3_large_320_fpn", "googlenet", "inception_v3", "lraspp_mobilenet_v3_large"),
    *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "quantized_resnet18?quantize=True", "r3d_18"),
    *("regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin3d_t"),
    *("swin_t", "swin_v2_t", "vgg11", "vit_b_32"),
)


def cases() -> list[Case]:
    """Return all cases that can be run here."""
    return [*torchvision_cases(), *timm_cases(), *transformers_cases(), *OWN]


def versions() -> dict[str, str]:
    """Return the versions of the collections that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package).partition("+")[0]
    return found


TOP = """# Models that were captured whole

Written by `make breadth`: each of these models, with random weights, was run on two rows and then on one
while `**` was recorded, and every captured value was equal, bit for bit, to a clone that a plain hook of
the test's own took in place. What was not captured was left out with a reason, in the store, in the
report and by a warning. `tests/test_breadth.py` runs some of each family with every run of the tests, and
holds them to this table.

MViT, whose input cannot be smaller, was run on one row and on one more, and CLIP, which holds each row of
a batch against each other, on two and on two. Modules counts a model itself too, leaves are modules
without others in them, and taps the tensors captured; a layer that is called twice, or gives several, has
several. What is left out:

* **container**: `nn.ModuleList` and the like, which only hold others;
* **not run**: layers that the forward does not call as modules, such as the auxiliary heads of GoogLeNet in
  evaluation mode or the projections inside `nn.MultiheadAttention`;
* **rows elsewhere**: tensors whose first axis is not that of the rows, such as the windows of a Swin
  (pictures times windows), the boxes of all pictures, or position embeddings;
* **no tensor**, **object**: layers that give no tensor, and parts that are none, such as a cache of keys;
* **empty**: tensors without values, such as the boxes where nothing was detected.
"""

HEADER = """| model | input of a row | modules | leaves | taps | left out |
| --- | --- | ---: | ---: | ---: | --- |"""


def lines_of(text: str) -> dict[str, str]:
    """Return the lines of a page's table by the models' names."""
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def page(lines: Sequence[str]) -> str:
    """Return the page with the table."""
    said = ", ".join(f"{package} {number}" for package, number in versions().items())
    n_taps = sum(int(line.split(" | ")[4]) for line in lines)
    total = f"{len(lines)} models, {n_taps:,} taps. Run with {said}."
    return "\n".join([TOP, total, "", HEADER, *lines, ""])


def main(arguments: Sequence[str]) -> int:
    """Run the cases whose names fit, print what fails, and write or compare the page."""
    import time

    patterns = [argument for argument in arguments if not argument.startswith("-")]
    before = PAGE.read_text() if PAGE.exists() else ""
    lines, n_failed = lines_of(before) if patterns else {}, 0
    for case in cases():
        name = case.name.partition(":")[2] or case.name
        if patterns and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                lines[case.name] = measure(case, Path(folder)).line()
                print(f"{time.perf_counter() - began:6.1f} s  {lines[case.name]}", flush=True)
            except Exception as error:
                n_failed += 1
                print(f"FAILED {case.name}: {type(error).__name__}: {error}", flush=True)
                if "--traceback" in arguments:
                    raise
    after = page([lines[case.name] for case in cases() if case.name in lines])
    if "--write" in arguments and not n_failed:
        PAGE.write_text(after)
    elif after != before:
        print(f"{PAGE} differs; --write writes it anew")
        return 1
    return min(1, n_failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
