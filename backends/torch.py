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
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, tee
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..capture.backend import Backend, Json, Learned, Session, Sink, Surveyed
from ..capture.checksum import crc32c
from ..capture.columns import check_cast
from ..capture.data import Batch, Preprocess, SampleSource, Source
from ..capture.dtypes import BFLOAT16, DType
from ..capture.errors import CaptureError, DataError, PlanError
from ..capture.layout import Layout
from ..capture.pipeline import Memory, Piece, Slab
from ..capture.taps import ROOT, Choice, Layer, Path, Patterns, TapName, flatten, follow, select
from . import torch_compile as compiled
from .torch_slabs import DEVICES, TORCH_DTYPES, Device, DeviceSlabs, HostSlabs, prepare

is_compiling = torch.compiler.is_compiling

_UNSEEN = (
    "it ran where no hook is seen. A CUDA graph that is replayed (torch.cuda.make_graphed_callables) and an "
    "exported program run none: record the model without them. A function that torch.compile had compiled "
    "before may keep the code that it had: call torch.compiler.reset() before the recording"
)

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class TorchBackend(Backend):
    """`torch.nn.Module`s."""

    name = "torch"

    def accepts(self, model: Any) -> bool:
        """Return whether `model` is a module."""
        return isinstance(model, nn.Module)

    def layers(self, model: Any) -> list[Layer]:
        """Return the model and all of its modules; a shared module under each of its names.

        A compiled module is not told from a plain one.
        """
        return [
            Layer(name or ROOT, tuple(c.__name__ for c in type(module).__mro__), module)
            for name, module in compiled.named_originals(model)
        ]

    def session(self, model: Any, layers: Patterns) -> Session:
        """Choose `layers` of `model`.

        Raises:
            PlanError: one of them runs without Python, inside a module that `torch.jit` made.
        """
        there = self.layers(model)
        choices = select(there, layers)
        _check_scripted(there, choices)
        return TorchSession(model, choices)

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
            return TorchSource(data, preprocess=_normalisation(getattr(data, "transform", None)))
        return super().source(data)

    def place(self, model: Any, device: str | None) -> Any:
        """Move `model` to `device`, by default to this process's own CUDA device where there is some."""
        try:
            return model.to(device or _own_device())
        except (RuntimeError, AssertionError) as error:
            raise PlanError(f"the model cannot be moved to {device!r}: {error}") from error

    def survey(self, model: Any, batch: Batch) -> list[Surveyed]:
        """Run `model` once, in evaluation mode, and note every module's outputs."""
        layers = self.layers(model)
        session = TorchSession(model, [])
        notes: dict[str, list[Any]] = {layer.name: [] for layer in layers}

        def note(name: str, output: Any) -> None:
            call = len(notes[name]) + 1
            leaves = flatten(output, lambda value: isinstance(value, Tensor))
            notes[name].append(
                [
                    (TapName(name, call, p), tuple(t.shape), str(t.dtype).removeprefix("torch."))
                    for p, t in leaves
                ]
            )

        handles = [
            layer.module.register_forward_hook(lambda m, args, output, name=layer.name: note(name, output))
            for layer in layers
        ]
        try:
            with session.inference(), compiled.eagerly():
                session.forward(batch.inputs, batch.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return [
            Surveyed(layer, len(calls), tuple(tap for call in calls for tap in call))
            for layer in layers
            for calls in [notes[layer.name]]
        ]

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
        for step, samples in zip(steps, _handed_over(loader), strict=True):
            yield source.collate(step, samples)


def _handed_over(loader: Any) -> Iterator[list[Any]]:
    """Yield what the workers load; name one that dies while it hands over a batch, which torch does not."""
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:
        raise DataError(
            "a DataLoader worker died while it handed over a batch: killed, perhaps for want of memory. "
            "Give fewer workers; with none (--workers 0, workers=0) an error of the data shows where it is"
        ) from error


class TorchSource(SampleSource):
    """A torch `Dataset` of tensors, PIL images or dicts."""

    def stack(self, values: Sequence[Any]) -> Any:
        """Stack to one tensor.

        Raises:
            DataError: the values differ in shape.
        """
        tensors = [torch.as_tensor(value) for value in values]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise DataError(
                f"the inputs of one batch differ in shape: {', '.join(map(str, sorted(shapes)))}; "
                "resize or pad them in the data set's transform"
            )
        return torch.stack(tensors)


class _Tap:
    """Where one tensor of one call goes."""

    __slots__ = ("index", "path", "step")

    def __init__(self, index: int, path: Path) -> None:
        self.index, self.path, self.step = index, path, -1


class _Hook:
    """The forward hook of one layer."""

    __slots__ = ("call", "calls", "choice", "layer", "session")

    def __init__(self, session: TorchSession, choice: Choice) -> None:
        self.session, self.choice, self.layer = session, choice, choice.layer.name
        self.call = 0
        self.calls: list[list[_Tap]] = []

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_compiling():
            compiled.trace_tap(self.session.number, self.layer, output)
        else:
            self.take(output)

    def take(self, output: Any) -> None:
        """Copy what this call of the layer gave."""
        session = self.session
        call = self.call
        self.call = call + 1
        if session.copies is None:
            if session.learning:
                session.learn(self.choice, call + 1, output)
            return
        if call >= len(self.calls):
            if self.choice.only:
                return
            raise CaptureError(
                f"{self.choice.layer.name} was called {call + 1} times in this forward and "
                f"{len(self.calls)} times in the first; every forward must call it alike"
            )
        for tap in self.calls[call]:
            tensor = output if not tap.path else session.find(output, tap)
            session.copy(tap, tensor)


class TorchSession(Session):
    """One module with hooks on its chosen layers."""

    unseen = _UNSEEN

    def __init__(self, model: nn.Module, choices: Sequence[Choice]) -> None:
        self.model = model
        self.learning = False
        #: The prepared views of this step's pieces, with the rows; None where nothing is copied.
        self.copies: list[tuple[list[Tensor], Piece]] | None = None
        self._whole: list[Tensor] | None = None
        self._hooks = [_Hook(self, choice) for choice in choices]
        self._handles: list[RemovableHandle] = []
        self._sink: Sink | None = None
        self._kept: dict[TapName, Tensor] = {}
        self._seen: list[TapName] = []
        self._types: dict[str, str] = {choice.layer.name: choice.layer.type for choice in choices}
        self._names: list[TapName] = []
        self._shapes: list[torch.Size] = []
        self._sizes: list[torch.Size] = []
        self._n_rows = 0
        self._step = 0
        self._memory: HostSlabs | DeviceSlabs | None = None
        self._device: Device | None = None
        self._by_layer = {hook.layer: hook for hook in self._hooks}
        self._aside: compiled.SetAside | None = None
        #: By what number traced hooks find this session while it is attached.
        self.number = -1

    def attach(self, sink: Sink) -> None:
        """Register all hooks, or none and raise."""
        self._sink = sink
        self._device = _device_of(self.model)
        self.number = compiled.open_recording(self)
        try:
            layers = (hook.choice.layer.module for hook in self._hooks)
            self._aside = compiled.SetAside((compiled.original(self.model), *layers))
            self._handles.append(self.model.register_forward_pre_hook(self._pre_hook, with_kwargs=True))
            for hook in self._hooks:
                self._handles.append(hook.choice.layer.module.register_forward_hook(hook))
            self._handles.append(self.model.register_forward_hook(self._post_hook))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove the hooks and let go of all tensors."""
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
        self._sink = None
        self.copies = self._whole = None
        self.learning = False

    def forward(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module on a batch, moved to where its parameters are."""
        move = self._mover()
        return self.model(*map(move, inputs), **{key: move(value) for key, value in kwargs.items()})

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Run in evaluation mode without gradients; every module gets its own mode back."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():  # inference_mode would poison what a model caches for later training
                yield
        finally:
            for module in training:
                module.training = True

    def learn(self, choice: Choice, call: int, output: Any) -> None:
        """Keep copies of what a layer gave in the first step."""
        for path, tensor in flatten(output, lambda value: isinstance(value, Tensor)):
            tap = TapName(choice.layer.name, call, path)
            self._seen.append(tap)
            if choice.takes(tap):
                _check_recurrent(choice.layer, tap)
                if tap in self._kept:
                    raise CaptureError(f"two tensors are called {tap}; choose another part of the output")
                _check_tensor(tap, tensor, self._n_rows)
                self._kept[tap] = tensor.detach().clone(memory_format=torch.contiguous_format)

    def learned(self) -> list[Learned]:
        """Return the taps of the first step, layer by layer in the order of the model."""
        found: list[Learned] = []
        for hook in self._hooks:
            name = hook.choice.layer.name
            taps = [tap for tap in self._kept if tap.layer == name]
            seen = [tap for tap in self._seen if tap.layer == name]
            if not seen:
                raise CaptureError(_silent(hook))
            for wanted in hook.choice.only:
                if not any(Choice(hook.choice.layer, frozenset((wanted,))).takes(tap) for tap in taps):
                    raise CaptureError(
                        f"{name} gave no {wanted} in the first forward; it gave {', '.join(map(str, seen))}"
                    )
            hook.calls = [[] for _ in range(max(tap.call for tap in taps))]
            for tap in taps:
                tensor = self._kept[tap]
                hook.calls[tap.call - 1].append(_Tap(len(found), tap.path))
                found.append(
                    Learned(tap, self._types[name], tuple(tensor.shape[1:]), _numpy_dtype(tensor.dtype))
                )
        self._names = [learned.tap for learned in found]
        return found

    def sample(self, i: int) -> NDArray[Any]:
        """Return tap `i` of the first step."""
        return _to_numpy(self._kept[self._names[i]])

    def prepare(self, layout: Layout, memory: Memory, slabs: Sequence[Slab]) -> None:
        """Make views into the slabs, or into device memory and page-lock the slabs."""
        self._memory = prepare(layout, memory, slabs, self._kept.values())
        self._shapes = [torch.Size(tap.shape) for tap in layout.taps]
        self._sizes = [torch.Size((layout.step_rows, *tap.shape)) for tap in layout.taps]

    def replay(self, pieces: Sequence[Piece]) -> None:
        """Copy what the first step kept."""
        self._aim(pieces)
        for hook in self._hooks:
            for call in hook.calls:
                for tap in call:
                    self.copy(tap, self._kept[self._names[tap.index]])
        self._kept.clear()

    def transfer(self, pieces: Sequence[Piece]) -> Callable[[], None] | None:
        """Start the device-to-host copy of the step; None on the host."""
        assert self._memory is not None
        return self._memory.transfer(pieces)

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

    def copy(self, tap: _Tap, tensor: Any) -> None:
        """Copy one tap's rows to where they belong, casting if need be.

        Raises:
            CaptureError: it is no tensor, or of another shape than in the first step.
        """
        index = tap.index
        whole = self._whole
        if whole is not None and isinstance(tensor, Tensor) and tensor.shape == self._sizes[index]:
            whole[index].copy_(tensor.detach() if tensor.requires_grad else tensor)
        else:
            self._check_shape(tap, tensor)
            tensor = tensor.detach()
            for views, piece in self.copies or ():
                views[index][piece.rows].copy_(tensor[piece.batch])
        tap.step = self._step

    def find(self, output: Any, tap: _Tap) -> Any:
        """Return the part of `output` that `tap` names.

        Raises:
            CaptureError: it is not there this time.
        """
        try:
            return follow(output, tap.path)
        except (LookupError, TypeError):
            raise CaptureError(
                f"{self._names[tap.index]} is not in the output this time; every forward must give it"
            ) from None

    def _pre_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        n_rows = _batch_rows((*args, *kwargs.values()))
        if is_compiling():
            compiled.trace_begin(self.number, n_rows)
        else:
            self.begin(n_rows)

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
        pieces = self._sink.begin(n_rows)  # finishes the step before, which has rows of its own
        self._n_rows = n_rows
        self._step += 1
        for hook in self._hooks:
            hook.call = 0
        if pieces is None:
            self._kept.clear()
            self._seen.clear()
            self.learning = True
        elif pieces:
            self._aim(pieces)

    def fire(self, layer: str, output: Any) -> None:
        """Take what a layer in compiled code gave."""
        if (hook := self._by_layer.get(layer)) is not None:
            hook.take(output)

    def end(self) -> None:
        """Close the step.

        Raises:
            CaptureError: a tap did not fire.
        """
        assert self._sink is not None
        if self.copies is not None:
            for hook in self._hooks:
                for call in hook.calls:
                    for tap in call:
                        if tap.step != self._step:
                            raise CaptureError(
                                f"{self._names[tap.index]} fired in the first forward and not in this one: "
                                f"{_UNSEEN}"
                            )
        self.copies = self._whole = None
        self.learning = False
        if self._memory is not None:
            self._memory.computed()
        self._sink.done()

    def _aim(self, pieces: Sequence[Piece]) -> None:
        """Point the hooks at the memory of a step."""
        assert self._memory is not None
        self.copies = [(self._memory.views(piece.slab), piece) for piece in pieces]
        # A batch that fills one slab is copied into prepared views; any other is cut to measure.
        fills = len(pieces) == 1 and pieces[0].start == 0 and pieces[0].batch == slice(0, self._n_rows)
        self._whole = self.copies[0][0] if fills else None

    def _check_shape(self, tap: _Tap, tensor: Any) -> None:
        name = self._names[tap.index]
        if not isinstance(tensor, Tensor):
            raise CaptureError(f"{name} is a {type(tensor).__name__} this time, not a tensor")
        if tensor.shape[1:] != self._shapes[tap.index] or tensor.shape[0] != self._n_rows:
            raise CaptureError(
                f"{name} has shape {tuple(tensor.shape)}; {(self._n_rows, *self._shapes[tap.index])} follows "
                "from the first batch. A tap keeps the shape of its rows: give inputs of one size"
            )

    def _mover(self) -> Callable[[Any], Any]:
        parameter = next(self.model.parameters(), None)
        anything = parameter if parameter is not None else next(self.model.buffers(), None)
        device = anything.device if anything is not None else torch.device("cpu")

        def move(value: Any) -> Any:
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


compiled.leave_as_is(_Hook.__call__, TorchSession._pre_hook, TorchSession._post_hook)


def _check_tensor(tap: TapName, tensor: Tensor, n_rows: int) -> None:
    kind = None
    if tensor.is_meta:
        kind = "lies on the meta device and has no values"
    elif tensor.layout is not torch.strided or tensor.is_nested:
        kind = f"is {'nested' if tensor.is_nested else tensor.layout}, not a dense tensor"
    elif tensor.dtype not in _NAMES:
        kind = f"holds {tensor.dtype}, which a store cannot hold"
    elif tensor.ndim == 0 or tensor.shape[0] != n_rows:
        kind = f"has shape {tuple(tensor.shape)}; the batch has {n_rows} rows, and rows come first"
        if tap.path:
            kind += (
                f". Choose the parts of {tap.layer} whose rows do, such as {TapName(tap.layer, path=(0,))}"
            )
    if kind is not None:
        raise CaptureError(f"{tap} {kind}")


def _check_recurrent(layer: Layer, tap: TapName) -> None:
    """Refuse what a recurrent layer gives with its rows on the second axis.

    The shape alone does not tell: a batch may have as many rows as the layer has steps or layers.
    """
    module = layer.module
    if isinstance(module, nn.RNNBase) and (tap.path[:1] == (1,) or not module.batch_first):
        first = "layers" if tap.path[:1] == (1,) else "steps"
        raise CaptureError(
            f"{tap} has {first} on its first axis, and rows come first. Choose "
            + (
                f"{layer.name}[0], the outputs"
                if module.batch_first
                else "a layer built with batch_first=True"
            )
        )


def _silent(hook: _Hook) -> str:
    layer = hook.choice.layer
    if hook.call:
        return f"{layer.name} ({layer.type}) gave no tensor: there is nothing to capture"
    return (
        f"{layer.name} ({layer.type}) did not run as a module in this forward. Either the forward does not "
        f"call it (as with the projections inside nn.MultiheadAttention), or {_UNSEEN}"
    )


def _check_scripted(there: Sequence[Layer], choices: Sequence[Choice]) -> None:
    scripted = [layer.name for layer in there if isinstance(layer.module, torch.jit.ScriptModule)]
    for choice in choices:
        name = choice.layer.name
        around = next((s for s in scripted if name != s and (s == ROOT or name.startswith(f"{s}."))), None)
        if around is not None:
            raise PlanError(
                f"{name} lies inside {'the model' if around == ROOT else around}, which torch.jit made: its "
                "layers run without Python, and no hook sees them. Record the module that it was made from"
            )


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
    name = _NAMES[dtype]
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[Any] = tensor.numpy()
    return array


def _batch_rows(values: Sequence[Any]) -> int:
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]  # while it is traced, what stands for a number
        if isinstance(value, list) and value:  # of pictures that differ in size
            return len(value)
        if isinstance(value, tuple | dict) and value:
            return _batch_rows(list(value.values() if isinstance(value, dict) else value))
    raise CaptureError("the forward got no tensor whose first axis would count the rows of the batch")


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            continue
        name = compiled.plain_name(key)
        data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        crc = crc32c(data.data) if data.size else 0
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:{crc:08x}\n".encode())
    return digest.hexdigest()[:32]


def _normalisation(transform: Any) -> Preprocess:
    """Read mean and standard deviation from a torchvision `Normalize` inside `transform`."""
    for part in (transform, *getattr(transform, "transforms", ())):
        if type(part).__name__ == "Normalize" and hasattr(part, "mean") and hasattr(part, "std"):
            return Preprocess(tuple(map(float, part.mean)), tuple(map(float, part.std)))
    return Preprocess()
