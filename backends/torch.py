"""PyTorch: taps are forward hooks that copy at once into memory that was prepared for them.

What shaped it:

* A reference to an output is not the output: 17 of the 60 leaf outputs of a torchvision ResNet-18 are
  overwritten later by `ReLU(inplace=True)` or `+=`. So every hook copies, on the stream that computes.
* `view.copy_(output)` into a view made beforehand costs 0.65 us and its bytes, fuses the cast, and stays in
  one graph; building a view in the hook costs 6 us.
* What a hook returns replaces the module's output: it returns None.
* While `torch.compile` traces a hook, the hook leaves an operator that does its work; see `torch_compile`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, tee
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..capture import tapping
from ..capture.backend import Backend, Json, Learned, Session, Sink, Surveyed
from ..capture.columns import check_cast
from ..capture.data import Batch, Source
from ..capture.dtypes import DType, named_dtype
from ..capture.errors import CaptureError, DataError, PlanError
from ..capture.fingerprint import fingerprint
from ..capture.layout import Layout
from ..capture.left_out import told
from ..capture.pipeline import Memory, Piece, Slab
from ..capture.ragged import Form, check_in_time, ways
from ..capture.reduce import Chain, Rows
from ..capture.score import Score
from ..capture.taps import (
    ATTENTION,
    ROOT,
    Choice,
    Layer,
    Path,
    Pattern,
    Patterns,
    TapName,
    asks_for,
    check_some,
    choose,
    follow,
)
from . import torch_compile as compiled
from .torch_data import EXAMPLES, TorchSource, handed_over, normalisation
from .torch_gradients import Gradients
from .torch_hooks import (
    HOOKS,
    AttentionHook,
    Handle,
    Hook,
    Listener,
    Order,
    Tap,
    hook_of,
    parts_of,
)
from .torch_ragged import (
    Given,
    Masks,
    check_room,
    check_rows,
    put,
    put_mask,
    reduced_rows,
    row_tensors,
    shape_of,
)
from .torch_reduce import Reducer
from .torch_refusals import (
    UNSEEN,
    check_made,
    check_no_replica,
    refusal,
    silent,
    steps_first,
    without_scripted,
)
from .torch_slabs import DEVICES, TORCH_DTYPES, Device, DeviceSlabs, HostSlabs, prepare, transfer_rates
from .torch_survey import Survey

is_compiling = torch.compiler.is_compiling

#: By this, compiled code says the mask of a batch.
_MASK = ":mask:"

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class TorchBackend(Backend):
    """`torch.nn.Module`s."""

    name = "torch"

    def accepts(self, model: Any) -> bool:
        """Return whether `model` is a module."""
        return isinstance(model, nn.Module)

    def layers(self, model: Any) -> list[Layer]:
        """Return the model and all of its modules; a shared module under the first of its names.

        A module that is compiled, or run in parallel, is not told from a plain one.
        """
        names: dict[nn.Module, list[str]] = {}
        for name, module in compiled.named_originals(model):
            names.setdefault(module, []).append(name or ROOT)
        return [
            Layer(name, tuple(c.__name__ for c in type(module).__mro__), module, tuple(aliases))
            for module, (name, *aliases) in names.items()
        ]

    def session(self, model: Any, layers: Patterns) -> Session:
        """Choose `layers` of `model`.

        What matches no layer may be what `lt.tap` calls a value, which the first forward shows.

        Raises:
            PlanError: one of them runs without Python, inside a module that `torch.jit` made; or the model's
                weights are not made yet.
        """
        there = self.layers(model)
        choices, misses = choose(there, layers)
        if not misses:
            check_some(choices)
        seen, left_out = without_scripted(there, choices)
        check_made(model)
        session = TorchSession(model, seen, there, layers, misses)
        session.left_out |= left_out
        return session

    def describe(self, model: Any) -> Json:
        """Return the model's type, its number of parameters, and a checksum of its weights."""
        return {
            "type": type(compiled.original(model)).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights": _fingerprint(model),
        }

    def source(self, data: Any) -> Source:
        """Return a source; the normalisation of a torch `Dataset` is read from its transform."""
        if isinstance(data, torch.utils.data.IterableDataset):
            raise DataError(
                "an IterableDataset has no indices, so its rows cannot be shared out or resumed; use "
                "record() with a loop of your own"
            )
        if isinstance(data, torch.utils.data.DataLoader):
            raise DataError(
                "a DataLoader is a loop and not a data set: give its .dataset (batches are made here), or "
                "use record() around the loop"
            )
        if isinstance(data, torch.utils.data.Dataset):
            return TorchSource(data, preprocess=normalisation(getattr(data, "transform", None)))
        return super().source(data)

    def place(self, model: Any, device: str | None) -> Any:
        """Move `model` to `device`, by default to this process's own CUDA device where there is some."""
        try:
            return model.to(device or _own_device())
        except (RuntimeError, AssertionError) as error:
            raise PlanError(f"the model cannot be moved to {device!r}: {error}") from error

    def example(self, model: Any, n_rows: int) -> Batch | None:
        """Return rows that a model that was built by name takes."""
        made = EXAMPLES.get(compiled.original(model))
        return None if made is None else made(n_rows)

    def transfer_rates(self, model: Any) -> dict[str, float]:
        """Return the bytes a second from the model's CUDA device to pageable and to pinned host memory."""
        device = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
        return {} if device is None else transfer_rates(device)

    def survey(self, model: Any, batch: Batch) -> list[Surveyed]:
        """Run `model` once, in evaluation mode, and note what every module gets and gives."""
        session, survey = TorchSession(model, []), Survey(model, self.layers(model), len(batch.rows))
        with session.inference(), compiled.eagerly(), survey:
            session.forward(batch.inputs, batch.kwargs)
        return survey.found()

    def batches(self, source: Source, steps: Iterable[range], workers: int) -> Iterator[Batch]:
        """Yield batches; a torch `Dataset` is read by a `DataLoader`, with worker processes if asked."""
        if not isinstance(source, TorchSource) or workers < 1:
            yield from super().batches(source, steps, workers)
            return
        due, steps = tee(steps)
        loader = torch.utils.data.DataLoader(
            source.samples,
            batch_sampler=map(list, due),
            num_workers=workers,
            collate_fn=list,
        )
        for step, samples in zip(steps, handed_over(loader), strict=True):
            yield source.collate(step, samples)


