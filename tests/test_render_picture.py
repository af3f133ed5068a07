"""A picture is saved whole, by the suffix of its file; many are named by a template."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture import reader
from layertap.capture.errors import DrawError, SelectionError
from layertap.render import batch, draw, draw_many, tiles, view
from layertap.render.picture import file_names
from layertap.render.survey import found
from PIL import Image
from test_render_run import FakeArray, a_run


def test_a_picture_is_saved_by_its_suffix(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = draw(a_run(), "grid")
    starts = {"a.png": b"\x89PNG", "b.PNG": b"\x89PNG", "c.svg": b"<?xml", "deep/er/d.pdf": b"%PDF"}
    for name, start in starts.items():
        assert picture.save(tmp_path / name) == tmp_path / name
        assert (tmp_path / name).read_bytes().startswith(start)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.PNG", "c.svg", "deep"]


def test_a_picture_shows_itself() -> None:
    picture = draw(a_run(), "montage", layers="conv1")
    assert picture._repr_png_() == picture.png()
    decoded = np.asarray(Image.open(io.BytesIO(picture.png())).convert("RGB"))
    assert (decoded == picture.array()).all()
    assert picture.array().shape == (picture.sheet.height, picture.sheet.width, 3)
    assert repr(picture).startswith("<Picture montage:")


@pytest.mark.parametrize("name", ["a.bmp", "a", "a."])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DrawError, match="png, svg, pdf"):
        draw(a_run()).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_chosen_painter_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(DrawError, match="matplotlib"):
        draw(a_run(), painter="pillow").save(tmp_path / "a.pdf")


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(DrawError, match=r"a\.png cannot be written"):
        draw(a_run(), painter="pillow").save(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(DrawError, match="cannot be written"):
        draw(a_run(), painter="pillow").save(tmp_path / "file" / "a.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "file"]


def test_what_is_drawn_is_the_same_from_the_specification() -> None:
    run = a_run()
    first = draw(run, "grid", rows=[1, 3], layers=["conv1"], channels="top:4", painter="pillow")
    again = draw(run, type(first.spec).from_json(first.spec.to_json()), painter="pillow")
    assert again.png() == first.png()


def test_the_first_captured_row_is_drawn_by_default() -> None:
    run = a_run()
    run._committed[:2] = False
    assert draw(run).spec.rows == (2,)


def test_bad_requests_are_refused() -> None:
    run = a_run()
    for options, words in [
        ({"kind": "gird"}, "grid"),
        ({"rows": 99}, "0 to 5"),
        ({"layers": "conv2"}, "conv1"),
        ({"chanels": 3}, "channels"),
        ({"channels": 99}, "0 to 15"),
    ]:
        with pytest.raises((DrawError, SelectionError), match=words):
            draw(run, **options)


# Templates


def test_a_template_names_each_row() -> None:
    names = file_names(a_run(), [0, 5], "out/{row:05d}_{label}_{predicted}_{class}_{id}.png")
    assert names == ["out/00000_0_cat_cat_000.png.png", "out/00005_1_cat_dog_005.png.png"]


def test_what_a_file_name_cannot_hold_is_replaced() -> None:
    run = a_run(2)
    run.classes = ('a/b\\c:*?"<>|\n', "../..")
    run.rows["id"].values = np.array(["飞机 1", ""])
    for name in file_names(run, [0, 1], "{class}-{id}.png"):
        assert not set(name) & set('/\\:*?"<>|\n ')
        assert not name.startswith(".")
    assert "飞机_1" in file_names(run, [0], "{id}.png")[0]


def test_an_unknown_label_is_called_so() -> None:
    run = a_run(2)
    run.rows["label"].values = np.array([-1, 1])
    assert file_names(run, [0, 1], "{class}.png") == ["unknown.png", "dog.png"]


def test_labels_that_are_text_or_no_class_name_files_as_far_as_they_can() -> None:
    run = a_run(2)
    run.rows["label"] = FakeArray("label", ("row",), np.array(["frog", ""]))
    assert file_names(run, [0, 1], "{row}_{label}_{class}.png") == ["0_frog_frog.png", "1___unknown.png"]
    run.rows["label"] = FakeArray("label", ("row", "x"), np.zeros((2, 3)))
    with pytest.raises(DrawError, match=r"no field \{label\}"):
        file_names(run, [0], "{label}.png")


@pytest.mark.parametrize("template", ["{rows}.png", "{}.png", "{0}.png", "{row.real}.png", "{row[0]}.png"])
def test_an_unknown_field_is_refused_with_those_that_are(template: str) -> None:
    with pytest.raises(DrawError, match=r"\{row\}, \{label\}, \{class\}, \{predicted\}, \{id\}"):
        file_names(a_run(), [0], template)


def test_a_field_that_the_store_does_not_have_is_refused() -> None:
    run = a_run()
    del run.rows["prediction"]
    with pytest.raises(DrawError, match=r"no field \{predicted\}"):
        file_names(run, [0], "{predicted}.png")


@pytest.mark.parametrize("template", ["{row", "{row:q}.png", "{class:05d}.png"])
def test_a_template_that_cannot_be_read_is_refused(template: str) -> None:
    with pytest.raises(DrawError, match="template"):
        file_names(a_run(), [0], template)


def test_two_rows_with_one_name_are_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(DrawError, match="rows 0 and 2 one name"):
        draw_many(a_run(), "grid", "0,1,2", tmp_path / "{class}.png")
    assert not list(tmp_path.iterdir())


def test_many_are_drawn_and_what_is_there_is_left(tmp_path: Path) -> None:
    template = tmp_path / "{row}.png"
    (tmp_path / "1.png").write_bytes(b"mine")
    paths = draw_many(a_run(), "grid", "0:3", template, layers="conv1", painter="pillow")
    assert paths == [tmp_path / f"{row}.png" for row in range(3)]
    assert (tmp_path / "1.png").read_bytes() == b"mine"
    told: list[tuple[str, bool]] = []
    (tmp_path / "2.png").unlink()
    report = lambda path, drawn: told.append((path.name, drawn))  # noqa: E731
    draw_many(a_run(), "grid", "1,2", template, layers="conv1", painter="pillow", report=report)
    assert told == [("1.png", False), ("2.png", True)]
    single = draw(a_run(), "grid", rows=2, layers="conv1", painter="pillow").png()
    assert (tmp_path / "2.png").read_bytes() == single
    draw_many(a_run(), "grid", "0:3", template, layers="conv1", painter="pillow", overwrite=True)
    assert (tmp_path / "1.png").read_bytes() != b"mine"


# Many pictures of a store


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    """Return a run of 300 rows, several of them in each inner chunk."""
    rng = np.random.default_rng(0)

    def layers(pictures: Any) -> dict[str, Any]:
        return {
            name: rng.standard_normal((len(pictures), 8, side, side)).astype(np.float32)
            for name, side in (("conv1", 28), ("conv2", 7))
        }

    data = rng.integers(0, 256, (300, 8, 8, 3), np.uint8), np.arange(300) % 3
    lt.record_dataset(layers, data, tmp_path / "run.zarr", "*", backend="arrays", batch_size=60)
    return lt.open(tmp_path / "run.zarr")


@pytest.mark.parametrize("channels", ["first:4", "top:4", "top:4:f_ratio"])
def test_rows_that_are_drawn_one_by_one_share_what_is_read(
    stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: str
) -> None:
    singles = [draw(stored, "grid", rows=row, channels=channels).png() for row in (0, 77, 129)]
    reads: list[str] = []
    read = reader.Array._read
    monkeypatch.setattr(reader.Array, "_read", lambda self, key: reads.append(self.name) or read(self, key))
    monkeypatch.setattr(batch, "TASK_ROWS", 50)
    paths = draw_many(stored, "grid", range(130), tmp_path / "{row}.png", channels=channels)
    assert [paths[row].read_bytes() for row in (0, 77, 129)] == singles
    assert all(reads.count(name) <= 3 + (channels == "top:4:f_ratio") for name in ("conv1", "conv2"))
    assert reads.count("picture") == 3
    assert reads.count("label") == 4  # and once for the names of the files


def test_what_is_read_together_is_bounded(
    stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    read = view.read_maps
    monkeypatch.setattr(
        view, "read_maps", lambda tap, rows, *rest: sizes.append(len(rows)) or read(tap, rows, *rest)
    )
    row_bytes = 4 * 8 * (28 * 28 + 7 * 7)
    monkeypatch.setattr(tiles, "SHELF_BYTES", 10 * row_bytes + 1)
    draw_many(stored, "montage", range(25), tmp_path / "{row}.png", layers=["conv1", "conv2"])
    assert sizes == [10, 10, 10, 10, 5, 5]


@pytest.mark.parametrize("options", [{}, {"scope": "data", "clip": 99.0}])
def test_several_processes_draw_what_one_does(stored: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    told: list[tuple[str, bool]] = []
    report = lambda path, drawn: told.append((path.name, drawn))  # noqa: E731
    rows = range(290)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "140.png").write_bytes(b"mine")
    two = draw_many(
        stored,
        "grid",
        rows,
        tmp_path / "two" / "{row}.png",
        jobs=2,
        report=report,
        channels="top:3",
        **options,
    )
    one = draw_many(
        stored, "grid", [0, 5, 200, 289], tmp_path / "one" / "{row}.png", channels="top:3", **options
    )
    assert [two[row].read_bytes() for row in (0, 5, 200, 289)] == [path.read_bytes() for path in one]
    assert told == [(f"{row}.png", row != 140) for row in rows]
    assert two[140].read_bytes() == b"mine"
    assert len(list((tmp_path / "two").iterdir())) == 290


def test_what_is_found_of_all_rows_is_not_found_again_by_each_process(stored: Any, tmp_path: Path) -> None:
    draw_many(stored, "grid", range(2), tmp_path / "{row}.png", scope="data")
    known = dict(found(stored))
    assert {key[:2] for key in known} == {("limits", "conv1"), ("limits", "conv2")}
    other = pickle.loads(pickle.dumps(stored))
    one = batch.Batch(other, "grid", {"scope": "data"}, None, False)
    batch._take(one, dict.fromkeys(known, (0.0, 1234.0)))
    try:
        batch._draw(((7,), (tmp_path / "7.png",)))
    finally:
        batch._batch = None
    expected = draw(stored, "grid", rows=7, scope=(0, 1234))
    assert found(other) == dict.fromkeys(known, (0.0, 1234.0))
    assert (tmp_path / "7.png").read_bytes() != expected.png()  # the caption says what it is
    assert draw(other, "grid", rows=7, scope="data").sheet.bars[0].high == 1234


def test_an_error_of_a_process_is_raised_and_what_was_drawn_stays(stored: Any, tmp_path: Path) -> None:
    (tmp_path / "200.png").mkdir()
    with pytest.raises(DrawError, match=r"200\.png cannot be written"):
        draw_many(stored, "grid", None, tmp_path / "{row}.png", overwrite=True, jobs=2, layers="conv2")
    assert (tmp_path / "0.png").is_file()
    assert not list(tmp_path.glob(".*.part"))
    (tmp_path / "200.png").rmdir()
    drawn: list[bool] = []
    draw_many(
        stored,
        "grid",
        None,
        tmp_path / "{row}.png",
        layers="conv2",
        report=lambda _, is_new: drawn.append(is_new),
    )
    assert len(drawn) == 300
    assert 0 < sum(drawn) < 300


def test_no_job_is_no_number_of_jobs(stored: Any, tmp_path: Path) -> None:
    with pytest.raises(DrawError, match="jobs must be 1 or more, not 0"):
        draw_many(stored, "grid", 0, tmp_path / "{row}.png", jobs=0)


_KILLED = """
import os, sys
import layertap as lt

if __name__ == "__main__":
    report = lambda path, drawn: print(path.name, flush=True)
    lt.draw_many(lt.open(sys.argv[1]), "grid", None, sys.argv[2] + "/{row}.png", jobs=2, report=report)
"""


def test_a_batch_that_is_killed_leaves_no_process_and_goes_on(stored: Any, tmp_path: Path) -> None:
    (tmp_path / "many.py").write_text(_KILLED)
    out = tmp_path / "out"
    command = [sys.executable, str(tmp_path / "many.py"), str(stored.path), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    for _ in range(2):  # the second line tells that processes have begun
        process.stdout.readline()
    process.kill()
    assert process.stdout.read() is not None  # ends when no process has it open any more
    process.stdout.close()
    process.wait()
    there = {path.name: path.read_bytes() for path in out.glob("[0-9]*.png")}
    assert 2 <= len(there) < 300
    drawn: list[bool] = []
    paths = draw_many(stored, "grid", None, out / "{row}.png", report=lambda _, is_new: drawn.append(is_new))
    assert sum(drawn) == 300 - len(there)
    assert all((out / name).read_bytes() == data for name, data in there.items())
    assert all(Image.open(path).verify() is None for path in paths)
