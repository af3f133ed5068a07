"""Rows that differ in shape: what is asked for, memory, files, and reading back, without a framework."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.checksum import sealed
from layertap.capture.layout import ArraySpec, Layout, array_view
from layertap.capture.pipeline import Pipeline
from layertap.capture.place import place_of
from layertap.capture.ragged import (
    Rule,
    as_written,
    extents_spec,
    flat,
    runs,
    table_of,
    varying,
    writer_bytes,
)
from layertap.capture.shard import Shard, ShardRecord, write_shard
from layertap.capture.store import commit_path, manifest_crc, record_bytes, shard_path
from layertap.capture.taps import TapName
from layertap.capture.testing import contents
from layertap.capture.verify import repair, verify

N_ROWS = 61


class Sequences(lt.Source):
    """Batches of sequences that are padded to the longest of each, with a mask, at the right or the left."""

    name = "sequences"

    def __init__(self, n_rows: int = N_ROWS, longest: int = 9, left: bool = False, pool: int = 3) -> None:
        rng = np.random.default_rng(7)
        self.n_rows, self.left = n_rows, left
        lengths = rng.integers(0, longest + 1, n_rows).tolist()
        lengths[:6] = [longest - 1, 2, 0, 1, 3, longest]
        self.rows = [rng.standard_normal((n, pool), np.float32) for n in lengths]

    def batch(self, rows: range) -> lt.Batch:
        some = [self.rows[row] for row in rows]
        longest = max(1, max(map(len, some)))
        padded = np.full((len(some), longest, some[0].shape[1]), 99, np.float32)
        mask = np.zeros((len(some), longest), np.int64)
        for i, row in enumerate(some):
            where = slice(longest - len(row), None) if self.left else slice(0, len(row))
            padded[i, where], mask[i, where] = row, 1
        return lt.Batch(rows, (padded,), {"attention_mask": mask}, {"n": mask.sum(1)})


class Pictures(lt.Source):
    """Batches of pictures, each batch of another size."""

    name = "pictures"
    n_rows = 17

    def batch(self, rows: range) -> lt.Batch:
        height, width = 4 + rows.start % 5, 9 - rows.start % 3
        values = np.arange(len(rows) * 2 * height * width, dtype=np.float32) + rows.start
        return lt.Batch(rows, (values.reshape(len(rows), 2, height, width),))


def double(batch: Any, attention_mask: Any = None) -> dict[str, Any]:
    return {"twice": batch * 2, "sum": batch.sum((1, 2))}


def capture(path: Path, source: lt.Source | None = None, **options: Any) -> lt.Run:
    source = source or Sequences()
    chosen = {"ragged": "twice:9", "batch_size": 4} | options
    return lt.record_dataset(double, source, path, ["twice"], **chosen)


def small(path: Path, source: lt.Source | None = None, **options: Any) -> lt.Run:
    """Capture with blocks as short as memory can make them."""
    for n_kib in range(512, 16_384, 32):
        try:
            return capture(path, source, memory=f"{n_kib}KiB", writers=1, **options)
        except lt.PlanError:
            continue
    raise AssertionError("no memory is enough")


# What is asked for


def test_a_rule_is_read_from_text_and_from_a_dict():
    assert varying("encoder.*:512").rules == (Rule("encoder.*", (512,)),)
    assert varying({"conv": (20, 30)}, "type:Linear:input:7,-1").rules == (
        Rule("conv", (20, 30)),
        Rule("type:Linear:input", (7,), -1.0),
    )
    assert varying(["a:3", "b:12x8x8"], {"c": 5, "d": ((4, 5), float("nan"))}).rules[1].sizes == (12, 8, 8)
    assert str(Rule("a", (3, 4), 0.5)) == "pad a:3x4,0.5"
    for wrong in ("encoder", "encoder:", "encoder:x", ":5", "a:0"):
        with pytest.raises(lt.PlanError, match=r"SIZE|above 0"):
            varying(wrong)
    with pytest.raises(lt.PlanError, match="no number"):
        varying(None, "a:5,black")


@pytest.mark.parametrize(
    ("sizes", "shape", "bound"),
    [
        ((9,), (5, 3), (9, 3)),
        ((9,), (5,), (9,)),
        ((9,), (2, 5, 5), (2, 9, 9)),
        ((9, 8), (2, 5, 5), (2, 9, 8)),
        ((4, 9, 8), (2, 5, 5), (4, 9, 8)),
        ((6,), (2, 3, 5, 5), (2, 6, 6, 6)),
    ],
)
def test_the_sizes_are_those_of_the_axes_that_vary(sizes, shape, bound):
    assert Rule("x", sizes).bound("x", shape) == bound


def test_sizes_that_fit_no_axes_are_refused():
    with pytest.raises(lt.PlanError, match=r"gives 2 sizes, and x has rows of shape \(5, 3, 4, 2\)"):
        Rule("x", (1, 2)).bound("x", (5, 3, 4, 2))


def test_the_last_rule_that_matches_a_tap_counts_and_one_that_matches_none_is_refused(tmp_path):
    how = varying("**:8", "twice:9")
    rule = how.rule(TapName("twice"), "array")
    assert rule is not None
    assert rule.pad == 0
    assert how.rule(TapName("other"), "array") == Rule("**", (8,))
    with pytest.raises(lt.PlanError, match=r"no tap follows ragged trice:9.*twice"):
        capture(tmp_path / "run", ragged="trice:9")


def test_without_a_choice_the_error_names_tap_shapes_and_ways(tmp_path):
    with pytest.raises(lt.CaptureError) as caught:
        capture(tmp_path / "run", ragged=None)
    text = str(caught.value)
    for words in (
        "twice has shape (4, 9, 3)",
        "(4, 8, 3) follows",
        "--ragged 'twice:9x3'",
        "--pad",
        "tokens:mean",
    ):
        assert words in text, text
    assert not (tmp_path / "run").exists()


def test_a_row_that_is_larger_than_its_room_is_an_error_that_names_row_size_and_bound(tmp_path):
    with pytest.raises(
        lt.CaptureError, match=r"twice has shape \(9, 3\) for row 4; there is room for \(8, 3\)"
    ):
        capture(tmp_path / "run", ragged="twice:8")
    assert not (tmp_path / "run").exists()
    with pytest.raises(lt.PlanError, match=r"\(8, 3\) for row 0; there is room for \(7, 3\)"):
        capture(tmp_path / "run", ragged="twice:7")


def test_an_axis_that_was_not_said_to_vary_must_not(tmp_path):
    def model(batch: Any, attention_mask: Any) -> dict[str, Any]:
        return {"twice": np.zeros((len(batch), 3, 5 if batch[0, 0, 0] != 99 else 6), np.float32)}

    with pytest.raises(lt.CaptureError, match=r"axis 1 had 5 entries in the first batch.*3x5"):
        lt.record_dataset(model, Sequences(left=True), tmp_path / "run", ["**"], batch_size=1, ragged="**:9")


def test_what_needs_rows_of_one_shape_is_refused_with_the_way_out(tmp_path):
    for reduce in ("pool:2", "crop:2", "int8", "topk:2", lambda batch: batch):
        with pytest.raises(lt.PlanError, match=r"(?i)ragged twice:9.*leave out one of the two"):
            capture(tmp_path / "run", reduce=reduce)
    with pytest.raises(lt.PlanError, match=r"lets its channels \(the axis feature\) vary too"):
        capture(tmp_path / "run", ragged="twice:9x3", reduce="channels:0")
    with pytest.raises(lt.PlanError, match=r"would be fitted to what pads its rows too.*fit_pca"):
        capture(tmp_path / "run", reduce="pca:2")
    assert not (tmp_path / "run").exists()
    with pytest.raises(lt.PlanError, match=r"cannot be padded with 0\.5"):
        lt.record_dataset(
            lambda batch, attention_mask: {"twice": batch.astype(np.int16)},
            Sequences(),
            tmp_path / "run",
            ["**"],
            batch_size=4,
            pad="twice:9,0.5",
        )


# In memory and on disk


def test_a_table_points_at_what_a_mask_leaves():
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
    skipped, kept = runs(mask)
    assert skipped.tolist() == [0, 3, 0, -1, 0]
    assert kept.tolist() == [2, 1, 0, 2, 4]
    table = table_of((4, 5), 100, 5, skipped, kept)
    assert table.tolist() == [[100, 2, 5], [135, 1, 5], [140, 0, 5], [-1, 2, 5], [180, 4, 5]]


def block_of(rows: list[np.ndarray], bound: int, step_rows: int, codec: str = "none") -> tuple[Any, ...]:
    """Return the layout and slabs of one block of vectors that lie anywhere in their room, with gaps."""
    values = ArraySpec(
        "v", "taps/v/values", ("row", "feature"), (bound,), rows[0].dtype, codec, role="ragged"
    )
    n_steps = -(-len(rows) // step_rows)
    layout = Layout((values,), (), step_rows, n_steps * step_rows, parts=(extents_spec(values),))
    slabs = [np.frombuffer(mmap.mmap(-1, layout.slab_bytes), np.uint8) for _ in range(n_steps)]
    for i, row in enumerate(rows):
        slab, at = slabs[i // step_rows], i % step_rows
        start = at * bound + (bound - len(row)) // 2
        array_view(layout, 0, slab).reshape(-1)[start : start + len(row)] = row
        array_view(layout, 1, slab)[at] = start, len(row)
    return layout, slabs


def write_rows(
    new: Any, array: ArraySpec, layout: Layout, slabs: Any, n_rows: int, block: int
) -> ShardRecord:
    rows = as_written(array, layout, slabs, n_rows, block)
    return write_shard(new, *rows[:4], None, rows.pieces)


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "complex128"])
def test_a_block_is_its_rows_back_to_back_and_their_extents(tmp_path, codec, dtype):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 100, n).astype(dtype) for n in rng.integers(0, 40_000, 23)]
    layout, slabs = block_of(rows, 40_000, 4, codec)
    place, (values, extents) = place_of(tmp_path), layout.arrays
    room = flat(values, layout)[1].block_rows
    for array in layout.arrays:
        (tmp_path / array.path).mkdir(parents=True)
        new = place.new_file(shard_path(array, 3))
        record = write_rows(new, array, layout, slabs, len(rows), 3)
        new.settle()
        place.publish([shard_path(array, 3)])
        if array is values:
            elements, packed = flat(array, layout)
            with Shard(place, shard_path(array, 3), elements, packed, record) as shard:
                shard.check(shard.n_there)
                stored = np.concatenate(
                    [c.view(dtype) for c in shard.chunks(range(shard.n_there // shard.chunk_rows))]
                )
    whole = np.concatenate(rows)
    assert stored[: len(whole)].tobytes() == whole.tobytes()
    assert not stored[len(whole) :].any()
    assert len(stored) - len(whole) < shard.chunk_rows, "inner chunks that no row needs are not there"
    data = (tmp_path / shard_path(extents, 3)).read_bytes()
    table = np.frombuffer(data[: 16 * len(rows)], "<u8").reshape(-1, 2)
    lengths = np.array(list(map(len, rows)))
    assert table[:, 1].tolist() == lengths.tolist()
    assert table[:, 0].tolist() == (3 * room + np.cumsum(lengths) - lengths).tolist()


def test_a_block_without_any_element_is_an_index_alone(tmp_path):
    layout, slabs = block_of([np.zeros(0, np.float32)] * 5, 10, 4)
    (tmp_path / layout.arrays[0].path).mkdir(parents=True)
    new = place_of(tmp_path).new_file(shard_path(layout.arrays[0], 0))
    record = write_rows(new, layout.arrays[0], layout, slabs, 5, 0)
    assert record.n_bytes == 16 + 4


@pytest.mark.parametrize(("n_rows", "longest"), [(2000, 3000), (60_000, 4)])
def test_a_writer_holds_no_more_than_was_planned_beside_the_slabs(tmp_path, n_rows, longest):
    sizes = np.random.default_rng(0).integers(0, longest, n_rows).tolist()
    rows = [np.full(n, n, np.float32) for n in sizes]
    layout, slabs = block_of(rows, longest, n_rows // 20)
    place = place_of(tmp_path)
    for array in layout.arrays:
        (tmp_path / array.path).mkdir(parents=True)
        tracemalloc.start()
        write_rows(place.new_file(shard_path(array, 0)), array, layout, slabs, len(rows), 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= writer_bytes(array, n_rows // 20, 20, 1 << 20) + 128 * 1024, array.name


def test_the_memory_of_a_ragged_tap_is_that_of_its_bound(tmp_path, monkeypatch):
    held: list[int] = []
    made = Pipeline.__init__

    def noted(self: Pipeline, store: Any, done: Any, **options: Any) -> None:
        made(self, store, done, **options)
        held.append(self.memory.nbytes)
        assert self.layout.taps[0].row_bytes == 64 * 3 * 4

    monkeypatch.setattr(Pipeline, "__init__", noted)
    run = capture(tmp_path / "run", ragged="twice:64", memory="4MiB")
    assert held[0] <= 4 * 2**20
    assert run["twice"].bound == (64, 3)
    with pytest.raises(lt.PlanError, match="does not fit the memory"):
        capture(tmp_path / "other", ragged="twice:100000", memory="4MiB")


# Capture and reading


def test_values_that_are_not_finite_are_counted_and_read(tmp_path):
    class Odd(Sequences):
        def batch(self, rows: range) -> lt.Batch:
            batch = super().batch(rows)
            batch.inputs[0][:] = np.inf if rows.start % 8 else np.nan
            return batch

    run = capture(tmp_path / "run", Odd())
    assert all(not np.isfinite(row).any() for row in run["twice"][:])
    counted = run.stats["twice"]
    assert counted.nan + counted.inf == 3 * sum(map(len, Odd().rows))
    assert not list(verify(tmp_path / "run"))


def test_the_report_counts_what_the_rows_took_and_not_their_room(tmp_path):
    reports: list[Any] = []
    run = capture(tmp_path / "run", ragged="twice:900", on_report=reports.append)
    assert reports[0].stages.raw_bytes <= run.n_bytes


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_each_row_is_read_back_in_its_own_shape(tmp_path, left, codec):
    source = Sequences(left=left)
    run = capture(tmp_path / "run", source, codec=codec)
    tap = run["twice"]
    assert len(tap) == N_ROWS
    for row, true in enumerate(source.rows):
        assert tap[row].shape == true.shape
        assert tap[row].tobytes() == (true * 2).tobytes()
    assert tap.shapes.tolist() == [list(row.shape) for row in source.rows]
    some = tap[[40, 3, 3, -1]]
    assert [one.tolist() for one in some] == [(source.rows[i] * 2).tolist() for i in (40, 3, 3, N_ROWS - 1)]
    assert [one.shape for one in tap[10:20]] == [row.shape for row in source.rows[10:20]]
    assert [one.shape for one in tap[:, :2, 1]] == [row[:2, 1].shape for row in source.rows]
    many = np.zeros(N_ROWS, bool)
    many[[5, 8]] = True
    assert len(tap[many]) == 2
    assert tap[5:5] == []
    start, n = int(tap.offsets[17]), source.rows[17].size
    assert tap.values[start : start + n].tolist() == (source.rows[17] * 2).reshape(-1).tolist()
    assert not list(verify(tmp_path / "run"))


def test_without_a_mask_rows_have_the_shape_of_their_batch(tmp_path):
    source = Sequences()
    tap = capture(tmp_path / "run", source, mask=None)["twice"]
    assert [tap[row].shape for row in range(8)] == [(8, 3)] * 4 + [(9, 3)] * 4
    assert (tap[1][len(source.rows[1]) :] == 198).all()


def test_pictures_of_several_sizes_are_kept_each_in_its_own(tmp_path):
    source = Pictures()
    tap = capture(tmp_path / "run", source, ragged="twice:8x9")["twice"]
    for first in range(0, source.n_rows, 4):
        rows = range(first, min(first + 4, source.n_rows))
        true = source.batch(rows).inputs[0] * 2
        for row in rows:
            assert tap[row].tolist() == true[row - first].tolist()


def test_a_list_with_one_entry_a_row_is_named_by_path_without_the_index(tmp_path):
    rng = np.random.default_rng(0)
    found = [
        {"boxes": rng.standard_normal((n, 4), np.float32), "labels": rng.integers(0, 9, n)}
        for n in (3, 0, 5, 1, 0, 0, 2)
    ]

    class Numbers(lt.Source):
        name, n_rows = "numbers", 7

        def batch(self, rows: range) -> lt.Batch:
            return lt.Batch(rows, (np.array(rows),))

    run = lt.record_dataset(
        lambda batch: {"found": [found[i] for i in batch.tolist()]},
        Numbers(),
        tmp_path / "run",
        ["found"],
        batch_size=3,
        ragged={"found[boxes]": 5},
        pad={"found[labels]": (6, -1.0)},
    )
    assert list(run) == ["found[boxes]", "found[labels]"]
    for i, one in enumerate(found):
        n = len(one["boxes"])
        assert run["found[boxes]"][i].tobytes() == one["boxes"].tobytes()
        assert run["found[boxes]"][i].shape == (n, 4)
        assert run["found[labels]"][i].tolist() == one["labels"].tolist() + [-1] * (6 - n)
        assert run["found[labels]"].mask[i].tolist() == [True] * n + [False] * (6 - n)


@pytest.mark.parametrize("left", [False, True])
def test_a_padded_tap_has_one_shape_and_a_mask(tmp_path, left):
    source = Sequences(left=left)
    tap = capture(tmp_path / "run", source, ragged=None, pad="twice:12,-1")["twice"]
    assert tap.shape == (N_ROWS, 12, 3)
    assert tap.mask.dims == ("row", "token")
    for row, true in enumerate(source.rows):
        assert tap[row][tap.mask[row]].tolist() == (true * 2).tolist()
        assert tap.mask[row].sum() == len(true)
        batch = source.batch(range(row // 4 * 4, min(N_ROWS, row // 4 * 4 + 4))).inputs[0]
        assert (tap[row][batch.shape[1] :] == -1).all()
        assert tap[row][: batch.shape[1]].tolist() == (batch[row % 4] * 2).tolist()


def test_a_mask_with_a_hole_is_refused_by_a_ragged_tap_and_kept_by_a_padded_one(tmp_path):
    class Holes(Sequences):
        def batch(self, rows: range) -> lt.Batch:
            batch = super().batch(rows)
            batch.kwargs["attention_mask"][:] = np.arange(batch.inputs[0].shape[1]) % 2
            del batch.columns["n"]
            return batch

    with pytest.raises(lt.CaptureError, match=r"leaves tokens of twice out between.*pad="):
        capture(tmp_path / "run", Holes())
    tap = capture(tmp_path / "padded", Holes(), ragged=None, pad="twice:9")["twice"]
    assert tap.mask[4].tolist() == [bool(i % 2) for i in range(9)]


def test_a_mask_of_another_form_is_refused(tmp_path):
    class Odd(Sequences):
        def batch(self, rows: range) -> lt.Batch:
            batch = super().batch(rows)
            batch.kwargs["attention_mask"] = batch.kwargs["attention_mask"][:, None]
            return batch

    with pytest.raises(lt.CaptureError, match=r"attention_mask has shape \(4, 1, 8\)"):
        capture(tmp_path / "run", Odd())


@pytest.mark.parametrize("how", [{"ragged": "twice:9"}, {"ragged": None, "pad": "twice:9"}])
def test_a_mask_may_come_beside_the_rows_where_the_model_takes_none(tmp_path, how):
    class Beside(Sequences):
        def batch(self, rows: range) -> lt.Batch:
            batch = super().batch(rows)
            batch.columns["attention_mask"] = batch.kwargs.pop("attention_mask")
            return batch

    capture(tmp_path / "argument", **how)
    run = capture(tmp_path / "beside", Beside(), **how)
    assert _but_model(contents(tmp_path / "beside")) == _but_model(contents(tmp_path / "argument"))
    assert list(run.rows) == ["n"]


def test_a_mask_that_comes_after_tokens_were_chosen_is_refused(tmp_path):
    def model(batch: Any) -> dict[str, Any]:
        return {"twice": batch * 2, "last": batch}

    class Beside(Sequences):
        def batch(self, rows: range) -> lt.Batch:
            batch = super().batch(rows)
            batch.columns["attention_mask"] = batch.kwargs.pop("attention_mask")
            return batch

    options: dict[str, Any] = {"ragged": "twice:9", "reduce": {"last": "tokens:last"}, "batch_size": 4}
    with pytest.raises(lt.CaptureError, match=r"last is reduced by tokens:last while the model runs"):
        lt.record_dataset(model, Beside(), tmp_path / "run", ["**"], **options)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("which", ["first", "last", "mean"])
def test_tokens_are_those_that_the_mask_leaves(tmp_path, which, left):
    source = Sequences(left=left)
    tap = capture(tmp_path / "run", source, ragged=None, reduce=f"tokens:{which}")["twice"]
    assert tap.shape == (N_ROWS, 3)
    of = {"first": lambda x: x[0], "last": lambda x: x[-1], "mean": lambda x: x.astype(np.float64).mean(0)}
    for row, true in enumerate(source.rows):
        expected = of[which](true * 2) if len(true) else np.full(3, np.nan)
        assert np.allclose(tap[row], expected, rtol=1e-6, equal_nan=True), row


def test_what_is_reduced_to_one_shape_may_vary_and_what_is_not_may_not(tmp_path):
    source = Pictures()
    tap = capture(tmp_path / "run", source, ragged=None, reduce="pool:global,max")["twice"]
    for first in range(0, source.n_rows, 4):
        true = source.batch(range(first, min(first + 4, source.n_rows))).inputs[0] * 2
        assert tap[first : first + 4].tolist() == true.max((2, 3)).tolist()
    with pytest.raises(lt.CaptureError, match="follows from the first batch"):
        capture(tmp_path / "other", source, ragged=None, reduce="channels:0")


# Other readers


def test_zarr_tensorstore_and_xarray_open_it(tmp_path):
    source = Sequences()
    run = small(tmp_path / "run", source)
    assert run.manifest.n_blocks > 3
    values, extents = (run.zarr()[f"taps/twice/{name}"] for name in ("values", "extents"))
    assert values.ndim == 1
    assert values.chunks[0] == 4 * 2 * 3 or values.shards is not None
    for row, true in enumerate(source.rows):
        first, *shape = extents[row].tolist()
        assert values[first : first + true.size].reshape(shape).tolist() == (true * 2).tolist()
    ts = pytest.importorskip("tensorstore")
    opened = ts.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "run/taps/twice/values")}}
    ).result()
    first, *shape = extents[37].tolist()
    assert (
        opened[first : first + source.rows[37].size].read().result().reshape(shape).tolist()
        == (source.rows[37] * 2).tolist()
    )
    xarray = pytest.importorskip("xarray")
    group = xarray.open_zarr(tmp_path / "run", group="taps/twice", chunks=None)
    assert group["extents"].dims == ("row", "extent")
    assert group["values"].dims == ("element",)


def test_a_reader_written_from_the_page_alone_reads_the_rows(tmp_path):
    source = Sequences()
    run = small(tmp_path / "run", source)
    manifest = json.loads((tmp_path / "run/zarr.json").read_text())["attributes"]["layertap"]
    tap = manifest["taps"][0]
    assert tap["ragged"] is True
    elements = manifest["block_rows"] * int(np.prod(tap["shape"]))
    chunk = min(512 * 1024 // 4, elements)
    n_chunks = -(-elements // chunk)
    for block in range(run.manifest.n_blocks):
        shard = (tmp_path / "run" / tap["path"] / f"c.{block}").read_bytes()
        index = np.frombuffer(shard[-4 - 16 * n_chunks : -4], "<u8").reshape(n_chunks, 2)
        there = [shard[int(at) : int(at + n) - 4] for at, n in index if at != 2**64 - 1]
        values = np.frombuffer(b"".join(there), "<f4")
        for row in range(block * manifest["block_rows"], min(N_ROWS, (block + 1) * manifest["block_rows"])):
            first, *sizes = run.zarr()[f"{tap['parts'][0]['path']}"][row].tolist()
            first -= block * n_chunks * chunk
            n = int(np.prod(sizes))
            assert values[first : first + n].reshape(sizes).tolist() == (source.rows[row] * 2).tolist()


def test_one_row_reads_its_chunks_and_no_more(tmp_path, monkeypatch):
    source = Sequences(200, 400, pool=128)
    run = capture(tmp_path / "run", source, ragged="twice:400", batch_size=20)
    tap = run["twice"]
    tap[0]
    taken: list[int] = []
    chunks = Shard.chunks

    def counted(self: Shard, numbers: Any) -> Iterator[Any]:
        taken.extend([self.chunk_rows * self._array.row_bytes] * len(numbers))
        return chunks(self, numbers)

    monkeypatch.setattr(Shard, "chunks", counted)
    assert tap[100].tolist() == (source.rows[100] * 2).tolist()
    chunk_bytes = 512 * 1024
    values = [n for n in taken if n == chunk_bytes]
    assert len(values) <= source.rows[100].nbytes // chunk_bytes + 2
    assert sum(taken) - sum(values) <= 8192
    taken.clear()
    found = tap[:]
    assert sum(n == chunk_bytes for n in taken) <= sum(row.nbytes for row in source.rows) // chunk_bytes + (
        run.manifest.n_blocks
    ), "each chunk is read once"
    assert [one.shape for one in found] == [row.shape for row in source.rows]
    assert not list(verify(tmp_path / "run"))


# Going on, parts, damage


def test_parts_and_a_capture_that_goes_on_make_the_same_bytes(tmp_path):
    whole = small(tmp_path / "whole")
    assert whole.manifest.n_blocks > 3
    expected = contents(tmp_path / "whole")
    n_kib = next(n for n in range(512, 16_384, 32) if _fits(tmp_path / f"try{n}", n))
    for part in ("2/3", "3/3", "1/3"):
        capture(tmp_path / "parts", memory=f"{n_kib}KiB", writers=1, part=part)
    assert contents(tmp_path / "parts") == expected

    at_40 = Sequences().batch(range(40, 44)).inputs[0]

    def dies(batch: Any, attention_mask: Any) -> dict[str, Any]:
        if len(batch) == 4 and batch[1].tobytes() == at_40[1].tobytes():
            raise KeyboardInterrupt
        return double(batch)

    options: Any = {"batch_size": 4, "ragged": "twice:9", "memory": f"{n_kib}KiB", "writers": 1}
    with pytest.raises(KeyboardInterrupt):
        lt.record_dataset(dies, Sequences(), tmp_path / "run", ["twice"], **options)
    assert 0 < lt.open(tmp_path / "run").n_committed < N_ROWS
    lt.record_dataset(double, Sequences(), tmp_path / "run", ["twice"], **options)
    assert _but_model(contents(tmp_path / "run")) == _but_model(expected)


def _fits(path: Path, n_kib: int) -> bool:
    try:
        capture(path, memory=f"{n_kib}KiB", writers=1)
    except lt.PlanError:
        return False
    return True


def _but_model(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.endswith("zarr.json")}


KILLED = """
import os, signal, sys
import numpy as np
import layertap as lt
sys.path.insert(0, sys.argv[3])
from test_ragged import Sequences, double

