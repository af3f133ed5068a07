"""Capturing from the front door: stores in the way, bad input, no space, what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture import files, pipeline
from layertap.capture.local import LocalPlace
from layertap.capture.testing import SMALL_MEMORY, contents


def model(batch: Any) -> dict[str, Any]:
    return {"a": np.maximum(batch, 0), "b": batch.reshape(len(batch), -1)[:, :16]}


def values(n_rows: int = 40) -> Any:
    return np.random.default_rng(0).standard_normal((n_rows, 4, 32, 32), np.float32)


def capture(path: Path, data: Any = None, **options: Any) -> lt.Run:
    options = {"batch_size": 4, "memory": SMALL_MEMORY, "writers": 1, **options}
    return lt.record_dataset(model, values() if data is None else data, path, ["a", "b"], **options)


def test_what_is_captured_is_what_is_read(tmp_path):
    run = capture(tmp_path / "s.zarr")
    expected = model(values())
    assert run.complete
    assert run.manifest.n_blocks > 3
    assert np.array_equal(run["a"][...], expected["a"])
    assert np.array_equal(run["a"][[3, 17], 1:3, ::2, 5], expected["a"][[3, 17], 1:3, ::2, 5])
    assert np.array_equal(run["b"][...], expected["b"])


def test_a_finished_store_is_in_the_way_of_a_loop(tmp_path):
    capture(tmp_path / "s")
    with pytest.raises(lt.StoreExistsError, match="overwrite"), lt.record(model, tmp_path / "s", "a"):
        pass


def test_overwriting_replaces_a_store_and_nothing_else(tmp_path):
    capture(tmp_path / "s")
    run = capture(tmp_path / "s", dtype="float16", overwrite=True)
    assert run["a"].dtype == np.float16
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(lt.StoreExistsError, match="not a layertap store"):
        capture(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "s"]


def test_overwriting_keeps_the_old_store_until_the_new_plan_stands(tmp_path):
    capture(tmp_path / "s")
    before = contents(tmp_path / "s")
    with pytest.raises(lt.SelectionError):
        lt.record_dataset(model, values(), tmp_path / "s", ["nosuch"], overwrite=True)
    with pytest.raises(lt.PlanError):
        capture(tmp_path / "s", memory="1KiB", overwrite=True)
    assert contents(tmp_path / "s") == before


def test_something_else_at_the_path_is_not_a_store(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(lt.FormatError, match="not a layertap store"):
        capture(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("x")
    with pytest.raises(lt.FormatError, match="not a layertap store"):
        capture(tmp_path / "folder")


def test_a_store_of_a_newer_format_is_refused_before_anything_runs(tmp_path):
    capture(tmp_path / "s")
    root = tmp_path / "s" / "zarr.json"
    data = json.loads(root.read_text())
    data["attributes"]["layertap"]["format"] = 99
    root.write_text(json.dumps(data))
    for use in (lt.open, capture):
        with pytest.raises(lt.FormatError, match=r"format 99.*pip install --upgrade layertap"):
            use(tmp_path / "s")


def test_a_batch_larger_than_the_memory_is_refused_with_what_would_fit(tmp_path):
    with pytest.raises(
        lt.PlanError, match=r"a batch of 40 rows takes .* Give memory=(\S+) or more"
    ) as caught:
        capture(tmp_path / "s", batch_size=40)
    assert not (tmp_path / "s").exists()
    advised = str(caught.value).split("Give memory=")[1].split(" ")[0]
    capture(tmp_path / "s", batch_size=40, memory=advised)


def test_a_later_batch_that_memory_does_not_hold_is_refused(tmp_path):
    with (
        pytest.raises(lt.CaptureError, match="one batch fills all"),
        lt.record(model, tmp_path / "s", "a", memory=SMALL_MEMORY, writers=1) as rec,
    ):
        rec(values(4))
        rec(values(400))


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(lt.NoSpaceError, match=r"needs .*KiB and 1000B are free"):
        capture(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_stops_the_run_and_keeps_what_is_committed(tmp_path, monkeypatch):
    capture(tmp_path / "whole")
    written = [0]
    write = files.DurableFile.write

    def fills_up(self: Any, buffers: Any, **options: Any) -> None:
        written[0] += 1
        if written[0] > 12:
            raise OSError(28, "No space left on device")
        write(self, buffers, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_shard", _patched(pipeline.write_shard, patch, fills_up))
        with pytest.raises(lt.NoSpaceError, match=r"No space left.*committed are kept"):
            capture(tmp_path / "s")
    done = int(lt.open(tmp_path / "s").committed().sum())
    assert 0 < done < 40
    assert not list((tmp_path / "s").rglob("*.part"))
    capture(tmp_path / "s")
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def _patched(function: Any, patch: Any, write: Any) -> Any:
    def run(*args: Any) -> Any:
        patch.setattr(files.DurableFile, "write", write)
        return function(*args)

    return run


def test_a_writer_that_fails_at_once_leaves_no_store(tmp_path, monkeypatch):
    def fails(*args: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pipeline, "write_shard", fails)
    with pytest.raises(lt.StoreError, match="Input/output"):
        capture(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_no_thread_outlives_its_run(tmp_path):
    before = threading.active_count()
    capture(tmp_path / "s")
    with pytest.raises(lt.CaptureError):
        lt.record_dataset(lambda b: {"a": b[:1]}, values(8), tmp_path / "t", "a", batch_size=4)
    assert threading.active_count() == before


def test_no_file_stays_open(tmp_path):
    capture(tmp_path / "s")
    opened = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    for name in "tuv":
        capture(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) <= len(opened) + 1 if opened else True


def test_two_captures_of_one_store_at_once_are_kept_apart(tmp_path):
    with lt.record(model, tmp_path / "s", "a", memory=SMALL_MEMORY, writers=1) as rec:
        for _ in range(8):
            rec(values(4))
        with (
            pytest.raises(lt.StoreError, match="another process is capturing"),
            lt.record(model, tmp_path / "s", "a", memory=SMALL_MEMORY, writers=1) as second,
        ):
            second(values(4))
            second(values(4))
    assert lt.open(tmp_path / "s").n_rows == 32


def test_every_batch_has_the_columns_of_the_first(tmp_path):
    with (
        pytest.raises(lt.DataError, match="'label' is missing for rows 4 to 7"),
        lt.record(model, tmp_path / "s", "a") as rec,
    ):
        rec(values(4))
        rec.annotate(label=[1, 2, 3, 4])
        rec(values(4))
    with pytest.raises(lt.DataError, match="'extra' is new"), lt.record(model, tmp_path / "t", "a") as rec:
        rec(values(4))
        rec(values(4))
        rec.annotate(extra=[1, 2, 3, 4])


def test_annotating_out_of_turn_is_an_error(tmp_path):
    with (
        pytest.raises(lt.CaptureError, match="after the forward"),
        lt.record(model, tmp_path / "s", "a") as rec,
    ):
        rec.annotate(label=[1])


def test_labels_of_the_wrong_length_are_an_error_that_says_which_rows(tmp_path):
    with (
        pytest.raises(lt.DataError, match=r"'label' has 3 values; the batch has 4 rows \(0 to 3\)"),
        lt.record(model, tmp_path / "s", "a") as rec,
    ):
        rec(values(4))
        rec.annotate(label=[1, 2, 3])
    assert not (tmp_path / "s").exists()
    with pytest.raises(lt.DataError, match="39 labels for 40 inputs"):
        capture(tmp_path / "s", (values(), np.arange(39)))


def test_pictures_are_made_from_normalised_inputs(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (8, 6, 5, 3), np.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    normalised = lt.Preprocess(mean, std)(pictures)
    with lt.record(lambda b: {"a": b}, tmp_path / "s", "a", mean=mean, std=std) as rec:
        rec(normalised)
        rec.annotate(input=normalised)
    run = lt.open(tmp_path / "s")
    assert np.array_equal(run.rows["picture"][...], pictures)
    assert run.mean == mean


def test_a_run_goes_on_after_its_rows_with_seek(tmp_path):
    data = values(40)
    with (
        pytest.raises(RuntimeError),
        lt.record(model, tmp_path / "s", "a", memory=SMALL_MEMORY, writers=1) as rec,
    ):
        for i in range(0, 24, 4):
            rec(data[i : i + 4])
        raise RuntimeError
    with lt.record(model, tmp_path / "s", "a", memory=SMALL_MEMORY, writers=1) as rec:
        first = rec.committed_rows
        assert 0 < first < 24
        rec.seek(first)
        for i in range(first, 40, 4):
            rec(data[i : i + 4])
    run = lt.open(tmp_path / "s")
    assert run.complete
    assert np.array_equal(run["a"][...], model(data)["a"])


def test_a_hole_in_the_rows_is_refused(tmp_path):
    with (
        pytest.raises(lt.CaptureError, match="rows 4 to 7 are not captured"),
        lt.record(model, tmp_path / "s", "a") as rec,
    ):
        rec(values(4))
        rec.seek(8)


def test_a_store_is_read_while_it_is_written(tmp_path):
    data = values(40)
    with lt.record(model, tmp_path / "s", "a", memory=SMALL_MEMORY, writers=1) as rec:
        for i in range(0, 40, 4):
            rec(data[i : i + 4])
            if (tmp_path / "s").exists():
                run = lt.open(tmp_path / "s")
                done = run.committed()
                assert not run.complete
                assert np.array_equal(run["a"][done], model(data)["a"][: len(done)][done])


def test_an_unknown_cast_codec_or_amount_of_memory_is_named(tmp_path):
    for options, words in (
        ({"dtype": "int4"}, "no cast to 'int4'"),
        ({"codec": "rar"}, "no codec 'rar'"),
        ({"memory": "much"}, "'much' is no amount of memory"),
        ({"batch_size": 0}, "at least one row"),
    ):
        with pytest.raises(lt.PlanError, match=words):
            capture(tmp_path / "s", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_backend_is_named_with_those_that_are_there(tmp_path):
    with pytest.raises(lt.SelectionError, match="there are keras, torch, jax, onnx, arrays"):
        capture(tmp_path / "s", backend="caffe")
    with pytest.raises(lt.PlanError, match="no backend takes a str"):
        lt.record_dataset("model", values(), tmp_path / "s", "a")


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Counted: the pipeline's memory is allocated once, and within what was given."""
    sizes = []
    for n_rows in (40, 160):
        with lt.record(model, tmp_path / str(n_rows), "a", memory=SMALL_MEMORY, writers=1) as rec:
            for _ in range(0, n_rows, 4):
                rec(values(4))
            sizes.append(rec._pipeline.memory.nbytes)
            views = {slab.memory.__array_interface__["data"][0] for slab in rec._pipeline.slabs}
            assert len(views) == len(rec._pipeline.slabs)
    assert sizes[0] == sizes[1] <= 800 * 1024


