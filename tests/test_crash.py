"""Whatever ends a capture, the same command goes on, and the finished store is byte for byte the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import layertap as lt
import pytest
from layertap.capture.testing import contents
from layertap.capture.verify import verify

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")

CAPTURE = """
import sys
import numpy as np
import layertap as lt

class Made(lt.Source):
    name, n_rows, classes = "made", 400, ("a", "b")
    def batch(self, rows):
        noise = [np.random.default_rng(row).standard_normal((4, 32, 32), np.float32) for row in rows]
        names = [f"row {row}" for row in rows]
        return lt.Batch(rows, (np.stack(noise),), columns={"label": np.array(rows) % 2, "id": names})

def model(batch):
    return {"maps": batch, "sums": batch.sum((2, 3)), "mask": batch[:, 0] > 0}

print("ready", flush=True)
lt.record_dataset(model, Made(), sys.argv[1], ["**"], batch_size=4, memory=sys.argv[3], codec=sys.argv[2])
print("done", flush=True)
"""


def start(path: Path, codec: str = "none") -> subprocess.Popen[str]:
    memory = "1800KiB" if codec == "none" else "4MiB"  # encoders have buffers of their own
    arguments = [sys.executable, "-c", CAPTURE, str(path), codec, memory]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """Return the bytes of a store that nothing disturbed, and the seconds that it took."""
    path = tmp_path_factory.mktemp("undisturbed") / "s"
    process, started = start(path), time.perf_counter()
    assert finish(process) == (0, "")
    seconds = time.perf_counter() - started
    assert lt.open(path).manifest.n_blocks > 20
    return contents(path), seconds


def check_reader(path: Path) -> None:
    """Require that what a reader sees of a killed store is sound."""
    if not path.exists():
        return
    run = lt.open(path)
    done = run.committed()
    assert list(verify(path)) == []
    assert [name.split()[1] for name in run.rows["id"][done]] == [str(i) for i in done.nonzero()[0]]


def test_killed_at_fifty_instants_it_goes_on_and_ends_the_same(undisturbed, tmp_path):
    whole, seconds = undisturbed
    rng = random.Random(0)
    kills = finished = progressed = 0
    path, before = tmp_path / "0", 0
    while kills < 50:
        process = start(path)
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        code, _ = finish(process)
        kills += code == -signal.SIGKILL
        check_reader(path)
        done = int(lt.open(path).committed().sum()) if path.exists() else 0
        assert done >= before
        progressed += done > before
        before = done
        if code == 0 or done == 400:
            assert finish(start(path)) == (0, "")
            assert contents(path) == whole
            finished += 1
            path, before = tmp_path / str(finished), 0
    assert finish(start(path)) == (0, "")
    assert contents(path) == whole
    assert not list(tmp_path.glob("[0-9]*/**/*.part"))
    assert finished > 3, "the kills came too early to tell"
    assert progressed > 10, "nothing was ever gone on with"


def test_a_stopped_process_goes_on_when_it_is_continued(undisturbed, tmp_path):
    whole, seconds = undisturbed
    process = start(tmp_path / "s")
    for _ in range(4):
        time.sleep(seconds / 8)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        process.send_signal(signal.SIGCONT)
    assert finish(process) == (0, "")
    assert contents(tmp_path / "s") == whole


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_keeps_what_is_committed_and_leaves_at_once(undisturbed, tmp_path, times):
    whole, seconds = undisturbed
    process = start(tmp_path / "s")
    time.sleep(seconds / 2)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    code, errors = finish(process)
    assert code != 0
    assert "KeyboardInterrupt" in errors
    check_reader(tmp_path / "s")
    assert finish(start(tmp_path / "s")) == (0, "")
    assert contents(tmp_path / "s") == whole


def test_a_second_process_is_refused_while_the_first_one_writes(tmp_path):
    first = start(tmp_path / "s")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("s/commits/c.*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    try:
        code, errors = finish(start(tmp_path / "s"))
    finally:
        first.send_signal(signal.SIGCONT)
    assert code == 1
    assert "another process is capturing into" in errors
    assert finish(first) == (0, "")


def test_an_encoded_store_is_resumed_byte_for_byte_too(tmp_path):
    assert finish(start(tmp_path / "whole", "zstd")) == (0, "")
    for i in range(3):
        process = start(tmp_path / "killed", "zstd")
        time.sleep(0.1 * (i + 1))
        process.kill()
        finish(process)
    assert finish(start(tmp_path / "killed", "zstd")) == (0, "")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_readers_beside_a_writer_see_whole_rows_only(tmp_path):
    """Several readers at once, for as long as the capture runs."""
    process = start(tmp_path / "s")
    seen: list[int] = []
    while process.poll() is None:
        if not (tmp_path / "s").exists():
            continue
        run = lt.open(tmp_path / "s", check=True)
        done = run.committed().nonzero()[0]
        seen.append(len(done))
        if len(done):
            rows: Any = done[-8:]
            assert (run["maps"][rows].sum((2, 3)) == run["sums"][rows]).all()
            assert run.rows["label"][rows].tolist() == [row % 2 for row in rows]
    assert finish(process) == (0, "")
    assert len(set(seen)) > 3, "the reader never saw the store grow"
