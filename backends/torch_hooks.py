"""The hooks of a recording: one for each chosen layer and kind of tap.

What shaped it:

* What a hook returns replaces the module's output: it returns None. The one exception is a gradient of a data
  set, where the output has to take part in a graph that begins there.
* What a layer gets may be changed in place by it, so inputs are copied before it runs.
* Hooks run in the order in which they were put on, and each sees what the one before it made of the output.
  So ours are kept last: they see what the next layer sees.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..capture.errors import CaptureError, SelectionError
from ..capture.taps import (
    Choice,
    Layer,
    Path,
    Pattern,
    Patterns,
    TapName,
    choose,
    flatten,
    follow,
    no_match,
    replaced,
)
from . import torch_compile as compiled
from .torch_attention import AttentionCalls, multihead_weights, weights_of

if TYPE_CHECKING:
    from .torch import TorchSession

is_compiling = torch.compiler.is_compiling

_EAGER = (
    'Run the loop under torch.compiler.set_stance("force_eager"), or record the model that was compiled '
    "(model._orig_mod); record_dataset does so by itself"
)


class Handle(Protocol):
    """What takes a hook off."""

    def remove(self) -> None:
        """Take it off."""


class Tap:
    """Where one tensor of one call goes."""

    __slots__ = ("dequantized", "index", "inside", "path", "step")

    def __init__(self, index: int, path: Path, dequantized: bool = False, inside: Path | None = None) -> None:
        self.index, self.path, self.step, self.dequantized = index, path, -1, dequantized
        #: Where `path` leads to a list with one entry a row: where in each entry its tensor is; else None.
        self.inside = inside


class Hook:
    """The hook of one layer's output, and the base of the others."""

    __slots__ = ("call", "calls", "choice", "n_calls", "place", "session")

    #: Whether its values come after the forward.
    late = False

    def __init__(self, session: TorchSession, choice: Choice) -> None:
        self.session, self.choice = session, choice
        #: The layer and kind, by which compiled code finds the hook.
        self.place = str(TapName(choice.layer.name, kind=choice.kind))
        self.call = 0
        #: How often it was called in the first forward.
        self.n_calls = 0
        self.calls: list[list[Tap]] = []

    def register(self) -> list[Handle]:
        """Put it on and return what takes it off."""
        return [self.choice.layer.module.register_forward_hook(self)]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Take the output."""
        if is_compiling():
            compiled.trace_tap(self.session.number, self.place, output)
        else:
            self.take(output)

    def fired(self, value: Any) -> None:
        """Take what compiled code gave."""
        self.take(value)

    def take(self, value: Any) -> None:
        """Copy what this call gave."""
        session = self.session
        call = self.call
        self.call = call + 1
        if session.copies is None:
            if session.learning:
                self.n_calls = call + 1
                session.learn(self, call + 1, value)
            return
        for tap in self.calls[call] if call < len(self.calls) else self.taps_of(call):
            tensor = value if not tap.path and tap.inside is None else session.find(value, tap)
            if tap.dequantized:
                tensor = tensor.dequantize()
            session.copy(tap, tensor)

    def taps_of(self, call: int) -> list[Tap]:
        """Return the taps of a call.

        Raises:
            CaptureError: the first forward had no such call.
        """
        if call < len(self.calls):
            return self.calls[call]
        if self.choice.only or not any(self.calls):  # or all of it is left out
            return []
        raise CaptureError(
            f"{self.choice.layer.name} was called {call + 1} times in this forward and "
            f"{len(self.calls)} times in the first; every forward must call it alike"
        )

    def idle(self) -> bool:
        """Return whether the next call is for nobody."""
        session = self.session
        if session.copies is None:
            return not session.learning
        return bool(self.choice.only) and (self.call >= len(self.calls) or not self.calls[self.call])


class InputHook(Hook):
    """What a layer gets, before it runs."""

    def register(self) -> list[Handle]:
        """Put it on."""
        return [self.choice.layer.module.register_forward_pre_hook(self, with_kwargs=True)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Take the arguments."""
        given = arguments(args, kwargs)
        if is_compiling():
            compiled.trace_tap(self.session.number, self.place, given)
        else:
            self.take(given)