def test_taps_that_differ_in_case_alone_have_folders_of_their_own(tmp_path):
    run = lt.record_dataset(lambda b: {"Conv": b, "conv": b + 1}, values(8), tmp_path / "s", ["**"])
    paths = [tap["path"] for tap in run.info["taps"]]
    assert len({path.lower() for path in paths}) == 2
    assert np.array_equal(run["conv"][...], values(8) + 1)


def test_a_column_whose_type_would_lose_something_is_refused(tmp_path):
    with (
        pytest.raises(lt.DataError, match="holds float64 and the first batch made it int64"),
        lt.record(model, tmp_path / "s", "a") as rec,
    ):
        rec(values(4))
        rec.annotate(score=[1, 2, 3, 4])
        rec(values(4))
        rec.annotate(score=[1.5, 2, 3, 4])


def test_complex_values_that_are_not_finite_are_counted_by_their_parts(tmp_path):
    data = np.array([[1 + 1j, complex(np.nan, np.inf)], [complex(0, np.nan), 2]], np.complex64)
    run = lt.record_dataset(lambda b: {"a": b}, data, tmp_path / "s", "a")
    assert run.stats.not_finite("a") == (2, 1)
    assert run["a"][...].tobytes() == data.tobytes()


def test_file_names_that_are_not_utf8_are_kept(tmp_path):
    from PIL import Image

    (tmp_path / "p").mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "p" / "x.png")
    (tmp_path / "p" / "x.png").rename(tmp_path / "p" / name)
    run = lt.record_dataset(lambda b: {"a": b}, tmp_path / "p", tmp_path / "s", "a")
    assert run.rows["id"][0] == "caf\ufffd.png"


