"""Taps in modules that `torch.compile` has compiled, or will.

What shaped it:

* Hooks that are on when a region is compiled are traced into it, and Python that copies would break its
  graph. So a hook that is being traced leaves one operator there, whose body runs with the true tensors when
  its turn comes. It says that it writes to a token: so it is neither dropped nor moved past another.
* Once a region is compiled, torch does not look at hooks again, but it does check the types of the modules.
  So while a recording lasts, modules whose code may be compiled already have a class of their own: that code
  is set aside, and is what runs again afterwards.
* What is compiled during a recording is guarded by its mark in `_MARKS`. When the mark goes, so does the
  code, and the next call compiles without taps, or finds the code of before.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..capture.taps import Path, flatten

#: Codes of earlier recordings that a function of the user's may still hold; torch allows 8 of all kinds.
_MAX_DEAD = 2
#: Between the paths of an output's tensors, and between the keys of a path; no name has them.
_PATHS, _KEYS = "\x1f", "\x1e"

_TOKEN = torch.zeros(1)
#: What code that was compiled during a recording is valid for, by the recording's number.
_MARKS: dict[int, type] = {}
#: Those that ran in what torch compiled for them.
_COMPILED: set[int] = set()
_RECORDINGS: dict[int, Recording] = {}


class Recording(Protocol):
    """What the operators call."""

    def begin(self, n_rows: int) -> None:
        """Open a step."""

    def fire(self, place: str, value: Any) -> None:
        """Take what a hook was given."""

    def end(self) -> None:
        """Close the step."""


def open_recording(recording: Recording) -> int:
    """Return a number by which operators find `recording`, until it is closed."""
    number = next(i for i in range(len(_RECORDINGS) + 1) if i not in _RECORDINGS)
    _RECORDINGS[number] = recording
    _MARKS[number] = type("Mark", (), {})
    return number


def close_recording(number: int) -> None:
    """Let go of the recording, and of the code that was compiled for it."""
    _RECORDINGS.pop(number, None)
    if _MARKS.pop(number, None) is not None and number in _COMPILED and _compiled_codes():
        gc.collect()  # a class is a cycle; what torch compiled for it goes with it
    _COMPILED.discard(number)


def trace_begin(number: int, n_rows: int) -> None:
    """Leave the start of a step in the graph that is being traced."""
    assert _MARKS[number] is not None  # torch guards what is compared
    torch.ops.layertap.begin(_TOKEN, number, n_rows)


def trace_tap(number: int, place: str, output: Any) -> None:
    """Leave a tap in the graph that is being traced."""
    assert _MARKS[number] is not None
    tensors, paths = [], []
    for path, tensor in flatten(output, _is_tensor):
        tensors.append(tensor.detach())
        paths.append(_KEYS.join([f"i{key}" if isinstance(key, int) else f"s{key}" for key in path]))
    torch.ops.layertap.tap(_TOKEN, tensors, number, place, _PATHS.join(paths))


def trace_end(number: int) -> None:
    """Leave the end of a step in the graph that is being traced."""
    assert _MARKS[number] is not None
    torch.ops.layertap.end(_TOKEN, number)


def leave_as_is(*functions: Any) -> None:
    """Let torch not compile these, nor what they call, unless it is tracing what calls them."""
    frames: Any = torch._C._dynamo.eval_frame
    if hasattr(frames, "_FrameExecStrategy"):
        skip = frames._FrameAction.SKIP
        for function in functions:
            frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))


def original(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` or a parallel wrapper stands around, or `module` itself."""
    while (inner := _inside(module)) is not None:
        module = getattr(module, inner)
    return module


def undistributed(model: nn.Module) -> nn.Module:
    """Return what `DataParallel` or `DistributedDataParallel` stands around, or `model` itself."""
    found = module = model
    while (inner := _inside(module)) is not None:
        compiles = _is_wrapper(module)
        module = getattr(module, inner)
        if not compiles:
            found = module
    return found