class TorchSession(Session):
    """One module with hooks on its chosen layers."""

    unseen = UNSEEN

    def __init__(
        self,
        model: nn.Module,
        choices: Sequence[Choice],
        there: Sequence[Layer] = (),
        patterns: Patterns = (),
        misses: Sequence[Pattern] = (),
    ) -> None:
        self.model = model
        #: What runs the rows of one process, with or without `DataParallel` or DDP around it.
        self._root = compiled.undistributed(model)
        self._runs = model
        self.learning = False
        #: The prepared views of this step's pieces, with the rows; None where nothing is copied.
        self.copies: list[tuple[list[Tensor], Piece]] | None = None
        self._whole: list[Tensor] | None = None
        self._hooks = [hook_of(self, choice) for choice in choices]
        self._handles: list[Handle] = []
        self._order = Order()
        self._sink: Sink | None = None
        self._kept: dict[TapName, Given] = {}
        #: Of taps that are a list with one tensor for each row, the paths of the list and inside an entry.
        self._listed: dict[TapName, tuple[Path, Path]] = {}
        self._forms: Sequence[Form] = ()
        #: Of taps whose rows may vary, what reduces them, where a copy alone does not.
        self._of_varying: list[Reducer | None] = []
        self._masks: Masks | None = None
        self._mask: Tensor | None = None
        self._minds_mask = False
        #: Of taps whose rows may vary, the shape of the step's batch.
        self._batch_shapes: dict[int, tuple[int, ...]] = {}
        self._seen: list[TapName] = []
        self._refused: dict[TapName, str] = {}
        self._steps_first = steps_first(model)
        self.left_out: dict[str, str] = {}
        self._names: list[TapName] = []
        self._shapes: list[torch.Size] = []
        self._sizes: list[torch.Size] = []
        #: What each tap is reduced by; None where a copy, which casts, does all.
        self._reducers: list[Reducer | None] = []
        #: The places of each tap's values and parts among the prepared views.
        self._numbers: Sequence[tuple[int, ...]] = ()
        self._n_rows = 0
        self.step = 0
        self._memory: HostSlabs | DeviceSlabs | None = None
        self._device: Device | None = None
        self._by_place = {hook.place: hook for hook in self._hooks}
        self.listener = Listener(self, there, patterns, misses)
        self.late = Gradients(self)
        self.gradients = bool(patterns) and asks_for(patterns, "grad")
        #: Where the step's gradients go, which come after its forward, and whether they are learnt.
        self._of_step: tuple[Any, Any, bool] = (None, None, False)
        self._quantized: set[TapName] = set()
        self._aside: compiled.SetAside | None = None
        #: Returns the axes of a row of some shape, where a library on top of torch tells them.
        self.tell_dims: Callable[[TapName, tuple[int, ...]], tuple[str, ...]] = lambda tap, shape: ()
        #: Whether other names of a layer are the same in every process, so that a store may hold them.
        self.keeps_aliases = True
        #: Whether a list among the inputs has an entry for each row, and is not several inputs.
        self.lists_are_rows = True
        #: By what number traced hooks find this session while it is attached.
        self.number = -1

    def attach(self, sink: Sink) -> None:
        """Register all hooks, or none and raise."""
        self._sink = sink
        if self.spans is not None:
            self.copy = self._copy_with_span  # type: ignore[method-assign]
        self._device = _device_of(self.model)
        self._masks = Masks(self._root, self.varying.mask)
        self.number = compiled.open_recording(self)
        try:
            layers = (hook.choice.layer.module for hook in self._hooks)
            self._aside = compiled.SetAside((compiled.original(self._root), *layers))
            self._put_on([self._root.register_forward_pre_hook(self._pre_hook, with_kwargs=True)])
            for hook in self._hooks:
                self._put_on(hook.register())
            self._put_on([self._root.register_forward_hook(self._post_hook)])
            tapping.listen(self.listener)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove the hooks and let go of all tensors."""
        tapping.leave(self.listener)
        self._order = Order()
        while self._handles:
            self._handles.pop().remove()
        if self._aside is not None:
            self._aside.restore()
        compiled.close_recording(self.number)
        self._aside = None
        if self._memory is not None:
            self._memory.release()
            self._memory = None
        self._kept.clear()
        self.late.forget()
        self._sink = None
        self.copies = self._whole = None
        self.learning = False
        self._of_step = (None, None, False)
        self._mask = None

    def forward(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module on a batch, moved to where its parameters are."""
        move = self._mover()
        return self._runs(*map(move, inputs), **{key: move(value) for key, value in kwargs.items()})

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Run in evaluation mode; every module gets its own mode back.

        There are no gradients, unless some are tapped: then they begin at the tapped layers. What cannot be
        seen in compiled code runs without it.
        """
        training = [module for module in self.model.modules() if module.training]
        eager = self.gradients or any(isinstance(hook, AttentionHook) for hook in self._hooks)
        self.model.eval()
        self._runs = self._root
        try:
            with contextlib.ExitStack() as stack:
                if self.gradients:
                    stack.enter_context(self.late.begin_at_taps(self.model))
                else:
                    # inference_mode would poison what a model caches for later training
                    stack.enter_context(torch.no_grad())
                if eager:
                    stack.enter_context(compiled.eagerly())
                yield
        finally:
            self._runs = self.model
            for module in training:
                module.training = True

    @contextlib.contextmanager
    def separate(self) -> Iterator[None]:
        """Run convolutions as plain products."""
        with torch.backends.cudnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
            yield

    def backward(self, output: Any, score: Score, labels: Any) -> None:
        """Run down to the tapped layers; no parameter's gradient is touched."""
        self.late.run(output, score, labels)

    def learn(self, hook: Hook, call: int, value: Any) -> None:
        """Keep copies of what a hook was given in the first step."""
        layer, kind = hook.choice.layer, hook.choice.kind
        rows: set[Path] = set()
        for path, inside, tensors in row_tensors(value, self._n_rows) if self.varying.rules else ():
            tap = TapName(layer.name, call, (*path, *inside), kind)
            if hook.choice.takes(tap) and self.varying.rule(tap, layer.type) is not None:
                check_rows(tap, tensors, self._n_rows, bare=not inside)
                rows |= {(*path, i, *inside) for i in range(len(tensors))}
                self._seen.append(tap)
                self._listed[tap] = path, inside
                self._kept[tap] = [tensor.detach().clone() for tensor in tensors]
        for path, part in parts_of(value):
            tap = TapName(layer.name, call, path, kind)
            if isinstance(part, Tensor):
                if path not in rows and self.see(hook, tap, part):
                    self._keep(tap, part)
            elif hook.choice.takes(tap):
                self._refused[tap] = f"is no tensor: it is a {type(part).__name__}"

    def see(self, hook: Hook, tap: TapName, tensor: Tensor) -> bool:
        """Note a tap that is there in the first step; return whether it is chosen and can be captured.

        Raises:
            CaptureError: it was asked for by name, and cannot be captured.
        """
        self._seen.append(tap)
        if not hook.choice.takes(tap):
            return False
        if tap in self._kept:
            reason: str | None = "has the name of another tensor: choose another part of the output"
        else:
            reason = refusal(hook.choice.layer, tap, tensor, self._n_rows, self._steps_first)
        if reason is not None:
            self.refuse(hook, tap, reason)
        return reason is None

    def refuse(self, hook: Hook, tap: TapName, reason: str) -> None:
        """Leave out a tap of the first step.

        Raises:
            CaptureError: it was asked for by name.
        """
        if hook.choice.insists(tap):
            raise CaptureError(f"{tap} {reason}")
        self._refused.setdefault(tap, reason)

    def arrive(self, step: int, name: TapName, tap: Tap | None, gradient: Tensor) -> None:
        """Take a gradient, which comes after the forward of its step.

        Raises:
            CaptureError: it has come already.
        """
        if step != self.step or self._sink is None:
            return
        if name in self._kept if tap is None else tap.step == step:
            raise CaptureError(
                f"{name} came a second time in one step: a gradient is whole after one backward(), so add up "
                "what it is called on"
            )
        copies, whole, learning = self._of_step
        if tap is None:
            if learning:
                self._keep(name, gradient)
            return
        before = self.copies, self._whole
        self.copies, self._whole = copies, whole
        try:
            self.copy(tap, gradient)
        finally:
            self.copies, self._whole = before
        assert self._memory is not None
        self._memory.computed()

    def _keep(self, tap: TapName, tensor: Tensor) -> None:
        tensor = tensor.detach()
        if tensor.is_quantized:
            self._quantized.add(tap)
            tensor = tensor.dequantize()
        self._kept[tap] = tensor.clone(memory_format=torch.contiguous_format)

    def expect(self, tap: Tap, output: Any) -> Tensor:
        """Let the gradient of a part of `output` come to `tap`; return what goes on in the forward."""
        tensor = self.find(output, tap)
        self._check_shape(tap, tensor)
        return self.late.expect(self._names[tap.index], tap, tensor)

    def add(self, hooks: Iterable[Hook]) -> None:
        """Take in hooks that the first forward brought."""
        self._hooks += hooks

    def learned(self) -> list[Learned]:
        """Return the taps of the first step, layer by layer in the order of the model."""
        self.listener.check_misses()
        found: list[Learned] = []
        seen, refused = _by_hook(self._seen), _by_hook(self._refused)
        for hook in self._hooks:
            layer, place = hook.choice.layer, (hook.choice.layer.name, hook.choice.kind)
            taps = self._taken(hook, seen.get(place, []), silent_too=place not in refused)
            self.left_out |= {str(tap): self._refused[tap] for tap in refused.get(place, ())}
            hook.calls = [[] for _ in range(hook.n_calls)]
            for tap in taps:
                given = self._kept[tap]
                path, inside = self._listed.get(tap, (tap.path, None))
                hook.calls[tap.call - 1].append(Tap(len(found), path, tap in self._quantized, inside))
                dtype = _numpy_dtype((given if isinstance(given, Tensor) else given[0]).dtype)
                names = layer.aliases if self.keeps_aliases else ()
                aliases = tuple(str(replace(tap, layer=alias)) for alias in names)
                shape = shape_of(given)
                dims = self.tell_dims(tap, shape) if tap.kind != ATTENTION else ()
                found.append(Learned(tap, layer.type, shape, dtype, aliases, dims))
        if not found:
            raise CaptureError("nothing that was chosen can be captured. " + "; ".join(told(self.left_out)))
        self._names = [learned.tap for learned in found]
        return found

    def _taken(self, hook: Hook, seen: Sequence[TapName], silent_too: bool) -> list[TapName]:
        """Hold what a hook was given against what it was asked for; return what is captured of it."""
        layer, choice = hook.choice.layer, hook.choice
        if not seen:
            reason = silent(hook)
            if choice.named is None or choice.named:
                raise CaptureError(f"{layer.name} ({layer.type}) {reason}")
            if silent_too:
                self.left_out[hook.place] = reason
            return []
        taps = [tap for tap in seen if tap in self._kept]
        if hook.late:
            for tap in seen:
                if choice.takes(tap) and tap not in self._kept and tap not in self._refused:
                    if choice.insists(tap):
                        raise CaptureError(self.late.missing(tap))
                    self.left_out[str(tap)] = "has no gradient: " + self.late.missing(tap)
        for wanted in choice.only | (choice.named or frozenset()):
            if not any(Choice(layer, frozenset((wanted,)), choice.kind).takes(tap) for tap in taps):
                gave = f"in the first forward; it gave {', '.join(map(str, seen))}"
                if choice.insists(wanted):
                    raise CaptureError(f"{layer.name} gave no {wanted} {gave}")
                self.left_out.setdefault(str(wanted), f"is not there: {layer.name} gave none {gave}")
        return taps

    def sample(self, i: int) -> NDArray[Any]:
        """Return tap `i` of the first step."""
        given = self._kept[self._names[i]]
        return _to_numpy(given if isinstance(given, Tensor) else given[0][None])

    def fit(self, forms: Sequence[Form]) -> None:
        """Know how the rows of each tap may vary."""
        self._forms = forms
        self._minds_mask = any(form.minds_mask for form in forms)
        if self._minds_mask and self._masks is not None:
            self._mask = self._masks.checked(self._mask, self._n_rows)

        reducers = [
            Reducer(form.chain, form.room, varying=True)
            if form.rule is not None and form.chain.steps
            else None
            for form in forms
        ]
        self._of_varying = [None if one is None or one.only_copies else one for one in reducers]

    def reduce(self, reductions: Sequence[tuple[Chain, Rows]]) -> None:
        """Make ready what the hooks reduce by."""
        reducers = [Reducer(chain, rows) for chain, rows in reductions]
        self._reducers = [None if reducer.only_copies else reducer for reducer in reducers]

    def reduced(self, i: int, chain: Chain, rows: Rows) -> tuple[NDArray[Any], ...]:
        """Return what `chain` makes of tap `i` of the first step, by the hooks' own way."""
        given = self._kept[self._names[i]]
        assert isinstance(given, Tensor), "rows that vary are not reduced"
        return tuple(map(_to_numpy, Reducer(chain, rows).stored(given, self._mask)))

    def prepare(self, layout: Layout, memory: Memory, slabs: Sequence[Slab]) -> None:
        """Make views into the slabs, or into device memory and page-lock the slabs."""
        kept = [self._kept[name] for name in self._names]
        tensors = chain.from_iterable([given] if isinstance(given, Tensor) else given for given in kept)
        self._memory = prepare(layout, memory, slabs, tensors)
        self._shapes = [torch.Size(shape_of(given)) for given in kept]
        self._sizes = [torch.Size((layout.step_rows, *shape)) for shape in self._shapes]
        self._numbers = layout.numbers
        self._reducers = self._reducers or [None] * len(self._names)
        self._others: dict[tuple[int, torch.Size], Reducer] = {}

    def replay(self, pieces: Sequence[Piece]) -> None:
        """Copy what the first step kept."""
        self._aim(pieces)
        for hook in self._hooks:
            for call in hook.calls:
                for tap in call:
                    self.copy(tap, self._kept[self._names[tap.index]])
        self._kept.clear()

    def transfer(self, pieces: Sequence[Piece]) -> Callable[[], None] | None:
        """Start the device-to-host copy of the step; None on the host.

        Raises:
            CaptureError: a gradient did not come.
        """
        for hook in self._hooks:
            if hook.late:
                self._check_fired(hook)
        assert self._memory is not None
        return self._memory.transfer(pieces)

    def wait(self) -> None:
        """Wait for the model's CUDA devices."""
        for device in {p.device for p in self.model.parameters() if p.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    def put(self, view: NDArray[Any], values: Any) -> None:
        """Copy a column; from a GPU without waiting for it."""
        if isinstance(values, Tensor):
            target = torch.from_numpy(view)
            check_cast(
                values.dtype, target.dtype, torch.promote_types(values.dtype, target.dtype) == target.dtype
            )
            assert self._memory is not None
            self._memory.put(target, values.detach())
        else:
            super().put(view, values)

    def to_numpy(self, values: Any) -> NDArray[Any]:
        """Return a tensor, or anything array-like, on the host."""
        return _to_numpy(values) if isinstance(values, Tensor) else np.asarray(values)

    def copy(self, tap: Tap, tensor: Any) -> None:
        """Copy one tap's rows to where they belong, reduced or cast if need be.

        Raises:
            CaptureError: it is no tensor, or of another shape than in the first step.
        """
        index = tap.index
        whole, reducer = self._whole, self._reducers[index]
        if self._forms and self._forms[index].rule is not None:
            self._put(tap, tensor)
        elif whole is not None and isinstance(tensor, Tensor) and tensor.shape == self._sizes[index]:
            tensor = tensor.detach() if tensor.requires_grad else tensor
            if reducer is None:
                whole[index].copy_(tensor)
            else:
                reducer.into([whole[number] for number in self._numbers[index]], tensor, self._mask)
        else:
            reducer = self._reducer_for(tap, tensor)
            tensor = tensor.detach()
            # Reduced as a whole: what lies in which slab must not show in the values.
            parts = (tensor,) if reducer is None else reducer.made(tensor, self._mask)
            self._put_alike(self._numbers[index], parts)
        tap.step = self.step

    def _copy_with_span(self, tap: Tap, tensor: Any) -> None:
        assert self.spans is not None
        start_s = time.perf_counter()
        type(self).copy(self, tap, tensor)
        self.spans.add(f"copy {self._names[tap.index]}", start_s, time.perf_counter())

    def _put_alike(self, numbers: Sequence[int], parts: Sequence[Tensor]) -> None:
        """Put rows of one shape where they belong."""
        for views, piece in self.copies or ():
            for number, part in zip(numbers, parts, strict=True):
                views[number][piece.rows].copy_(part[piece.batch])

    def _put(self, tap: Tap, given: Any) -> None:
        """Put rows that may differ in shape from those of other batches where they belong."""
        name, numbers = self._names[tap.index], self._numbers[tap.index]
        if not isinstance(given, Tensor | list):
            raise CaptureError(f"{name} is a {type(given).__name__} this time, not a tensor")
        if len(given) != self._n_rows:
            raise CaptureError(f"{name} has {len(given)} rows this time, and the batch has {self._n_rows}")
        form, reducer = self._forms[tap.index], self._of_varying[tap.index]
        for _, piece in self.copies or ():
            check_room(form, piece, given)
        parts = (given,) if reducer is None else reduced_rows(form, reducer, given, self._mask)
        if not form.varies:
            self._put_alike(numbers, [part for part in parts if isinstance(part, Tensor)])
            return
        (made,) = parts
        if isinstance(made, Tensor):
            self._batch_shapes[tap.index] = tuple(made.shape)
        for views, piece in self.copies or ():
            put(form, [views[number] for number in numbers], piece, made, self._mask)

    @property
    def lacks_mask(self) -> bool:
        """Whether rows may vary and the forward got no mask."""
        return bool(self.varying.rules) and self._mask is None

    def mask(self, mask: Any) -> None:
        """Say which tokens of the step's rows are their own."""
        tensor = mask.detach() if isinstance(mask, Tensor) else torch.as_tensor(np.asarray(mask))
        copies, _, learning = self._of_step
        if learning:
            self._mask = tensor.clone()
            self.n_tokens = tensor.shape[1] if tensor.ndim == 2 else None
        elif copies is not None:
            check_in_time(self._forms)
            assert self._masks is not None
            assert self._memory is not None
            self._mask = checked = self._masks.checked(tensor, self._n_rows)
            assert checked is not None
            for index, shape in self._batch_shapes.items():
                for views, piece in copies:
                    put_mask(self._forms[index], views[self._numbers[index][1]], piece, shape, checked)
            self._memory.computed()

    def _reducer_for(self, tap: Tap, tensor: Any) -> Reducer | None:
        """Return what reduces a batch, of another shape than the first one's perhaps.

        Raises:
            CaptureError: its rows do not come to what the first ones did.
        """
        index = tap.index
        if isinstance(tensor, Tensor) and len(tensor) == self._n_rows and self._forms:
            if tensor.shape[1:] != self._shapes[index] and (index, tensor.shape[1:]) not in self._others:
                bound = self._forms[index].bound_to(tuple(tensor.shape[1:]))
                if bound is not None:
                    self._others[index, tensor.shape[1:]] = Reducer(*bound)
            if (reducer := self._others.get((index, tensor.shape[1:]))) is not None:
                return reducer
        self._check_shape(tap, tensor)
        return self._reducers[index]

    def find(self, output: Any, tap: Tap) -> Any:
        """Return the part of `output` that `tap` names.

        Raises:
            CaptureError: it is not there this time.
        """
        try:
            found = follow(output, tap.path)
            return found if tap.inside is None else [follow(row, tap.inside) for row in found]
        except (LookupError, TypeError):
            raise CaptureError(
                f"{self._names[tap.index]} is not in the output this time; every forward must give it"
            ) from None

    def _pre_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        n_rows = _batch_rows((*args, *kwargs.values()), self.lists_are_rows)
        check_no_replica(module)
        assert self._masks is not None
        mask = self._masks.among(args, kwargs)
        if is_compiling():
            compiled.trace_begin(self.number, n_rows)
            if mask is not None:
                compiled.trace_tap(self.number, _MASK, mask)
        else:
            self.begin(n_rows)
            self._take_mask(mask)

    def _take_mask(self, mask: Tensor | None) -> None:
        """Know which tokens of the step are the rows' own, where that matters.

        Raises:
            CaptureError: the mask does not say so.
        """
        assert self._masks is not None
        if self.learning:
            self._mask = None if mask is None else mask.detach().clone()
            self.n_tokens = mask.shape[1] if mask is not None and mask.ndim == 2 else None
        elif self.copies is not None and self._minds_mask:
            self._mask = self._masks.checked(mask, self._n_rows)

    def _post_hook(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_compiling():
            compiled.trace_end(self.number)
        else:
            self.end()

    def begin(self, n_rows: int) -> None:
        """Open a step.

        Raises:
            CaptureError: a CUDA graph is being captured.
        """
        assert self._sink is not None
        if self._device is not None and self._device.capturing():
            raise CaptureError(
                "a CUDA graph is being captured: its replays run no hooks, so nothing would be recorded. "
                "Record the model as it runs without the graph, and capture the graph after the recording"
            )
        self.copies = self._whole = None
        self.learning = False
        if self._root._forward_pre_hooks in self._order.restore() and self._gets_inputs:
            raise CaptureError(
                "a forward pre-hook was put on the model after the recording began, so what the model gets "
                "is no longer what is captured: put it on before"
            )
        pieces = self._sink.begin(n_rows)  # finishes the step before, which has rows of its own
        self._n_rows = n_rows
        self._mask = None
        self._batch_shapes.clear()
        self.step += 1
        for hook in self._hooks:
            hook.call = 0
        if pieces is None:
            self._kept.clear()
            self._seen.clear()
            self._refused.clear()
            for hook in self._hooks:
                hook.n_calls = 0
            self.learning = True
        elif pieces:
            self._aim(pieces)
        self.late.forget()
        self._of_step = (self.copies, self._whole, self.learning)

    def fire(self, place: str, value: Any) -> None:
        """Take what a hook in compiled code was given."""
        if place == _MASK:
            self._take_mask(value)
        elif place.startswith(Listener.MARK):
            if self.copies is not None or self.learning:
                for heard in self.listener.hooks(place.removeprefix(Listener.MARK)):
                    heard.fired(value)
        elif (hook := self._by_place.get(place)) is not None:
            hook.fired(value)

    def end(self) -> None:
        """Close the step.

        Raises:
            CaptureError: a tap did not fire.
        """
        assert self._sink is not None
        if self.copies is not None:
            for hook in self._hooks:
                if not hook.late:
                    self._check_fired(hook)
        self.copies = self._whole = None
        self.learning = False
        if self._memory is not None:
            self._memory.computed()
        self._sink.done()

    def _put_on(self, handles: Iterable[Handle]) -> None:
        for handle in handles:
            self._handles.append(handle)
            if isinstance(handle, RemovableHandle):
                hooks = handle.hooks_dict_ref()
                assert hooks is not None
                self._order.note(hooks, handle.id)

    @property
    def _gets_inputs(self) -> bool:
        """Whether what the model itself gets is tapped."""
        return any(
            hook.choice.layer.name == ROOT and hook.choice.kind in ("input", "attention")
            for hook in self._hooks
        )

    def _check_fired(self, hook: Hook) -> None:
        for call in hook.calls:
            for tap in call:
                if tap.step != self.step:
                    name = self._names[tap.index]
                    raise CaptureError(
                        self.late.missing(name)
                        if hook.late
                        else f"{name} fired in the first forward and not in this one: {UNSEEN}"
                    )

    def _aim(self, pieces: Sequence[Piece]) -> None:
        """Point the hooks at the memory of a step."""
        assert self._memory is not None
        self.copies = [(self._memory.views(piece.slab), piece) for piece in pieces]
        # A batch that fills one slab is copied into prepared views; any other is cut to measure.
        fills = len(pieces) == 1 and pieces[0].start == 0 and pieces[0].batch == slice(0, self._n_rows)
        self._whole = self.copies[0][0] if fills else None

    def _check_shape(self, tap: Tap, tensor: Any) -> None:
        name = self._names[tap.index]
        if not isinstance(tensor, Tensor):
            raise CaptureError(f"{name} is a {type(tensor).__name__} this time, not a tensor")
        if tensor.shape[1:] != self._shapes[tap.index] or tensor.shape[0] != self._n_rows:
            raise CaptureError(
                f"{name} has shape {tuple(tensor.shape)}; {(self._n_rows, *self._shapes[tap.index])} follows "
                f"from the first batch. {ways(str(name), tuple(tensor.shape[1:]), self._shapes[tap.index])}"
            )

    def _mover(self) -> Callable[[Any], Any]:
        parameter = next(self.model.parameters(), None)
        anything = parameter if parameter is not None else next(self.model.buffers(), None)
        device = anything.device if anything is not None else torch.device("cpu")

        def move(value: Any) -> Any:
            if isinstance(value, list):  # of pictures that differ in size
                return list(map(move, value))
            if isinstance(value, np.ndarray):
                value = np.require(value, value.dtype.newbyteorder("="), ["W"])
                value = torch.from_numpy(value)
            if not isinstance(value, Tensor):
                return value
            moved = value.to(device, non_blocking=True)
            if parameter is not None and moved.is_floating_point() and parameter.is_floating_point():
                return moved.to(parameter.dtype)
            return moved

        return move


compiled.leave_as_is(
    *(kind.__call__ for kind in (*HOOKS, Listener)), TorchSession._pre_hook, TorchSession._post_hook
)


def _by_hook(taps: Iterable[TapName]) -> dict[tuple[str, str], list[TapName]]:
    groups: dict[tuple[str, str], list[TapName]] = {}
    for tap in taps:
        groups.setdefault((tap.layer, tap.kind), []).append(tap)
    return groups


def _device_of(model: nn.Module) -> Device | None:
    """Return the device that `model` runs on, or partly runs on; None for the host."""
    devices = (t.device for t in chain(model.parameters(), model.buffers()))
    device = next((device for device in devices if device.type in DEVICES), None)
    return None if device is None else DEVICES[device.type](device)


def _own_device() -> str:
    """Return the device of this process among those of its machine, which torchrun and SLURM number."""
    if not torch.cuda.is_available():
        return "cpu"
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", ""))
    return f"cuda:{int(rank) % torch.cuda.device_count()}" if rank.isdecimal() else "cuda"


def _numpy_dtype(dtype: torch.dtype) -> DType:
    return named_dtype(_NAMES[dtype])


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return tensor.view(torch.uint8).numpy().view(_numpy_dtype(tensor.dtype))
    array: NDArray[Any] = tensor.numpy()
    return array


def _batch_rows(values: Sequence[Any], lists_are_rows: bool = True) -> int:
    for value in values:
        if isinstance(value, Tensor | np.ndarray) and value.ndim:
            return value.shape[0]  # while it is traced, what stands for a number
        if isinstance(value, list) and value and lists_are_rows:  # of pictures that differ in size
            return len(value)
        if isinstance(value, tuple | list | dict) and value:
            return _batch_rows(list(value.values() if isinstance(value, dict) else value), lists_are_rows)
    raise CaptureError("the forward got no tensor whose first axis would count the rows of the batch")


def _fingerprint(model: nn.Module) -> str:
    state = model.state_dict()
    return fingerprint(
        (name, str(tensor.dtype), tuple(tensor.shape), _bytes_of(tensor))
        for name, tensor in zip(compiled.plain_names(model, state), state.values(), strict=True)
        if isinstance(tensor, Tensor) and not tensor.is_meta
    )


def _bytes_of(tensor: Tensor) -> NDArray[Any]:
    values: NDArray[Any] = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return values
