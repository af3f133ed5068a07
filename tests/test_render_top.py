"""The rows that excite channels most: which they are, where their pictures are cut, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.capture.errors import DrawError, SelectionError
from layertap.render import Sheet, TopSpec, draw, draw_many
from layertap.render.cli import render
from layertap.render.colormaps import palette
from layertap.render.fields import box, shares, told
from layertap.render.kinds import spec_from_json
from layertap.render.lettering import text_width
from layertap.render.painters import painter
from layertap.render.sheet import FRAME, Ink
from layertap.render.top_layout import outline
from layertap.render.top_rows import top_rows

pytestmark = pytest.mark.filterwarnings("ignore:no installed font has")

SIZE, N_ROWS = (24, 20), 40
CLASSES = ("cat", "dog", "ein sehr langer Name einer Klasse, der nicht passt", "飞机", "سيارة", "🐸")


def model(batch: Any) -> dict[str, Any]:
    """Maps with strides, tokens, a vector, and channels that are dead, constant, tied, NaN or negative."""
    odd = np.stack(
        [batch[:, 0], batch[:, 0] * 0, batch[:, 0] * 0 + 2, np.round(batch[:, 1] * 2), -batch[:, 2] - 5], 1
    )
    return {
        "same": batch,
        "half": np.maximum(batch[:, :, 1::2, 1::2], batch[:, :, ::2, ::2]).repeat(4, axis=1) - 0.2,
        "odd": odd,
        "bad": np.where(batch > 0.9, np.nan, np.where(batch < 0.05, -np.inf, batch)),
        "sparse": np.maximum(batch - batch.max((2, 3), keepdims=True) + 1e-9, 0)
        * (batch[:, :1, :1, :1] > 0.9),
        "tokens": batch[:, :, ::6, ::5].reshape(len(batch), 3, -1).transpose(0, 2, 1),
        "vector": batch.mean((2, 3)),
        "number": batch.mean((1, 2, 3)),
        "logits": np.stack([batch[:, i % 3, i, i] for i in range(len(CLASSES))], 1),
    }


def source(n: int = N_ROWS) -> Any:
    pictures = np.random.default_rng(3).integers(0, 256, (n, *SIZE, 3), np.uint8)
    return lt.ArraySource(pictures, np.arange(n) % len(CLASSES), classes=CLASSES)


LAYERS = ["same", "half", "odd", "bad", "sparse", "tokens", "vector", "number", "logits"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> lt.Run:
    """A store with receptive fields and without statistics."""
    path = tmp_path_factory.mktemp("top") / "run.zarr"
    return lt.record_dataset(model, source(), path, LAYERS, batch_size=8, fields=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> lt.Run:
    """A store with statistics, in several blocks, and without receptive fields."""
    path = tmp_path_factory.mktemp("top") / "measured.zarr"
    options: dict[str, Any] = {"batch_size": 4, "writers": 1, "memory": "2400KiB"}
    run = lt.record_dataset(model, source(), path, LAYERS, stats="cheap,top:6", **options)
    assert run.manifest.n_blocks > 2
    return run


def texts(sheet: Sheet) -> list[str]:
    return [text.text for text in sheet.texts]


def cut(photo: Any) -> Any:
    """Return a photo without its frame."""
    frame = palette("gray")[FRAME]
    assert (photo.pixels[[0, -1]] == frame).all()
    assert (photo.pixels[:, [0, -1]] == frame).all()
    return photo.pixels[1:-1, 1:-1]


# Which rows


def channels_of(tap: Any) -> int:
    return tap.shape[-1] if tap.dims[-1] == "feature" else 1 if len(tap.dims) == 1 else tap.shape[1]


def by_sorting(tap: Any, channel: int, k: int, rows: Any) -> list[tuple[int, float]]:
    """Return rows and values, by looking at all of them."""
    axis = len(tap.dims) - 1 if tap.dims[-1] == "feature" else 1
    values = np.asarray(tap[rows])
    values = np.moveaxis(values if values.ndim > 1 else values[:, None], axis, 1)[:, channel]
    values = values.reshape(len(rows), -1).astype(float)
    found = []
    for row, one in zip(rows, values, strict=True):
        finite = one[np.isfinite(one)]
        if finite.size:
            found.append((int(row), float(finite.max())))
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:k]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [None, tuple(range(30, 2, -3))])
def test_they_are_the_rows_with_the_greatest_values_each_once_the_earlier_of_equals(run, name, rows):
    tap = run[name]
    n_channels = channels_of(tap)
    found = top_rows(run, tap, range(n_channels), 5, rows)
    looked_at = np.arange(N_ROWS) if rows is None else np.array(sorted(rows))
    for channel in range(n_channels):
        expected = by_sorting(tap, channel, 5, looked_at)
        assert found.rows[channel].tolist() == [row for row, _ in expected], channel
        assert found.values[channel].tolist() == [value for _, value in expected]
        for (row, value), cell in zip(expected, found.cells[channel].tolist(), strict=True):
            at = (*cell, channel) if tap.dims[-1] == "feature" else (channel, *cell)[: len(tap.dims) - 1]
            assert float(tap[row][at]) == value


@pytest.mark.parametrize("name", LAYERS)
def test_one_pass_over_the_store_finds_what_the_capture_kept(run, measured, name, monkeypatch):
    n_channels = channels_of(run[name])
    passed = top_rows(run, run[name], range(n_channels), 6, None)
    monkeypatch.setattr(type(measured[name]), "_read", None)  # no value is read
    kept = top_rows(measured, measured[name], range(n_channels), 6, None)
    assert kept.is_kept
    assert not passed.is_kept
    for field in ("rows", "values", "cells", "low", "high", "n_not_finite"):
        assert np.array_equal(getattr(kept, field), getattr(passed, field), equal_nan=True), field


def test_more_rows_than_were_kept_take_the_pass(measured):
    found = top_rows(measured, measured["same"], [0, 2], 7, None)
    assert not found.is_kept
    assert found.rows.shape == (2, 7)
    assert not top_rows(measured, measured["same"], [0], 3, [4, 5, 6, 7]).is_kept


def test_the_pass_reads_a_bounded_number_of_values_at_once(run, monkeypatch):
    sizes = []
    tap = run["same"]
    read = type(tap)._read

    def noted(self: Any, selectors: Any) -> Any:
        values = read(self, selectors)
        sizes.append(values.shape)
        return values

    monkeypatch.setattr(type(tap), "_read", noted)
    monkeypatch.setattr("layertap.render.top_rows._AT_ONCE_BYTES", 8 * 2 * 480 * 7)
    found = top_rows(run, tap, [2, 0], 4, None)
    assert sizes == [(7, 2, *SIZE)] * 5 + [(5, 2, *SIZE)]
    assert found.rows.tolist() == top_rows(run, tap, [2, 0], 4, None).rows.tolist()


def test_a_store_of_statistics_alone_is_drawn_as_far_as_they_go(tmp_path):
    run = lt.record_dataset(model, source(), tmp_path / "run.zarr", ["half"], stats="top:4", values=False)
    sheet = draw(run, "top", k=4, channels="first:2").sheet
    assert len(sheet.photos) == 8
    with pytest.raises(DrawError, match=r"holds statistics alone.*stats='top:5'"):
        draw(run, "top", k=5)


# Where pictures are cut


def test_pictures_are_cut_to_the_receptive_field_of_the_greatest_value(run):
    sheet = draw(run, "top", layers="half", channels=[5], k=6, crop=True).sheet
    found = top_rows(run, run["half"], [5], 6, None)
    pictures = run.rows["picture"]
    assert len(sheet.photos) == 6
    for photo, row, (y, x) in zip(sheet.photos, found.rows[0], found.cells[0], strict=True):
        expected = pictures[row][2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        shown = cut(photo)
        factor = shown.shape[0] // 2
        assert (shown == expected.repeat(factor, 0).repeat(factor, 1)).all()
    assert "cut to the receptive field of the value" in texts(sheet)


def test_whole_pictures_have_it_outlined(run):
    sheet = draw(run, "top", layers="half", channels=[5], k=2, crop=False, magnification=4).sheet
    found = top_rows(run, run["half"], [5], 2, None)
    for photo, row, (y, x) in zip(sheet.photos, found.rows[0], found.cells[0], strict=True):
        expected = run.rows["picture"][row].repeat(4, 0).repeat(4, 1)
        top, left = 8 * y, 8 * x
        assert (cut(photo)[top, left : left + 8] == 17).all()
        assert (cut(photo)[top + 1, left + 1 : left + 7] == 255).all()
        outline(expected, (top, left, top + 8, left + 8))
        assert (cut(photo) == expected).all()
    assert "outlined is the receptive field of the value" in texts(sheet)


def test_where_a_cut_would_show_too_little_it_is_outlined(run, tmp_path):
    whole = draw(run, "top", layers="half", channels=[5], k=2).sheet
    assert (
        whole.photos[0].pixels.shape
        == draw(run, "top", layers="half", channels=[5], k=2, crop=False).sheet.photos[0].pixels.shape
    )
    assert "outlined is the receptive field of the value" in texts(whole)
    pooled = lt.record_dataset(
        model, source(4), tmp_path / "pooled.zarr", ["half"], reduce="pool:6", fields=True, batch_size=4
    )
    sheet = draw(pooled, "top", channels="first:1", k=1).sheet
    assert "cut to the receptive field of the value" in texts(sheet)
    assert cut(sheet.photos[0]).shape[0] % 4 == 0


def test_a_value_that_sees_all_of_the_picture_is_said_to(tmp_path):
    def far(batch: Any) -> dict[str, Any]:
        return {"far": np.broadcast_to(batch.mean((2, 3), keepdims=True), (len(batch), 3, 6, 5)).copy()}

    run = lt.record_dataset(far, source(4), tmp_path / "run.zarr", ["far"], fields=True, batch_size=4)
    for crop in (None, True, False):
        said = " ".join(texts(draw(run, "top", channels="first:1", k=1, crop=crop).sheet))
        assert "whole pictures: the receptive field of the value is all of the input" in said


def test_a_box_is_inside_its_picture_and_shows_on_any(run):
    for box_ in ((0, 0, 1, 1), (23, 19, 24, 20), (0, 0, 24, 20), (5, 5, 6, 20)):
        pixels = np.full((24, 20, 3), 100, np.uint8)
        outline(pixels, box_)
        top, left, bottom, right = box_
        assert (pixels[top, left:right] == 17).all()
        assert (pixels[bottom - 1, left:right] == 17).all()
        assert (pixels[top:bottom, left] == 17).all()
        pixels[top:bottom, left:right] = 100
        assert (pixels == 100).all()


def test_large_pictures_are_means_of_squares_and_all_of_a_layer_are_as_large(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 250, 331, 3), np.uint8)
    run = lt.record_dataset(lambda x: {"n": x.mean((2, 3))}, pictures, tmp_path / "run.zarr", ["n"])
    photos = draw(run, "top", channels=[0], k=2).sheet.photos
    divisor = 3
    for photo, row in zip(photos, top_rows(run, run["n"], [0], 2, None).rows[0], strict=True):
        shown = cut(photo)
        assert shown.shape == (84, 111, 3)
        squares = pictures[row, :249, :330].reshape(83, divisor, 110, divisor, 3).astype(float)
        assert np.abs(shown[:83, :110] - squares.mean((1, 3))).max() < 0.6
        assert np.abs(shown[83, 110] - pictures[row, 249, 330]).max() == 0


@pytest.mark.parametrize(
    ("reduction", "cell", "seen"),
    [
        (None, (3, 2), (6, 4, 8, 6)),
        ("int8", (3, 2), (6, 4, 8, 6)),
        ("pool:4", (1, 1), (6, 4, 12, 10)),
        ("pool:4x3,max", (0, 1), (0, 6, 6, 14)),
        ("crop:6x4@2,3", (0, 0), (4, 6, 6, 8)),
        ("crop:6@2,1|pool:3|float16", (1, 2), (8, 10, 12, 14)),
        ("channels:0,3", (3, 2), (6, 4, 8, 6)),
        ("norm:l2", (11, 9), (22, 18, 24, 20)),
        ("project:2,seed=1", (0, 0), (0, 0, 2, 2)),
        ("pool:global", (), (0, 0, 24, 20)),
    ],
)
def test_a_cell_of_what_was_reduced_sees_what_its_cells_of_the_layer_see(tmp_path, reduction, cell, seen):
    run = lt.record_dataset(
        model, source(4), tmp_path / "run.zarr", ["half"], reduce=reduction, fields=True, batch_size=4
    )
    assert box(run["half"], cell, SIZE) == seen
    top, left, bottom, right = seen
    assert box(run["half"], cell, (48, 60)) == (2 * top, 3 * left, 2 * bottom, 3 * right)
    words = told(run["half"], (48, 60, 3), "cut to", [(bottom - top, right - left)])
    times = "\N{MULTIPLICATION SIGN}"
    brought = f"of an input of 20 {times} 24 brought to the picture's 60 {times} 48"
    assert (brought in words) == (reduction != "pool:global")
    draw(run, "top", channels="first:1")


def test_without_receptive_fields_the_share_of_the_cell_stands_for_them_and_that_is_said(measured):
    assert box(measured["half"], (3, 2), SIZE) == (6, 4, 8, 6)
    assert box(measured["half"], (0, 0), (25, 25)) == (0, 0, 3, 3)
    assert box(measured["tokens"], (3,), SIZE) == (0, 0, *SIZE)
    words = " ".join(
        texts(draw(measured, "top", layers=["half", "tokens", "vector"], channels="first:1", crop=True).sheet)
    )
    assert (
        "cut to the cell's share of the picture: the store has no receptive field of this layer (capture with"
        in words
    )
    assert "whole pictures: the store has no receptive field of" in words
    assert "whole pictures: a value has no place in them" in words


def test_of_a_gradient_it_is_the_field_of_the_output(tmp_path):
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 6, 4, 1), torch.nn.Flatten(), torch.nn.Linear(60, 6))
    run = lt.record_dataset(net, source(8), tmp_path / "run.zarr", ["0", "0:grad"], fields=True)
    assert run["0:grad"].field is None
    assert box(run["0:grad"], (2, 1), SIZE) == box(run["0"], (2, 1), SIZE) == (7, 3, 13, 9)


def test_what_sees_nothing_is_shown_by_the_whole_picture_and_widens_no_box(tmp_path):
    def with_class_token(batch: Any) -> dict[str, Any]:
        tokens = batch[:, :, ::6, ::5].reshape(len(batch), 3, -1).transpose(0, 2, 1)
        return {"tokens": np.concatenate([np.zeros_like(tokens[:, :1]), tokens], 1)}

    run = lt.record_dataset(with_class_token, source(4), tmp_path / "run.zarr", ["tokens"], fields=True)
    assert box(run["tokens"], (0,), SIZE) == (0, 0, *SIZE)
    assert box(run["tokens"], (6,), SIZE) == (6, 5, 7, 6)
    field = run["tokens"].field
    assert field.box(slice(0, 3), slice(0, 3)) == (0, 0, 1, 6)
    assert field.box(slice(0, 1), slice(0, 1)) is None


def test_a_store_whose_reduction_does_not_come_to_its_places_is_shown_whole(tmp_path):
    from hostile import edit

    path = tmp_path / "run.zarr"
    lt.record_dataset(model, source(4), path, ["half"], reduce="pool:4", fields=True, batch_size=4)
    edit(path, lambda manifest: manifest["taps"][0]["reduction"]["steps"][0].update(size=[9, 9]))
    assert box(lt.open(path)["half"], (1, 1), SIZE) == (0, 0, *SIZE)


def test_an_overlay_outlines_the_receptive_field_of_its_cell_where_the_store_has_it(tmp_path):
    def blurred(batch: Any) -> dict[str, Any]:
        wide = np.pad(batch, ((0, 0), (0, 0), (2, 2), (2, 2)))
        return {"blur": sum(wide[:, :, i : i + 24 : 4, j : j + 20 : 4] for i in range(5) for j in range(5))}

    for fields, corner, size, words in (
        (True, (6, 2), 5, "box: where cell (2, 1) looks: its receptive field"),
        (False, (8, 4), 4, "box: where cell (2, 1) lies"),
    ):
        path = tmp_path / f"{fields}.zarr"
        run = lt.record_dataset(blurred, source(2), path, ["blur"], fields=fields)
        sheet = draw(run, "overlay", layers="blur", cell=(2, 1), magnification=4).sheet
        photo, outer = sheet.photos[0], max(sheet.outlines, key=lambda one: (-one.x, one.width))
        assert (outer.y - photo.y, outer.x - photo.x) == (4 * corner[0], 4 * corner[1])
        assert (outer.height, outer.width) == (4 * size, 4 * size)
        assert words in " ".join(texts(sheet))


def test_tokens_are_cut_to_what_each_sees(run):
    assert box(run["tokens"], (5,), SIZE) == (6, 5, 7, 6)
    assert shares(run["tokens"], (5,)) == (6 / 24, 5 / 20, 7 / 24, 6 / 20)
    assert shares(run["tokens"], (1, 1)) is None  # of a patch grid, which is not how tokens are counted
    sheet = draw(run, "top", layers="tokens", channels=[1], k=3, crop=True).sheet
    assert all(len(np.unique(cut(photo).reshape(-1, 3), axis=0)) == 1 for photo in sheet.photos)


# What is written


def test_each_picture_has_its_row_value_class_and_whether_that_was_predicted(run):
    sheet = draw(run, "top", layers="same", channels=[1], k=4).sheet
    found = top_rows(run, run["same"], [1], 4, None)
    labels, predictions = np.asarray(run.rows["label"][:]), np.asarray(run.rows["prediction"][:])
    for photo, row, value in zip(sheet.photos, found.rows[0], found.values[0], strict=True):
        here = [t for t in sheet.texts if t.x == photo.x and t.y > photo.y - 10]
        said = [t.text for t in here]
        assert said[0] == f"row {row}"
        assert float(said[1]) == pytest.approx(value, rel=6e-3)
        assert said[2][:3] == CLASSES[labels[row]][:3]
        right = labels[row] == predictions[row]
        assert said[3].startswith("right" if right else "wrong: ")
        assert here[3].ink is (Ink.RIGHT if right else Ink.WRONG)


def test_no_text_touches_another_or_leaves_the_sheet(run, measured):
    for one, options in (
        (run, {"layers": LAYERS, "channels": "all", "k": 5}),
        (measured, {"layers": LAYERS, "channels": "first:2", "k": 1, "crop": False, "title": "飞机 سيارة"}),
    ):
        sheet = draw(one, "top", **options).sheet
        taken = np.zeros((sheet.height, sheet.width), np.int64)
        for photo in sheet.photos:
            taken[photo.y : photo.y + photo.size[1], photo.x : photo.x + photo.size[0]] += 1
        for text in sheet.texts:
            width = text_width(text.text, text.size, text.bold)
            assert text.x + width <= sheet.width
            left, top = int(text.x), round(text.y - 0.75 * text.size)
            taken[top : int(text.y) + 1, left : int(text.x + width * 0.95)] += 1
        assert taken.max() == 1


def test_what_does_not_excite_is_not_drawn_and_the_reason_is_written(run):
    sheet = draw(run, "top", layers="odd", channels="all", k=3).sheet
    assert len(sheet.photos) == 9
    assert {"all zero", "constant: 2 everywhere"} < set(texts(sheet))
    assert "odd, channel 1: all zero" in sheet.notes
    few = draw(run, "top", layers="sparse", channels=[0], k=30).sheet
    n = int((run["sparse"][:, 0].max((1, 2)) > 0).sum())
    assert 0 < n < 30
    assert len(few.photos) == n
    assert f"{n} of {N_ROWS} rows excite it" in texts(few)


def test_values_that_are_not_finite_are_left_out_and_listed(run):
    sheet = draw(run, "top", layers="bad", channels="all", k=2).sheet
    assert "NaN or infinite values, left out, in 0, 1, 2" in texts(sheet)
    assert any("left out" in note for note in sheet.notes)
    assert len(sheet.photos) == 6


def test_how_many_of_how_many_channels_and_rows_is_written(run, measured):
    words = texts(draw(run, "top", layers="half", channels="top:4", rows="3:9").sheet)
    assert "4 of 12 channels, by maximum" in words
    assert "the rows with the greatest values among 6 chosen rows" in words
    words = texts(draw(measured, "top", layers="half", channels="all", k=6).sheet)
    assert "all 12 channels" in words
    assert "the rows with the greatest values among all 40 rows, as captured" in words


def test_channels_come_by_what_they_are_ranked_by(run, measured):
    maxima = run["half"][:].max((0, 2, 3))
    sheet = draw(run, "top", layers="half", channels="top:12", k=1).sheet
    names = [text for text in texts(sheet) if text.startswith("channel ")]
    assert names == [f"channel {i}" for i in np.argsort(-maxima, kind="stable")]
    means = measured.stats["half"].mean
    sheet = draw(measured, "top", layers="half", channels="top:2", by="mean", k=1).sheet
    names = [text for text in texts(sheet) if text.startswith("channel ")]
    assert names == [f"channel {i}" for i in np.argsort(-means, kind="stable")[:2]]
    with pytest.raises(DrawError, match=r"mean ranks .* by statistics .* does not keep: rank by maximum"):
        draw(run, "top", layers="half", channels="top:2:mean")


def test_channels_come_in_pages(run):
    words = texts(draw(run, "top", layers="half", channels="page:3:5", k=1).sheet)
    assert "2 of 12 channels, page 3 of 3" in words
    assert [word for word in words if word.startswith("channel ")] == ["channel 10", "channel 11"]
    ranked = [
        [
            t
            for t in texts(draw(run, "top", layers="half", channels=which, k=1).sheet)
            if t.startswith("channel ")
        ]
        for which in ("top:12", "page:1:5:maximum", "page:2:5:maximum", "page:3:5:maximum")
    ]
    assert ranked[0] == ranked[1] + ranked[2] + ranked[3]
    with pytest.raises(SelectionError, match="page 4 of the channels of half is not there"):
        draw(run, "top", layers="half", channels="page:4:5")


def test_an_unfinished_store_is_drawn_from_what_is_committed_and_says_so(measured, tmp_path):
    import shutil

    shutil.copytree(measured.path, tmp_path / "run.zarr")
    (tmp_path / "run.zarr/commits/c.1.0").unlink()
    run = lt.open(tmp_path / "run.zarr")
    words = texts(draw(run, "top", layers="half", channels="first:1").sheet)
    assert (
        f"the rows with the greatest values among the {run.n_committed} rows that are captured so far"
        in words
    )
    missing = set(np.flatnonzero(~run.committed()).tolist())
    assert missing
    assert not missing & {int(word.removeprefix("row ")) for word in words if word.startswith("row ")}


# As any other picture


@pytest.mark.parametrize(
    "spec",
    [
        TopSpec(layers=("a",)),
        TopSpec(layers=("a", "b"), channels=(3, 1), k=4, crop=False, magnification=2, title="飞机"),
        TopSpec(layers=("a",), channels="top:9:mean", rows=(5, 2)),
        TopSpec(layers=("a",), channels="top:9", by="sparsity"),
    ],
)
def test_a_specification_comes_back_from_json_equal(spec):
    assert spec_from_json(json.dumps(spec.to_json())) == spec
    assert hash(spec_from_json(spec.to_json())) == hash(spec)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k must be a whole number from 1"),
        ({"k": True}, "k must be a whole number from 1"),
        ({"magnification": 1000}, "magnification"),
        ({"channels": "top:9:l1"}, "index, maximum, mean, variance, sparsity, not by l1"),
        ({"channels": "top:9:meen"}, "mean"),
        ({"channels": "best"}, "none of"),
        ({"channels": "99"}, "channel of same: 99 is not there; there are 0 to 2"),
        ({"layers": "samee"}, "same"),
        ({"rows": "40"}, "row 40 is not there"),
        ({"scope": "layer"}, "no option 'scope'"),
    ],
)
def test_bad_input_is_an_error_that_names_what_would_do(run, options, words):
    with pytest.raises((DrawError, SelectionError), match=words):
        draw(run, "top", **options)


def test_without_pictures_that_is_an_error_that_says_how_to_keep_them(tmp_path):
    with lt.record(model, tmp_path / "run.zarr", ["half"]) as rec:
        rec(source(4).batch(range(4)).inputs[0])
    with pytest.raises(DrawError, match=r"no pictures of its rows.*annotate\(input="):
        draw(lt.open(tmp_path / "run.zarr"), "top")


def test_too_large_a_sheet_is_refused_before_a_picture_is_read(run, monkeypatch):
    monkeypatch.setattr("layertap.render.layout.LARGEST", 100_000)
    monkeypatch.setattr("layertap.render.top._shots", None)
    with pytest.raises(DrawError, match="draw fewer channels or rows"):
        draw(run, "top", layers="half", channels="all")


def test_pictures_are_read_for_some_channels_at_a_time_each_once(run, monkeypatch):
    expected = draw(run, "top", layers="half", channels="all", k=3)
    column, seen = run.rows["picture"], []
    monkeypatch.setattr("layertap.render.top._AT_ONCE_BYTES", 24 * 20 * 3 * 3 * 5)
    read = type(column)._read

    def noted(self: Any, selectors: Any) -> Any:
        if self.name == "picture":
            seen.append(selectors[0].tolist())
        return read(self, selectors)

    monkeypatch.setattr(type(column), "_read", noted)
    assert draw(run, "top", layers="half", channels="all", k=3).png() == expected.png()
    found = top_rows(run, run["half"], range(12), 3, None).rows
    assert seen == [np.unique(found[i : i + 5]).tolist() for i in (0, 5, 10)]


def test_the_same_specification_draws_the_same_picture_by_both_painters(run):
    picture = draw(run, "top", layers=["half", "odd"], channels="first:2", k=3, crop=False)
    again = draw(run, picture.spec)
    assert picture.png() == again.png()
    sheet = picture.sheet
    for name in ("pillow", "matplotlib"):
        if name == "matplotlib":
            pytest.importorskip("matplotlib")
        got = painter(name).array(Sheet(sheet.width, sheet.height, photos=sheet.photos))
        expected = np.full_like(got, 255)
        for x, y, pixels in sheet.pictures():
            expected[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        assert (got == expected).all()


def test_it_is_saved_in_every_format_and_a_row_a_file(run, tmp_path):
    pytest.importorskip("matplotlib")
    for suffix in ("png", "svg", "pdf"):
        assert draw(run, "top", k=2, channels=[0]).save(tmp_path / f"top.{suffix}").stat().st_size > 1000
    paths = draw_many(run, "top", [3, 5], tmp_path / "{row}.png", layers="half", channels="first:2")
    assert [path.name for path in paths] == ["3.png", "5.png"]
    assert draw(run, "top", rows=[3], layers="half", channels="first:2").png() == paths[0].read_bytes()


def test_one_value_is_not_called_constant(run):
    sheet = draw(run, "top", rows=[3], layers="vector", channels="all").sheet
    assert len(sheet.photos) == 3
    assert not [text for text in texts(sheet) if "constant" in text]


def test_the_command_draws_what_the_call_draws(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = str(run.path)
    options = ["top", store, "--layers", "half,odd", "--channels", "top:2", "--k", "3", "--no-crop"]
    done = CliRunner().invoke(render, options)
    assert (done.exit_code, done.output) == (0, "top.png\n")
    same = draw(run, "top", layers=["half", "odd"], channels="top:2", k=3, crop=False)
    assert Path("top.png").read_bytes() == same.png()
    done = CliRunner().invoke(render, ["top", store, "--class", "dog", "--wrong", "--out", "dog.png"])
    assert done.output == "dog.png\n"
    labels, predictions = (np.asarray(run.rows[name][:]) for name in ("label", "prediction"))
    rows = np.flatnonzero((labels == 1) & (predictions != 1))
    assert Path("dog.png").read_bytes() == draw(run, "top", rows=rows).png()
    assert "--right" in CliRunner().invoke(render, ["top", store, "--wrong", "--right"]).output
    done = CliRunner().invoke(render, ["top", store, "--layers", "halff"])
    assert done.exit_code == 1
    assert "half" in done.output
