"""One forward that notes what every layer gets and gives, and copies nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..capture import tapping
from ..capture.backend import Surveyed
from ..capture.taps import KINDS, Layer, TapName
from .torch_attention import AttentionCalls
from .torch_compile import compiled_modules
from .torch_hooks import Handle, arguments, attends, named_tap, tensors_in
from .torch_refusals import refusal, steps_first

_Note = tuple[TapName, tuple[int, ...], str]


class Survey:
    """Notes what happens in a model while it is entered."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], n_rows: int) -> None:
        self._layers = list(layers)
        self._compiled = set(compiled_modules(model))
        self._n_rows, self._steps_first = n_rows, steps_first(model)
        self._refused: dict[TapName, str] = {}
        self._outputs: dict[str, list[list[_Note]]] = {layer.name: [] for layer in layers}
        self._kinds: dict[str, set[str]] = {layer.name: set() for layer in layers}
        self._running: list[str] = []
        self._handles: list[Handle] = []
        self._calls = AttentionCalls(self._attends)
        #: Every tensor with its version when its layer gave it: what is written in place counts on.
        self._versions: list[tuple[TapName, Tensor, int]] = []
        self._overwritten: frozenset[TapName] = frozenset()

    def __enter__(self) -> Survey:
        for layer in self._layers:
            begin = _Begin(self, layer.name)
            self._handles.append(layer.module.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(layer.module.register_forward_hook(_End(self, layer)))
        tapping.listen(self._heard)
        self._calls.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        self._overwritten = frozenset(tap for tap, t, seen in self._versions if _version(t) != seen)
        self._versions.clear()
        self._calls.__exit__(*error)  # type: ignore[no-untyped-call]
        tapping.leave(self._heard)
        while self._handles:
            self._handles.pop().remove()

    def found(self) -> list[Surveyed]:
        """Return what each layer showed, in the order of the model, then each `lt.tap`."""
        return [
            Surveyed(
                layer,
                len(calls),
                tuple(note for call in calls for note in call),
                tuple(kind for kind in KINDS if kind in self._kinds[layer.name]),
                {tap: self._refused[tap] for call in calls for tap, *_ in call if tap in self._refused},
                frozenset(tap for call in calls for tap, *_ in call if tap in self._overwritten),
                layer.module in self._compiled,
            )
            for layer in self._layers
            for calls in [self._outputs[layer.name]]
        ]

    def begin(self, name: str, given: Any) -> None:
        """Note that a layer begins, and what it got."""
        self._running.append(name)
        if tensors_in(given):
            self._kinds[name].add("input")

    def end(self, layer: Layer, output: Any) -> None:
        """Note that a layer has ended, and what it gave."""
        self._running.pop()
        if attends(layer.module):
            self._kinds[layer.name].add("attention")
        self._note(layer, output)

    def _note(self, layer: Layer, output: Any) -> None:
        name = layer.name
        calls, found = self._outputs[name], tensors_in(output)
        taps = [(TapName(name, len(calls) + 1, path), tensor) for path, tensor in found]
        calls.append(
            [(tap, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for tap, t in taps],
        )
        for tap, tensor in taps:
            self._versions.append((tap, tensor, _version(tensor)))
            if (reason := refusal(layer, tap, tensor, self._n_rows, self._steps_first)) is not None:
                self._refused[tap] = reason
        if found:
            self._kinds[name].add("output")
        if any(t.is_floating_point() for _, t in found):
            self._kinds[name].add("grad")

    def _attends(self, args: Any, kwargs: Any) -> None:
        if self._running:
            self._kinds[self._running[-1]].add("attention")

    def _heard(self, name: str, value: Any) -> Any:
        if name not in self._outputs:
            self._layers.append(named_tap(name))
            self._outputs[name], self._kinds[name] = [], set()
        self._note(named_tap(name), value)
        return value


class _Begin:
    def __init__(self, survey: Survey, name: str) -> None:
        self._survey, self._name = survey, name

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        self._survey.begin(self._name, arguments(args, kwargs))


class _End:
    def __init__(self, survey: Survey, layer: Layer) -> None:
        self._survey, self._layer = survey, layer

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self._survey.end(self._layer, output)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written in place; 0 where nothing counts it, in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
