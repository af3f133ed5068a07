"""Schedulers, restarts and readers: one store, however many processes are at it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.testing import contents
from layertap.capture.verify import verify

pytestmark = pytest.mark.skipif(os.name != "posix", reason="starts and kills POSIX processes")

PAGE = (Path(__file__).parents[1] / "docs" / "many-processes.md").read_text()

#: Dies once, where `dies` names a file that is not there yet, in the middle of its part.
MODEL = """
import os, signal
from pathlib import Path
import numpy as np

VALUES = np.random.default_rng(0).standard_normal((122, 4, 16, 16), np.float32)

def build():
    seen = [0]

    def model(batch):
        seen[0] += 1
        mark = os.environ.get("DIES")
        if mark and seen[0] == 4:
            try:
                Path(mark).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return {"maps": np.maximum(batch, 0)}

    return model

def data():
    return VALUES, np.arange(122) % 4
"""

OPTIONS = ("--batch-size", "4", "--memory", "1250KiB")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    return tmp_path


def values() -> Any:
    return np.random.default_rng(0).standard_normal((122, 4, 16, 16), np.float32)


def capture(path: Path, part: str | None = None, **options: Any) -> lt.Run:
    source = lt.ArraySource(values(), np.arange(122) % 4)
    options = {"batch_size": 4, "memory": "750KiB", "writers": 1, **options}
    return lt.record_dataset(
        lambda batch: {"maps": np.maximum(batch, 0)}, source, path, ["maps"], part=part, **options
    )


def block(language: str, words: str) -> str:
    """Return the one block of the page that holds `words`."""
    return next(b for b in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if words in b)


def command(line: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(line.replace("\\\n", " ")) + list(more)
    if words[0] == "torchrun":
        words = ["-m", "torch.distributed.run", "--standalone", *words[1:]]
    else:
        words = ["-m", *words]
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | environment,
    )


def whole_by_command(folder: Path) -> dict[str, bytes]:
    line = "layertap capture model.py:build model.py:data whole --layers maps"
    done = command(line, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert lt.open(folder / "whole").manifest.n_blocks > 8
    return contents(folder / "whole")


def test_torchruns_ranks_that_die_are_started_again_and_end_the_same(folder):
    pytest.importorskip("torch")
    whole = whole_by_command(folder)
    done = command(block("sh", "torchrun"), *OPTIONS, DIES=str(folder / "died"))
    assert done.returncode == 0, done.stderr
    assert (folder / "died").exists()
    assert contents(folder / "run.zarr") == whole
    assert list(verify(folder / "run.zarr")) == []


def test_the_line_of_an_array_job_says_which_part_it_is(folder):
    whole = whole_by_command(folder)
    line = block("sh", "SBATCH").replace("layertap capture", f"{sys.executable} -m layertap capture").rstrip()
    for task in (2, 0, 1):
        done = subprocess.run(
            ["bash", "-c", f"{line} {' '.join(OPTIONS)}"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "3"},
        )
        assert done.returncode == 0, done.stderr
        assert lt.open(folder / "run.zarr").complete is (task == 1)
    assert contents(folder / "run.zarr") == whole


def check_tasks(path: Path, folder: Path) -> None:
    from model import build, data  # type: ignore[import-not-found]

    lt.record_dataset(build(), data(), folder / "whole", ["maps"], batch_size=4)
    assert (folder / "died").exists(), "no worker died, so nothing was retried"
    assert contents(path) == contents(folder / "whole")


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_tasks_that_die_are_retried_and_make_the_same_store(folder, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
    paths = os.pathsep.join([str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    variables = {"DIES": str(folder / "died"), "PYTHONPATH": paths}
    try:
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
            runtime_env={"env_vars": variables}, object_store_memory=80 * 2**20,
        )  # fmt: skip
    except Exception as error:
        pytest.skip(f"ray does not start here: {error}")
    try:
        exec(compile(block("python", "ray.get"), "many-processes.md", "exec"), {})
    finally:
        ray.shutdown()
    check_tasks(folder / "ray.zarr", folder)


@pytest.mark.filterwarnings("ignore")  # distributed's own
def test_dask_tasks_that_die_are_retried_and_make_the_same_store(folder, monkeypatch):
    pytest.importorskip("distributed")
    import dask

    monkeypatch.setenv("DIES", str(folder / "died"))
    paths = os.pathsep.join([str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    monkeypatch.setenv("PYTHONPATH", paths)
    with dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}):
        exec(compile(block("python", "Client"), "many-processes.md", "exec"), {"__name__": "page"})
    check_tasks(folder / "dask.zarr", folder)


# Any number of parts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = capture(tmp_path_factory.mktemp("whole") / "s")
    assert run.manifest.n_blocks > 8
    return contents(run.path)


@pytest.mark.parametrize("seed", range(8))
def test_any_number_of_parts_in_any_order_makes_the_same_bytes(whole, tmp_path, seed):
    """Some at the same time, some more than once, some killed in the middle, more of them than blocks."""
    rng = np.random.default_rng(seed)
    n = [1, 2, 3, 5, 8, 13, 31, 40][seed]
    order = [f"{k}/{n}" for k in [*rng.permutation(n) + 1, *rng.integers(1, n + 1, 3)]]
    threads = int(rng.integers(1, 5))

    def one(part: str) -> None:
        while True:
            try:
                capture(tmp_path / "s", part)
            except lt.StoreError as error:
                if "another process is capturing" not in str(error):
                    raise
                time.sleep(0.01)  # the same part, at the same time
            else:
                return

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, order))
    assert contents(tmp_path / "s") == whole
    assert not list(tmp_path.glob(".s.*"))


# Two at once


def held(path: Path, part: str | None, other: str | None) -> str:
    """Start a capture, and another one while the first is in its model; return what the other says."""
    inside, go = threading.Event(), threading.Event()
    said: list[str] = []

    def waits(batch: Any) -> Any:
        if path.exists():
            inside.set()
            go.wait(20)
        return {"maps": np.maximum(batch, 0)}

    def first() -> None:
        source = lt.ArraySource(values(), np.arange(122) % 4)
        lt.record_dataset(waits, source, path, ["maps"], part=part, batch_size=4, memory="750KiB", writers=1)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert inside.wait(20)
        capture(path, other)
    except lt.StoreError as error:
        said.append(str(error))
    finally:
        go.set()
        thread.join()
    return "".join(said)


@pytest.mark.parametrize(
    ("part", "other", "refused"),
    [
        (None, None, True),
        ("1/2", "1/3", True),
        ("1/2", None, True),
        ("2/3", "2/2", True),
        ("1/2", "2/2", False),
    ],
)
def test_of_two_captures_of_the_same_blocks_in_one_process_the_second_is_refused(
    whole, tmp_path, part, other, refused
):
    said = held(tmp_path / "s", part, other)
    assert ("another process is capturing into" in said) is refused
    capture(tmp_path / "s")
    assert contents(tmp_path / "s") == whole


def test_commands_of_parts_that_overlap_are_kept_apart(folder):
    line = ["-m", "layertap", "capture", "model.py:build", "model.py:data", "s", "--layers", "maps", *OPTIONS]
    first = subprocess.Popen([sys.executable, *line, "--part", "1/2"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(folder.glob("s/commits/c.*")) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    try:
        assert first.poll() is None, "the first ended before the second began"
        second = command("layertap " + shlex.join(line[2:]), "--part", "1/3")
    finally:
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=60)
    assert second.returncode == 1
    assert "another process is capturing into" in second.stderr


# Readers beside a writer

READER = """
import sys, time
import numpy as np
import layertap as lt

