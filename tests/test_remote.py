"""Stores behind a URL: the same bytes as on a disk, whatever the server does."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture.place import place_of
from layertap.capture.testing import contents
from layertap.capture.verify import repair, verify

obstore = pytest.importorskip("obstore")
pytest.importorskip("moto")

from object_server import BUCKET, CREDENTIALS, FileServer, Front, S3Server  # noqa: E402

CAPTURE = """
import sys
import numpy as np
import layertap as lt

def model(batch):
    return {"maps": np.maximum(batch, 0), "sums": batch.sum((2, 3))}

data = np.random.default_rng(0).standard_normal((96, 4, 32, 32), np.float32), np.arange(96) % 3
storage = {"retry_config": {"max_retries": 4, "backoff": {
    "init_backoff": __import__("datetime").timedelta(milliseconds=5),
    "max_backoff": __import__("datetime").timedelta(milliseconds=20), "base": 2}}}

def capture(path, **options):
    options = {"memory": "50MiB", "writers": 2, "batch_size": 4, **options}
    if "://" in str(path):
        options = {"storage": storage, **options}
    return lt.record_dataset(model, data, path, ["maps", "sums"], **options)

if __name__ == "__main__":
    print("ready", flush=True)
    capture(sys.argv[1], part=sys.argv[2])
"""
CODE: dict[str, Any] = {"__name__": "capture"}
exec(CAPTURE, CODE)
capture, model, data = CODE["capture"], CODE["model"], CODE["data"]
LEASE_S = 1.0


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def front(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    from layertap.capture import remote

    front = Front(server.port)
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": front.address}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LAYERTAP_LEASE_S", str(LEASE_S))
    monkeypatch.setattr(remote, "LEASE_S", LEASE_S)
    yield front
    front.stop()


@pytest.fixture
def url(front: Front, request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{request.node.nodeid.encode().hex()[-40:]}/run.zarr"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of the same store on a disk, in blocks as long as an upload's buffers leave."""
    path = tmp_path_factory.mktemp("whole") / "s"
    capture(path, memory="2MiB")
    assert lt.open(path).manifest.n_blocks == 6
    return contents(path)


def objects(url: str) -> dict[str, bytes]:
    """Return every object of a store by its name inside it, but for the log."""
    place = place_of(url)
    names = [item["path"] for listed in obstore.list(place._objects) for item in listed]  # type: ignore[attr-defined]
    return {name: place.read(name, 2**30) for name in names if "/log/" not in name}


def commits(url: str) -> list[str]:
    """Return the commit records that are there."""
    place = place_of(url)
    names = (place.names("commits") or []) if place.exists() else []
    return [name for name in names if name.startswith("c.")]


def start(url: str, part: str = "1/1") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CAPTURE, url, part], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def test_a_remote_store_has_the_bytes_of_one_on_a_disk(url, whole, front):
    run = capture(url)
    assert run.path == url
    assert run.complete
    assert objects(url) == whole
    assert run["maps"][[3, 95], 1:3].tobytes() == np.maximum(data[0], 0)[[3, 95], 1:3].tobytes()
    assert run["sums"][...].tobytes() == data[0].sum((2, 3)).tobytes()
    assert run.rows["label"][:].tolist() == data[1].tolist()
    assert list(verify(url)) == []
    before = front.counts["PUT"]
    capture(url)
    assert front.counts["PUT"] == before, "a finished store was written to"


def test_a_row_is_a_few_small_requests(url, front):
    capture(url)
    run = lt.open(url)
    run["maps"][0]
    front.counts.clear()
    run["maps"][1]
    assert front.counts["GET"] == 1, "the index is known and the row is one range"
    front.counts.clear()
    run["maps"][:, 2]
    assert front.counts["GET"] < 30, "windows of one channel that lie near each other are fetched as one"


def test_a_loop_is_stored_and_ended(url, tmp_path):
    for path in (url, tmp_path / "s"):
        with lt.record(model, path, "sums", memory="50MiB", writers=2) as rec:
            for i in range(0, 96, 4):
                rec(data[0][i : i + 4])
                rec.annotate(label=data[1][i : i + 4])
    assert lt.open(url).n_rows == 96
    assert lt.open(url).complete
    with pytest.raises(lt.StoreExistsError, match="finished capture of 96 rows"):
        lt.record(model, url, "sums").__enter__()


