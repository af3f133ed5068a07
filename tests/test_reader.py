"""The reading side: indexing as numpy does, damage that is found, stores that are none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import layertap as lt
import ml_dtypes
import numpy as np
import pytest
import zarr
from layertap.capture import local, reader
from layertap.capture.codecs import CODECS
from layertap.capture.errors import ChecksumError, FormatError, SelectionError, StoreError, StoreNotFoundError
from layertap.capture.store import FORMAT_VERSION, commit_path, manifest_crc

N_ROWS = 43
RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal((N_ROWS, 12, 5, 7)).astype(np.float32)
LABELS = RNG.integers(0, 10, N_ROWS)
TEXTS = [f"folder é/{'x' * (row % 5)}{row}" for row in range(N_ROWS)]


class Texts(lt.ArraySource):
    """Rows with an id."""

    def batch(self, rows: range) -> lt.Batch:
        batch = super().batch(rows)
        batch.columns["id"] = TEXTS[rows.start : rows.stop]
        return batch

    def text_bytes(self) -> dict[str, int]:
        return {"id": 40}


def model(batch: np.ndarray) -> dict[str, Any]:
    return {
        "a": batch,
        "flat": batch[:, :, 0, 0],
        "scalar": batch[:, 0, 0, 0],
        "half": batch[:, :3].astype(ml_dtypes.bfloat16),
    }


EXPECTED = {
    "a": VALUES,
    "flat": VALUES[:, :, 0, 0],
    "scalar": VALUES[:, 0, 0, 0],
    "half": VALUES[:, :3].astype(ml_dtypes.bfloat16),
}


def capture(path: Path, codec: str = "none", n_rows: int = N_ROWS) -> lt.Run:
    # A step of 5 rows takes 16 KiB + 4 pages in taps and 3 pages in columns: some steps a block.
    return lt.record_dataset(
        model,
        Texts(VALUES[:n_rows], LABELS[:n_rows]),
        path,
        ["a", "flat", "scalar", "half"],
        batch_size=5,
        memory="800KiB" if codec == "none" else "1916KiB",
        codec=codec,
        writers=1,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for each codec, made once; tests do not write to them."""
    made = tmp_path_factory.mktemp("reader")
    for codec in CODECS:
        run = capture(made / codec, codec)
        assert run.manifest.n_blocks > 2
        assert N_ROWS % run.manifest.layout.block_rows
    return made


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Path:
    """A store of one's own, to damage."""
    return Path(shutil.copytree(folder / "none", tmp_path / "run.zarr"))


