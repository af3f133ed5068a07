"""Whatever fails: a clear error, nothing left behind, and once it is mended the same call ends the same."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture import files, pipeline, shard
from layertap.capture.local import LocalPlace
from layertap.capture.reader import _open_shard
from layertap.capture.recorder import Recorder
from layertap.capture.testing import contents
from layertap.capture.verify import verify

pytestmark = pytest.mark.skipif(os.name != "posix", reason="injects POSIX errors")

VALUES = np.random.default_rng(0).standard_normal((50, 4, 16, 16), np.float32)
LABELS = np.arange(50) % 3
MEMORY = "1220KiB"  # a step or two in a block


def model(batch: Any) -> dict[str, Any]:
    return {"maps": batch, "sums": batch.sum((2, 3))}


def capture(path: Path, function: Callable[[Any], Any] = model, data: Any = None, **options: Any) -> lt.Run:
    data = lt.ArraySource(VALUES, LABELS) if data is None else data
    options = {"batch_size": 4, "memory": MEMORY, "writers": 2, **options}
    return lt.record_dataset(function, data, path, ["**"], **options)


def loop(path: Path) -> None:
    with lt.record(model, path, ["**"], memory=MEMORY, writers=2) as rec:
        for i in range(0, 50, 4):
            rec(VALUES[i : i + 4])
            rec.annotate(label=LABELS[i : i + 4])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = capture(tmp_path_factory.mktemp("whole") / "s")
    assert run.manifest.n_blocks > 5
    return contents(run.path)


@pytest.fixture(scope="module")
def whole_loop(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("loop") / "s"
    loop(path)
    return contents(path)


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("layertap")]


def open_files() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def check_left(path: Path, expected: dict[str, bytes]) -> int:
    """Require that a failed capture left committed blocks that are whole, and nothing else of ours."""
    assert ours() == []
    assert [name for name in open_files() if str(path) in name] == []
    assert not list(path.parent.glob(f".{path.name}.*"))
    if not path.exists():
        return 0
    assert list(verify(path)) == []
    run = lt.open(path, check=True)
    rows = np.flatnonzero(run.committed())
    assert run["maps"][rows].tobytes() == VALUES[rows].tobytes()
    found = contents(path)
    for name in (name for name in found if name.startswith("commits/c") and not name.endswith(".part")):
        assert found[name] == expected[name]
    _open_shard.cache_clear()
    return len(rows)


class Injected:
    """A function that fails from its k-th call on; calls count whose file has `match` in its name."""

    def __init__(self, real: Any, error: BaseException, k: int, match: str) -> None:
        self.real, self.error, self.k, self.match = real, error, k, match
        self.calls = 0
        self.lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.match in self.what(args):
            with self.lock:
                self.calls += 1
                n = self.calls
            if n >= self.k:
                error = self.error
                paths = [str(arg) for arg in args if isinstance(arg, str | Path)]
                raise type(error)(*error.args, *paths[:1]) if isinstance(error, OSError) else error
        return self.real(*args, **kwargs)

    @staticmethod
    def what(args: Any) -> str:
        if args and isinstance(args[0], int):
            try:
                return os.readlink(f"/proc/self/fd/{args[0]}")
            except OSError:
                return ""
        names = (getattr(arg, "path", arg) for arg in args)  # of a file that is being written, its path
        return " ".join(str(name) for name in names if isinstance(name, str | Path))


# No space, no permission, and other refusals of the system, at every place that writes

PLACES = {
    "the first shard": ("writev", "maps/values/c.", 1, "taps/maps/values/c."),
    "a later shard": ("writev", "maps/values/c.", 4, "taps/maps/values/c."),
    "a column": ("writev", "label/c.", 3, "rows/label/c."),
    "a commit record": ("writev", "commits/c.", 3, "commits/c."),
    "the metadata": ("writev", "zarr.json", 4, "zarr.json"),
    "opening": ("open", "maps/values/c.", 4, "taps/maps/values/c."),
    "making it durable": ("fdatasync", "sums/values/c.", 5, "taps/sums/values/c."),
    "its name": ("replace", "maps/values/c.", 3, "taps/maps/values/c."),
    "a commit record's name": ("replace", "commits/c.", 2, "commits/c."),
    "the durable name": ("fsync", "s/taps/maps/values", 2, "taps/maps/values"),
    "the store's name": ("rename", "", 1, "s"),
}


SOME_ARE_COMMITTED = {  # for certain; elsewhere the other writer may or may not have come so far
    *("a commit record", "a commit record's name", "its name"),
}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks /proc for the names of open files")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("place", PLACES)
def test_a_refusal_of_the_system_is_told_with_the_file(whole, tmp_path, monkeypatch, place, code):
    call, match, k, named = PLACES[place]
    path = tmp_path / "s"
    injected = Injected(getattr(os, call), OSError(code, os.strerror(code)), k, match)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, injected)
        with pytest.raises(lt.StoreError) as caught:
            capture(path)
    message = str(caught.value)
    assert isinstance(caught.value, lt.NoSpaceError) is (code == errno.ENOSPC)
    assert named in message
    assert os.strerror(code) in message
    assert "the same capture goes on" in message
    assert injected.calls >= k
    n_rows = check_left(path, whole)
    assert n_rows < 50
    assert n_rows > 0 or place not in SOME_ARE_COMMITTED
    capture(path)
    assert contents(path) == whole


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks /proc for the names of open files")
@pytest.mark.parametrize(
    "code", [errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG], ids=errno.errorcode.get
)
def test_other_refusals_are_told_too(whole, tmp_path, monkeypatch, code):
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", Injected(os.open, OSError(code, os.strerror(code)), 7, "taps/maps"))
        with pytest.raises(lt.StoreError, match=os.strerror(code)) as caught:
            capture(tmp_path / "s")
    assert isinstance(caught.value, lt.NoSpaceError) is (code == errno.EDQUOT)
    check_left(tmp_path / "s", whole)
    capture(tmp_path / "s")
    assert contents(tmp_path / "s") == whole


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks /proc for the names of open files")
@pytest.mark.parametrize("k", range(1, 8))
def test_no_space_at_the_end_of_a_loop_loses_nothing(whole_loop, tmp_path, monkeypatch, k):
    """The metadata are written anew there, with the number of rows."""
    path = tmp_path / "s"
    n_files = len([name for name in whole_loop if name.endswith("zarr.json")])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", Injected(os.writev, full, n_files + k, "zarr.json"))
        with pytest.raises(lt.NoSpaceError, match=r"zarr\.json.*the same capture goes on"):
            loop(path)
    check_left(path, whole_loop)
    assert int(lt.open(path).committed().sum()) == 50
    loop(path)
    assert contents(path) == whole_loop


def test_a_folder_in_the_place_of_a_shard_is_named(whole, tmp_path):
    path = tmp_path / "s"
    capture(path, part="1/2")
    block = max(int(file.name.split(".")[1]) for file in (path / "commits").glob("c.*")) + 2
    for name in (f"c.{block}.0.0.0.part", f"c.{block}.0.0.0"):
        folder = path / "taps" / "maps" / "values" / name
        folder.mkdir()
        with pytest.raises(lt.StoreError, match=rf"values/{name.replace('.part', '')}.*Is a directory"):
            capture(path)
        check_left(path, whole)
        folder.rmdir()
    capture(path)
    assert contents(path) == whole


FULL = """
import sys
sys.path.insert(0, {tests!r})
import test_faults as faults
from pathlib import Path
import layertap as lt
try:
    faults.capture(Path(sys.argv[1]))