def test_killed_at_any_instant_it_goes_on_and_ends_the_same(url, whole):
    kills = 0
    for delay in (0.05, 0.1, 0.2, 0.3, 0.45, 0.6):
        process = start(url)
        time.sleep(delay)
        process.kill()
        kills += finish(process)[0] == -signal.SIGKILL
        if place_of(url).exists():
            run = lt.open(url)
            done = run.committed()
            assert (run["sums"][done] == data[0].sum((2, 3))[done]).all()
            # Metadata that was not put before the kill are put by the next capture; no block is damaged.
            assert not [damage for damage in verify(url) if damage.block is not None]
    assert kills > 3
    capture(url)
    assert objects(url) == whole


def test_metadata_that_a_killed_process_did_not_put_is_put_by_the_next(url, whole):
    capture(url)
    place = place_of(url)
    place.delete(["taps/zarr.json", "taps/maps/values/zarr.json", "commits/c.1.0"])
    capture(url)
    assert objects(url) == whole


def test_a_second_process_is_refused_while_the_first_lives_and_takes_over_once_it_is_dead(url, whole, front):
    front.before = lambda method, path: time.sleep(0.15) if "/values/c." in path else None
    first = start(url)
    deadline = time.monotonic() + 60
    while not place_of(url).exists() or not place_of(url).names("commits/log"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(lt.StoreError, match="another process is capturing into"):
        capture(url)
    first.kill()
    finish(first)
    front.before = lambda method, path: None
    capture(url)
    assert objects(url) == whole
    assert not [name for name in place_of(url).names("commits/log") or () if "lease" in name]


def test_a_process_that_was_stopped_too_long_commits_nothing_more(url, whole, front):
    front.before = lambda method, path: time.sleep(0.1) if "/values/c." in path else None
    first = start(url)
    deadline = time.monotonic() + 60
    while not commits(url):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)
    front.before = lambda method, path: None
    try:
        capture(url)
    finally:
        first.send_signal(signal.SIGCONT)
    code, errors = finish(first)
    assert code == 1
    assert "took over the blocks" in errors
    assert objects(url) == whole


def test_parts_at_the_same_time_make_the_same_store(url, whole):
    said = [finish(process) for process in [start(url, f"{k}/3") for k in (1, 2, 3)]]
    assert [code for code, _ in said] == [0, 0, 0], said
    assert objects(url) == whole


def test_parts_that_overlap_are_refused(url):
    from layertap.capture.remote import Lease, RemotePlace

    capture(url)
    place = place_of(url)
    assert isinstance(place, RemotePlace)
    first, second = Lease(place, range(4)), Lease(place, range(4, 9))
    for blocks in (range(4), range(3, 5), None):
        with pytest.raises(lt.StoreError, match="another process is capturing"):
            Lease(place, blocks)
    Lease(place, range(9, 9)).release()
    first.release()
    Lease(place, range(4)).release()
    second.release()
    Lease(place, None).release()


def test_a_server_that_fails_now_and_then_is_asked_again(url, whole, front):
    seen: Counter[tuple[str, str]] = Counter()  # each by itself: of many at once, one could fail for good

    def fails(method: str, path: str) -> int | None:
        seen[method, path] += 1
        return (503, 500, None)[seen[method, path] % 3 - 1]

    front.before = fails
    capture(url)
    front.before = lambda method, path: None
    assert objects(url) == whole


@pytest.mark.parametrize("kind", ["values/c.", "commits/c.", "label/c."])
def test_a_server_that_fails_for_good_ends_the_capture_and_loses_nothing_committed(url, whole, front, kind):
    n_put = 0

    def fails(method: str, path: str) -> int | None:
        nonlocal n_put
        n_put += method == "PUT" and kind in path
        return 503 if n_put > 2 and kind in path and method in ("PUT", "POST") else None

    front.before = fails
    with pytest.raises(lt.StoreError, match=r"cannot write s3://.*503") as caught:
        capture(url)
    assert "the same capture goes on" in str(caught.value)
    assert "Debug source" not in str(caught.value)
    front.before = lambda method, path: None
    run = lt.open(url)
    done = run.committed()
    assert 0 < done.sum() < 96
    assert (run["sums"][done] == data[0].sum((2, 3))[done]).all()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("layertap")]
    capture(url)
    assert objects(url) == whole