def named_originals(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module under the name that it has in a model that nothing stands around."""
    module = original(model)
    yield name, module
    for child, inner in module._modules.items():
        if inner is not None:
            yield from named_originals(inner, f"{name}.{child}" if name else child)


def compiled_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module that runs in compiled code."""
    for module in model.modules():
        if _is_wrapper(module) or getattr(module, "_compiled_call_impl", None) is not None:
            yield from module.modules()


def plain_names(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Yield the names of parameters as they are in a model that nothing stands around."""
    around = {
        f"{name}.{inner}.".lstrip("."): f"{name}.".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if (inner := _inside(module)) is not None
    }
    for name in names:
        for prefix in sorted(around, key=len, reverse=True):
            if name.startswith(prefix):
                name = around[prefix] + name[len(prefix) :]
        yield name


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Run what is compiled as if it were not."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    if "torch._dynamo" not in sys.modules or set_stance is None:
        yield
        return
    with set_stance("force_eager"):
        yield


class SetAside:
    """Code that was compiled before a recording, set aside while it lasts.

    Nothing is done where torch has compiled nothing yet.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._classes: list[tuple[nn.Module, type]] = []
        # Held until the mark is gone: what ends first is what torch names as the end of the code.
        self._ours: list[type] = []
        codes = _compiled_codes()
        if not codes:
            return
        _drop_dead(codes)
        try:
            for module in dict.fromkeys(modules):
                kind = vars(type(module)).get("_set_aside_from", type(module))  # recordings may overlap
                self._classes.append((module, kind))
                self._ours.append(_subclass(kind))
                module.__class__ = self._ours[-1]
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Give every module its class back."""
        while self._classes:
            module, kind = self._classes.pop()
            module.__class__ = kind


def _subclass(kind: type) -> type:
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind)(kind.__name__, (kind,), {**names, "_set_aside_from": kind})


def _compiled_codes() -> list[Any]:
    """Return the code objects that torch has compiled in this process."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is None:
        return []
    seen = [*frames.input_codes.seen, *frames.output_codes.seen]
    return [code for code in (reference() for reference in seen) if code is not None]


def _drop_dead(codes: Iterable[Any]) -> None:
    """Make room where code of earlier recordings takes up what torch allows for one function.

    Torch empties such an entry and counts it all the same. A function's entries go all at once, so it is
    compiled again when it is called next.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code

    for code in codes:
        reasons = [
            getattr(entry.guard_manager, "invalidation_reason", "")
            for entry in _debug_get_cache_entry_list(code)
        ]
        if sum("_MARKS" in reason for reason in reasons) > _MAX_DEAD:
            reset_code(code)


def _is_wrapper(module: Any) -> bool:
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(module, frames.OptimizedModule)


def _inside(module: Any) -> str | None:
    """Return where `module` keeps the one that it stands around."""
    if _is_wrapper(module):
        return "_orig_mod"
    return "module" if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) else None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@cache
def _parse(paths: str) -> tuple[Path, ...]:
    return tuple(
        tuple(int(key[1:]) if key[0] == "i" else key[1:] for key in path.split(_KEYS) if key)
        for path in paths.split(_PATHS)
    )


def _rebuild(tensors: list[Tensor], paths: str) -> Any:
    """Return the output that has `tensors` at `paths`; what else was in it is left out."""
    if not paths:
        return tensors[0] if tensors else None
    output: dict[Any, Any] = {}
    for path, tensor in zip(_parse(paths), tensors, strict=True):
        inner = output
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = tensor
    return output


def _run_begin(token: Tensor, number: int, n_rows: int) -> None:
    _COMPILED.add(number)
    if (recording := _RECORDINGS.get(number)) is not None:
        recording.begin(n_rows)


def _run_tap(token: Tensor, tensors: list[Tensor], number: int, place: str, paths: str) -> None:
    _COMPILED.add(number)
    if (recording := _RECORDINGS.get(number)) is not None:
        recording.fire(place, _rebuild(tensors, paths))


def _run_end(token: Tensor, number: int) -> None:
    _COMPILED.add(number)
    if (recording := _RECORDINGS.get(number)) is not None:
        recording.end()


def _define() -> torch.library.Library:
    """Define the operators: no copy of what they get, in any layout, and no part of a CUDA graph."""
    library = torch.library.Library("layertap", "DEF")  # type: ignore[no-untyped-call]
    tags = [getattr(torch.Tag, name, None) for name in ("flexible_layout", "cudagraph_unsafe")]
    for schema, run in (
        ("begin(Tensor(a!) token, int number, SymInt n_rows) -> ()", _run_begin),
        ("tap(Tensor(a!) token, Tensor[] tensors, int number, str place, str paths) -> ()", _run_tap),
        ("end(Tensor(a!) token, int number) -> ()", _run_end),
    ):
        known = tuple(tag for tag in tags if tag is not None)
        name = library.define(schema, tags=known)  # type: ignore[no-untyped-call]
        library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"layertap::{name}", lambda *args: None, lib=library)
    return library


_LIBRARY = _define()