def as_numpy(values: np.ndarray, key: Any) -> Any:
    """Index axis by axis, which is what a selection of each axis by itself means."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if not any(k is Ellipsis for k in keys):
        keys.append(Ellipsis)
    at = next(i for i, k in enumerate(keys) if k is Ellipsis)
    keys[at : at + 1] = [slice(None)] * (values.ndim - len(keys) + 1)
    axis = 0
    for k in keys:
        k = np.array(k, np.intp) if isinstance(k, list) and not k else k
        values = values[(slice(None),) * axis + (np.array(k) if isinstance(k, list) else k,)]
        axis += not isinstance(k, int | np.integer)
    return values


MASK = np.arange(N_ROWS) % 3 == 1
KEYS: dict[str, Any] = {
    "all": ...,
    "one row": 17,
    "first row": 0,
    "last row": -1,
    "numpy int": np.int64(3),
    "unsigned": np.uint8(40),
    "rows": slice(3, 30),
    "every other": slice(None, None, 2),
    "backwards": slice(None, None, -1),
    "backwards in threes": slice(40, 2, -3),
    "beyond the end": slice(40, 1000),
    "negative slice": slice(-7, -2),
    "no rows": slice(5, 5),
    "list": [3, 5, 4],
    "repeated and backwards": [42, 0, 42, -43, 17, 17],
    "array": np.array([1, 20, 2]),
    "empty list": [],
    "empty array": np.array([], np.int64),
    "mask": MASK,
    "mask as list": MASK.tolist(),
    "empty mask": np.zeros(N_ROWS, bool),
    "one value": (17, 3, 2, 1),
    "one value from behind": (-1, -1, -1, -1),
    "channels of a row": (17, slice(0, 9)),
    "one channel of all": (slice(None), 4),
    "last channel of all": (slice(None), -1),
    "two channels of all": (slice(None), [2, 3]),
    "two channels far apart": (slice(None), [11, 0]),
    "channels backwards": (slice(None), slice(3, 0, -1)),
    "channels in a window backwards": ([40, 3], slice(2, 0, -1), slice(None, None, -2)),
    "a channel twice": (7, [5, 5]),
    "no channels": (slice(None), slice(0, 0)),
    "no channels of a row": (3, []),
    "rows and channels": ([3, 40, 5], [0, 2]),
    "all axes by lists": ([3, 40, 5], [0, 2], [4, 1], [6, 6, 0]),
    "masks": (MASK, np.arange(12) < 2, np.arange(5) > 2),
    "int between lists": ([1, 2], 3, [0, 1]),
    "last axis": (..., 0),
    "last axes": (..., 1, slice(2, 4)),
    "row and last axis": (9, ..., -1),
    "ellipsis that stands for nothing": (1, 2, ..., 3, 4),
    "a window in a window": (slice(1, 40, 4), slice(1, 2), 2, slice(None, None, 3)),
}


@pytest.mark.parametrize("check", [False, True], ids=["", "checked"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_indexing_gives_what_numpy_gives(folder: Path, codec: str, check: bool, key: Any) -> None:
    run = lt.open(folder / codec, check=check)
    n_axes = len([k for k in key if k is not Ellipsis]) if isinstance(key, tuple) else 1
    for name, values in EXPECTED.items():
        if n_axes > values.ndim or (name == "half" and n_axes > 1):
            continue
        try:
            expected = as_numpy(values, key)
        except IndexError:  # a mask or an index for another number of channels
            continue
        got = run[name][key]
        assert np.shape(got) == np.shape(expected)
        assert got.dtype == expected.dtype
        assert np.array_equal(got, expected)


def test_lists_select_as_ix_does(folder: Path) -> None:
    tap = lt.open(folder / "none")["a"]
    rows, channels, ys, xs = [3, 40, 5], [0, 2], [4, 1], [6, 6, 0]
    assert np.array_equal(tap[rows, channels, ys, xs], VALUES[np.ix_(rows, channels, ys, xs)])


def test_random_selections_give_what_numpy_gives(folder: Path) -> None:
    rng = np.random.default_rng(1)
    runs = [lt.open(folder / codec) for codec in CODECS]

    def random_key(size: int) -> Any:
        start, stop = rng.integers(-size - 2, size + 3, 2).tolist()
        step = int(rng.choice([-3, -2, -1, 1, 2, 5]))
        return [
            slice(start, stop, step),
            slice(None),
            int(rng.integers(-size, size)),
            rng.integers(-size, size, rng.integers(0, 6)).tolist(),
            rng.random(size) < 0.3,
        ][rng.integers(5)]

    for i in range(300):
        key = tuple(random_key(size) for size in VALUES.shape[: rng.integers(1, 5)])
        expected = as_numpy(VALUES, key)
        got = runs[i % len(runs)]["a"][key]
        assert np.shape(got) == np.shape(expected), key
        assert np.array_equal(got, expected), key


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ((0, 0, 0, 0, 0), "a has 4 axes; 5 were indexed"),
        (43, "43 entries on axis 0; 43 is outside"),
        (-44, "-44 is outside"),
        ([0, 43], "outside"),
        ((0, 12), "12 entries on axis 1"),
        (np.uint64(2**64 - 1), "outside"),
        (1.0, "axis 0 got 1.0"),
        ([0.5], "ints, slices, lists of ints and masks"),
        ((slice(None), "x"), "axis 1 got 'x'"),
        (None, "got None"),
        (True, "got True"),
        ([[0, 1]], "lists of ints"),
        ([[0], [1, 2]], "cannot be indexed"),
        (np.ones(42, bool), "axis 0"),
        (np.ones((43, 12), bool), "axis 0"),
        ((..., 0, ...), r"one `\.\.\.` at most; 2 were given"),
        ((..., ...), "one `"),
        (slice(0, 10, 0), "step cannot be zero"),
        (slice(0.5, 3), "cannot be indexed by slice"),
        ({"row": 1}, "axis 0"),
    ],
    ids=str,
)
def test_a_selection_that_makes_no_sense_is_a_selection_error(folder: Path, key: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        lt.open(folder / "none")["a"][key]


def test_reading_changes_nothing_that_was_read_before(folder: Path) -> None:
    tap = lt.open(folder / "none")["a"]
    first = tap[3]
    first[...] = 0
    assert np.array_equal(tap[3], VALUES[3])


# Arrays


def test_an_array_knows_its_shape(folder: Path) -> None:
    run = lt.open(folder / "none")
    tap = run["a"]
    assert (tap.name, tap.shape, tap.ndim, len(tap), tap.dtype) == ("a", VALUES.shape, 4, N_ROWS, np.float32)
    assert tap.dims == ("row", "channel", "y", "x")
    assert (tap.layer, tap.type, tap.source_dtype) == ("a", "array", "float32")
    assert repr(tap) == "<Tap a: float32 (row=43, channel=12, y=5, x=7)>"
    assert repr(run.rows["label"]) == "<Array label: int64 (row=43)>"
    assert run["half"].dtype == ml_dtypes.bfloat16
    assert run["scalar"].dims == ("row",)


def test_an_array_can_be_made_a_numpy_array(folder: Path) -> None:
    run = lt.open(folder / "none")
    assert np.array_equal(np.asarray(run["a"]), VALUES)
    assert np.asarray(run["a"], np.float64).dtype == np.float64
    assert np.array_equal(np.array(run["flat"], copy=True), VALUES[:, :, 0, 0])
    assert np.array_equal(np.asarray(run.rows["label"]), LABELS)
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(run["a"], copy=False)


def test_iterating_gives_the_rows(folder: Path) -> None:
    run = lt.open(folder / "none")
    rows = list(run["flat"])
    assert len(rows) == N_ROWS
    assert np.array_equal(np.stack(rows), VALUES[:, :, 0, 0])
    assert list(run.rows["id"]) == TEXTS


@pytest.mark.parametrize("check", [False, True])
def test_text_columns_give_str(folder: Path, check: bool) -> None:
    ids = lt.open(folder / "none", check=check).rows["id"]
    assert type(ids[7]) is str
    assert ids[7] == TEXTS[7]
    assert ids[-1] == TEXTS[-1]
    assert ids[...].tolist() == TEXTS
    assert ids[[5, 3]].tolist() == [TEXTS[5], TEXTS[3]]
    assert ids[MASK].tolist() == [text for text, yes in zip(TEXTS, MASK, strict=True) if yes]
    assert ids[::-1].tolist() == TEXTS[::-1]
    assert ids[[]].shape == (0,)
    assert (ids.shape, ids.dims, ids.dtype) == ((N_ROWS,), ("row",), np.dtype(str))
    assert repr(ids) == "<Array id: <U0 (row=43)>"
    with pytest.raises(SelectionError, match="1 axes; 2 were indexed"):
        ids[0, 0]


# Runs


def test_a_run_is_a_mapping_of_its_taps(folder: Path) -> None:
    run = lt.open(folder / "none")
    assert list(run) == ["a", "flat", "scalar", "half"]
    assert len(run) == 4
    assert "a" in run
    assert "b" not in run
    assert set(run.rows) == {"label", "id"}
    assert repr(run) == f"<Run {folder / 'none'}: 4 taps x 43 rows>"
    with pytest.raises(SelectionError, match=r"holds no tap 'flatt'\. The closest are: flat"):
        run["flatt"]


def test_a_finished_run_is_complete(folder: Path) -> None:
    run = lt.open(folder / "zstd")
    assert run.complete
    assert run.committed().tolist() == [True] * N_ROWS
    assert run.n_rows == N_ROWS
    on_disk = sum(
        file.stat().st_size
        for part in ("taps", "rows")
        for file in (run.path / part).rglob("c.*")
        if file.is_file()
    )
    assert run.n_bytes == on_disk


def test_a_path_may_be_text(folder: Path) -> None:
    assert np.array_equal(lt.open(str(folder / "none"))["flat"][3], VALUES[3, :, 0, 0])


def uncommit(path: Path, block: int) -> bytes:
    record = path / commit_path(block)
    data = record.read_bytes()
    record.unlink()
    return data


def test_rows_that_are_not_committed_are_named_and_the_others_are_read(store: Path) -> None:
    block_rows = lt.open(store).manifest.layout.block_rows
    uncommit(store, 1)
    run = lt.open(store)
    assert not run.complete
    missing = range(block_rows, 2 * block_rows)
    assert np.flatnonzero(~run.committed()).tolist() == list(missing)
    assert run.n_rows == N_ROWS
    assert f"{N_ROWS - block_rows} captured" in repr(run)
    assert np.array_equal(run["a"][0], VALUES[0])
    assert np.array_equal(run["a"][run.committed()], VALUES[run.committed()])
    for key in (block_rows, slice(None), (slice(None), 0)):
        with pytest.raises(
            StoreError, match=f"rows {block_rows} to {2 * block_rows - 1} .*not captured"
        ) as caught:
            run["a"][key]
        assert "run the same capture again" in str(caught.value)


def test_the_last_rows_that_are_not_committed_are_named(store: Path) -> None:
    manifest = lt.open(store).manifest
    last = manifest.n_blocks - 1
    uncommit(store, last)
    with pytest.raises(StoreError, match=f"rows {last * manifest.layout.block_rows} to {N_ROWS - 1} "):
        lt.open(store)["a"][-1]


def test_refresh_finds_what_was_committed_since(store: Path) -> None:
    data = uncommit(store, 1)
    run = lt.open(store)
    (store / commit_path(1)).write_bytes(data)
    assert not run.complete
    run.refresh()
    assert run.complete
    assert run.committed().all()
    assert np.array_equal(run["a"][...], VALUES)


def test_stats_count_what_is_not_finite_and_follow_a_refresh(tmp_path: Path) -> None:
    values = np.ones((40, 3000), np.float32)
    values[1, :4] = np.nan
    values[2, :3] = [np.inf, -np.inf, np.nan]
    values[39, 7] = -np.inf
    path = tmp_path / "run.zarr"
    run = lt.record_dataset(
        lambda batch: {"a": batch, "b": batch[:, :2], "c": batch > 0},
        lt.ArraySource(values),
        path,
        ["a", "b", "c"],
        batch_size=4,
        memory="1MiB",
        writers=1,
    )
    assert run.manifest.n_blocks > 2
    whole = {"a": (5, 3), "b": (2, 2), "c": (0, 0)}

    def counted() -> dict[str, tuple[int, int]]:
        return {name: (its.nan, its.inf) for name, its in run.stats.items()}

    assert counted() == whole
    data = uncommit(path, 0)
    run.refresh()
    assert counted() == {"a": (0, 1), "b": (0, 0), "c": (0, 0)}
    (path / commit_path(0)).write_bytes(data)
    run.refresh()
    assert counted() == whole


def test_a_store_that_replaced_another_is_read_and_not_the_other_ones_open_files(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)
    for factor in (1, 2, 3):  # the shards differ in nothing but their values
        lt.record_dataset(
            lambda batch, factor=factor: {"a": factor * batch},
            rows,
            path,
            ["a"],
            batch_size=5,
            overwrite=True,
        )
        assert np.array_equal(lt.open(path)["a"][...], factor * rows)


def test_what_the_store_says_of_its_data_is_at_hand(tmp_path: Path) -> None:
    pictures = RNG.integers(0, 256, (6, 8, 8, 3), np.uint8)
    run = lt.record_dataset(
        lambda batch: {"a": batch},
        lt.ArraySource(pictures, np.arange(6) % 2, classes=["cat", "dog"]),
        tmp_path / "run.zarr",
        ["a"],
        mean=(0.5, 0.25, 0.125),
        std=(1, 2, 3),
    )
    assert run.classes == ("cat", "dog")
    assert run.mean == (0.5, 0.25, 0.125)
    assert run.std == (1, 2, 3)
    assert run.info["format"] == FORMAT_VERSION
    assert np.array_equal(run.rows["picture"][...], pictures)
    bare = lt.record_dataset(lambda batch: {"a": batch}, np.zeros((2, 2)), tmp_path / "bare.zarr", ["a"])
    assert (bare.classes, bare.mean, bare.std) == (None, None, None)


# Damage


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def shard_of(path: Path, name: str, block: int) -> Path:
    tap = lt.open(path)[name]
    return path / "taps" / name / "values" / ".".join(["c", str(block)] + ["0"] * (tap.ndim - 1))


def test_a_damaged_chunk_is_found_where_it_is_read_and_the_others_are_read(store: Path) -> None:
    shard = shard_of(store, "a", 1)
    flip(shard, 100)
    run = lt.open(store)
    block_rows = run.manifest.layout.block_rows
    assert np.array_equal(run["a"][0], VALUES[0])
    with pytest.raises(ChecksumError, match=r"inner chunk 0 of .* is damaged") as caught:
        run["a"][block_rows]
    assert str(shard) in str(caught.value)


def test_a_window_is_checked_where_that_was_asked_for(store: Path) -> None:
    assert lt.open(store).manifest.layout.chunk_rows(lt.open(store).manifest.layout.taps[0]) > 1
    flip(shard_of(store, "a", 0), 4)  # the second value of row 0, channel 0
    key = (0, slice(0, 2))
    assert not np.array_equal(lt.open(store)["a"][key], VALUES[key])
    with pytest.raises(ChecksumError):
        lt.open(store, check=True)["a"][key]


def test_a_damaged_index_a_short_shard_and_a_missing_one_are_found(store: Path) -> None:
    flip(shard_of(store, "a", 0), -6)
    with pytest.raises(ChecksumError, match="index"):
        lt.open(store)["a"][0, 0]
    os.truncate(shard_of(store, "flat", 0), 10)
    with pytest.raises(ChecksumError, match="10 bytes"):
        lt.open(store)["flat"][0]
    shard_of(store, "scalar", 0).unlink()
    with pytest.raises(StoreError, match="was committed and cannot be opened: No such file"):
        lt.open(store)["scalar"][0]


def test_a_damaged_commit_record_is_found(store: Path) -> None:
    flip(store / commit_path(0), 9)
    run = lt.open(store)
    with pytest.raises(ChecksumError, match="commit record"):
        run["a"][0]
    with pytest.raises(ChecksumError, match="commit record"):
        _ = run.stats["a"]


def test_a_whole_shard_of_another_length_in_the_place_of_one_is_found(store: Path) -> None:
    shutil.copy(shard_of(store, "flat", 0), shard_of(store, "a", 0))
    with pytest.raises(ChecksumError, match="were committed"):
        lt.open(store)["a"][0]


# What is read


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every pread."""
    reader._open_shard.cache_clear()
    sizes: list[int] = []
    real = os.pread

    def pread(fd: int, n: int, offset: int) -> bytes:
        data = real(fd, n, offset)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", pread)
    return sizes


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> lt.Run:
    """One block of several chunks of several rows of 48 KiB."""
    values = RNG.standard_normal((64, 48, 16, 16)).astype(np.float32)
    path = tmp_path_factory.mktemp("wide") / "run.zarr"
    run = lt.record_dataset(
        lambda batch: {"a": batch}, lt.ArraySource(values), path, ["a"], batch_size=16, memory="64MiB"
    )
    layout = run.manifest.layout
    assert layout.block_rows == 64
    assert 1 < layout.chunk_rows(layout.taps[0]) < 16
    return run