def test_what_a_process_killed_while_making_a_store_left_is_swept_away(tmp_path):
    old, young, other = (tmp_path / name for name in (".s.aaaa.part", ".s.bbbb.part", ".t.cccc.part"))
    for left in (old, young, other):
        left.mkdir()
        (left / "zarr.json").write_text("{")
    for left in (old, other):
        os.utime(left, (0, 0))
    capture(tmp_path / "s")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".s.bbbb.part", ".t.cccc.part", "s"]


def test_a_store_that_is_being_written_is_not_overwritten(tmp_path):
    with lt.record(model, tmp_path / "s", "a", memory=SMALL_MEMORY, writers=1) as rec:
        for _ in range(8):
            rec(values(4))
        with pytest.raises(lt.StoreError, match="another process is capturing"):
            capture(tmp_path / "s", overwrite=True)
    run = lt.open(tmp_path / "s")
    assert run.n_rows == 32
    assert list(run.taps) == ["a"]


def test_a_run_whose_store_was_replaced_says_so_instead_of_reading_the_other(tmp_path):
    first = capture(tmp_path / "s")
    assert np.array_equal(first["a"][0], np.maximum(values()[0], 0))
    second = capture(tmp_path / "s", -values(), overwrite=True)
    with pytest.raises(lt.StoreError, match="was replaced or removed since it was opened; open it again"):
        first["a"][0]
    assert np.array_equal(second["a"][0], np.maximum(-values()[0], 0))