def model(batch, attention_mask):
    model.steps += 1
    if model.steps == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return double(batch)

model.steps = 0
options = dict(batch_size=4, ragged="twice:9", memory=sys.argv[4], writers=1)
lt.record_dataset(model, Sequences(), sys.argv[1], ["twice"], **options)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_capture_goes_on_to_the_same_bytes(tmp_path):
    n_kib = next(n for n in range(512, 16_384, 32) if _fits(tmp_path / f"try{n}", n))

    def run(path: Path, step: int) -> int:
        command = [
            sys.executable,
            "-c",
            KILLED,
            str(path),
            str(step),
            str(Path(__file__).parent),
            f"{n_kib}KiB",
        ]
        return subprocess.run(command, env=os.environ, timeout=120, check=False).returncode

    assert run(tmp_path / "whole", -1) == 0
    for step in (9, 5):
        assert run(tmp_path / "run", step) == -signal.SIGKILL
    assert run(tmp_path / "run", -1) == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize("array", ["values", "extents"])
def test_a_flipped_bit_is_found_and_made_again(tmp_path, array):
    run = small(tmp_path / "run")
    expected = contents(tmp_path / "run")
    shard = tmp_path / f"run/taps/twice/{array}" / ("c.1" if array == "values" else "c.1.0")
    data = bytearray(shard.read_bytes())
    data[3] ^= 4
    shard.write_bytes(data)
    damages = list(verify(tmp_path / "run"))
    assert [damage.block for damage in damages] == [1]
    with pytest.raises(lt.ChecksumError, match="damaged"):
        run["twice"][run.manifest.layout.block_rows]
    assert repair(tmp_path / "run", damages) == [1]
    small(tmp_path / "run")
    assert contents(tmp_path / "run") == expected