def test_opening_reads_no_shard(wide: lt.Run, read: list[int]) -> None:
    run = lt.open(wide.path)
    assert run["a"].shape == (64, 48, 16, 16)
    assert read == []


def test_one_row_costs_the_index_and_its_chunk_at_most(wide: lt.Run, read: list[int]) -> None:
    layout = wide.manifest.layout
    chunk_rows = layout.chunk_rows(layout.taps[0])
    chunk, index = chunk_rows * 48 * 1024 + 4, 64 // chunk_rows * 16 + 4
    run = lt.open(wide.path)
    run["a"][17]
    assert len(read) == 2
    assert sum(read) <= chunk + index
    read.clear()
    run["a"][18]  # the index was read and checked
    assert len(read) == 1
    assert sum(read) <= chunk


def test_rows_of_one_chunk_read_it_once(wide: lt.Run, read: list[int]) -> None:
    layout = wide.manifest.layout
    chunk_rows = layout.chunk_rows(layout.taps[0])
    wide["a"][[chunk_rows - 1, 0, chunk_rows - 1, 1]]
    assert len(read) == 2


def test_one_channel_of_a_row_costs_the_index_and_that_channel(wide: lt.Run, read: list[int]) -> None:
    wide["a"][17, 5]
    index = read.pop(0)
    assert index <= 1024
    assert read == [1024]
    read.clear()
    wide["a"][:, 5]
    assert read == [1024] * 64