def test_a_run_that_was_opened_before_its_loop_ended_reads_on(tmp_path):
    with lt.record(model, tmp_path / "s", "a", memory=SMALL_MEMORY, writers=1) as rec:
        for _ in range(8):
            rec(values(4))
        run = lt.open(tmp_path / "s")
    assert np.array_equal(run["a"][0], model(values(4))["a"][0])
    assert run.complete
    assert run.n_rows == 32


def test_a_loop_neither_goes_back_nor_leaves_a_hole_nor_a_negative_row(tmp_path):
    for row in (0, -3, 9):
        with (
            pytest.raises(lt.CaptureError, match="cannot go"),
            lt.record(model, tmp_path / f"s{row}", "a") as rec,
        ):
            rec(values(8))
            rec.seek(row)


def test_a_loop_that_is_shorter_than_what_an_earlier_run_committed_is_refused(tmp_path):
    def loop(n_batches: int, fail: bool) -> None:
        with lt.record(model, tmp_path / "s", "a", memory=SMALL_MEMORY, writers=1) as rec:
            for _ in range(n_batches):
                rec(values(4))
            if fail:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        loop(9, True)
    done = lt.open(tmp_path / "s").committed().sum()
    for n_batches in (2, int(done) // 4 - 1):
        with pytest.raises(lt.CaptureError, match="rows, and an earlier run committed more"):
            loop(n_batches, False)
    assert lt.open(tmp_path / "s").committed().sum() == done
    loop(9, False)
    assert lt.open(tmp_path / "s").complete


def test_a_loop_that_died_after_its_last_block_is_ended_by_seeking_to_its_end(tmp_path):
    with (
        pytest.raises(RuntimeError),
        lt.record(model, tmp_path / "s", "a", memory=SMALL_MEMORY, writers=1) as rec,
    ):
        for _ in range(8):
            rec(values(4))
        raise RuntimeError
    with lt.record(model, tmp_path / "s", "a", memory=SMALL_MEMORY, writers=1) as rec:
        rec.seek(rec.committed_rows)
    run = lt.open(tmp_path / "s")
    assert run.complete
    assert run.n_rows > 0


def test_columns_that_have_a_meaning_are_held_to_it(tmp_path):
    for columns, words in (
        ({"picture": np.zeros((4, 8, 8), np.uint8)}, "'picture' holds uint8 of shape"),
        ({"picture": np.zeros((4, 3, 8, 8), np.float32)}, "Give what the model got as input="),
        ({"label": np.eye(4)}, "'label' holds float64 of shape"),
        ({"label": ["cat"] * 4}, "'label' holds texts"),
    ):
        with pytest.raises(lt.DataError, match=words), lt.record(model, tmp_path / "s", "a") as rec:
            rec(values(4))
            rec.annotate(**columns)
        assert not (tmp_path / "s").exists()


def test_columns_that_differ_in_case_alone_have_folders_of_their_own(tmp_path):
    with lt.record(model, tmp_path / "s", "a") as rec:
        rec(values(4))
        rec.annotate(Foo=[1, 2, 3, 4], foo=[5, 6, 7, 8])
    run = lt.open(tmp_path / "s")
    assert len({column["path"].lower() for column in run.info["columns"]}) == 2
    assert run.rows["foo"][...].tolist() == [5, 6, 7, 8]


def test_two_taps_of_one_name_are_refused(tmp_path):
    with pytest.raises(lt.CaptureError, match=r"two arrays are called a\[3\]"):
        lt.record_dataset(lambda b: {"a": {3: b, "3": b}}, values(4), tmp_path / "s", "a")


def test_fewer_writers_than_one_are_refused(tmp_path):
    with pytest.raises(lt.PlanError, match="at least one writer"):
        capture(tmp_path / "s", writers=-1)


def test_normalisation_that_does_not_fit_is_refused(tmp_path):
    pictures = np.zeros((4, 8, 8, 3), np.uint8)
    for options, words in (
        ({"mean": [0.5, 0.5]}, "mean has 2 numbers and the pictures have 3 channels"),
        ({"std": [0, 1, 1]}, "a standard deviation is above 0"),
        ({"mean": [float("nan")]}, "finite"),
    ):
        with pytest.raises(lt.DataError, match=words):
            lt.record_dataset(lambda b: {"a": b}, pictures, tmp_path / "s", "a", **options)
    with pytest.raises(lt.DataError, match="resize is -5"):
        lt.Preprocess(resize=-5)


def test_pictures_in_arrays_are_resized_and_other_arrays_are_refused(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    source = lt.ArraySource(pictures, preprocess=lt.Preprocess(resize=4))
    run = lt.record_dataset(lambda b: {"a": b}, source, tmp_path / "s", "a")
    assert run["a"].shape == (4, 3, 4, 4)
    assert run.rows["picture"].shape == (4, 4, 4, 3)
    source = lt.ArraySource(values(4), preprocess=lt.Preprocess(resize=4))
    with pytest.raises(lt.DataError, match="only pictures are resized"):
        lt.record_dataset(lambda b: {"a": b}, source, tmp_path / "t", "a")


def test_an_empty_folder_and_a_link_to_a_store_are_used(tmp_path):
    (tmp_path / "empty").mkdir()
    capture(tmp_path / "empty")
    (tmp_path / "link").symlink_to("empty")
    capture(tmp_path / "link", dtype="float16", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert lt.open(tmp_path / "empty")["a"].dtype == np.float16


def test_big_endian_arrays_are_taken(tmp_path):
    run = lt.record_dataset(lambda b: {"a": b}, np.arange(8, dtype=">f4").reshape(4, 2), tmp_path / "s", "a")
    assert run["a"][...].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_set_smaller_than_a_batch_needs_the_memory_of_its_rows_alone(tmp_path):
    run = capture(tmp_path / "s", values(2), batch_size=4096)
    assert run.manifest.layout.step_rows == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_that_cannot_be_written_to_is_named(tmp_path):
    capture(tmp_path / "s")
    (tmp_path / "s" / "commits" / "c.1.0").unlink()
    (tmp_path / "s" / "commits" / "log").chmod(0o500)
    with pytest.raises(lt.StoreError, match="cannot write into"):
        capture(tmp_path / "s")


def test_a_loop_that_goes_on_in_another_order_is_refused(tmp_path):
    def loop(order: Any, fail: bool) -> None:
        with lt.record(model, tmp_path / "s", "a", memory=SMALL_MEMORY, writers=1) as rec:
            for i in range(0, 40, 4):
                rec(values()[order[i : i + 4]])
                rec.annotate(index=order[i : i + 4], id=[f"row {k}" for k in order[i : i + 4]])
                if fail and i == 28:
                    raise RuntimeError

    rng = np.random.default_rng(0)
    first, second = rng.permutation(40), rng.permutation(40)
    with pytest.raises(RuntimeError):
        loop(first, True)
    with pytest.raises(lt.CaptureError, match=r"rows 0 to 3 come with another 'index'.*do not shuffle"):
        loop(second, False)
    loop(first, False)
    run = lt.open(tmp_path / "s")
    assert run.rows["index"][...].tolist() == first.tolist()
    assert np.array_equal(run["a"][...], model(values())["a"][first])


def test_a_source_that_gives_fewer_rows_than_it_said_is_an_error(tmp_path):
    class Short(lt.ArraySource):
        def batch(self, rows: range) -> lt.Batch:
            if rows.start >= 24:
                raise StopIteration
            return super().batch(rows)

    with pytest.raises((lt.CaptureError, RuntimeError)):
        capture(tmp_path / "s", Short(values()))
    assert not lt.open(tmp_path / "s").complete


def test_a_capture_does_not_fail_for_its_log(tmp_path, monkeypatch):
    def full(self: LocalPlace, name: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalPlace, "note", full)
    run = capture(tmp_path / "s")
    assert run.complete
    assert not list((tmp_path / "s" / "commits" / "log").glob("*.json"))


def test_annotations_that_hold_nan_or_odd_texts_are_the_same_when_a_loop_goes_on(tmp_path):
    scores = np.where(np.arange(40) % 3 == 0, np.nan, np.arange(40.0))

    def loop(fail: bool) -> None:
        with lt.record(model, tmp_path / "s", "a", memory=SMALL_MEMORY, writers=1) as rec:
            for i in range(0, 40, 4):
                rec(values()[i : i + 4])
                rec.annotate(score=scores[i : i + 4], id=[os.fsdecode(b"caf\xe9") + str(i)] * 4)
                if fail and i == 28:
                    raise RuntimeError

    with pytest.raises(RuntimeError):
        loop(True)
    loop(False)
    run = lt.open(tmp_path / "s")
    assert run.complete
    assert np.array_equal(run.rows["score"][...], scores, equal_nan=True)