path, seed, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
rng, seen, checked = np.random.default_rng(seed), set(), 0
truth = np.maximum(np.random.default_rng(0).standard_normal((400, 4, 16, 16), np.float32), 0)
print("ready", flush=True)
run, deadline = None, time.monotonic() + 100
while run is None:
    assert time.monotonic() < deadline
    try:
        run = lt.open(path, check=True)
    except lt.StoreNotFoundError:
        time.sleep(0.001)
while True:
    run.refresh()
    done = run.committed()
    seen.add(int(done.sum()))
    rows = np.flatnonzero(done)
    if len(rows):
        some = np.sort(rng.choice(rows, min(8, len(rows)), replace=False))
        if kind == "layertap":
            assert (run["maps"][some] == truth[some]).all()
            assert run.rows["label"][some].tolist() == (some % 4).tolist()
            for row in np.flatnonzero(~done)[:1]:
                try:
                    run["maps"][int(row)]
                except lt.StoreError as error:
                    assert "not captured yet" in str(error)
                else:
                    raise AssertionError(f"row {row} is not committed and was read")
        else:
            array = run.zarr()["taps/maps/values"]
            got = np.stack([array[int(row)] for row in some])
            assert (got == truth[some]).all()
            for row in rng.integers(0, 400, 3):
                got = array[int(row)]
                assert (got == truth[row]).all() or (np.isnan(got).all() and not done[row])
        checked += len(some)
    if run.complete:
        break
