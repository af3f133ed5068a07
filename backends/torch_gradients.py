"""Gradients of layers' outputs: how they come to their taps, and the backward pass that brings them.

What shaped it:

* A hook on the tensor itself, put on at once, gets the gradient of the value that the layer gave, also where
  that is changed in place later. It comes when the user calls `backward()`, after the forward has ended.
* In a capture of a data set the graph begins at the tapped layers: parameters take no part in it, and outputs
  that no tapped layer lies before are made its leaves. So nothing is kept of what runs before them, the
  backward pass ends there, and no parameter's `.grad` is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..capture.errors import CaptureError, DataError
from ..capture.score import LABEL, PREDICTION, Score, logits_of, score_text
from ..capture.taps import Path, TapName
from .torch_hooks import Hook, Tap, tensors_in

if TYPE_CHECKING:
    from .torch import TorchSession


class Gradients:
    """The taps of gradients of one session."""

    def __init__(self, session: TorchSession) -> None:
        self._session = session
        self._beginning = False
        self._edges: list[Any] = []

    @contextlib.contextmanager
    def begin_at_taps(self, model: nn.Module) -> Iterator[None]:
        """Let graphs begin at the tapped layers; every parameter gets its own `requires_grad` back."""
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._beginning = True
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            self._beginning = False
            self.forget()
            for parameter in learning:
                parameter.requires_grad_(True)

    def forget(self) -> None:
        """Let go of the graph of the step before."""
        self._edges.clear()

    def learn(self, hook: Hook, call: int, output: Any) -> list[tuple[TapName, Path, Tensor]]:
        """Return the taps of which gradients will come, with their paths and what they are gradients of."""
        found = []
        for path, tensor in tensors_in(output):
            tap = TapName(hook.choice.layer.name, call, path, hook.choice.kind)
            if (tensor.is_floating_point() or tensor.is_complex()) and self._session.see(hook, tap, tensor):
                if (reason := self._refusal(tensor)) is None:
                    found.append((tap, path, tensor))
                else:
                    self._session.refuse(hook, tap, reason)
        return found

    def expect(self, name: TapName, tap: Tap | None, tensor: Tensor) -> Tensor:
        """Let the gradient of `tensor` come to its tap; return what goes on in the forward.

        Args:
            name: the tap's name.
            tap: where it goes; None: it is learnt.
            tensor: what the layer gave.

        Raises:
            CaptureError: it can have no gradient.
        """
        if (reason := self._refusal(tensor)) is not None:
            raise CaptureError(f"{name} {reason}")
        if not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_().clone()  # a leaf could not be changed in place
        step = self._session.step
        tensor.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self._session.arrive(step, name, tap, gradient)
        )
        if self._beginning:
            self._edges.append(torch.autograd.graph.get_gradient_edge(tensor))
        return tensor

    def run(self, output: Any, score: Score, labels: Any) -> None:
        """Run from the sum of the rows' scores to the tapped layers, and no further.

        Raises:
            DataError: the score is that of the label, and the rows have none.
            CaptureError: the output has no such score, or the score depends on none of the layers.
        """
        edges, self._edges = self._edges, []
        if not edges:  # the rows are not captured
            return
        values = score_of(output, score, labels)
        if not values.requires_grad:
            raise CaptureError(
                f"the score ({score_text(score)}) depends on none of the layers whose gradients are tapped"
            )
        torch.autograd.grad(values.sum(), edges, allow_unused=True)

    def missing(self, tap: TapName) -> str:
        """Return what there is to say of a gradient that did not come."""
        if self._beginning:
            return f"no gradient came to {tap}: the score does not depend on it"
        return (
            f"no gradient came to {tap} in its step: call backward() on what depends on it, once after each "
            "forward and before the next"
        )

    def _refusal(self, tensor: Tensor) -> str | None:
        if tensor.requires_grad or (self._beginning and torch.is_grad_enabled()):
            return None
        return f"can have no gradient: {self._why_none()}"

    def _why_none(self) -> str:
        if self._beginning:
            return "the model runs the layer under torch.no_grad()"
        return (
            "the output does not require grad. Call the model where gradients are enabled, not under "
            "torch.no_grad(), and with parameters or inputs that require them"
        )


def score_of(output: Any, score: Score, labels: Any) -> Tensor:
    """Return the score of each row; shape (rows,).

    Raises:
        DataError: the score is that of the label, and the rows have none.
        CaptureError: the output has no such score.
    """
    if callable(score):
        values = score(output)
        if not isinstance(values, Tensor) or values.ndim != 1:
            raise CaptureError(
                f"the score ({score_text(score)}) gave {_shown(values)}; it should give one value a row, a "
                "tensor of shape (rows,)"
            )
        return values
    logits = logits_of(output)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        raise CaptureError(
            f"the model gives {_shown(logits)} and no logits of shape (rows, classes), of which the score "
            f"({score_text(score)}) would be one: give score= a callable that makes one value a row of the "
            "model's output"
        )
    return logits.gather(1, _classes(logits, score, labels)[:, None])[:, 0]


def _classes(logits: Tensor, score: str | int, labels: Any) -> Tensor:
    """Return the class of each row whose logit is the score."""
    if score == PREDICTION:
        return logits.detach().argmax(1)
    if score == LABEL and labels is None:
        raise DataError("the score is that of the label, and the data set has no labels")
    values: Sequence[Any] = labels if score == LABEL else [score] * len(logits)
    classes = torch.as_tensor(values, device=logits.device).to(torch.int64)
    wrong = classes[(classes < 0) | (classes >= logits.shape[1])]
    if len(wrong):
        raise CaptureError(f"the model has no class {int(wrong[0])}: it gives {logits.shape[1]} logits a row")
    return classes


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"