def test_it_packs_into_one_file(tmp_path):
    source = Sequences()
    capture(tmp_path / "run", source)
    lt.pack(tmp_path / "run", tmp_path / "run.zip")
    assert lt.open(tmp_path / "run.zip")["twice"][5].tolist() == (source.rows[5] * 2).tolist()


def test_another_bound_or_another_choice_is_another_plan(tmp_path):
    capture(tmp_path / "run")
    for other in ({"ragged": "twice:10"}, {"ragged": None, "pad": "twice:9"}):
        with pytest.raises(lt.StoreExistsError, match="another plan"):
            capture(tmp_path / "run", **other)


def test_padding_with_another_value_is_another_plan(tmp_path):
    capture(tmp_path / "run", ragged=None, pad="twice:9")
    with pytest.raises(lt.StoreExistsError, match="pad 0 there, 1 now"):
        capture(tmp_path / "run", ragged=None, pad="twice:9,1")


# Stores of somebody else


@pytest.mark.parametrize(
    ("row", "said"),
    [(3, [2**63, 1, 3]), (3, [0, 2**62, 2**62]), (3, [0, 10, 3]), (2, [10**9, 1, 3])],
    ids=["start", "overflow", "beyond the bound", "beyond the block"],
)
def test_extents_that_cannot_be_are_refused(tmp_path, row, said):
    import struct

    from layertap.capture.checksum import crc32c

    run = capture(tmp_path / "run", Sequences(8))
    layout = run.manifest.layout
    path = tmp_path / "run/taps/twice/extents/c.0.0"
    data = bytearray(path.read_bytes())
    n = layout.chunk_rows(layout.parts[0]) * 24
    data[row * 24 : row * 24 + 24] = struct.pack("<3Q", *said)
    crc = struct.pack("<I", crc32c(bytes(data[:n])))
    data[n : n + 4] = crc
    path.write_bytes(data)
    record = tmp_path / "run" / commit_path(0)
    values = np.frombuffer(record.read_bytes()[: record_bytes(3) - 4], "<u8").copy()
    values[1 + 5 + 2] = crc32c(crc)
    record.write_bytes(sealed(values.tobytes()))
    with pytest.raises(lt.FormatError, match=f"row {row} of twice lies where no row can"):
        lt.open(tmp_path / "run")["twice"][row]