class MultiheadHook(InputHook):
    """The attention weights of an `nn.MultiheadAttention`, before it runs."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Compute the weights and take them."""
        assert isinstance(module, nn.MultiheadAttention)
        if is_compiling():
            compiled.trace_tap(self.session.number, self.place, multihead_weights(module, args, kwargs))
        elif self.idle():
            self.call += 1
        else:
            self.take(multihead_weights(module, args, kwargs))


class AttentionHook(Hook):
    """The weights of `scaled_dot_product_attention` where a layer calls it.

    It stands around the layer's `forward`, so that it ends on every way out, an interrupt included.
    """

    def register(self) -> list[Handle]:
        """Put it around the forward."""
        module = self.choice.layer.module
        forward, number = module.forward, self.session.number
        calls = AttentionCalls(self._tell)
        was = vars(module).get("forward")

        def around(*args: Any, **kwargs: Any) -> Any:
            if is_compiling():
                compiled.trace_tap(number, self.place, None)
                return forward(*args, **kwargs)
            if self.session.copies is None and not self.session.learning:
                return forward(*args, **kwargs)
            with calls:
                return forward(*args, **kwargs)

        module.forward = around
        return [_Forward(module, was)]

    def fired(self, value: Any) -> None:
        """Refuse compiled code."""
        raise CaptureError(
            f"{self.choice.layer.name} is compiled, and calls of scaled_dot_product_attention in compiled "
            f"code are not seen. {_EAGER}"
        )

    def _tell(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.idle():
            self.call += 1
        else:
            self.take(weights_of(*args, **kwargs))


class _Forward:
    """Gives a module its own `forward` back."""

    def __init__(self, module: nn.Module, was: Any) -> None:
        self._module, self._was = module, was

    def remove(self) -> None:
        """Do so."""
        if self._was is None:
            del self._module.forward
        else:
            self._module.forward = self._was


class GradHook(Hook):
    """The gradient of what a layer gave, when a backward pass comes to it."""

    late = True

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Wait for the gradient; return what takes part in a graph, where the output does not."""
        if is_compiling():
            compiled.trace_tap(self.session.number, self.place, None)
            return None
        return self.watch(output)

    def fired(self, value: Any) -> None:
        """Refuse compiled code."""
        raise CaptureError(
            f"{self.choice.layer.name} is compiled, and gradients inside compiled code are not seen. {_EAGER}"
        )

    def watch(self, output: Any) -> Any:
        """Let the chosen tensors of `output` say when their gradients come."""
        session, call = self.session, self.call
        self.call = call + 1
        watched: list[tuple[Path, Tensor]] = []
        if session.copies is not None:
            watched = [(tap.path, session.expect(tap, output)) for tap in self.taps_of(call)]
        elif session.learning:
            self.n_calls = call + 1
            watched = [
                (path, session.late.expect(name, None, tensor))
                for name, path, tensor in session.late.learn(self, call + 1, output)
            ]
        changed = False
        for path, tensor in watched:
            if tensor is not follow(output, path):
                output, changed = replaced(output, path, tensor), True
        return output if changed else None


class Listener:
    """What `lt.tap` tells of while a recording lasts."""

    #: Behind this, compiled code says the name that `lt.tap` got.
    MARK = ":tap:"

    def __init__(
        self, session: TorchSession, there: Sequence[Layer], patterns: Patterns, misses: Sequence[Pattern]
    ) -> None:
        self.session = session
        self._there, self._patterns, self._misses = there, patterns, misses
        self._heard: dict[str, list[Hook]] = {}

    def __call__(self, name: str, value: Any) -> Any:
        """Take the value, if a step is under way; return what goes on in the forward."""
        if is_compiling():
            compiled.trace_tap(self.session.number, self.MARK + name, value)
            return value
        return self.take(name, value)

    def take(self, name: str, value: Any) -> Any:
        """Let the hooks have the value."""
        if self.session.copies is None and not self.session.learning:
            return value
        for hook in self.hooks(name):
            if isinstance(hook, GradHook):
                new = hook.watch(value)
                value = value if new is None else new
            else:
                hook.take(value)
        return value

    def hooks(self, name: str) -> list[Hook]:
        """Return the hooks of what `lt.tap` calls `name`, which are made when it is first heard.

        Raises:
            CaptureError: it is chosen, and a layer has that name, or the first forward did not bring it.
        """
        hooks = self._heard.get(name)
        if hooks is None:
            choices = choose([named_tap(name)], self._patterns)[0] if self._patterns else []
            hooks = [hook_of(self.session, choice) for choice in choices]
            if hooks and any(name in (layer.name, *layer.aliases) for layer in self._there):
                raise CaptureError(f"lt.tap({name!r}, ...) has the name of a layer; give it another")
            if hooks and not self.session.learning:
                raise CaptureError(
                    f"lt.tap({name!r}, ...) was called in this forward and not in the first; every forward "
                    "must call it alike"
                )
            self._heard[name] = hooks
            self.session.add(hooks)
        return hooks

    def check_misses(self) -> None:
        """Refuse patterns that matched neither a layer nor what `lt.tap` named.

        Raises:
            SelectionError: with the closest names.
        """
        heard = [named_tap(name) for name in self._heard]
        for pattern in self._misses:
            if choose(heard, pattern)[1]:
                raise SelectionError(no_match([*self._there, *heard], pattern))


class Order:
    """Keeps our hooks behind those that others put on later."""

    def __init__(self) -> None:
        self._ours: dict[int, tuple[OrderedDict[int, Any], list[int]]] = {}

    def note(self, hooks: OrderedDict[int, Any], key: int) -> None:
        """Remember that `key` of `hooks` is ours; the order is that of the calls."""
        self._ours.setdefault(id(hooks), (hooks, []))[1].append(key)

    def restore(self) -> list[OrderedDict[int, Any]]:
        """Move our hooks behind all others, and return where that was needed."""
        late = []
        for hooks, keys in self._ours.values():
            if next(reversed(hooks)) != keys[-1]:
                late.append(hooks)
                for key in keys:
                    hooks.move_to_end(key)
        return late


#: The hooks that are called as such.
HOOKS = (Hook, InputHook, MultiheadHook, GradHook)


def named_tap(name: str) -> Layer:
    """Return what `lt.tap(name, ...)` is among layers."""
    return Layer(name, ("tap",), kinds=("output", "grad"))


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the one argument of a call that has one; else all of them, by position and by name."""
    if not kwargs and len(args) == 1:
        return args[0]
    return {**dict(enumerate(args)), **kwargs}


def hook_of(session: TorchSession, choice: Choice) -> Hook:
    """Return the hook that takes what `choice` asks for."""
    if choice.kind == "attention" and attends(choice.layer.module):
        return MultiheadHook(session, choice)
    kinds: dict[str, Callable[[TorchSession, Choice], Hook]] = {
        "input": InputHook,
        "grad": GradHook,
        "attention": AttentionHook,
    }
    return kinds.get(choice.kind, Hook)(session, choice)


def attends(module: nn.Module) -> bool:
    """Return whether `module` computes its attention as `nn.MultiheadAttention` does."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def parts_of(value: Any) -> list[tuple[Path, Any]]:
    """Return the tensors of a value, and what else nothing looks into, with their paths."""
    return list(flatten(value, _is_part))


def _is_part(value: Any) -> bool:
    plain = (dict, list, tuple, str, bytes, int, float, complex)
    return isinstance(value, Tensor) or not (
        value is None or isinstance(value, plain) or hasattr(value, "__dataclass_fields__")
    )


def tensors_in(value: Any) -> list[tuple[Path, Tensor]]:
    """Return the tensors of a value, with their paths."""
    return list(flatten(value, lambda leaf: isinstance(leaf, Tensor)))
