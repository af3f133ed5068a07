"""FORMAT.md and the code say the same, and other readers read the same values."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture import store
from layertap.capture.axes import dims_of
from layertap.capture.codecs import CODECS
from layertap.capture.dtypes import DTYPES
from layertap.capture.layout import CHUNK_BYTES
from layertap.capture.statistics import BINS, LONGEST_MAP, MOST_GRAM_CHANNELS, NAMES
from layertap.capture.taps import KINDS, TapName

PAGE = (Path(__file__).parents[1] / "FORMAT.md").read_text()


def capture(path: Path, **options: Any) -> lt.Run:
    """A store with all that the format has: nested and odd names, text, pictures, several blocks."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (22, 16, 16, 3), np.uint8)

    def model(batch: Any) -> dict[str, Any]:
        batch = np.tile(batch, (1, 6, 1, 1))
        return {
            "maps": batch,
            "re/lu#": {"x": batch.mean((2, 3)), "on": batch > 0},
            "logits": batch[:, :3, 0, 0],
        }

    class Pictures(lt.ArraySource):
        def batch(self, rows: range) -> lt.Batch:
            batch = super().batch(rows)
            batch.columns["id"] = [f"猫/{row}" for row in rows]
            return batch

    source = Pictures(
        pictures, np.arange(22) % 3, classes=["a", "b", "猫"], preprocess=lt.Preprocess((0.5,), (0.25,))
    )
    return lt.record_dataset(
        model, source, path, ["**"], batch_size=4, writers=1, **{"memory": "850KiB", **options}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> lt.Run:
    return capture(tmp_path_factory.mktemp("format") / "run.zarr")


def table(heading: str, first: str) -> dict[str, str]:
    """Return the table of the section `heading` whose first column is called `first`."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = section.split(f"| {first} |")[1].split("\n\n")[0].splitlines()[2:]
    return {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in lines)}


def names(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_version_is_the_pages(run):
    assert f"# The store, format {store.FORMAT_VERSION}" in PAGE
    assert run.info["format"] == store.FORMAT_VERSION


def test_the_manifest_has_the_keys_that_the_page_lists_and_no_others(run):
    listed = [key for cell in table("The manifest", "key") for key in names(cell)]
    assert sorted(listed) == sorted(run.info)


def test_taps_and_columns_have_the_fields_that_the_page_lists(run):
    rows = table("The manifest", "key")
    told = {"taps": {"source_dims"}, "columns": set()}  # of a framework that names its axes
    for kind, more in told.items():
        assert sorted(names(rows[f"`{kind}`"])) == sorted({*run.info[kind][0], *more})


def test_the_kinds_of_taps_are_the_pages():
    kinds = table("The manifest", "`kind`")
    assert {name.strip("`") for name in kinds} == set(KINDS)
    names_of_taps = re.findall(r"\| `(layer[^`]*)` \|", PAGE)
    assert {TapName.parse(name).kind for name in names_of_taps} == set(KINDS)


def test_the_data_types_and_codecs_are_the_pages():
    cell = table("Arrays of taps and columns", "property")["`data_type`"]
    for name in DTYPES:
        assert name in cell or name in ("int16", "int32", "uint16", "uint32")
    assert sorted(names(" ".join(table("Arrays of taps and columns", "`codec` in the manifest")))) == sorted(
        CODECS
    )
    assert f"near {CHUNK_BYTES // 1024} KiB" in PAGE


def test_the_dimension_names_are_the_pages():
    cell = table("Arrays of taps and columns", "property")["`dimension_names`"]
    groups = [names(part) for part in cell.split("axes:")[1].split(";")]
    assert groups[:4] == [list(dims_of((2,) * n)[1:]) for n in (1, 2, 3, 4)]


def test_the_record_has_the_fields_that_the_page_lists(run):
    fields = json.loads((run.path / "commits" / "zarr.json").read_text())["attributes"]["fields"]
    section = PAGE.split("A record holds")[1].split("A writer writes")[0]
    listed = [name for name in names(section) if name.startswith("<path>/")]
    paths = [array["path"] for array in run.info["taps"] + run.info["columns"]]
    assert fields == ["rows", *(name.replace("<path>", path) for path in paths for name in listed)]


def test_the_folders_are_the_pages(run):
    def known(path: str) -> bool:
        return bool(
            re.fullmatch(
                r"(zarr\.json|taps/zarr\.json|taps/[^/]+/zarr\.json|taps/[^/]+/values/(zarr\.json|c(\.\d+)+)"
                r"|rows/zarr\.json|rows/[^/]+/(zarr\.json|c(\.\d+)+)|commits/(zarr\.json|c\.\d+\.0)|commits/log/.*)",
                path,
            )
        )

    files = [file.relative_to(run.path).as_posix() for file in run.path.rglob("*") if file.is_file()]
    assert [file for file in files if not known(file)] == []
    assert (run.path / "taps" / "re~2flu~23~5bx~5d" / "values").is_dir()


def test_a_reader_written_from_the_page_alone_reads_the_values(run):
    """Python's standard library and numpy, following FORMAT.md for a tap without a codec."""
    manifest = json.loads((run.path / "zarr.json").read_text())["attributes"]["layertap"]
    tap = next(tap for tap in manifest["taps"] if tap["name"] == "maps")
    folder = run.path / tap["path"]
    sharding = json.loads((folder / "zarr.json").read_text())["codecs"][0]["configuration"]
    chunk_rows = sharding["chunk_shape"][0]
    n_chunks = manifest["block_rows"] // chunk_rows
    rows = []
    for block in range(-(-manifest["rows"] // manifest["block_rows"])):
        record = (run.path / "commits" / f"c.{block}.0").read_bytes()
        n_rows = int(np.frombuffer(record[:8], "<u8")[0])
        shard = (folder / f"c.{block}.0.0.0").read_bytes()
        index = np.frombuffer(shard[-4 - 16 * n_chunks : -4], "<u8").reshape(n_chunks, 2)
        found = [
            np.frombuffer(shard[int(at) : int(at + size) - 4], "<f4").reshape(chunk_rows, *tap["shape"])
            for at, size in index
            if at != 2**64 - 1
        ]
        assert all(int(at) % 4096 == 0 for at, _ in index if at != 2**64 - 1)
        rows.append(np.concatenate(found)[:n_rows])
    assert len(rows) > 2
    assert np.array_equal(np.concatenate(rows), run["maps"][...])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_zarr_python_tensorstore_xarray_and_dask_read_equal_values(tmp_path, codec, dtype):
    xarray = pytest.importorskip("xarray")
    tensorstore = pytest.importorskip("tensorstore")
    dask = pytest.importorskip("dask.array")
    memory = "850KiB" if codec == "none" else "1916KiB"  # encoders have buffers of their own
    run = capture(tmp_path / "run.zarr", codec=codec, dtype=dtype, memory=memory)
    assert run.manifest.n_blocks > 1
    group = run.zarr()
    arrays = {array["path"]: run[array["name"]] for array in run.info["taps"]}
    arrays |= {array["path"]: run.rows[array["name"]] for array in run.info["columns"]}
    for path, array in arrays.items():
        expected = array._read([slice(None)] * len(array._spec.dims))
        assert np.array_equal(group[path][...], expected), path
        assert group[path].metadata.dimension_names == array._spec.dims
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(run.path / path)}}
        assert np.array_equal(tensorstore.open(spec, read=True).result().read().result(), expected), path
        parent, _, name = path.rpartition("/")
        opened = xarray.open_zarr(run.path, group=parent)[name]
        assert opened.dims == array._spec.dims
        assert np.array_equal(opened.values, expected), path
        assert np.array_equal(dask.from_zarr(group[path]).compute(), expected), path
    assert len(arrays) == 8
    assert {name for name, _ in group.members()} == {"taps", "rows", "commits"}
    assert group["commits"].shape == (run.manifest.n_blocks, 1 + 5 * len(arrays))
    assert group["commits"][:, 0].sum() == run.n_rows


def test_rows_that_are_missing_show_as_nan_to_other_readers(tmp_path):
    run = capture(tmp_path / "run.zarr")
    for file in [run.path / "commits" / "c.1.0", *run.path.glob("taps/maps/values/c.1.*")]:
        file.unlink()
    maps = run.zarr()["taps/maps/values"][...]
    size = run.manifest.layout.block_rows
    assert np.isnan(maps[size : 2 * size]).all()
    assert np.isfinite(maps[:size]).all()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> lt.Run:
    path = tmp_path_factory.mktemp("measured") / "run.zarr"
    return capture(path, stats="all", memory="6500KiB")


def test_the_statistics_have_the_names_and_fields_that_the_page_lists(measured):
    assert names(table("The manifest", "key")["`statistics`"].split("`top_rows`")[0])[1:] == list(NAMES)
    listed = [name for cell in table("Statistics", "field") for name in names(cell)]
    kept = measured.info["statistics"]
    assert sorted(listed) == sorted(kept["taps"]["maps"]["fields"])
    assert f"c, {BINS} |" in PAGE
    assert f"at most {LONGEST_MAP}, less" in PAGE
    assert f"more than {MOST_GRAM_CHANNELS} channels" in PAGE
    row = table("The manifest", "key")["`statistics`"]
    for said in (kept, kept["blocks"], kept["rows"], kept["taps"]["maps"]):
        assert set(said) <= set(names(row))
    files = {file.relative_to(measured.path).as_posix() for file in measured.path.glob("statistics/**/*")}
    assert {file for file in files if file.endswith(".0")} == {
        f"statistics/{name}/c.{block}.0" for name in ("rows", "blocks") for block in measured.blocks
    }


def test_a_reader_written_from_the_page_alone_merges_the_statistics(measured):
    """zarr-python and numpy, following FORMAT.md."""
    group = measured.zarr()
    manifest = group.attrs["layertap"]
    rows, blocks = group["statistics/rows"][...], group["statistics/blocks"][...]
    assert len(blocks) == measured.manifest.n_blocks > 2
    assert group["statistics/blocks"].metadata.dimension_names == ("block", "entry")
    for name, about in manifest["statistics"]["taps"].items():
        n = about["channels"]
        means = rows[:, about["pooled"] : about["pooled"] + n]
        assert np.array_equal(means, measured.stats.pooled(name)), name
        fields = {
            field: blocks[:, start : start + math.prod(shape)].reshape(-1, *shape)
            for field, (start, *shape) in about["fields"].items()
        }
        its = measured.stats[name]
        assert np.array_equal(fields["count"].sum(0), its.count)
        assert np.array_equal(fields["histogram"].sum(0), its.histogram)
        assert np.array_equal(np.nanmax(fields["maximum"], 0), its.maximum)
        count, mean, squares = (fields[field][0] for field in ("count", "mean", "squares"))
        for m, b, more in zip(*(fields[field][1:] for field in ("count", "mean", "squares")), strict=True):
            squares = squares + more + (b - mean) ** 2 * count * m / (count + m)
            mean, count = mean + (b - mean) * m / (count + m), count + m
        np.testing.assert_allclose(its.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(its.variance, squares / count, rtol=1e-12, atol=1e-30)


def test_other_readers_read_the_statistics(measured):
    xarray = pytest.importorskip("xarray")
    tensorstore = pytest.importorskip("tensorstore")
    for name in ("rows", "blocks"):
        expected = measured.zarr()[f"statistics/{name}"][...]
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(measured.path / "statistics" / name)},
        }
        read = tensorstore.open(spec, read=True).result().read().result()
        assert np.array_equal(read, expected, equal_nan=True), name
    opened = xarray.open_zarr(measured.path, group="statistics")
    assert opened["rows"].dims == ("row", "pooled")
    assert opened["blocks"].dims == ("block", "entry")
    assert opened.sizes["row"] == measured.n_rows