@pytest.mark.parametrize(
    "change",
    [
        lambda tap: tap.pop("parts"),
        lambda tap: tap["parts"][0].update(shape=[2]),
        lambda tap: tap["parts"][0].update(dtype="int64"),
        lambda tap: tap.update(ragged="yes"),
        lambda tap: tap.update(shape=[], dims=["row"]),
    ],
    ids=["no extents", "other extents", "other type", "no truth", "no axes"],
)
def test_a_manifest_whose_ragged_tap_cannot_be_is_refused(tmp_path, change):
    capture(tmp_path / "run", Sequences(8))
    root = json.loads((tmp_path / "run/zarr.json").read_text())
    manifest = root["attributes"]["layertap"]
    change(manifest["taps"][0])
    manifest["crc32c"] = manifest_crc(manifest)
    (tmp_path / "run/zarr.json").write_text(json.dumps(root))
    with pytest.raises(lt.FormatError, match=r"ragged|say where"):
        lt.open(tmp_path / "run")


# Drawing and the command line


def test_rows_of_one_shape_are_drawn_and_others_refused(tmp_path):
    run = capture(tmp_path / "run", Pictures(), ragged="twice:8x9", batch_size=4)
    lt.draw(run, "grid", rows=[5], layers="twice", picture=False).save(tmp_path / "one.png")
    lt.draw(run, "montage", rows=5, layers="twice").save(tmp_path / "two.png")
    with pytest.raises(lt.SelectionError, match=r"rows 0 and 5 of twice have the shapes \(2, 4, 9\) and"):
        lt.draw(run, "grid", rows=[0, 5], layers="twice")