except lt.StoreError as error:
    print(type(error).__name__, error)
else:
    print("done")
"""


def in_child(path: Path, *before: str, cwd: Path | None = None) -> str:
    script = FULL.format(tests=str(Path(__file__).parent))
    command = [*before, sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_limit_of_file_size_is_told(whole, tmp_path):
    said = in_child(tmp_path / "s", "sh", "-c", 'ulimit -f 8; exec "$@"', "sh")
    assert said.startswith("StoreError cannot write ")
    assert "File too large" in said
    check_left(tmp_path / "s", whole)
    assert in_child(tmp_path / "s") == "done\n"
    assert contents(tmp_path / "s") == whole


def test_a_disk_that_is_full_is_told_and_gone_on_with_when_it_has_room(whole, tmp_path):
    """A real file system of 600 KiB, in a mount namespace that ends with the child."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    script = FULL.format(tests=str(Path(__file__).parent)).replace(
        "import layertap as lt\n",
        "import layertap as lt\nfrom layertap.capture import recorder\n"
        "recorder.check_space = lambda *args: None  # which would refuse beforehand\n",
    )
    steps = (
        f"mount -t tmpfs -o size=300k layertap {disk} || exit 77; "
        f'"$@" {disk}/s; cp -a {disk}/s {kept}/full; '
        f"mount -o remount,size=10m {disk}; "
        f'"$@" {disk}/s; cp -a {disk}/s {kept}/s'
    )
    command = ["unshare", "-m", "sh", "-c", steps, "sh", sys.executable, "-c", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"this user cannot mount: {done.stderr.strip()}")
    first, second = done.stdout.splitlines()
    assert first.startswith("NoSpaceError cannot write "), done.stderr
    assert "No space left on device" in first
    assert 0 < check_left(kept / "full", whole) < 50
    assert second == "done"
    assert contents(kept / "s") == whole