def test_a_slow_server_holds_the_model_back_and_nothing_is_dropped(url, whole, front, monkeypatch):
    from layertap.capture.recorder import Recorder

    ahead: list[int] = []
    begin = Recorder.begin

    def counts(self: Recorder, n_rows: int) -> Any:
        pieces = begin(self, n_rows)
        ahead.append(self.row + n_rows - self.stages.n_rows)
        return pieces

    def slow(method: str, path: str) -> None:
        if method == "PUT" and "/values/c." in path:
            time.sleep(0.2)

    monkeypatch.setattr(Recorder, "begin", counts)
    front.before = slow
    capture(url)
    front.before = lambda method, path: None
    assert objects(url) == whole
    # Six blocks of 16 rows, of which memory holds three.
    assert 32 < max(ahead) <= 48, f"the model was {max(ahead)} rows ahead of what was committed"


def test_statistics_alone_in_a_bucket_are_those_on_a_disk(url, tmp_path):
    options: dict[str, Any] = {"memory": "256MiB", "stats": "all", "values": False}
    capture(url, **options)
    capture(tmp_path / "s", **options)
    assert objects(url) == contents(tmp_path / "s")
    assert "statistics/blocks/c.0.0" in objects(url)
    assert list(verify(url)) == []
    assert lt.open(url).stats.cka().shape == (len(lt.open(url)),) * 2


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FileServer]:
    server = FileServer(tmp_path)
    yield server
    server.stop()


def test_a_store_is_read_over_http(web, tmp_path):
    capture(tmp_path / "run.zarr", memory="2MiB")
    run = lt.open(f"{web.address}/run.zarr")
    assert run.complete
    assert run["maps"][17, :2].tobytes() == np.maximum(data[0], 0)[17, :2].tobytes()
    assert list(verify(f"{web.address}/run.zarr/")) == []
    assert lt.draw(run, "grid", rows=[3], layers="maps").png()[:4] == b"\x89PNG"
    with pytest.raises(lt.StoreError, match="read over HTTP and cannot be written"):
        capture(f"{web.address}/new.zarr")
    with pytest.raises(lt.StoreNotFoundError, match="no store at http"):
        lt.open(f"{web.address}/nothing.zarr")


def test_an_unfinished_loop_is_read_over_http_as_far_as_it_came(web, tmp_path):
    path = tmp_path / "run.zarr"
    with pytest.raises(RuntimeError), lt.record(model, path, "maps", memory="800KiB", writers=1) as rec:
        for i in range(0, 96, 4):
            rec(data[0][i : i + 4])
            if lt.open(path).n_rows if path.exists() else 0:
                raise RuntimeError
    run = lt.open(f"{web.address}/run.zarr")
    assert 96 > run.n_rows == lt.open(path).n_rows > 0
    assert (run["maps"][:] == np.maximum(data[0], 0)[: run.n_rows]).all()


def test_a_server_without_ranges_gives_an_error_and_no_wrong_values(tmp_path):
    capture(tmp_path / "run.zarr", memory="2MiB")
    server = FileServer(tmp_path, ranges=False)
    try:
        run = lt.open(f"{server.address}/run.zarr")
        with pytest.raises(lt.StoreError, match="Range, status 206"):
            run["maps"][3]
    finally:
        server.stop()


def test_damage_is_found_and_repaired(url, whole):
    capture(url)
    place = place_of(url)
    damaged = bytearray(place.read("taps/maps/values/c.2.0.0.0", 2**20))
    damaged[100] ^= 1
    place.write("taps/maps/values/c.2.0.0.0", bytes(damaged))
    (damage,) = verify(url)
    assert (damage.block, damage.name) == (2, "maps")
    with pytest.raises(lt.ChecksumError):
        lt.open(url)["maps"][2 * 16]
    assert repair(url, [damage]) == [2]
    capture(url)
    assert objects(url) == whole


def test_another_plan_and_what_is_no_store_are_left_alone(url, whole):
    capture(url)
    with pytest.raises(lt.StoreExistsError, match="dtype float32 there, float16 now"):
        capture(url, dtype="float16")
    assert objects(url) == whole
    place_of(url + "/../other/x").write("zarr.json", b"{}")
    other = url + "/../other/x"
    with pytest.raises(lt.StoreExistsError, match="is not a layertap store"):
        capture(other, overwrite=True)
    assert place_of(other).read("zarr.json", 2**20) == b"{}"