@pytest.mark.parametrize("view", ["numpy", "dask", "xarray", "dataset"])
def test_views_that_are_one_array_refuse_them_with_the_way_out(tmp_path, view):
    tap = (run := capture(tmp_path / "run"))["twice"]
    views = {
        "numpy": lambda: np.asarray(tap),
        "dask": lambda: tap.dask(),
        "xarray": lambda: tap.xarray(),
        "dataset": lambda: run.xarray(),
    }
    with pytest.raises(lt.SelectionError, match=r"twice differ in shape and make no array.*pad="):
        views[view]()


def test_the_command_line_has_the_same_choices(tmp_path):
    (tmp_path / "model.py").write_text(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_ragged import Sequences, double

def build():
    return double

def data():
    return Sequences()
"""
    )
    from click.testing import CliRunner
    from layertap.__main__ import main

    def invoke(*more: str) -> Any:
        model = f"{tmp_path / 'model.py'}"
        begin = ["capture", f"{model}:build", f"{model}:data", str(tmp_path / "run"), "--layers", "twice"]
        result = CliRunner().invoke(main, [*begin, "--batch-size", "4", "--overwrite", *more])
        assert result.exit_code == 0, result.output
        return lt.open(tmp_path / "run")["twice"] if "--dry-run" not in more else None

    rows = Sequences().rows
    assert [one.shape for one in invoke("--ragged", "twice:9")[:]] == [row.shape for row in rows]
    assert invoke("--ragged", "twice:9", "--mask", "none")[0].shape == (8, 3)
    assert invoke("--pad", "twice:9,-1").mask[:].sum() == sum(map(len, rows))
    assert invoke("--tokens", "last")[5].tolist() == (rows[5] * 2)[-1].tolist()
    invoke("--ragged", "twice:9", "--dry-run")
    shutil.rmtree(tmp_path / "run")


# Reductions


BASIS = np.random.default_rng(3).standard_normal((2, 3)).astype(np.float32)


def of_places(text: str, row: np.ndarray) -> np.ndarray:
    """Return what a reduction of each place makes of a row of tokens, by numpy in float64."""
    wide = row.astype(np.float64)
    if text.startswith("channels"):
        return wide[:, [2, 0]]
    if text.startswith("norm"):
        return np.sqrt((wide**2).sum(1, keepdims=True))
    return wide @ BASIS.T.astype(np.float64)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("text", ["channels:2,0", "norm:l2", "project", "channels:2,0|float16"])
def test_what_is_done_to_each_place_keeps_rows_in_their_own_shape(tmp_path, text, left):
    source = Sequences(left=left)
    reduce: Any = lt.reduce.Pca(None, BASIS) if text == "project" else text
    run = capture(tmp_path / "run", source, reduce=reduce)
    padded = capture(tmp_path / "padded", source, reduce=reduce, ragged=None, pad="twice:11,-1")["twice"]
    tap = run["twice"]
    assert tap.is_ragged
    assert str(tap.reduction).startswith(text[:3] if text != "project" else "pca")
    for row, true in enumerate(source.rows):
        expected = of_places(text, true * 2)
        assert tap[row].shape == expected.shape
        assert np.allclose(tap[row], expected, rtol=1e-3 if "float16" in text else 1e-5, atol=1e-6), row
        own = padded[row][padded.mask[row]]
        assert own.tobytes() == tap[row].tobytes()
    if text == "project":
        assert np.array_equal(tap.constants["basis"], BASIS)
    assert not list(verify(tmp_path / "run"))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("how", [{}, {"ragged": None, "pad": "twice:9"}])
@pytest.mark.parametrize("text", ["pool:global", "pool:global,max", "tokens:mean", "tokens:last"])
def test_what_is_made_of_a_whole_row_is_made_of_its_own_tokens(tmp_path, text, how, left):
    source = Sequences(left=left)
    tap = capture(tmp_path / "run", source, reduce=f"channels:2,0|{text}", **how)["twice"]
    assert not tap.is_ragged
    assert tap.shape == (N_ROWS, 2)
    of: Any = {"pool:global,max": lambda x: x.max(0), "tokens:last": lambda x: x[-1]}
    for row, true in enumerate(source.rows):
        expected = of.get(text, lambda x: x.mean(0))((true * 2)[:, [2, 0]]) if len(true) else [np.nan] * 2
        assert np.allclose(tap[row], expected, rtol=1e-5, equal_nan=True), row
    assert tap._about["masked"] is True


@pytest.mark.parametrize("left", [False, True])
def test_the_largest_places_are_those_of_the_rows_own_tokens(tmp_path, left):
    source = Sequences(left=left)
    tap = capture(tmp_path / "run", source, reduce="topk:4,space")["twice"]
    assert tap.shape == (N_ROWS, 4, 3)
    assert tap.dims == ("row", "rank", "feature")
    for row, true in enumerate(source.rows):
        order = np.argsort(-true, axis=0, kind="stable")[:4]
        lacking = [(0, 4 - len(order)), (0, 0)]
        top = np.pad(np.take_along_axis(true * 2, order, 0), lacking, constant_values=np.nan)
        assert np.array_equal(tap[row], top, equal_nan=True), row
        assert np.array_equal(tap.positions[row], np.pad(order, lacking, constant_values=-1))


def maps_of(n_rows: int = 9) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = [(2, int(h), int(w)) for h, w in rng.integers(1, 6, (n_rows, 2))]
    shapes[4] = (2, 0, 3)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


class Numbers(lt.Source):
    name, n_rows = "numbers", 9

    def batch(self, rows: range) -> lt.Batch:
        return lt.Batch(rows, (np.array(rows),))


def test_lists_of_rows_are_reduced_one_by_one(tmp_path):
    maps = maps_of()

    def take(name: str, reduce: str) -> Any:
        options: Any = {"batch_size": 4, "ragged": "maps:5", "reduce": reduce}
        return lt.record_dataset(
            lambda batch: {"maps": [maps[i] for i in batch.tolist()]}, Numbers(), tmp_path / name, ["maps"],
            **options,
        )["maps"]  # fmt: skip

    norms, means, top = (
        take(str(i), text) for i, text in enumerate(("norm:l1", "pool:global", "topk:3,space"))
    )
    for row, true in enumerate(maps):
        assert np.allclose(norms[row], np.abs(true).sum(0, keepdims=True), rtol=1e-6)
        assert norms[row].shape == (1, *true.shape[1:])
        mean = true.mean((1, 2)) if true.size else [np.nan] * 2
        assert np.allclose(means[row], mean, rtol=1e-5, equal_nan=True)
        for channel in range(2):
            for value, at in zip(top[row, channel], top.positions[row, channel], strict=True):
                y, x = divmod(int(at), 5)  # as in the greatest row
                assert at == -1 or value == true[channel, y, x]
            there = np.sort(true[channel].ravel())[::-1][:3]
            assert top[row, channel, : len(there)].tolist() == there.tolist()
            assert np.isnan(top[row, channel, len(there) :]).all()


def test_statistics_are_of_what_rows_that_vary_were_reduced_to(tmp_path):
    run = capture(tmp_path / "run", reduce="channels:2", stats="cheap")
    whole = np.concatenate([row[:, 2] * 2 for row in Sequences().rows])
    its = run.stats["twice"]
    assert (its.count[0], its.maximum[0]) == (whole.size, whole.max())


def test_a_mask_that_comes_after_whole_rows_were_reduced_is_refused(tmp_path):
    class Beside(Sequences):
        def batch(self, rows: range) -> lt.Batch:
            batch = super().batch(rows)
            batch.columns["attention_mask"] = batch.kwargs.pop("attention_mask")
            return batch

    with pytest.raises(lt.CaptureError, match="twice is reduced by pool:global while the model runs"):
        capture(tmp_path / "run", Beside(), reduce="pool:global")
    capture(tmp_path / "argument", reduce="norm:l2")
    run = capture(tmp_path / "beside", Beside(), reduce="norm:l2")
    assert run["twice"].shapes.tolist() == lt.open(tmp_path / "argument")["twice"].shapes.tolist()