def test_a_checked_window_reads_its_chunk(wide: lt.Run, read: list[int]) -> None:
    layout = wide.manifest.layout
    lt.open(wide.path, check=True)["a"][17, 5]
    assert read[1:] == [layout.chunk_rows(layout.taps[0]) * 48 * 1024 + 4]


def test_an_empty_selection_reads_nothing(wide: lt.Run, read: list[int]) -> None:
    assert wide["a"][[]].shape == (0, 48, 16, 16)
    assert wide["a"][:, []].shape == (64, 0, 16, 16)
    assert read == []


# What is no store


def test_opening_nothing_says_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"there is no store at .*nothing\.zarr"):
        lt.open(tmp_path / "nothing.zarr")
    with pytest.raises(FileNotFoundError):
        lt.open(tmp_path / "nothing.zarr")


def test_a_store_made_between_two_looks_at_its_place_is_opened(tmp_path, monkeypatch):
    lt.record_dataset(model, Texts(VALUES, LABELS), tmp_path / "made", layers=["a"], batch_size=8)
    exists = local.LocalPlace.exists

    def made_meanwhile(self: local.LocalPlace) -> bool:
        if (tmp_path / "made").exists():
            os.rename(tmp_path / "made", tmp_path / "s")
        return exists(self)

    monkeypatch.setattr(local.LocalPlace, "exists", made_meanwhile)
    assert lt.open(tmp_path / "s").n_rows == N_ROWS