def test_a_store_is_overwritten_when_that_is_said(url):
    capture(url)
    run = capture(url, overwrite=True, dtype="float16")
    assert str(run["maps"].dtype) == "float16"
    assert run.complete
    assert list(verify(url)) == []


def test_zarr_python_reads_it(url):
    group = capture(url).zarr()
    assert (group["taps/maps/values"][5] == np.maximum(data[0], 0)[5]).all()


def test_the_commands_take_a_url(url, tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(
        CAPTURE + "\ndef build():\n    return model\n\ndef rows():\n    return data\n"
    )
    monkeypatch.chdir(tmp_path)
    call = CliRunner().invoke
    done = call(main, ["capture", "model.py:build", "model.py:rows", url, "--layers", "maps,sums"])
    assert done.exit_code == 0, done.output
    for command in (["info"], ["verify"]):
        done = call(main, [*command, url])
        assert done.exit_code == 0, done.output
        assert url in done.output
    done = call(main, ["render", "grid", url, "--rows", "3", "--layers", "maps", "--out", "x.png"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "x.png").stat().st_size > 1000
    done = call(main, ["pack", url, "run.zip"])
    assert done.exit_code == 0, done.output
    assert lt.open("run.zip")["sums"][:].tobytes() == data[0].sum((2, 3)).tobytes()


def test_a_zip_file_is_read_where_it_lies(url, front, web, tmp_path):
    packed = lt.pack(capture(url).place, tmp_path / "run.zip")
    remote = url.replace("run.zarr", "run.zip")
    place_of(url.removesuffix("/run.zarr")).write("run.zip", packed.read_bytes())
    for path, counts in ((remote, front.counts), (f"{web.address}/run.zip", web.counts)):
        run = lt.open(path)
        assert run.complete
        assert run["maps"][[0, 50], 1].tobytes() == np.maximum(data[0], 0)[[0, 50], 1].tobytes()
        run["maps"][51]
        counts.clear()
        run["maps"][52]
        assert counts["GET"] == 1
        assert list(verify(path)) == []
        with pytest.raises(lt.StoreError, match="can be read and not written"):
            capture(path, overwrite=True)
        with pytest.raises(lt.StoreError, match="on a disk alone"):
            run.zarr()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("s3://nosuchbucket/run.zarr", "no such bucket"),
        ("ftp://host/run.zarr", "ftp:// is not known"),
    ],
)
def test_what_cannot_be_reached_is_told_in_a_sentence(front, path, words):
    with pytest.raises(lt.LayertapError, match=words):
        capture(path)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "layertap.capture.remote", raising=False)
    with pytest.raises(lt.MissingPackageError, match=r"pip install 'layertap\[remote\]'"):
        lt.open("s3://bucket/run.zarr")
    with pytest.raises(lt.PlanError, match="options are for stores behind a URL"):
        lt.open("run.zarr", storage={"region": "x"})


def test_reduced_taps_and_their_constants_are_put_mended_and_read(url, tmp_path):
    options = {"reduce": {"maps": "project:2|int8", "sums": "pca:2,rows=8"}, "memory": "50MiB"}
    capture(tmp_path / "s", **{**options, "memory": "2MiB"})
    run = capture(url, **options)
    there, here = objects(url), lt.open(tmp_path / "s")
    assert set(there) >= {"taps/maps/scale/zarr.json", "taps/maps/basis/c.0.0", "taps/sums/mean/c.0"}
    for name in ("maps", "sums"):
        assert run[name][...].tobytes() == here[name][...].tobytes()
        assert run[name].constants.keys() == here[name].constants.keys()
    place_of(url).delete(["taps/sums/basis/c.0.0"])
    damages = list(verify(url))
    assert [damage.file for damage in damages] == ["taps/sums/basis/c.0.0"]
    capture(url, **options)
    assert objects(url) == there


def test_rows_that_differ_in_shape_lie_in_a_bucket_as_on_a_disk(url, tmp_path):
    from test_ragged import Sequences, double

    source = Sequences()
    for path in (tmp_path / "run", url):
        lt.record_dataset(double, source, path, ["twice"], batch_size=4, ragged="twice:9", writers=1)
    assert objects(url) == contents(tmp_path / "run")
    assert list(verify(url)) == []
    assert [one.tolist() for one in lt.open(url)["twice"][:]] == [(row * 2).tolist() for row in source.rows]
