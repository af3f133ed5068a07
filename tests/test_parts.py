"""Any number of processes write one store, and it is the same store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.parts import Part
from layertap.capture.testing import contents

MODEL = """
import numpy as np

def build():
    return lambda batch: {"maps": np.maximum(batch, 0), "logits": batch.mean((2, 3))}

def data():
    return np.random.default_rng(0).standard_normal((122, 4, 32, 32), np.float32), np.arange(122) % 4
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path / "model.py"


def arguments(model: Path, store: Path, *more: str) -> list[str]:
    return [
        *("capture", f"{model}:build", f"{model}:data", str(store), "--layers", "maps,logits"),
        *("--batch-size", "4", "--memory", "1600KiB", *more),
    ]  # fmt: skip


def command(*args: Any, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "layertap", *arguments(*args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def finish(*processes: subprocess.Popen[str]) -> str:
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return "".join(out + err for out, err in said)


@pytest.fixture
def whole(model: Path, tmp_path: Path) -> dict[str, bytes]:
    finish(command(model, tmp_path / "whole"))
    assert lt.open(tmp_path / "whole").manifest.n_blocks > 6
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 40])
@pytest.mark.parametrize("n_blocks", [0, 1, 2, 9, 16, 1000])
def test_parts_cover_every_block_once_and_evenly(n, n_blocks):
    parts = [Part(k, n).blocks(n_blocks) for k in range(1, n + 1)]
    assert [block for part in parts for block in part] == list(range(n_blocks))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_parts_are_read_from_text_and_from_the_environment():
    assert Part.parse("3/16") == Part(3, 16)
    assert str(Part(3, 16)) == "3/16"
    assert Part.of_environment({"RANK": "0", "WORLD_SIZE": "4"}) == Part(1, 4)
    assert Part.of_environment({}) == Part(1, 1)
    for text in ("0/3", "4/3", "3", "a/b", "1/0", ""):
        with pytest.raises(lt.PlanError, match="K/N"):
            Part.parse(text)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_one_after_the_other_make_the_same_store(model, whole, tmp_path, order):
    for k in order:
        finish(command(model, tmp_path / "s", "--part", f"{k}/3"))
    assert contents(tmp_path / "s") == whole


def test_parts_at_the_same_time_make_the_same_store(model, whole, tmp_path):
    """The store's making is a race, which one of them wins."""
    finish(*[command(model, tmp_path / "s", "--part", f"{k}/4") for k in range(1, 5)])
    assert contents(tmp_path / "s") == whole
    assert not list(tmp_path.glob(".s.*"))


def test_more_parts_than_blocks_leave_nothing_to_do_for_some(model, whole, tmp_path):
    n_blocks = lt.open(tmp_path / "whole").manifest.n_blocks
    for k in range(1, 2 * n_blocks, 2):
        finish(*[command(model, tmp_path / "s", "--part", f"{j}/{2 * n_blocks}") for j in (k, k + 1)])
    assert contents(tmp_path / "s") == whole


def test_a_part_that_is_killed_goes_on_and_others_are_not_touched(model, whole, tmp_path):
    finish(command(model, tmp_path / "s", "--part", "2/2"))
    done = lt.open(tmp_path / "s").committed().sum()
    for path in sorted((tmp_path / "s" / "commits").glob("c.*"))[1:2]:
        path.unlink()
    process = command(model, tmp_path / "s", "--part", "1/2")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(command(model, tmp_path / "s", "--part", "1/2"))
    run = lt.open(tmp_path / "s")
    assert 0 < done < 122
    if not run.complete:
        finish(command(model, tmp_path / "s"))
    assert contents(tmp_path / "s") == whole


def test_the_whole_takes_over_what_parts_have_left(model, whole, tmp_path):
    said = finish(command(model, tmp_path / "s", "--part", "2/3"))
    assert "unfinished, " in said
    said = finish(command(model, tmp_path / "s"))
    assert "goes on after " in said
    assert contents(tmp_path / "s") == whole


def test_torchrun_makes_the_same_store(model, whole, tmp_path):
    pytest.importorskip("torch")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone"]
    done = subprocess.run(
        [*torchrun, "-m", "layertap", *arguments(model, tmp_path / "s")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "s") == whole


def test_parts_that_overlap_are_refused_and_parts_that_do_not_pass(tmp_path):
    from layertap.capture.local import FileLock

    (tmp_path / "commits").mkdir()
    first = FileLock(tmp_path, range(4))
    second = FileLock(tmp_path, range(4, 9))
    for blocks in (range(4), range(3, 5), None):
        with pytest.raises(lt.StoreError, match="another process is capturing"):
            FileLock(tmp_path, blocks)
    FileLock(tmp_path, range(9, 9)).release()
    first.release()
    FileLock(tmp_path, range(4)).release()
    second.release()
    FileLock(tmp_path, None).release()


def test_a_part_does_not_overwrite(model, tmp_path):
    process = command(model, tmp_path / "s", "--part", "1/2", "--overwrite")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "part 1/2 cannot overwrite" in errors


def test_a_part_of_another_plan_is_refused(model, tmp_path):
    finish(command(model, tmp_path / "s", "--part", "1/2"))
    process = command(model, tmp_path / "s", "--part", "2/2", "--dtype", "float16")
    assert "dtype float32 there, float16 now" in process.communicate()[1]
    assert np.isfinite(lt.open(tmp_path / "s").committed().sum())
