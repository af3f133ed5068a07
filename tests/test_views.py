"""A run as dask's and xarray's arrays: equal, lazy, and the same errors."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import layertap as lt
import ml_dtypes
import numpy as np
import pytest
from layertap.capture import reader
from layertap.capture.store import commit_path

dask = pytest.importorskip("dask")
xarray = pytest.importorskip("xarray")

N_ROWS = 43
RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal((N_ROWS, 12, 5, 7)).astype(np.float32)
LABELS = RNG.integers(0, 10, N_ROWS)
TEXTS = [f"é/{'x' * (row % 5)}{row}" for row in range(N_ROWS)]
EXPECTED = {
    "a": VALUES,
    "half": VALUES[:, :3].astype(ml_dtypes.bfloat16),
    "flat": VALUES[:, :, 0, 0],
    "x": VALUES[:, 0, 0],
    "scalar": VALUES[:, 0, 0, 0],
}


class Named(lt.ArraySource):
    """Rows with an id and pictures."""

    def batch(self, rows: range) -> lt.Batch:
        batch = super().batch(rows)
        batch.columns["id"] = TEXTS[rows.start : rows.stop]
        batch.columns["flat"] = LABELS[rows.start : rows.stop] + 1  # a tap has the name too
        batch.columns["spot"] = VALUES[rows.start : rows.stop, 0, :2, 0]
        return batch

    def text_bytes(self) -> dict[str, int]:
        return {"id": 40}


def model(batch: np.ndarray) -> dict[str, Any]:
    return {
        "a": batch,
        "half": batch[:, :3].astype(ml_dtypes.bfloat16),
        "flat": batch[:, :, 0, 0],
        "x": batch[:, 0, 0],
        "scalar": batch[:, 0, 0, 0],
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("views") / "run.zarr"
    run = lt.record_dataset(
        model, Named(VALUES, LABELS), made, list(EXPECTED), batch_size=5, memory="1100KiB", writers=1
    )
    assert run.manifest.n_blocks > 2
    return made


@pytest.fixture
def run(path: Path) -> lt.Run:
    return lt.open(path)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read of a shard."""
    reader._open_shard.cache_clear()
    sizes: list[int] = []
    pread, preadv = os.pread, os.preadv

    def one(fd: int, n: int, at: int) -> bytes:
        data = pread(fd, n, at)
        sizes.append(len(data))
        return data

    def many(fd: int, buffers: list[memoryview], at: int) -> int:
        n_bytes = preadv(fd, buffers, at)
        sizes.append(n_bytes)
        return n_bytes

    monkeypatch.setattr(os, "pread", one)
    monkeypatch.setattr(os, "preadv", many)
    return sizes


@pytest.mark.parametrize("name", EXPECTED)
def test_a_dask_array_holds_what_the_tap_holds(run, name):
    lazy, values = run[name].dask(), EXPECTED[name]
    assert (lazy.shape, lazy.dtype) == (values.shape, values.dtype)
    assert lazy.chunks[0] == tuple(
        min(run.manifest.layout.block_rows, N_ROWS - row)
        for row in range(0, N_ROWS, run.manifest.layout.block_rows)
    )
    assert np.array_equal(lazy.compute(scheduler="threads"), values)
    assert np.array_equal(lazy[3:30:4, ...].compute(scheduler="sync"), values[3:30:4])
    assert np.array_equal(lazy[[40, 3]].compute(scheduler="sync"), values[[40, 3]])
    assert np.array_equal(lazy[::-1].compute(scheduler="sync"), values[::-1])
    assert np.array_equal(np.asarray(run[name]), values)


def test_a_reduction_of_dask_is_that_of_numpy(run):
    lazy = run["a"].dask()
    assert np.allclose(lazy.mean((0, 2, 3)).compute(scheduler="threads"), VALUES.mean((0, 2, 3)), atol=1e-6)
    matrix = run["flat"].dask()
    gram = EXPECTED["flat"].T @ EXPECTED["flat"]
    assert np.allclose((matrix.T @ matrix).compute(scheduler="sync"), gram, atol=1e-4)


def test_columns_are_lazy_arrays_too(run):
    assert run.rows["label"].dask().compute(scheduler="sync").tolist() == LABELS.tolist()
    ids = run.rows["id"].dask()
    assert ids.dtype == object
    assert ids.compute(scheduler="sync").tolist() == TEXTS
    assert ids[7].compute(scheduler="sync") == TEXTS[7]


def test_nothing_is_read_before_it_is_computed_and_then_what_is_asked_for(run, read):
    lazy = run["a"].dask()
    run["a"].xarray()
    run.xarray()
    assert read == []
    assert np.array_equal(lazy[17, 4:6].compute(scheduler="sync"), VALUES[17, 4:6])
    assert read[1:] == [2 * 5 * 7 * 4], "the index, and two channels of a row"


