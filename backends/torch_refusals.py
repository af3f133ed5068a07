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
    "exported program run none: record the model without them. A function that torch.compile had compiled "
    "before may keep the code that it had: call torch.compiler.reset() before the recording"
)

_DTYPES = frozenset(TORCH_DTYPES.values())


def check_tensor(tap: TapName, tensor: Tensor, n_rows: int) -> None:
    """Refuse what cannot be stored row by row.

    Raises:
        CaptureError: with the reason and the way out.
    """
    reason = None
    if tensor.is_meta:
        reason = (
            "lies on the meta device and has no values: load the model's weights, with "
            "load_state_dict(..., assign=True), before the recording"
        )
    elif tensor.is_nested:
        reason = "is nested, not a dense tensor. " + _instead("to_padded_tensor(0)")
    elif tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        reason = f"is sparse ({kind}), not a dense tensor. " + _instead("to_dense()")
    elif tensor.dtype not in _DTYPES and not tensor.is_quantized:
        reason = f"holds {tensor.dtype}, which a store cannot hold"
    elif tensor.ndim == 0 or tensor.shape[0] != n_rows:
        reason = f"has shape {tuple(tensor.shape)}; the batch has {n_rows} rows, and rows come first"
        if tap.path:
            some = TapName(tap.layer, path=(0,), kind=tap.kind)
            reason += f". Choose the parts of {tap.layer} whose rows do, such as {some}"
    if reason is not None:
        raise CaptureError(f"{tap} {reason}")


def _instead(call: str) -> str:
    return f"Tap what can be stored, with a line in the forward: lt.tap('name', x.{call})"


def check_rows_first(layer: Layer, tap: TapName) -> None:
    """Refuse what a recurrent layer or attention gets or gives with its rows on the second axis.

    The shape alone does not tell: a batch may have as many rows as the layer has steps or layers.

    Raises:
        CaptureError: with the way out.
    """
    module = layer.module
    if isinstance(module, nn.RNNBase):
        states = tap.path[:1] in ((1,), ("hx",))
        if states or not module.batch_first:
            _refuse_steps(layer, tap, "layers" if states else "steps", bool(module.batch_first))
    elif isinstance(module, nn.MultiheadAttention) and not module.batch_first:
        weights = tap.kind == "attention" or (tap.kind == "output" and tap.path[:1] == (1,))
        padding = tap.path[:1] in ((3,), ("key_padding_mask",))
        if not weights and not (tap.kind == "input" and padding):
            _refuse_steps(layer, tap, "steps", False)


def _refuse_steps(layer: Layer, tap: TapName, first: str, batch_first: bool) -> None:
    part = TapName(layer.name, path=(0,), kind=tap.kind)
    way = f"{part}, the {tap.kind}s" if batch_first else "a layer built with batch_first=True"
    raise CaptureError(f"{tap} has {first} on its first axis, and rows come first. Choose {way}")


def silent(hook: Hook) -> str:
    """Return why a hook took nothing in the first forward."""
    layer, kind = hook.choice.layer, hook.choice.kind
    if kind == "attention" and not attends(layer.module):
        inside = [
            f"{'' if layer.name == ROOT else layer.name + '.'}{name}"
            for name, module in compiled.named_originals(layer.module)
            if name and attends(module)
        ]
        return (
            f"{layer.name} ({layer.type}) computed no attention that can be seen: it is no "
            "nn.MultiheadAttention, and its forward called no scaled_dot_product_attention"
            + (f". There is some in {', '.join(inside[:5])}" if inside else "")
        )
    if hook.call:
        verb = "got" if kind == "input" else "gave"
        what = "nothing that has a gradient" if kind == "grad" else "no tensor"
        return f"{layer.name} ({layer.type}) {verb} {what}: there is nothing to capture"
    return (
        f"{layer.name} ({layer.type}) did not run as a module in this forward. Either the forward does not "
        f"call it (as with the projections inside nn.MultiheadAttention), or {UNSEEN}"
    )


def check_scripted(there: Sequence[Layer], choices: Sequence[Choice]) -> None:
    """Refuse layers inside a module that `torch.jit` made.

    Raises:
        PlanError: with what to record instead.
    """
    scripted = [layer.name for layer in there if isinstance(layer.module, torch.jit.ScriptModule)]
    for choice in choices:
        name = choice.layer.name
        around = next((s for s in scripted if name != s and (s == ROOT or name.startswith(f"{s}."))), None)
        if around is not None:
            raise PlanError(
                f"{name} lies inside {'the model' if around == ROOT else around}, which torch.jit made: its "
                "layers run without Python, and no hook sees them. Record the module that it was made from"
            )


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