def test_a_file_and_an_empty_folder_are_no_stores(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FormatError, match="file is not a layertap store"):
        lt.open(tmp_path / "file")
    with pytest.raises(StoreNotFoundError, match=r"there is no store at .*folder"):
        lt.open(tmp_path / "folder")


def test_another_zarr_group_is_no_store(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "group", attributes={"layertap_like": 1})
    zarr.create_array(tmp_path / "array", shape=(3,), dtype="uint8")
    for name in ("group", "array"):
        with pytest.raises(FormatError, match="no attribute 'layertap'"):
            lt.open(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"attributes": null}', '{"attributes": []}', "[" * 100_000, "\udcff"],
    ids=lambda text: ascii(text)[:20],
)
def test_a_broken_root_is_no_store(tmp_path: Path, text: str) -> None:
    (tmp_path / "zarr.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FormatError, match="is not a layertap store"):
        lt.open(tmp_path)


def edit(path: Path, change: Any) -> None:
    """Change a manifest and give it the checksum that belongs to it, as somebody hostile would."""
    root = json.loads((path / "zarr.json").read_bytes())
    manifest = root["attributes"]["layertap"]
    change(manifest)
    manifest["crc32c"] = manifest_crc(manifest)
    (path / "zarr.json").write_text(json.dumps(root))


def test_a_newer_format_says_how_to_upgrade(store: Path) -> None:
    edit(store, lambda manifest: manifest.update(format=FORMAT_VERSION + 1))
    with pytest.raises(FormatError, match=f"format {FORMAT_VERSION + 1}.*pip install --upgrade layertap"):
        lt.open(store)


@pytest.mark.parametrize("path", ["../x", "taps/../../x", "/etc", "", ".", "taps//a", "taps/./a", 7, None])
@pytest.mark.parametrize("group", ["taps", "columns"])
def test_a_manifest_that_points_outside_the_store_is_refused(store: Path, group: str, path: Any) -> None:
    edit(store, lambda manifest: manifest[group][0].update(path=path))
    with pytest.raises(FormatError, match="cannot be read: its attribute"):
        lt.open(store)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("taps"),
        lambda manifest: manifest.pop("rows"),
        lambda manifest: manifest.update(format=None),
        lambda manifest: manifest.update(format=True),
        lambda manifest: manifest.update(block_rows=manifest["step_rows"] + 1),
        lambda manifest: manifest.update(step_rows=0),
        lambda manifest: manifest.update(step_rows="many"),
        lambda manifest: manifest["taps"][0].update(dtype="float8"),
        lambda manifest: manifest["taps"][0].update(shape=3),
        lambda manifest: manifest["taps"][0].pop("name"),
        lambda manifest: manifest.update(taps={"a": 1}),
    ],
)
def test_a_manifest_of_another_form_is_refused(store: Path, change: Any) -> None:
    edit(store, change)
    with pytest.raises(FormatError, match="cannot be read"):
        lt.open(store)