def test_chunks_are_rows_that_were_asked_for_or_inner_chunks_of_long_blocks(run, tmp_path, monkeypatch):
    assert run["a"].dask(rows=10).chunks[0] == (10, 10, 10, 10, 3)
    with pytest.raises(lt.SelectionError, match="one row at least"):
        run["a"].dask(rows=0)
    rows = np.zeros((48, 48, 32, 32), np.float32)  # of 192 KiB
    long = lt.record_dataset(lambda b: {"a": b}, rows, tmp_path / "s", "a", batch_size=8, memory="64MiB")
    layout = long.manifest.layout
    assert (layout.block_rows, layout.chunk_rows(layout.taps[0])) == (48, 2)
    monkeypatch.setattr("layertap.capture.views.PIECE_BYTES", 7 * 192 * 1024)
    assert long["a"].dask().chunks[0] == (6,) * 8


def test_a_view_is_pickled_with_its_store_and_not_its_values(run, path, tmp_path, monkeypatch):
    monkeypatch.chdir(path.parent)
    data = pickle.dumps(lt.open("run.zarr")["a"].dask().sum(0))
    assert len(data) < 30_000
    monkeypatch.chdir(tmp_path)
    assert np.allclose(pickle.loads(data).compute(scheduler="sync"), VALUES.sum(0), atol=1e-5)
    assert pickle.loads(pickle.dumps(run))["flat"][3].tolist() == EXPECTED["flat"][3].tolist()


@pytest.mark.filterwarnings("ignore")  # distributed's own
def test_the_distributed_scheduler_computes_it_in_other_processes(run):
    distributed = pytest.importorskip("distributed")
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}),
        distributed.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster,
        distributed.Client(cluster),
    ):
        lazy = run["a"].dask()
        assert np.array_equal((lazy * 2)[5:].compute(), VALUES[5:] * 2)


def test_two_views_of_one_tap_are_the_same_to_dask(run, path):
    assert run["a"].dask().name == lt.open(path)["a"].dask().name != run["flat"].dask().name


def test_a_data_array_has_axes_and_columns_by_name(run):
    array = run["a"].xarray()
    assert array.dims == ("row", "channel", "y", "x")
    assert array.name == "a"
    assert array.attrs == {"layer": "a", "type": "array"}
    assert array.chunks is not None
    assert set(array.coords) == {"row", "id", "label", "flat"}
    assert np.array_equal(array.sel(row=17).isel(channel=4).values, VALUES[17, 4])
    label = LABELS[0]
    assert np.array_equal(array[array.label == label].values, VALUES[label == LABELS])
    means = array.groupby("label").mean("row").compute()
    assert np.allclose(means.sel(label=label), VALUES[label == LABELS].mean(0), atol=1e-6)
    assert array.id.values.tolist() == TEXTS


def test_a_dataset_has_all_taps_and_columns_whatever_their_axes(run):
    made = run.xarray()
    assert set(made.data_vars) == {*EXPECTED, "spot"}
    assert set(made.coords) == {"row", "id", "label", "rows.flat"}
    for name, values in EXPECTED.items():
        assert np.array_equal(made[name].values, values), name
    assert made["a"].dims == ("row", "a_channel", "y", "a_x"), "12 and 3 channels; x is a tap"
    assert made["half"].dims == ("row", "half_channel", "y", "half_x")
    assert made["flat"].dims == ("row", "flat_feature")
    assert made["x"].dims == ("row", "x_feature")
    assert made["scalar"].dims == ("row",)
    assert made["spot"].dims == ("row", "spot_1")
    assert made["rows.flat"].values.tolist() == (LABELS + 1).tolist()
    assert made.sel(row=slice(3, 5)).sizes["row"] == 3


def test_rows_that_are_not_captured_are_an_error_when_they_are_computed(path, tmp_path):
    import shutil

    shutil.copytree(path, tmp_path / "s")
    (tmp_path / "s" / commit_path(1)).unlink()
    run = lt.open(tmp_path / "s")
    size = run.manifest.layout.block_rows
    for lazy in (run["a"].dask(), run["a"].xarray(), run.xarray()["a"]):
        assert np.array_equal(np.asarray(lazy[:size]), VALUES[:size])
        assert np.array_equal(np.asarray(lazy[2 * size :]), VALUES[2 * size :])
        with pytest.raises(lt.StoreError, match=f"rows {size} to {2 * size - 1} .*not captured yet"):
            np.asarray(lazy[: size + 1])


@pytest.mark.parametrize(
    ("package", "view"),
    [
        ("dask.array", lambda run: run["a"].dask()),
        ("dask.array", lambda run: run["a"].xarray()),
        ("xarray", lambda run: run["a"].xarray()),
        ("xarray", lambda run: run.xarray()),
    ],
)
def test_without_the_package_the_line_that_installs_it_is_named(run, monkeypatch, package, view):
    monkeypatch.setitem(sys.modules, package, None)
    name = package.split(".")[0]
    with pytest.raises(lt.MissingPackageError, match=rf"needs {name}; .*pip install 'layertap\[{name}\]'"):
        view(run)