# Interrupted and short writes


def test_short_writes_and_signals_change_no_byte(whole, tmp_path, monkeypatch):
    real = os.writev
    rng = np.random.default_rng(0)

    def short(fd: int, buffers: Any) -> int:
        first = memoryview(buffers[0])
        return real(fd, [first[: int(rng.integers(1, first.nbytes + 1))]])

    monkeypatch.setattr(files, "_DIRECT", 0)
    monkeypatch.setattr(os, "writev", short)
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *args: seen.append(args))
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    ended = threading.Event()

    def poke() -> None:
        while not ended.wait(0.001):
            for thread in threading.enumerate():
                if thread.name.startswith("layertap-writer") and thread.ident and thread.is_alive():
                    with contextlib.suppress(ProcessLookupError):
                        signal.pthread_kill(thread.ident, signal.SIGALRM)

    poker = threading.Thread(target=poke)
    poker.start()
    try:
        capture(tmp_path / "s")
    finally:
        ended.set()
        poker.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) > 5
    assert contents(tmp_path / "s") == whole


# Whatever a writer raises


@pytest.mark.parametrize("error", [ZeroDivisionError("odd"), MemoryError(), KeyError("x")], ids=repr)
def test_what_a_writer_raises_is_told_with_its_rows(whole, tmp_path, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_shard", Injected(shard.write_shard, error, 4, "taps/sums"))
        with pytest.raises(lt.CaptureError, match=r"cannot write rows \d+ to \d+ of sums: ") as caught:
            capture(tmp_path / "s")
    assert type(error).__name__ in str(caught.value)
    assert caught.value.__cause__ is error
    assert check_left(tmp_path / "s", whole) > 0
    capture(tmp_path / "s")
    assert contents(tmp_path / "s") == whole


def test_of_two_writers_that_fail_at_once_the_first_wins(tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=20)
    order: list[str] = []
    lock = threading.Lock()

    def fail(path: Path, array: Any, *rest: Any) -> Any:
        both.wait()
        with lock:
            order.append(array.name)
        raise ZeroDivisionError(array.name)

    fails = pipeline.Pipeline._fail
    first: list[BaseException] = []

    def note(self: Any, error: BaseException) -> None:
        fails(self, error)
        first.append(self._failure)

    monkeypatch.setattr(pipeline, "write_shard", fail)
    monkeypatch.setattr(pipeline.Pipeline, "_fail", note)
    with pytest.raises(lt.CaptureError) as caught:
        capture(tmp_path / "s")
    assert sorted(order) == ["maps", "sums"]
    assert [error is caught.value for error in first] == [True, True]
    assert not (tmp_path / "s").exists()
    assert ours() == []


def test_the_loop_ends_within_the_slots_after_a_writer_failed(tmp_path, monkeypatch):
    calls: list[int] = []

    def counting(batch: Any) -> dict[str, Any]:
        calls.append(len(batch))
        return model(batch)

    def fail(*args: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "write_shard", fail)
    with pytest.raises(lt.CaptureError):
        capture(tmp_path / "s", counting, data=np.repeat(VALUES, 20, axis=0))
    assert sum(calls) <= 4 * 3 * 3  # of 1,000 rows


# Models, data and loaders that fail


def after(n_rows: int, error: BaseException) -> Callable[[Any], Any]:
    seen = [0]

    def failing(batch: Any) -> Any:
        seen[0] += len(batch)
        if seen[0] > n_rows:
            raise error
        return model(batch)

    return failing


@pytest.mark.parametrize(
    "error", [ValueError("mine"), MemoryError("mine"), KeyboardInterrupt("mine")], ids=repr
)
@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_model_raises_comes_out_as_it_is(whole, tmp_path, error, workers):
    with pytest.raises(type(error), match="mine") as caught:
        capture(tmp_path / "s", after(30, error), workers=workers)
    assert caught.value is error
    assert check_left(tmp_path / "s", whole) > 0  # while the traceback is still held
    capture(tmp_path / "s")
    assert contents(tmp_path / "s") == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_data_set_raises_comes_out_as_it_is(whole, tmp_path, workers):
    class Failing(lt.ArraySource):
        def batch(self, rows: range) -> lt.Batch:
            if rows.start >= 32:
                raise OSError(errno.EIO, "the disk of the data", "data.bin")
            return super().batch(rows)

    with pytest.raises(OSError, match="the disk of the data") as caught:
        capture(tmp_path / "s", data=Failing(VALUES, LABELS), workers=workers)
    assert not isinstance(caught.value, lt.StoreError)
    assert check_left(tmp_path / "s", whole) > 0
    capture(tmp_path / "s")
    assert contents(tmp_path / "s") == whole


def test_memory_that_the_system_does_not_give_is_a_plan_that_does_not_fit(tmp_path, monkeypatch):
    class NoMemory:
        @staticmethod
        def mmap(*args: Any) -> Any:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(pipeline, "mmap", NoMemory)
    with pytest.raises(lt.PlanError, match=r"Cannot allocate memory\. Give less memory="):
        capture(tmp_path / "s")
    assert not (tmp_path / "s").exists()


# Ctrl-C at the places where it may strike


def interrupted(owner: Any, name: str, k: int, monkeypatch: Any) -> None:
    """Raise a KeyboardInterrupt in the k-th call, and in none after it."""
    real = getattr(owner, name)
    calls = [0]

    def replaced(*args: Any, **kwargs: Any) -> Any:
        calls[0] += threading.current_thread() is threading.main_thread()
        if calls[0] == k and threading.current_thread() is threading.main_thread():
            calls[0] += 1
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, replaced)


