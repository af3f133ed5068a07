"""Where hooks copy to: the slabs of the host themselves, or slabs on a device that are moved to them.

What shaped it:

* On a GPU one copy a step moves a whole slab to page-locked memory on a side stream, after an event. A copy
  straight from a layer's output would race with in-place operations.
* The host waits for a device nowhere in a step: streams wait for events, and a writer thread for the copy.
* A device slab is written again only after the copy that reads it; three of them let the next step begin.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..capture.dtypes import dtype_name
from ..capture.errors import CaptureError, PlanError
from ..capture.layout import Layout
from ..capture.pipeline import Memory, Piece, Slab
from ..capture.plan import show_bytes

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2"),
    )
}

#: Device slabs that are made beforehand: one is filled while others are copied. Device memory that a capture
#: takes: this many steps of taps.
N_DEVICE_SLABS = 3

_TIMED_BYTES = 64 * 2**20


class Event(Protocol):
    """A place in the order of what a device does."""

    def synchronize(self) -> None:
        """Let the calling thread wait for it."""


class Device(Protocol):
    """What slabs need of a device: memory, the order of its work, and copies beside it."""

    def capturing(self) -> bool:
        """Return whether what is called now is only noted for a graph."""

    def lock(self, memory: Memory) -> None:
        """Page-lock host memory, so that it can be copied to asynchronously."""

    def unlock(self, memory: Memory) -> None:
        """Undo `lock`."""

    def allocate(self, n_bytes: int) -> Tensor:
        """Return new memory on the device."""

    def now(self) -> Event:
        """Return an event behind all that this thread's current stream was given."""

    def wait(self, event: Event) -> None:
        """Let the current stream wait for `event`."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Event]) -> Event:
        """Copy each (to the host, from the device) beside the current stream; return the event behind it."""

    def follow(self) -> Callable[[Tensor, Tensor], Event]:
        """Return what copies to the host, from the device, on the stream that is the current one now."""

    def finish(self) -> None:
        """Let the calling thread wait for all that the device was given."""


class Cuda:
    """A CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capturing(self) -> bool:
        """Return whether a CUDA graph is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def lock(self, memory: Memory) -> None:
        """Page-lock just these bytes; torch's own pinned allocator rounds up to 2**n."""
        portable = 1  # for every GPU of the process
        self._check(_cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, portable))

    def unlock(self, memory: Memory) -> None:
        """Undo `lock`."""
        self._check(_cudart().cudaHostUnregister(memory.ctypes.data))

    def allocate(self, n_bytes: int) -> Tensor:
        """Return new memory on the device."""
        return torch.empty(n_bytes, dtype=torch.uint8, device=self._device)

    def now(self) -> Event:
        """Return an event on the current stream."""
        event: Event = torch.cuda.current_stream(self._device).record_event()
        return event

    def wait(self, event: Event) -> None:
        """Let the current stream wait."""
        torch.cuda.current_stream(self._device).wait_event(event)  # type: ignore[arg-type]

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Event]) -> Event:
        """Copy on a stream of its own."""
        for event in after:
            self._beside.wait_event(event)  # type: ignore[arg-type]
        with torch.cuda.stream(self._beside):
            for host, device in pairs:
                host.copy_(device, non_blocking=True)
        # A writer that spins would take a core from the forward.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._beside.record_event(done)
        return done

    def follow(self) -> Callable[[Tensor, Tensor], Event]:
        """Return what copies on the stream that is the current one now."""
        stream = torch.cuda.current_stream(self._device)

        def copy(host: Tensor, device: Tensor) -> Event:
            with torch.cuda.stream(stream):
                host.copy_(device, non_blocking=True)
            event: Event = stream.record_event()
            return event

        return copy

    def finish(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize(self._device)

    def _check(self, status: Any) -> None:
        if int(status) != 0:
            raise CaptureError(f"the GPU's driver cannot lock host memory: {status}; give less memory")


#: What stands for each kind of device. Others are copied from in the hook, which waits for them.
DEVICES: dict[str, Callable[[torch.device], Device]] = {"cuda": Cuda}


def prepare(
    layout: Layout, memory: Memory, slabs: Sequence[Slab], taps: Iterable[Tensor]
) -> HostSlabs | DeviceSlabs:
    """Make ready for copies of tensors like `taps`: on the device that most of their bytes lie on.

    A tap on another device is copied there by torch, which orders the streams of both.
    """
    n_bytes: dict[torch.device, int] = {}
    for tap in taps:
        if tap.device.type in DEVICES:
            n_bytes[tap.device] = n_bytes.get(tap.device, 0) + tap.nbytes
    if not n_bytes:
        return HostSlabs(layout, slabs)
    device = max(n_bytes, key=lambda device: n_bytes[device])
    return DeviceSlabs(layout, memory, DEVICES[device.type](device), device.type)


class HostSlabs:
    """Slabs that the hooks fill themselves: the copy in the hook is the only one."""

    def __init__(self, layout: Layout, slabs: Sequence[Slab]) -> None:
        self._views = {slab.number: _tap_views(layout, torch.from_numpy(slab.memory)) for slab in slabs}

    def views(self, slab: Slab) -> list[Tensor]:
        """Return the tensor of each tap and part in `slab`."""
        return self._views[slab.number]

    def computed(self) -> None:
        """Do nothing: what was computed is there."""

    def put(self, host: Tensor, values: Tensor) -> None:
        """Copy a column, and wait for it."""
        host.copy_(values)

    def transfer(self, pieces: Sequence[Piece]) -> Callable[[], None] | None:
        """Do nothing: the rows are there."""
        return None

    def release(self) -> None:
        """Let go of the slabs."""
        self._views.clear()


class DeviceSlabs:
    """Slabs that are filled by way of memory on a device.

    Hooks fill a device slab on the stream that computes; once the step ends, one asynchronous copy moves it
    into its page-locked slab. A device slab is filled again only after its copy, for which the computing
    stream waits, not the host. More than three are made only for a batch that spans more slabs.

    Raises:
        PlanError: the device has no room for three slabs.
        CaptureError: the host's memory cannot be page-locked.
    """

    def __init__(self, layout: Layout, memory: Memory, device: Device, kind: str = "cuda") -> None:
        self._layout, self._memory, self._device, self._kind = layout, memory, device, kind
        self._held: dict[int, _DeviceSlab] = {}
        self._after: list[Event] = []
        device.finish()  # what the first step kept may come from a stream that is not the current one
        self._copy_column = device.follow()
        self._free = [self._device_slab() for _ in range(N_DEVICE_SLABS)]
        device.lock(memory)
        self._locked = True

    def views(self, slab: Slab) -> list[Tensor]:
        """Return the device tensor of each tap and part that will end up in `slab`."""
        held = self._held.get(slab.number)
        if held is None:
            held = self._free.pop(0) if self._free else self._device_slab()
            self._held[slab.number] = held
        if held.copied is not None:
            self._device.wait(held.copied)
            held.copied = None
        return held.views

    def computed(self) -> None:
        """Mark the end of a forward on the stream that it ran on, whichever that is."""
        self._after = [self._device.now()]
        self._copy_column = self._device.follow()

    def put(self, host: Tensor, values: Tensor) -> None:
        """Copy a column; from the device without waiting, on the stream of the forward that it came from."""
        if values.device.type == self._kind:
            self._after.append(self._copy_column(host, values))
        else:
            host.copy_(values)

    def transfer(self, pieces: Sequence[Piece]) -> Callable[[], None] | None:
        """Start one copy for each slab of the step and return what waits for them."""
        held = [self._held[piece.slab.number] for piece in pieces]
        pairs = [
            (torch.from_numpy(piece.slab.memory[: self._layout.device_bytes]), slab.memory)
            for piece, slab in zip(pieces, held, strict=True)
        ]
        done = self._device.copy(pairs, [*self._after, self._device.now()])
        self._after.clear()
        for piece, slab in zip(pieces, held, strict=True):
            slab.copied = done
            if piece.rows.stop == self._layout.step_rows:
                self._free.append(self._held.pop(piece.slab.number))
        return done.synchronize

    def release(self) -> None:
        """Wait for all that is under way and unlock the host memory."""
        try:
            self._device.finish()
        finally:
            if self._locked:
                self._locked = False
                self._device.unlock(self._memory)
            self._held.clear()
            self._free.clear()

    def _device_slab(self) -> _DeviceSlab:
        n_bytes = self._layout.device_bytes
        try:
            memory = self._device.allocate(n_bytes)
        except torch.cuda.OutOfMemoryError as error:
            raise PlanError(
                f"the device has no room for {N_DEVICE_SLABS} steps of taps, {show_bytes(n_bytes)} each, "
                f"beside the model: give smaller batches, fewer layers, or a cast to float16 ({error})"
            ) from error
        return _DeviceSlab(memory, _tap_views(self._layout, memory))


@dataclass
class _DeviceSlab:
    memory: Tensor
    views: list[Tensor]
    copied: Event | None = None


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _tap_views(layout: Layout, slab: Tensor) -> list[Tensor]:
    views = []
    for tap, offset in zip(layout.moved, layout.offsets, strict=False):
        data = slab[offset : offset + tap.row_bytes * layout.step_rows]
        dtype = TORCH_DTYPES[dtype_name(tap.dtype)]
        views.append(data.view(dtype).view(layout.step_rows, *tap.shape))
    return views


def transfer_rates(device: torch.device) -> dict[str, float]:
    """Return the bytes a second from a CUDA device to host memory, `pageable` and `pinned`."""
    source = torch.ones(_TIMED_BYTES, dtype=torch.uint8, device=device)
    rates = {}
    for name in ("pageable", "pinned"):
        target = torch.zeros(_TIMED_BYTES, dtype=torch.uint8, pin_memory=name == "pinned")
        times = []
        for _ in range(4):  # the first brings what is made once
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        rates[name] = _TIMED_BYTES / min(times)
    return rates