print(len(seen), checked, flush=True)
"""

WRITER = """
import sys, time
import numpy as np
import layertap as lt
from layertap.capture import local

publish = local.publish

def slowly(path):
    time.sleep(0.01)  # a block that has half of its names
    publish(path)
    time.sleep(0.01)

local.publish = slowly

def model(batch):
    time.sleep(0.01)
    return {"maps": np.maximum(batch, 0)}

values = np.random.default_rng(0).standard_normal((400, 4, 16, 16), np.float32)
source = lt.ArraySource(values, np.arange(400) % 4)
lt.record_dataset(model, source, sys.argv[1], ["maps"], batch_size=4, memory="1200KiB", codec=sys.argv[2])
"""


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_no_reader_ever_sees_a_row_that_is_wrong_torn_or_not_committed(tmp_path, codec):
    with contextlib.ExitStack() as stack:
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", READER, str(tmp_path / "s"), str(i), kind],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i, kind in enumerate(["layertap", "layertap", "layertap", "zarr"])
        ]
        for reader in readers:
            stack.enter_context(reader)
            stack.callback(reader.kill)  # whatever fails, none looks for a store that never comes
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
        script = WRITER if codec == "none" else WRITER.replace("1200KiB", "3400KiB")
        writer = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "s"), codec],
            capture_output=True,
            text=True,
            check=False,
        )
        assert writer.returncode == 0, writer.stderr
        assert lt.open(tmp_path / "s").manifest.n_blocks > 10
        for reader in readers:
            out, errors = reader.communicate(timeout=60)
            assert reader.returncode == 0, errors
            grew, checked = map(int, out.split())
            assert grew > 3, "the reader hardly saw the store grow"
            assert checked > 20


def test_readers_in_threads_of_the_writers_process_see_whole_rows(tmp_path):
    truth = np.maximum(values(), 0)
    ended, failures, grew = threading.Event(), [], []

    def read(seed: int) -> None:
        rng, seen = np.random.default_rng(seed), set()
        try:
            while not ended.is_set():
                if not (tmp_path / "s").exists():
                    continue
                run = lt.open(tmp_path / "s", check=True)
                rows = np.flatnonzero(run.committed())
                seen.add(len(rows))
                if len(rows):
                    some = np.sort(rng.choice(rows, 4))
                    assert (run["maps"][some] == truth[some]).all()
        except BaseException as error:
            failures.append(error)
        grew.append(len(seen))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    try:
        capture(tmp_path / "s", on_plan=lambda *args: time.sleep(0.01))
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert max(grew) > 1