@pytest.mark.parametrize(
    ("owner", "name", "k"),
    [
        (Recorder, "begin", 6),
        (Recorder, "done", 6),
        (Recorder, "annotate", 6),
        (Recorder, "_start", 1),
        (Recorder, "_create_store", 1),
        (pipeline.Pipeline, "_take", 4),
        (pipeline.Pipeline, "_submit", 3),
        (pipeline.Pipeline, "end", 5),
        (pipeline.Pipeline, "_join", 1),
        (LocalPlace, "_make", 1),
        (threading.Thread, "join", 2),
    ],
    ids=str,
)
def test_ctrl_c_anywhere_leaves_nothing_but_committed_blocks(whole, tmp_path, monkeypatch, owner, name, k):
    path = tmp_path / "s"
    with monkeypatch.context() as patch:
        interrupted(owner, name, k, patch)
        with pytest.raises(KeyboardInterrupt):
            capture(path)
    check_left(path, whole)
    capture(path)
    assert contents(path) == whole


def test_ctrl_c_in_the_wait_for_a_slot_and_again_in_the_end(whole, tmp_path, monkeypatch):
    """The first one drains; the second leaves what is queued, and waits for what is half-written."""
    path, go = tmp_path / "s", threading.Event()
    real, begun = shard.write_shard, threading.Semaphore(0)

    def slow(*args: Any) -> Any:
        begun.release()
        go.wait(20)
        return real(*args)

    def strike() -> None:
        for _ in range(2):
            begun.acquire()
        time.sleep(0.2)  # until every slot is full and the loop waits
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        alive.append(ours())
        go.set()

    alive: list[list[str]] = []
    monkeypatch.setattr(pipeline, "write_shard", slow)
    striker = threading.Thread(target=strike)
    striker.start()
    with pytest.raises(KeyboardInterrupt):
        capture(path)
    striker.join()
    assert len(alive[0]) == 2, "the capture ended before its writers did"
    assert check_left(path, whole) <= 4, "what was queued was written after the second Ctrl-C"
    monkeypatch.undo()
    capture(path)
    assert contents(path) == whole


# Job schedulers, forks, and loaders

COMMAND = """
import os, signal, sys, time
import numpy as np

VALUES = np.random.default_rng(0).standard_normal((50, 4, 16, 16), np.float32)

def build():
    seen = [0]
    def model(batch):
        seen[0] += len(batch)
        if seen[0] > 30 and os.environ.get("WAITS"):
            print("waits", flush=True)
            for _ in range(6000):  # not one long sleep: a signal just before it would not end it
                time.sleep(0.01)
        return {"maps": batch, "sums": batch.sum((2, 3))}
    return model

def data():
    return VALUES, np.arange(50) % 3
"""


