"""Data sets for torch's loader: rows at random, and batches that are mixed while they are read in order."""

from __future__ import annotations

import os
import pickle
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import layertap as lt
import ml_dtypes
import numpy as np
import pytest
from layertap.capture.dtypes import DTYPES
from layertap.capture.store import commit_path

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader, RandomSampler, Subset  # noqa: E402
from transforms import first_channel, told_whether_shared  # noqa: E402

N_ROWS = 83
RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal((N_ROWS, 12, 8, 8)).astype(np.float32)
HALVES = VALUES[:, :3].astype(ml_dtypes.bfloat16)
LABELS = RNG.integers(0, 10, N_ROWS)
TEXTS = [f"é/{'x' * (row % 5)}{row}" for row in range(N_ROWS)]
ROWS = list(range(N_ROWS))


def flat(made: Any) -> list[Any]:
    return list(chain.from_iterable(made))


class Named(lt.ArraySource):
    """Rows with an id."""

    def batch(self, rows: range) -> lt.Batch:
        batch = super().batch(rows)
        batch.columns["id"] = TEXTS[rows.start : rows.stop]
        return batch

    def text_bytes(self) -> dict[str, int]:
        return {"id": 40}


def capture(path: Path, codec: str = "none") -> lt.Run:
    return lt.record_dataset(
        lambda batch: {
            "maps": batch,
            "half": batch[:, :3].astype(ml_dtypes.bfloat16),
            "one": batch[:, 0, 0, 0],
        },
        Named(VALUES, LABELS),
        path,
        ["maps", "half", "one"],
        batch_size=4,
        memory="800KiB" if codec == "none" else "2500KiB",
        codec=codec,
        writers=1,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("dataset")
    for codec in ("none", "zstd"):
        assert capture(made / codec, codec).manifest.n_blocks > 1
    lt.pack(made / "none", made / "run.zip")
    return made


@pytest.fixture
def run(folder: Path) -> lt.Run:
    return lt.open(folder / "none")


def batches_of(run: lt.Run, **options: Any) -> Any:
    chosen = {"taps": "maps", "columns": "row", "batch_size": 8, "shuffle": True, "memory": "256KiB"}
    return run.torch_dataset(**(chosen | options))


def rows_of(loaded: Any) -> list[int]:
    """Return the rows of all batches, whose values are held to what was captured."""
    seen: list[int] = []
    for batch in loaded:
        rows = batch["row"].tolist()
        assert torch.equal(batch["maps"], torch.from_numpy(VALUES[rows]))
        seen += rows
    return seen


# Rows


def test_a_row_is_a_dict_of_tensors_and_what_the_columns_hold(run):
    rows = run.torch_dataset(columns=["label", "id", "row"])
    assert isinstance(rows, torch.utils.data.Dataset)
    assert len(rows) == N_ROWS
    row = rows[17]
    assert list(row) == ["maps", "half", "one", "label", "id", "row"]
    assert torch.equal(row["maps"], torch.from_numpy(VALUES[17]))
    assert row["half"].dtype == torch.bfloat16
    assert torch.equal(row["half"].float(), torch.from_numpy(HALVES[17].astype(np.float32)))
    assert row["one"].shape == ()
    assert row["label"].dtype == torch.int64
    assert row["label"] == LABELS[17]
    assert row["id"] == TEXTS[17]
    assert row["row"] == 17


def test_a_list_or_slice_of_rows_is_a_batch(run):
    rows = run.torch_dataset(["maps", "one"], ["id", "row"])
    for index, numbers in (([3, 80, 3, -1], [3, 80, 3, 82]), (slice(70, None, 5), [70, 75, 80]), ([], [])):
        batch = rows[index]
        assert torch.equal(batch["maps"], torch.from_numpy(VALUES[numbers]))
        assert torch.equal(batch["one"], torch.from_numpy(VALUES[numbers, 0, 0, 0]))
        assert batch["id"] == [TEXTS[row] for row in numbers]
        assert batch["row"].tolist() == numbers


@pytest.mark.parametrize("index", [N_ROWS, -N_ROWS - 1, [0, N_ROWS], "x", 1.0, [[0]], None])
def test_a_row_that_is_not_there_is_a_selection_error(run, index):
    with pytest.raises(lt.SelectionError, match=r"outside|are asked for by"):
        run.torch_dataset("one")[index]


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("check", [False, True])
def test_a_loader_gives_each_row_once_in_batches_of_its_own(folder, codec, check):
    rows = lt.open(folder / codec, check=check).torch_dataset("maps", "row")
    assert sorted(rows_of(DataLoader(rows, batch_size=8, shuffle=True))) == ROWS
    assert rows_of(DataLoader(rows, batch_size=8)) == ROWS
    whole = torch.utils.data.BatchSampler(RandomSampler(rows), 8, drop_last=False)
    assert sorted(rows_of(DataLoader(rows, sampler=whole, batch_size=None))) == ROWS
    assert rows_of(DataLoader(Subset(rows, [5, 80, 3]), batch_size=2)) == [5, 80, 3]
    assert [item["row"] for item in rows] == ROWS


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_arrives_as_torchs_own(tmp_path, name):
    dtype = DTYPES[name]
    bits = RNG.integers(0, 2 if name == "bool" else 256, (5, 6 * dtype.itemsize), np.uint8)
    values = np.ascontiguousarray(bits).view(dtype)
    run = lt.record_dataset(lambda b: {"a": values[b[:, 0]]}, np.arange(5)[:, None], tmp_path / "s", "a")
    row = run.torch_dataset()[3]["a"]
    assert row.dtype == getattr(torch, name)
    assert row.view(torch.uint8).numpy().tobytes() == values[3].tobytes()
    (batch,) = run.torch_dataset(batch_size=8)
    assert batch["a"].dtype == getattr(torch, name)
    assert batch["a"].view(torch.uint8).numpy().tobytes() == values.tobytes()


def test_a_tap_that_is_made_of_several_arrays_is_put_together(run, monkeypatch):
    one, label = run["one"].stored_as[0], run.rows["label"].stored_as[0]
    single = type(run["one"]).stored_as.fget
    monkeypatch.setattr(
        lt.Tap, "stored_as", property(lambda tap: (one, label) if tap.name == "one" else single(tap))
    )
    monkeypatch.setattr(lt.Tap, "made_of", lambda tap, stored: stored[0] + 10 * stored[1])
    expected = VALUES[:, 0, 0, 0] + 10 * LABELS
    rows = run.torch_dataset(["one", "maps"], "label")
    assert rows[5]["one"] == expected[5]
    assert torch.equal(rows[3:7]["maps"], torch.from_numpy(VALUES[3:7]))
    (batch,) = run.torch_dataset("one", "row", batch_size=100)
    assert torch.equal(batch["one"], torch.from_numpy(expected))


def test_a_tap_goes_by_the_name_that_it_was_asked_for_by(run):
    run._first_names["another"] = "maps"
    rows = run.torch_dataset(["another", "one", "maps"])
    assert list(rows[3]) == ["another", "one", "maps"]
    assert torch.equal(rows[3]["another"], torch.from_numpy(VALUES[3]))
    assert torch.equal(next(iter(run.torch_dataset("another", batch_size=100)))["another"], rows[:]["maps"])


def test_a_transform_has_each_item(run):
    rows = run.torch_dataset("maps", "row", transform=first_channel)
    values, _ = rows[3]
    assert torch.equal(values, torch.from_numpy(VALUES[3, 0]))
    values, numbers = next(iter(DataLoader(rows, batch_size=4)))
    assert torch.equal(values, torch.from_numpy(VALUES[numbers, 0]))
    values, numbers = next(iter(batches_of(run, transform=first_channel)))
    assert torch.equal(values, torch.from_numpy(VALUES[numbers, 0]))


def test_a_row_is_read_straight_into_its_tensor_and_alone(folder, monkeypatch):
    run = lt.open(folder / "none")
    row_bytes, chunk_rows = 12 * 8 * 8 * 4, run.manifest.layout.chunk_rows(run.manifest.layout.taps[0])
    assert chunk_rows >= 4
    rows = run.torch_dataset("maps", "row")
    rows[17]
    calls: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], at: int) -> int:
        calls.append((np.frombuffer(buffers[0], np.uint8).ctypes.data, sum(b.nbytes for b in buffers)))
        return real(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", preadv)
    row = rows[17]
    assert calls == [(row["maps"].data_ptr(), row_bytes)]
    calls.clear()
    # Half of a chunk and more is read whole, and checked.
    rows[list(range(chunk_rows))]
    assert sum(n for _, n in calls) > chunk_rows * row_bytes
    calls.clear()
    rows.__getitems__([40, 41, 40, 60])
    assert sum(n for _, n in calls) <= 4 * row_bytes
    calls.clear()
    checked = lt.open(folder / "none", check=True).torch_dataset("maps")
    for row in range(chunk_rows):
        checked[row]
    assert len(calls) == 1, "a chunk that was checked is kept"


def test_what_is_not_in_the_store_is_named(run):
    with pytest.raises(lt.SelectionError, match=r"holds no tap 'map'\. The closest are: maps"):
        run.torch_dataset("map")
    with pytest.raises(lt.SelectionError, match="no column 'labels'"):
        run.torch_dataset("maps", "labels")
    with pytest.raises(lt.SelectionError, match="'maps' is asked for twice"):
        run.torch_dataset(["maps", "maps"])
    with pytest.raises(lt.SelectionError, match="nothing is asked for"):
        run.torch_dataset([], "row")
    with pytest.raises(lt.SelectionError, match="the store has rows 0 to 82"):
        run.torch_dataset("one", rows=[83])
    with pytest.raises(lt.SelectionError, match="a slice, a list of row numbers, or a mask"):
        run.torch_dataset("one", rows=[0.5])
    with pytest.raises(lt.PlanError, match="give batch_size= too"):
        run.torch_dataset("one", shuffle=True)
    with pytest.raises(lt.PlanError, match="batch_size=0"):
        run.torch_dataset("one", batch_size=0)


@pytest.mark.parametrize("rows", [slice(10, 30), slice(None, None, -3), range(5, 80, 9), [70, 3], LABELS > 4])
def test_some_rows_are_chosen(run, rows):
    chosen = sorted(np.arange(N_ROWS)[rows if not isinstance(rows, range) else list(rows)].tolist())
    dataset = run.torch_dataset("maps", "row", rows=rows)
    assert [item["row"] for item in dataset] == chosen
    assert sorted(rows_of(batches_of(run, rows=rows))) == chosen


# Batches


def test_batches_come_mixed_and_every_row_once(run):
    made = batches_of(run)
    assert isinstance(made, torch.utils.data.IterableDataset)
    assert made.mixed_windows > 1
    assert made.mixed_rows < N_ROWS
    assert repr(made) == (
        f"<BatchStream {run.path}: 83 rows of maps, row, in batches of 8, {made.mixed_rows} mixed at a time>"
    )
    rows = rows_of(made)
    assert sorted(rows) == ROWS
    assert rows != ROWS
    assert len(made) == len(list(made)) == 11
    assert rows_of(made) == rows
    made.set_epoch(1)
    assert rows_of(made) != rows
    assert rows_of(batches_of(run, shuffle=False)) == ROWS
    assert len(batches_of(run, drop_last=True)) == len(list(batches_of(run, drop_last=True))) == 10


@pytest.mark.parametrize("name", ["none", "zstd", "run.zip"])
def test_workers_share_the_rows_and_make_batches_in_shared_memory(folder, name):
    run = lt.open(folder / name)
    run["maps"][0]  # the parent has files open already
    made = batches_of(run, transform=told_whether_shared, memory="2MiB")
    list(made)
    loader = DataLoader(
        made, batch_size=None, num_workers=2, multiprocessing_context="fork", persistent_workers=True
    )
    assert len(loader) == 11
    epochs = []
    for epoch in range(2):
        made.set_epoch(epoch)
        loaded = list(loader)
        assert all(batch["shared"] for batch in loaded)
        assert [len(batch["row"]) for batch in loaded] == [8] * 10 + [3]
        epochs.append(rows_of(loaded))
        assert sorted(epochs[-1]) == ROWS
    assert epochs[0] != epochs[1], "workers that stay did not hear of the next epoch"


def test_workers_that_are_forked_read_rows_at_random(folder):
    for name in ("none", "run.zip"):
        rows = lt.open(folder / name).torch_dataset("maps", ["row", "id"])
        rows[0]
        loaded = list(DataLoader(rows, batch_size=8, num_workers=2, multiprocessing_context="fork"))
        assert rows_of(loaded) == ROWS
        assert flat(batch["id"] for batch in loaded) == TEXTS


def test_workers_that_are_spawned_open_the_store_themselves(folder):
    made = batches_of(lt.open(folder / "run.zip"), transform=told_whether_shared)
    loader = DataLoader(
        made, batch_size=None, num_workers=1, multiprocessing_context="spawn", persistent_workers=True
    )
    epochs = []
    for epoch in range(2):
        made.set_epoch(epoch)
        epochs.append(rows_of(loader))
        assert sorted(epochs[-1]) == ROWS
    assert epochs[0] != epochs[1]


def test_ranks_share_the_rows(run, monkeypatch):
    seen = [rows_of(batches_of(run, part=f"{k}/3")) for k in (1, 2, 3)]
    assert sorted(flat(seen)) == ROWS
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert rows_of(batches_of(run)) == seen[1]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert sorted(rows_of(batches_of(run))) == ROWS
    finally:
        torch.distributed.destroy_process_group()


def test_an_epoch_goes_on_where_it_stopped(run):
    made = batches_of(run, seed=5)
    made.set_epoch(3)
    whole = [batch["row"].tolist() for batch in made]
    running = iter(made)
    assert [next(running)["row"].tolist() for _ in range(4)] == whole[:4]
    state = made.state_dict()
    assert (state["epoch"], state["batches"]) == (3, 4)
    again = batches_of(run, seed=5)
    again.load_state_dict(pickle.loads(pickle.dumps(state)))
    again.set_epoch(3)  # as the loop over epochs does first
    assert [batch["row"].tolist() for batch in again] == whole[4:]
    again.set_epoch(4)
    assert len(rows_of(again)) == N_ROWS
    with pytest.raises(lt.PlanError, match="another order of batches: seed 5 there, 0 now"):
        batches_of(run).load_state_dict(state)


def test_an_epoch_of_workers_goes_on_behind_the_batches_that_were_taken(run):
    made = batches_of(run)

    def loaded() -> list[list[int]]:
        return [batch["row"].tolist() for batch in DataLoader(made, batch_size=None, num_workers=2)]

    whole = loaded()
    for n in (1, 4, 11):
        made.load_state_dict(made.state_dict() | {"batches": n})
        assert (
            loaded() == whole[n:]
            if n % 2 == 0
            else sorted(map(tuple, loaded())) == sorted(map(tuple, whole[n:]))
        )


def test_each_worker_goes_on_from_a_state_of_its_own(run, monkeypatch):
    """Loaders that save what their workers say ask each, at different places."""
    from torch.utils.data._utils import worker

    def of_worker(k: int) -> Any:
        made = batches_of(run)
        monkeypatch.setattr(
            worker, "_worker_info", worker.WorkerInfo(id=k, num_workers=2, seed=0, dataset=made)
        )
        return made

    left, states = [], []
    for k, n in ((0, 3), (1, 2)):
        made = of_worker(k)
        running = iter(made)
        for _ in range(n):
            next(running)
        states.append(made.state_dict())
        left.append([batch["row"].tolist() for batch in running])
    now = batches_of(run)._now
    loaded = []
    for k in (0, 1):
        made = of_worker(k)
        made._now = now  # in shared memory, as it is for the workers of a loader
        made.load_state_dict(states[k])
        loaded.append(made)
    for k, made in enumerate(loaded):
        of_worker(k)
        assert [batch["row"].tolist() for batch in made] == left[k]
    assert len(left[0]) == len(left[1]) == 3


def test_an_error_in_a_worker_says_what_it_says_here(tmp_path):
    capture(tmp_path / "s")
    file = next((tmp_path / "s" / "taps" / "maps" / "values").glob("c.1.*"))
    data = bytearray(file.read_bytes())
    data[400] ^= 1
    file.write_bytes(data)
    with pytest.raises(lt.ChecksumError, match=r"is damaged: its bytes do not give its CRC-32C"):
        list(DataLoader(batches_of(lt.open(tmp_path / "s")), batch_size=None, num_workers=1))


def test_rows_that_are_not_captured_are_left_out_and_that_is_said(tmp_path):
    capture(tmp_path / "s")
    run = lt.open(tmp_path / "s")
    size = run.manifest.layout.block_rows
    (tmp_path / "s" / commit_path(1)).unlink()
    run = lt.open(tmp_path / "s")
    there = [row for row in ROWS if not size <= row < 2 * size]
    with pytest.warns(UserWarning, match=rf"is not finished: {len(there)} of the 83 rows"):
        rows = run.torch_dataset("maps", "row")
    assert [item["row"] for item in rows] == there
    assert repr(rows) == f"<RowDataset {run.path}: {len(there)} of 83 rows of maps, row>"
    with pytest.warns(UserWarning, match="is not finished") as caught:
        made = batches_of(run)
    assert caught[0].filename == __file__
    assert sorted(rows_of(made)) == there
    whole = batches_of(run, rows=slice(0, size))  # of these, all are there
    assert sorted(rows_of(whole)) == list(range(size))


def test_memory_that_is_too_small_is_refused_when_the_data_set_is_made(run):
    with pytest.raises(lt.PlanError, match=r"rows that are read at once take .* Give more memory="):
        batches_of(run, memory="20KiB")


def test_a_data_set_can_be_pickled_and_reads_the_same_store_alone(folder, run, tmp_path):
    capture(tmp_path / "s")
    for made in (batches_of(lt.open(tmp_path / "s")), lt.open(tmp_path / "s").torch_dataset("maps", "row")):
        again = pickle.loads(pickle.dumps(made))
        assert sorted(item["row"] for item in again) if made.transform else True
        assert repr(again) == repr(made)
        assert torch.equal(next(iter(again))["maps"], next(iter(made))["maps"])
        data = pickle.dumps(made)
        assert len(data) < 20_000
    lt.record_dataset(lambda b: {"maps": b}, VALUES, tmp_path / "s", "maps", batch_size=4, overwrite=True)
    with pytest.raises(lt.StoreError, match="was replaced since the run was pickled"):
        pickle.loads(data)


def test_without_torch_the_line_that_installs_it_is_named(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "layertap.backends.torch_dataset", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(lt.MissingPackageError, match=r"needs torch; .*pip install 'layertap\[torch\]'"):
        run.torch_dataset()


# Buckets


def test_a_bucket_is_read_by_workers_that_are_spawned_and_a_fork_says_so(folder, monkeypatch):
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    from layertap.capture.place import place_of
    from layertap.capture.testing import contents
    from object_server import BUCKET, CREDENTIALS, S3Server

    server = S3Server()
    try:
        for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}"}).items():
            monkeypatch.setenv(name, value)
        place = place_of(f"s3://{BUCKET}/run.zarr")
        for name, data in contents(folder / "none").items():
            place.write(name, data)
        run = lt.open(place)
        made, rows = batches_of(run), run.torch_dataset("maps", "row")
        assert sorted(rows_of(made)) == ROWS
        assert rows_of(DataLoader(rows, batch_size=16)) == ROWS
        assert run["maps"][...].tobytes() == VALUES.tobytes()
        loader = DataLoader(made, batch_size=None, num_workers=1, multiprocessing_context="spawn")
        assert sorted(rows_of(loader)) == ROWS
        with pytest.raises(lt.StoreError, match=r"in a forked process.*multiprocessing_context='spawn'"):
            list(DataLoader(made, batch_size=None, num_workers=1, multiprocessing_context="fork"))
    finally:
        server.stop()