def test_a_manifest_that_is_not_what_was_written_is_refused(store: Path) -> None:
    root = (store / "zarr.json").read_text()
    assert root.count('"step_rows": 5') == 1
    (store / "zarr.json").write_text(root.replace('"step_rows": 5', '"step_rows": 1'))
    with pytest.raises(ChecksumError, match="'layertap' is damaged"):
        lt.open(store)


def test_a_store_without_its_commit_records_is_refused(store: Path) -> None:
    shutil.rmtree(store / "commits")
    with pytest.raises(FormatError, match="has no commit records"):
        lt.open(store)


def test_a_column_that_is_not_there_is_named_with_the_closest(tmp_path):
    run = lt.record_dataset(lambda b: {"a": b}, (np.ones((4, 2)), np.arange(4)), tmp_path / "s", "a")
    with pytest.raises(lt.SelectionError, match=r"no column 'labels'\. The closest are: label"):
        run.rows["labels"]
    assert run.rows.get("labels") is None


@pytest.mark.parametrize("codec", CODECS)
def test_processors_decode_side_by_side_what_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    values = np.maximum(np.random.default_rng(0).standard_normal((200, 64, 16, 16), np.float32), 0)
    data = {"a": values}
    run = lt.record_dataset(
        lambda rows: {k: v[np.asarray(rows)[:, 0]] for k, v in data.items()},
        np.arange(200)[:, None],
        tmp_path / "s",
        "a",
        batch_size=40,
        codec=codec,
        backend="arrays",
    )
    pools: list[int] = []

    class Pool(reader.ThreadPoolExecutor):
        def __init__(self, n: int) -> None:
            pools.append(n)
            super().__init__(n)

    monkeypatch.setattr(reader, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(reader, "n_cores", lambda: 3)
    assert np.array_equal(run["a"][:], values)
    assert np.array_equal(run["a"][::-1, 5], values[::-1, 5])
    assert np.array_equal(run["a"][[7, 7, 150]], values[[7, 7, 150]])
    assert np.array_equal(run["a"][17], values[17])
    assert pools == ([] if codec == "none" else [3, 3])  # few chunks are not worth it