def command(folder: Path, **environment: str) -> subprocess.Popen[str]:
    (folder / "model.py").write_text(COMMAND)
    arguments = ["capture", f"{folder}/model.py:build", f"{folder}/model.py:data", str(folder / "s")]
    options = ["--layers", "**", "--batch-size", "4", "--memory", MEMORY]
    return subprocess.Popen(
        [sys.executable, "-m", "layertap", *arguments, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_scheduler_that_ends_the_command_loses_nothing(whole, tmp_path, number):
    process = command(tmp_path, WAITS="1")
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "the same command goes on from there" in errors
    assert check_left(tmp_path / "s", whole) == 24  # every block that was full, of two steps
    again = command(tmp_path)
    assert again.communicate(timeout=60)[0]
    assert again.returncode == 0
    shards = {name: data for name, data in contents(tmp_path / "s").items() if "/c." in name}
    assert shards == {name: data for name, data in whole.items() if "/c." in name}


def test_nobody_who_reads_the_progress_is_no_error(tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Gone())
    assert capture(tmp_path / "s", progress=True).complete


ORPHAN = """
import os, sys, time
sys.path.insert(0, {tests!r})
import test_faults as faults
from pathlib import Path

calls = []

def model(batch):
    calls.append(len(batch))
    if len(calls) == 6:
        while not Path(sys.argv[1], "commits", "c.0.0").exists():
            time.sleep(0.001)
        model.child = os.fork()  # as a data loader does, while writers write
        if model.child == 0:
            sys.stdout.close()
            os.close(1)
            time.sleep(30)
            os._exit(0)
        print(model.child, flush=True)
        time.sleep(60)
    return faults.model(batch)

faults.capture(Path(sys.argv[1]), model)
"""


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="this system does not fork")
def test_a_child_that_outlives_the_capture_does_not_hold_its_lock(whole, tmp_path):
    script = ORPHAN.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.communicate()
    try:
        os.kill(child, 0)  # it lives
        run = capture(tmp_path / "s")
    finally:
        os.kill(child, signal.SIGKILL)
    assert run.complete


def torch_set(act: Callable[[int], None]) -> Any:
    torch = pytest.importorskip("torch")

    class Set(torch.utils.data.Dataset):  # type: ignore[misc, name-defined]
        def __len__(self) -> int:
            return 50

        def __getitem__(self, row: int) -> Any:
            if torch.utils.data.get_worker_info() is not None:
                act(row)
            return torch.from_numpy(VALUES[row]), int(LABELS[row])

    return Set()


def torch_model() -> Any:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten())
    return model.eval()


def loaded(path: Path, act: Callable[[int], None], workers: int = 2, part: str | None = None) -> lt.Run:
    return lt.record_dataset(
        torch_model(), torch_set(act), path, ["0"], batch_size=4, memory=MEMORY, workers=workers, part=part
    )


def kill_at_40(row: int) -> None:
    if row == 40:
        os.kill(os.getpid(), signal.SIGKILL)


def raise_at_40(row: int) -> None:
    if row == 40:
        raise ValueError("row 40 is bad")


LOADED = """
import sys
sys.path.insert(0, {tests!r})
import test_faults as faults
from pathlib import Path
faults.loaded(Path(sys.argv[1]), getattr(faults, sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("act", "words"), [("kill_at_40", "DataLoader worker"), ("raise_at_40", "row 40 is bad")]
)
def test_a_loaders_worker_that_dies_is_named(tmp_path, act, words):
    """In a child: torch tells of a death from a signal handler, at any moment."""
    pytest.importorskip("torch")
    expected = contents(loaded(tmp_path / "whole", lambda row: None, 0).path)
    script = LOADED.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "s"), act],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "DataLoader worker" in done.stderr
    assert not (tmp_path / "s").exists() or list(verify(tmp_path / "s")) == []
    loaded(tmp_path / "s", lambda row: None)
    assert contents(tmp_path / "s") == expected


def test_a_worker_that_dies_while_it_hands_over_a_batch_is_named_too():
    pytest.importorskip("torch")
    from layertap.backends.torch_data import handed_over

    def dies() -> Any:
        yield [1]
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    batches = handed_over(dies())
    assert next(batches) == [1]
    with pytest.raises(lt.DataError, match=r"a DataLoader worker died.*--workers 0"):
        next(batches)


def test_loaders_that_fork_beside_writers_come_to_an_end(tmp_path):
    """The second part's workers are forked while its writers run."""
    expected = contents(loaded(tmp_path / "whole", lambda row: None, 0).path)
    for k in (1, 2, 3):
        loaded(tmp_path / "s", lambda row: None, part=f"{k}/3")
    assert contents(tmp_path / "s") == expected
