"""The way by device memory, on a stand-in for a device whose copies come as late as they may."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import layertap as lt
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from layertap.backends import torch_slabs  # noqa: E402
from layertap.backends.torch import TorchBackend  # noqa: E402
from layertap.capture.pipeline import Pipeline  # noqa: E402
from layertap.capture.testing import StopError, contents, inputs  # noqa: E402
from torch import Tensor, nn  # noqa: E402

LAYERS = ["conv", "relu"]
STEP = 4
#: Blocks of a step or two, and of more steps than there are device slabs.
FEW, MANY = "1400KiB", "2600KiB"


class LateEvent:
    """Something that is sure to have happened only once somebody waited for it."""

    def __init__(self, device: LateDevice, n_copies: int) -> None:
        self.device, self.n_copies = device, n_copies

    def synchronize(self) -> None:
        self.device.waits.append(threading.current_thread())
        self.device.run(self.n_copies)


class LateDevice:
    """A device on the host whose copies run no sooner than something waits for them."""

    def __init__(self) -> None:
        self.locked: list[np.ndarray[Any, Any]] = []
        self.unlocked: list[np.ndarray[Any, Any]] = []
        self.allocated: list[int] = []
        self.waits: list[threading.Thread] = []
        self.copies: list[list[tuple[Tensor, Tensor]]] = []
        self.columns: list[Tensor] = []
        self.marks: list[LateEvent] = []
        self.n_marks: list[int] = []
        self.n_done = 0
        self._lock = threading.Lock()

    def capturing(self) -> bool:
        return False

    def lock(self, memory: np.ndarray[Any, Any]) -> None:
        self.locked.append(memory)

    def unlock(self, memory: np.ndarray[Any, Any]) -> None:
        assert self.n_done == len(self.copies), "memory is unlocked under a copy"
        self.unlocked.append(memory)

    def allocate(self, n_bytes: int) -> Tensor:
        self.allocated.append(n_bytes)
        return torch.full((n_bytes,), 7, dtype=torch.uint8)

    def now(self) -> LateEvent:
        self.marks.append(LateEvent(self, 0))
        return self.marks[-1]

    def wait(self, event: LateEvent) -> None:
        self.run(event.n_copies)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[LateEvent]) -> LateEvent:
        self.n_marks.append(sum(event in self.marks for event in after))
        assert all(self.is_locked(host) for host, _ in pairs), "a copy into memory that is not locked"
        self.copies.append(list(pairs))
        return LateEvent(self, len(self.copies))

    def follow(self) -> Callable[[Tensor, Tensor], LateEvent]:
        def copy(host: Tensor, device: Tensor) -> LateEvent:
            assert self.is_locked(host)
            self.columns.append(device)
            host.copy_(device)
            return LateEvent(self, 0)

        return copy

    def finish(self) -> None:
        self.run(len(self.copies))

    def run(self, n: int) -> None:
        with self._lock:
            while self.n_done < n:
                for host, device in self.copies[self.n_done]:
                    host.copy_(device)
                self.n_done += 1

    def is_locked(self, host: Tensor) -> bool:
        return any(np.shares_memory(memory, host.numpy()) for memory in self.locked)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.failing = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        y = self.relu(y - 0.5)
        if self.failing:
            raise StopError
        y += 1
        return y.mean((2, 3))


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LateDevice:
    """A device that all tensors lie on."""
    made = LateDevice()
    monkeypatch.setitem(torch_slabs.DEVICES, "cpu", lambda _: made)
    return made


def capture(path: Path, sizes: Sequence[int], memory: str = MANY, **options: Any) -> lt.Run:
    values = torch.from_numpy(inputs(sum(sizes)))
    cuts = np.cumsum([0, *sizes])
    with torch.no_grad(), lt.record(model(), path, LAYERS, memory=memory, **options) as rec:
        for start, stop in pairwise(cuts):
            logits = rec(values[start:stop])
            rec.annotate(prediction=logits.argmax(1), label=np.arange(start, stop))
    return lt.open(path)


SIZES = {
    "whole steps": [STEP] * 20,
    "a short last batch": [STEP] * 17 + [1],
    "batches that straddle slabs": [STEP, 3, 1, 2, 4, 4, 4, 4, 4, 3, 3, 4, 4, 2],
    "batches that span slabs": [STEP, 7, 10, 4, 4, 4, 3, 11, 4],
    "one batch": [3],
}


@pytest.mark.parametrize("memory", [FEW, MANY])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_store_is_byte_for_byte_that_of_the_host(tmp_path, monkeypatch, sizes, memory):
    capture(tmp_path / "host", sizes, "2600KiB" if max(sizes) > STEP else memory)
    device = LateDevice()
    monkeypatch.setitem(torch_slabs.DEVICES, "cpu", lambda _: device)
    capture(tmp_path / "device", sizes, "2600KiB" if max(sizes) > STEP else memory)
    assert device.copies
    assert contents(tmp_path / "device") == contents(tmp_path / "host")


def test_gradients_that_come_after_the_forward_go_the_same_way(tmp_path, monkeypatch):
    def loop(path: Path) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(4, 3, 3, stride=4), nn.ReLU(inplace=True), nn.Flatten())
        with lt.record(network, path, ["0", "0:grad", "1"], memory=MANY) as rec:
            for batch in torch.from_numpy(inputs(22)).split(STEP):
                logits = rec(batch)
                logits.pow(3).sum().backward()
                rec.annotate(prediction=logits.argmax(1))

    loop(tmp_path / "host")
    device = LateDevice()
    monkeypatch.setitem(torch_slabs.DEVICES, "cpu", lambda _: device)
    loop(tmp_path / "device")
    assert len(device.copies) == 6
    assert contents(tmp_path / "device") == contents(tmp_path / "host")
    assert np.any(lt.open(tmp_path / "host")["0:grad"][...])


def test_the_stand_in_shows_a_slab_that_is_filled_too_soon(tmp_path, monkeypatch, device):
    """Blocks of more steps than there are device slabs, and nothing else that waits before they are full."""
    capture(tmp_path / "right", SIZES["whole steps"])
    monkeypatch.setattr(LateDevice, "wait", lambda self, event: None)
    capture(tmp_path / "wrong", SIZES["whole steps"])
    assert contents(tmp_path / "wrong") != contents(tmp_path / "right")


def test_one_copy_a_step_into_memory_that_is_locked_once(tmp_path, device):
    run = capture(tmp_path / "s", SIZES["whole steps"])
    assert run.manifest.layout.steps_per_block > torch_slabs.N_DEVICE_SLABS
    assert [len(pairs) for pairs in device.copies] == [1] * 20
    assert {host.nbytes for pairs in device.copies for host, _ in pairs} == {run.manifest.layout.device_bytes}
    # Behind the forward and what came after it; the first was waited for when the slabs were made.
    assert device.n_marks == [1] + [2] * 19
    assert len(device.locked) == 1
    assert [id(memory) for memory in device.unlocked] == [id(memory) for memory in device.locked]
    n_slots = device.locked[0].nbytes // run.manifest.layout.block_bytes
    assert n_slots in (2, 3)  # all of it, and nothing but, is the pipeline's within the budget


def test_a_batch_that_straddles_two_slabs_copies_those_two(tmp_path, device):
    capture(tmp_path / "s", [STEP, 2, STEP, 2])
    assert [len(pairs) for pairs in device.copies] == [1, 1, 2, 1]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_device_memory_is_made_before_the_second_step_or_for_a_longer_batch(tmp_path, device, sizes):
    run = capture(tmp_path / "s", sizes)
    n_spanned = max(-(-size // STEP) + 1 for size in sizes)
    assert len(device.allocated) <= max(torch_slabs.N_DEVICE_SLABS, n_spanned + 1)
    assert set(device.allocated) == {run.manifest.layout.device_bytes}
    if sizes == SIZES["whole steps"]:
        assert len(device.allocated) == torch_slabs.N_DEVICE_SLABS


def test_only_writers_wait_for_the_device(tmp_path, device):
    capture(tmp_path / "s", SIZES["whole steps"])
    assert device.waits
    assert all(thread.name.startswith("layertap-writer") for thread in device.waits)


def test_columns_on_the_device_go_by_the_stream_of_their_forward(tmp_path, device):
    followed: list[int] = []
    follow = device.follow
    device.follow = lambda: followed.append(len(device.columns)) or follow()  # type: ignore[method-assign]
    run = capture(tmp_path / "s", [STEP] * 5)
    assert len(device.columns) == 5  # predictions; labels are numpy's
    # Once when the slabs are made, then at the end of each forward but the first.
    assert followed == [0, *range(1, 5)]
    assert run.rows["label"][...].tolist() == list(range(20))


def stops(*args: Any) -> Any:
    raise StopError


def fail(how: str, device: LateDevice, monkeypatch: pytest.MonkeyPatch, made: Model) -> None:
    if how == "in the loop":
        raise StopError
    if how == "by hand":
        raise KeyboardInterrupt
    if how == "in the forward":
        made.failing = True
    if how == "in a copy":
        monkeypatch.setattr(device, "copy", stops)
    if how == "in a writer":
        monkeypatch.setattr(Pipeline, "_write_shard", stops)


@pytest.mark.parametrize(
    "how", ["well", "in the loop", "by hand", "in the forward", "in a copy", "in a writer"]
)
def test_memory_is_unlocked_once_on_every_way_out(tmp_path, monkeypatch, device, how):
    made, x = model(), torch.from_numpy(inputs(STEP))
    raised = (
        contextlib.nullcontext()
        if how == "well"
        else pytest.raises((StopError, KeyboardInterrupt, lt.CaptureError))
    )
    with raised, torch.no_grad(), lt.record(made, tmp_path / "s", LAYERS, memory=FEW) as rec:
        for i in range(8):
            if i == 3:
                fail(how, device, monkeypatch, made)
            rec(x)
    assert len(device.locked) == len(device.unlocked) == 1


def test_a_device_without_room_says_what_to_do_and_locks_nothing(tmp_path, monkeypatch, device):
    allocate = device.allocate

    def full(n_bytes: int) -> Tensor:
        if len(device.allocated) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return allocate(n_bytes)

    monkeypatch.setattr(device, "allocate", full)
    with pytest.raises(lt.PlanError, match=r"no room for 3 steps of taps, 48KiB each.*smaller batches"):
        capture(tmp_path / "s", [STEP] * 3)
    assert device.locked == device.unlocked == []
    assert not (tmp_path / "s").exists()


def test_memory_that_cannot_be_locked_is_an_error_and_not_unlocked(tmp_path, monkeypatch, device):
    def refuses(memory: Any) -> None:
        raise lt.CaptureError("cannot lock host memory")

    monkeypatch.setattr(device, "lock", refuses)
    with pytest.raises(lt.CaptureError, match="cannot lock"):
        capture(tmp_path / "s", [STEP] * 3)
    assert device.unlocked == []


def test_a_batch_that_fails_leaves_its_slab_to_the_next(tmp_path, device):
    made, x = model(), torch.from_numpy(inputs(8 * STEP))
    with torch.no_grad(), lt.record(made, tmp_path / "s", LAYERS, memory=MANY) as rec:
        for i, batch in enumerate(x.split(STEP)):
            if i % 3 == 1:
                made.failing = True
                with pytest.raises(StopError):
                    rec(batch * 2)
                made.failing = False
            rec(batch)
    assert len(device.allocated) == torch_slabs.N_DEVICE_SLABS
    with torch.no_grad():
        expected = torch.cat([made.conv(batch) for batch in x.split(STEP)])
    assert np.array_equal(lt.open(tmp_path / "s")["conv"][...], expected.numpy())


def test_slabs_lie_where_most_of_the_taps_do(monkeypatch):
    """Of a model on several devices; torch copies what lies elsewhere, in the order of both."""
    chosen: list[torch.device] = []
    monkeypatch.setitem(torch_slabs.DEVICES, "cuda", lambda device: chosen.append(device) or LateDevice())
    layout = SimpleNamespace(device_bytes=64, moved=(), offsets=())
    where = [("cpu", 900), ("cuda:0", 100), ("cuda:1", 80), ("cuda:1", 90), ("meta", 999)]
    taps: Any = [SimpleNamespace(device=torch.device(name), nbytes=n) for name, n in where]
    slabs = torch_slabs.prepare(layout, np.zeros(64, np.uint8), [], taps)  # type: ignore[arg-type]
    assert isinstance(slabs, torch_slabs.DeviceSlabs)
    assert chosen == [torch.device("cuda:1")]
    slabs = torch_slabs.prepare(layout, np.zeros(64, np.uint8), [], taps[:1])  # type: ignore[arg-type]
    assert isinstance(slabs, torch_slabs.HostSlabs)


class Places:
    """A model that notes where it was moved to."""

    def to(self, device: str) -> str:
        return device


@pytest.mark.parametrize(
    ("variables", "n_devices", "device"),
    [
        ({}, 4, "cuda"),
        ({"LOCAL_RANK": "2"}, 4, "cuda:2"),
        ({"LOCAL_RANK": "3"}, 1, "cuda:0"),  # the launcher shows each process its own device alone
        ({"SLURM_LOCALID": "1"}, 2, "cuda:1"),
        ({"LOCAL_RANK": "0", "SLURM_LOCALID": "1"}, 2, "cuda:0"),
        ({"LOCAL_RANK": "none"}, 2, "cuda"),
        ({"LOCAL_RANK": "2"}, 0, "cpu"),
    ],
)
def test_each_process_of_a_machine_has_a_device_of_its_own(monkeypatch, variables, n_devices, device):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_devices)
    assert TorchBackend().place(Places(), None) == device
    assert TorchBackend().place(Places(), "cpu") == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    def test_a_loop_on_a_stream_of_its_own_is_captured(self, tmp_path, sizes):
        made, values = model().cuda(), torch.from_numpy(inputs(sum(sizes))).cuda()
        batches = values.split(list(sizes))
        predictions = []
        torch.cuda.synchronize()
        with torch.no_grad(), lt.record(made, tmp_path / "s", LAYERS, memory=MANY) as rec:
            for batch in batches:
                with torch.cuda.stream(torch.cuda.Stream()):
                    logits = made(batch)
                    rec.annotate(prediction=logits.argmax(1))
                    predictions.append(logits.argmax(1))
        torch.cuda.synchronize()
        run = lt.open(tmp_path / "s")
        expected = torch.cat([made.conv(batch) for batch in batches]).detach().cpu().numpy()
        assert np.array_equal(run["conv"][...], expected)
        assert run.rows["prediction"][...].tolist() == torch.cat(predictions).tolist()

    def test_host_memory_is_page_locked_and_device_memory_is_three_steps(self, tmp_path):
        made, batch = model().cuda(), torch.from_numpy(inputs(64)).cuda()
        made(batch)
        before = torch.cuda.memory_allocated()
        with torch.no_grad(), lt.record(made, tmp_path / "s", LAYERS) as rec:
            for _ in range(3):
                made(batch)
            assert torch.from_numpy(rec._pipeline.memory).is_pinned()
            taken = torch.cuda.memory_allocated() - before
            made(batch)
            made(batch)
            assert torch.cuda.memory_allocated() - before == taken
            assert taken == torch_slabs.N_DEVICE_SLABS * rec._pipeline.layout.device_bytes
        assert torch.cuda.memory_allocated() == before
