"""What torch models give that cannot be captured, and what to do then."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..capture.errors import CaptureError, PlanError
from ..capture.taps import ROOT, Choice, Layer, TapName
from . import torch_compile as compiled
from .torch_hooks import Hook, attends
from .torch_slabs import TORCH_DTYPES

UNSEEN = (
    "it ran where no hook is seen. A CUDA graph that is replayed (torch.cuda.make_graphed_callables) and an "
    "exported program's module() run none: record the model without them, or torch.export.unflatten(...). "
    "A function that torch.compile had compiled before may keep the code that it had: call "
    "torch.compiler.reset() before the recording"
)

_DTYPES = frozenset(TORCH_DTYPES.values())


def refusal(
    layer: Layer, tap: TapName, tensor: Tensor, n_rows: int, steps_first: frozenset[str]
) -> str | None:
    """Return why `tensor` cannot be stored row by row, as the end of a sentence; None where it can.

    What is particular to one tap comes behind the first colon.
    """
    if tensor.is_meta:
        return (
            "lies on the meta device and has no values: load the model's weights, with "
            "load_state_dict(..., assign=True), before the recording"
        )
    if tensor.is_nested:
        return "is nested, not a dense tensor. " + _instead("to_padded_tensor(0)")
    if tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        return f"is sparse ({kind}), not a dense tensor. " + _instead("to_dense()")
    if tensor.dtype not in _DTYPES and not tensor.is_quantized:
        return f"holds {tensor.dtype}, which a store cannot hold"
    if (reason := _other_axis(layer, tap, steps_first)) is not None:
        return reason
    if tensor.ndim == 0 or tensor.shape[0] != n_rows:
        some = TapName(tap.layer, path=(0,), kind=tap.kind)
        return (
            f"has no rows on its first axis: it has shape {tuple(tensor.shape)}, the batch has {n_rows} "
            "rows, and rows come first"
            + (f". Choose the parts of {tap.layer} whose rows do, such as {some}" if tap.path else "")
        )
    if 0 in tensor.shape:
        return f"gives no values: the shape of one row is {tuple(tensor.shape[1:])}"
    return None


def _instead(call: str) -> str:
    return f"Tap what can be stored, with a line in the forward: lt.tap('name', x.{call})"


def _other_axis(layer: Layer, tap: TapName, steps_first: frozenset[str]) -> str | None:
    """Return why the first axis is not that of the rows, where the layer tells.

    The shape alone does not: a batch may have as many rows as the layer has steps or layers.
    """
    module, first, batch_first = layer.module, "", False
    if isinstance(module, nn.RNNBase):
        states = tap.path[:1] in ((1,), ("hx",))
        batch_first = bool(module.batch_first)
        first = "layers" if states else "" if batch_first else "steps"
    elif isinstance(module, nn.MultiheadAttention):
        weights = tap.kind == "attention" or (tap.kind == "output" and tap.path[:1] == (1,))
        padding = tap.kind == "input" and tap.path[:1] in ((3,), ("key_padding_mask",))
        first = "" if module.batch_first or weights or padding else "steps"
    elif layer.name in steps_first:
        first = "steps"
    if not first:
        return None
    part = TapName(layer.name, path=(0,), kind=tap.kind)
    way = f"{part}, the {tap.kind}s" if batch_first else "a layer built with batch_first=True"
    return f"has {first} on its first axis: rows come first. Choose {way}"


def steps_first(model: nn.Module) -> frozenset[str]:
    """Return the names of torch's transformer layers that take steps before rows, and of what is in them."""
    found: set[str] = set()
    for name, module in compiled.named_originals(model):
        inside = name and (name.rpartition(".")[0] or ROOT) in found
        if inside or (isinstance(module, _TRANSFORMERS) and _takes_steps_first(module)):
            found.add(name or ROOT)
    return frozenset(found)


_TRANSFORMERS = (
    *(nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)


def _takes_steps_first(module: nn.Module) -> bool:
    attention = next((inner for inner in module.modules() if isinstance(inner, nn.MultiheadAttention)), None)
    return attention is not None and not attention.batch_first


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def silent(hook: Hook) -> str:
    """Return why a hook took nothing in the first forward, as the end of a sentence."""
    layer, kind = hook.choice.layer, hook.choice.kind
    if kind == "attention" and not attends(layer.module):
        inside = [
            f"{'' if layer.name == ROOT else layer.name + '.'}{name}"
            for name, module in compiled.named_originals(layer.module)
            if name and attends(module)
        ]
        return (
            "computed no attention that can be seen: it is no nn.MultiheadAttention, and its forward called "
            "no scaled_dot_product_attention"
            + (f". There is some in {', '.join(inside[:5])}" if inside else "")
        )
    if hook.call:
        verb = "got" if kind == "input" else "gave"
        what = "nothing that has a gradient" if kind == "grad" else "no tensor"
        return f"{verb} {what}: there is nothing to capture"
    if isinstance(layer.module, _CONTAINERS):
        return "only holds others: nothing runs in it"
    return (
        "did not run as a module in this forward: either the forward does not call it (as with the "
        f"projections inside nn.MultiheadAttention), or {UNSEEN}"
    )


def without_scripted(
    there: Sequence[Layer], choices: Sequence[Choice]
) -> tuple[list[Choice], dict[str, str]]:
    """Return the choices without those inside a module that `torch.jit` made, and those with the reason.

    Raises:
        PlanError: one of them was asked for by name; with what to record instead.
    """
    scripted = [layer.name for layer in there if isinstance(layer.module, torch.jit.ScriptModule)]
    seen: list[Choice] = []
    left_out: dict[str, str] = {}
    for choice in choices:
        name = choice.layer.name
        around = next((s for s in scripted if name != s and (s == ROOT or name.startswith(f"{s}."))), None)
        if around is None:
            seen.append(choice)
            continue
        reason = (
            f"lies inside {'the model' if around == ROOT else around}, which torch.jit made: its layers run "
            "without Python, and no hook sees them. Record the module that it was made from"
        )
        if choice.named is None or choice.named:
            raise PlanError(f"{name} {reason}")
        left_out[name] = reason
    return seen, left_out


def check_made(model: nn.Module) -> None:
    """Refuse a model some of whose parameters are not made yet.

    Raises:
        PlanError: with their name.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise PlanError(
                f"{name} is not initialised yet: a lazy layer makes its weights, by chance, when it first "
                "runs. Load weights, or run one batch through the model, before the recording"
            )


def check_no_replica(module: Any) -> None:
    """Refuse a copy of the model that `nn.DataParallel` made.

    Raises:
        CaptureError: with what to record instead.
    """
    if getattr(module, "_is_replica", False):
        raise CaptureError(
            "nn.DataParallel runs copies of the model in threads, each on some rows of the batch, and none "
            "sees all of them. Call model.module on one GPU, use record_dataset (which does so by itself), "
            "or start a process for each GPU with torchrun"
        )
