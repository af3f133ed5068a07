"""Models inside DataParallel and DistributedDataParallel give the store of the plain model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.testing import contents

torch = pytest.importorskip("torch")

from layertap.backends.torch import TorchBackend  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

TAPS = ["0", "1", "2:input", "2", "2:grad"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()


def rows(n: int = 28) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((n, 4), np.float32)


def capture(model: nn.Module, path: Path, **options: Any) -> lt.Run:
    return lt.record_dataset(model, rows(), path, TAPS, batch_size=4, memory="1300KiB", **options)


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def check_same(wrapped: nn.Module, path: Path) -> None:
    backend, plain = TorchBackend(), model()
    assert [(x.name, x.types) for x in backend.layers(wrapped)] == [
        (x.name, x.types) for x in backend.layers(plain)
    ]
    assert backend.describe(wrapped) == backend.describe(plain)
    capture(plain, path / "plain")
    capture(wrapped, path / "wrapped")
    assert contents(path / "wrapped") == contents(path / "plain")


def check_loop(wrapped: nn.Module, path: Path) -> None:
    """A loop may call the wrapper, the recorder or the model inside."""
    expected = capture(model(), path / "expected")
    inner = wrapped.module
    with lt.record(wrapped, path / "loop", ["0", "2:grad"]) as rec:
        for i, batch in enumerate(torch.from_numpy(rows()).split(4)):
            out = (rec, wrapped, inner)[i % 3](batch)
            out.amax(1).sum().backward()
    run = lt.open(path / "loop")
    for name in ("0", "2:grad"):
        assert np.allclose(run[name][...], expected[name][...], atol=1e-7)


def test_data_parallel_is_the_plain_model(tmp_path):
    check_same(nn.DataParallel(model()), tmp_path)
    check_loop(nn.DataParallel(model()), tmp_path)
    inside = nn.Sequential(nn.DataParallel(model()), nn.Flatten())
    names = [layer.name for layer in TorchBackend().layers(inside)]
    assert names == [".", "0", "0.0", "0.1", "0.2", "0.3", "1"]
    run = lt.record_dataset(inside, rows(), tmp_path / "inside", ["0.0"])
    plain = nn.Sequential(model(), nn.Flatten())
    assert run.info["model"]["weights"] == TorchBackend().describe(plain)["weights"]


def test_a_copy_of_the_model_that_runs_in_a_thread_is_refused(tmp_path):
    """As nn.DataParallel makes them for each of several GPUs."""
    made = model()
    with (
        pytest.raises(lt.CaptureError, match=r"nn.DataParallel runs copies.*Call model.module on one GPU"),
        lt.record(nn.DataParallel(made), tmp_path / "s", ["0"]),
    ):
        made._replicate_for_data_parallel()(torch.from_numpy(rows(4)))


@pytest.mark.usefixtures("group")
def test_ddp_of_one_process_is_the_plain_model(tmp_path):
    check_same(DistributedDataParallel(model()), tmp_path)
    check_loop(DistributedDataParallel(model()), tmp_path)


@pytest.mark.usefixtures("group")
def test_ddp_may_be_compiled_inside_and_outside(tmp_path):
    torch.compiler.reset()
    plain = lt.record_dataset(model(), rows(), tmp_path / "plain", ["0", "1"], batch_size=4)
    made = (
        DistributedDataParallel(torch.compile(model(), backend="eager")),
        torch.compile(DistributedDataParallel(model()), backend="eager"),
    )
    for i, wrapped in enumerate(made):
        run = lt.record_dataset(wrapped, rows(), tmp_path / str(i), ["0", "1"], batch_size=4)
        assert contents(tmp_path / str(i)) == contents(tmp_path / "plain")
        assert list(run.taps) == list(plain.taps)
    torch.compiler.reset()


PROCESS = """
import gc
import sys
import torch
import layertap as lt
sys.path.insert(0, {tests!r})
from test_torch_parallel import DistributedDataParallel, capture, model, rows

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://{folder}/two", rank=rank, world_size=2)
wrapped = DistributedDataParallel(model())
run = capture(wrapped, "{folder}/together", part=f"{{rank + 1}}/2")  # one has more blocks than the other
torch.distributed.barrier()
with lt.record(wrapped.train(), f"{folder}/loop{{rank}}", ["0", "2:grad"]) as rec:
    for batch in torch.from_numpy(rows()).split(4)[rank:6:2]:
        rec(batch).square().sum().backward()
grads = [p.grad.clone() for p in wrapped.parameters()]
both = [torch.zeros_like(grads[0]) for _ in range(2)]
torch.distributed.all_gather(both, grads[0])
assert torch.equal(both[0], both[1])  # what a loop runs is DDP itself, which adds up gradients
# Gloo's threads end with the last that holds the group; one that frees a tensor while Python ends aborts.
torch.distributed.destroy_process_group()
del wrapped, batch, run, rec, grads, both
gc.collect()
"""


def test_ddp_of_two_processes_makes_the_store_of_one(tmp_path):
    code = PROCESS.format(folder=tmp_path, tests=str(Path(__file__).parent))
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in processes:
            errors = process.communicate(timeout=120)[1]
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    whole = capture(model(), tmp_path / "plain")
    assert whole.manifest.n_blocks % 2 == 1
    assert contents(tmp_path / "together") == contents(tmp_path / "plain")
    for rank in range(2):
        assert lt.open(tmp_path / f"loop{rank}")["2:grad"].shape == (12, 5)
