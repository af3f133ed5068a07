"""Where everything stands: no channel is lost, nothing overlaps, and what is said is true."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from layertap.capture.errors import DrawError, SelectionError
from layertap.render import GridSpec, MontageSpec, Sheet, draw
from layertap.render.blocks import number, scaled
from layertap.render.colormaps import N_COLOURS, WHITE, Mark
from layertap.render.lettering import shorten, text_width, wrap, wrap_even, wrap_name
from layertap.render.sheet import FRAME, Panel, Text
from layertap.render.view import take
from test_render_run import FakeArray, FakeRun, FakeTap, a_run, maps_run


def panel_of(sheet: Sheet) -> Panel:
    """Return the largest panel of a sheet: its tiles, and not a sample of a mark."""
    return max(sheet.panels, key=lambda panel: panel.tiles.size)


def words(sheet: Sheet) -> list[str]:
    return [text.text for text in sheet.texts]


@pytest.mark.parametrize("kind", ["grid", "montage"])
@pytest.mark.parametrize("first", range(1, 601, 50))
def test_no_channel_is_lost(first: int, kind: str) -> None:
    """For any number of them: each is in its place, and the places lie within the panel, apart."""
    # Two digits tell a channel, as 25 shades that no other number has; the third pixel is the scale's end.
    digits = np.stack([np.arange(600) // 25, np.arange(600) % 25], axis=1) / 24 * 0.9
    tiles = np.concatenate([digits, np.ones((600, 1))], axis=1).astype(np.float32)[:, None]
    for n in range(first, first + 50):
        sheet = draw(maps_run(tiles[None, :n]), kind, channels="all", magnification=1).sheet
        panel = panel_of(sheet)
        assert panel.columns == math.ceil(math.sqrt(n))
        assert panel.n_lines == math.ceil(n / panel.columns)
        entries = panel.entries()
        assert entries.shape == (panel.size[1] + 2, panel.size[0] + 2)
        lines, columns = np.divmod(np.arange(n), panel.columns)
        ys, xs = 1 + lines * (1 + panel.gap_y), 1 + columns * (3 + panel.gap_x)
        assert [panel.place(i) for i in (0, n - 1)] == [
            (panel.x + xs[i] - 1, panel.y + ys[i] - 1) for i in (0, n - 1)
        ]
        shown = np.stack([entries[ys, xs + i] for i in range(3)], axis=1)
        assert (shown == np.rint(tiles[:n, 0] * (N_COLOURS - 1))).all()
        entries[ys[:, None], xs[:, None] + np.arange(3)] = WHITE
        assert (entries == WHITE).all()  # and nothing else is there


def test_each_value_is_a_square_of_the_factor_and_gaps_are_white() -> None:
    tiles = np.arange(3 * 2 * 3, dtype=np.uint8).reshape(3, 2, 3)
    panel = Panel(10, 20, tiles, 2, 4, 3, 5, "viridis")
    entries = panel.entries()
    assert entries.shape == (2 * 8 + 5 + 2, 2 * 12 + 3 + 2)
    for i, tile in enumerate(tiles):
        x, y = panel.place(i)
        part = entries[y - 19 : y - 19 + 8, x - 9 : x - 9 + 12]
        assert (part == np.kron(tile, np.ones((4, 4), np.uint8))).all()
        entries[y - 19 : y - 19 + 8, x - 9 : x - 9 + 12] = WHITE
    assert (entries == WHITE).all()


def test_frames_stand_around_tiles_and_not_around_empty_places() -> None:
    panel = Panel(1, 1, np.zeros((3, 2, 2), np.uint8), 2, 1, 4, 4, "RdBu_r", framed=True)
    entries = panel.entries()
    assert (entries == FRAME).sum() == 3 * 12
    assert (entries[6:, 6:] == WHITE).all()


@pytest.mark.parametrize("side", [1, 2, 7, 14, 28, 56, 112, 224])
def test_maps_of_any_size_are_magnified_by_a_whole_number(side: int) -> None:
    values = np.random.default_rng(0).random((1, 4, side, side), np.float32)
    panel = panel_of(draw(maps_run(values), "grid").sheet)
    assert panel.factor == max(1, round((64 if side > 1 else 28) / side))
    assert panel.tiles.shape == (4, side, side)


def test_one_scale_holds_for_a_layer_and_its_bar_says_so() -> None:
    run = a_run()
    run["conv1"].values[0] *= 0.5
    run["conv1"].values[1, 3, 0, 0] = 8
    sheet = draw(run, "grid", rows=[0, 1], layers="conv1").sheet
    assert [(bar.low, bar.high) for bar in sheet.bars] == [(0.0, 8.0)]
    assert "8" in words(sheet)
    assert "one scale for the layer" in words(sheet)
    first, second = sheet.panels
    value = run["conv1"].values[0, 2, 4, 4]
    assert first.tiles[2, 4, 4] == round(value / 8 * (N_COLOURS - 1))
    assert second.tiles[3, 0, 0] == N_COLOURS - 1


def test_a_figure_scale_is_the_same_in_every_layer() -> None:
    run = a_run()
    sheet = draw(run, "grid", layers=["conv1", "layer1.0"], scope="figure").sheet
    bars = {(bar.colormap, bar.low, bar.high) for bar in sheet.bars}
    largest = float(np.abs(run["layer1.0"].values[0, :9]).max())
    assert bars == {("RdBu_r", -largest, largest)}


def test_a_row_scale_has_a_bar_for_each_row() -> None:
    run = a_run()
    sheet = draw(run, "grid", rows=[0, 1], layers="conv1", scope="row").sheet
    assert [bar.high for bar in sheet.bars] == [float(run["conv1"].values[i, :9].max()) for i in (0, 1)]


def test_channel_scales_have_no_bar_and_say_so() -> None:
    sheet = draw(a_run(), "grid", layers="conv1", scope="channel").sheet
    assert not sheet.bars
    assert {"no bar: the scales differ", "each channel by itself"} <= set(words(sheet))
    assert all(tile.max() == N_COLOURS - 1 for tile in panel_of(sheet).tiles)
    highest = a_run()["conv1"].values[0, :9].max(axis=(1, 2))
    assert sheet.notes == tuple(f"conv1, channel {c}: from 0 to {number(h)}" for c, h in enumerate(highest))


def test_given_limits_are_those_of_the_bar() -> None:
    sheet = draw(a_run(), "grid", layers="conv1", scope=(0.25, 0.5)).sheet
    assert [(bar.low, bar.high) for bar in sheet.bars] == [(0.25, 0.5)]
    assert {"0.25", "0.5", "the scale was given"} <= set(words(sheet))
    tiles = panel_of(sheet).tiles
    values = a_run()["conv1"].values[0, :9]
    assert (tiles == Mark.OVER).sum() == (values > 0.5).sum()
    assert (tiles == Mark.UNDER).sum() == (values < 0.25).sum()


@pytest.mark.parametrize("kind", ["grid", "montage"])
def test_what_is_no_ordinary_value_is_listed(kind: str) -> None:
    run = a_run()
    values = run["conv1"].values
    values[0, 2], values[0, 5], values[0, 3, 1, 1], values[0, 4, 0, 0] = 0, 0.5, np.nan, np.inf
    sheet = draw(run, kind, layers="conv1").sheet
    assert {"all zero: 2", "constant: 5", "NaN in 3", "+inf in 4"} <= set(words(sheet))
    assert sheet.notes == (
        "conv1, row 0: all zero: 2",
        "conv1, row 0: constant: 5",
        "conv1, row 0: NaN in 3",
        "conv1, row 0: +inf in 4",
    )
    swatches = [panel.tiles.item() for panel in sheet.panels if panel.tiles.size == 1]
    assert swatches == [Mark.ZERO, Mark.CONSTANT, Mark.NAN, Mark.POSITIVE_INFINITY]


def test_a_layer_without_a_finite_value_has_no_bar() -> None:
    sheet = draw(maps_run(np.full((1, 2, 3, 3), np.nan, np.float32)), "montage").sheet
    assert not sheet.bars
    assert "no finite value" in words(sheet)


def test_a_layer_of_one_value_has_no_bar() -> None:
    sheet = draw(maps_run(np.zeros((1, 2, 3, 3), np.float32)), "montage").sheet
    assert not sheet.bars
    assert {"no bar: every value is 0", "all zero: 0, 1"} <= set(words(sheet))


def test_many_marked_channels_are_counted() -> None:
    values = np.zeros((1, 256, 2, 2), np.float32)
    sheet = draw(maps_run(values), "grid", channels="all", magnification=1).sheet
    assert any(text.startswith("all zero: 256 channels") for text in words(sheet))
    assert sheet.notes[0].endswith("254, 255")


def test_channels_are_numbered_in_their_order() -> None:
    run = a_run()
    run["conv1"].values[0, 11] += 5
    run["conv1"].values[0, 6] += 3
    sheet = draw(run, "grid", layers="conv1", channels="top:2").sheet
    assert {"11", "6"} <= set(words(sheet))
    assert "2 of 16 channels shown, by mean in this row" in " ".join(words(sheet))
    assert (panel_of(sheet).tiles[0] > panel_of(sheet).tiles[1].max() // 2).all()
    assert "11" not in words(draw(run, "grid", layers="conv1", channels="top:2", numbers=False).sheet)


def test_importance_is_over_all_drawn_rows() -> None:
    run = a_run()
    run["conv1"].values[0, 3] += 1
    run["conv1"].values[1, 9] += 5
    sheet = draw(run, "grid", rows=[0, 1], layers="conv1", channels="top:2").sheet
    numbers = [text.text for text in sheet.texts if text.text in ("3", "9")]
    assert numbers == ["9", "3", "9", "3"]  # in both rows alike


def test_a_channel_that_is_not_there_is_an_error() -> None:
    with pytest.raises(SelectionError, match="channel of conv1: 16 is not there; there are 0 to 15"):
        draw(a_run(), "grid", layers="conv1", channels=[3, 16])


def test_fewer_channels_than_asked_for_are_all_drawn() -> None:
    sheet = draw(a_run(), "grid", layers="conv1", channels="first:99").sheet
    assert "all 16 channels" in words(sheet)


def test_the_row_is_named_with_its_class_and_whether_it_is_right() -> None:
    said = words(draw(a_run(), "grid", rows=[0, 2]).sheet)
    assert {"cat", "predicted cat", "right", "predicted dog", "wrong", "row 2 · 002.png"} <= set(said)


def test_a_row_without_label_or_picture_is_drawn_without() -> None:
    run = maps_run(np.random.default_rng(0).random((2, 4, 3, 3)))
    sheet = draw(run, "grid").sheet
    assert not sheet.photos
    assert panel_of(sheet).x < 30
    run = a_run()
    run.rows["label"].values[:] = -1
    said = words(draw(run, "grid", rows=0).sheet)
    assert "predicted cat" in said
    assert not {"right", "wrong"} & set(said)


@pytest.mark.parametrize("shape", [(28, 28, 1), (28, 28), (224, 200, 3), (1000, 40, 3)])
def test_pictures_of_any_size_fit_beside_the_blocks(shape: tuple[int, ...]) -> None:
    run: Any = FakeRun(FakeTap("conv1", np.ones((1, 1, 2, 2))), picture=np.full((1, *shape), 9, np.uint8))
    (photo,) = draw(run, "grid").sheet.photos
    assert (photo.rgb() == 9).all()
    assert 100 <= max(photo.size) <= 320
    assert photo.size[0] < panel_of(draw(run, "grid").sheet).x


@pytest.mark.parametrize("labels", [np.zeros((6, 2), np.int64), np.zeros(6, np.float32)])
def test_labels_that_are_no_class_a_row_count_as_absent(labels: Any) -> None:
    run = a_run()
    run.rows["label"] = FakeArray("label", ("row", "x")[: labels.ndim], labels)
    said = words(draw(run, "grid", rows=[0, 2]).sheet)
    assert {"predicted cat", "predicted dog"} <= set(said)
    assert not {"cat", "right", "wrong"} & set(said)
    run.rows["prediction"] = run.rows["label"]
    assert not any("predicted" in text for text in words(draw(run, "grid", rows=[0, 2]).sheet))


def test_labels_that_are_text_are_shown_as_they_are() -> None:
    run = a_run()
    run.rows["label"].values = np.array(["frog", "", "frog", "cat", "cat", "cat"])
    run.rows["label"].dtype = run.rows["label"].values.dtype
    said = words(draw(run, "grid", rows=[0, 1]).sheet)
    assert {"frog", "predicted cat", "predicted dog"} <= set(said)
    assert not {"right", "wrong"} & set(said)  # a name and a number cannot be compared
    run.rows["prediction"] = FakeArray("prediction", ("row",), np.array(["frog"] * 6))
    said = words(draw(run, "grid", rows=[0, 1, 3]).sheet)
    assert (said.count("right"), said.count("wrong")) == (1, 1)


def test_a_vector_is_drawn_whole_as_numbered_cells() -> None:
    run = a_run()
    sheet = draw(run, "grid", layers="fc").sheet
    panel = panel_of(sheet)
    assert panel.tiles.shape == (10, 1, 1)
    assert {"9", "all 10 features"} <= set(words(sheet))
    largest = np.abs(run["fc"].values[0]).max()
    middle = (N_COLOURS - 1) / 2
    expected = np.rint(middle + run["fc"].values[0] / largest * middle)
    assert np.abs(panel.tiles.ravel() - expected).max() <= 1
    top = draw(run, "grid", layers="fc", channels="top:1:maximum").sheet
    assert str(run["fc"].values[0].argmax()) in words(top)


def _tokens(n: int) -> Any:
    values = np.arange(1.0, n + 1)[None, :, None] * np.array([1.0, 2.0])
    return FakeRun(FakeTap("block", values, ("row", "token", "feature"), "Block"))


@pytest.mark.parametrize(
    ("n", "shape", "n_empty"),
    [(16, (4, 4), 0), (7, (3, 3), 2), (18, (4, 5), 2), (6, (2, 3), 0), (2, (1, 2), 0), (1, (1, 1), 0)],
)
def test_a_sequence_is_wrapped_and_every_token_drawn(n: int, shape: tuple[int, int], n_empty: int) -> None:
    panel = panel_of(draw(_tokens(n), "grid").sheet)
    assert panel.tiles.shape == (2, *shape)
    assert (panel.tiles == WHITE).sum() == 2 * n_empty
    shown = panel.tiles[1][panel.tiles[1] != WHITE]
    assert shown.tolist() == [round(i / n * (N_COLOURS - 1)) for i in range(1, n + 1)]


def test_a_class_token_is_left_out_so_that_patches_keep_their_places() -> None:
    sheet = draw(_tokens(17), "grid").sheet
    tiles = panel_of(sheet).tiles
    assert tiles.shape == (2, 4, 4)
    assert tiles[1].ravel().tolist() == [round(i / 17 * (N_COLOURS - 1)) for i in range(2, 18)]
    assert "class token left out, 4 \N{MULTIPLICATION SIGN} 4 patches" in " ".join(words(sheet))


@pytest.mark.parametrize("sign", [1, -1])
def test_where_a_sequence_has_no_value_is_page_outside_of_the_frame(sign: int) -> None:
    run = _tokens(7)
    run["block"].values *= sign
    panel = panel_of(draw(run, "grid", magnification=3).sheet)
    width, height = panel.tile_size
    tile = panel.entries()[: height + 2, : width + 2]
    assert (tile[8:, 5:] == WHITE).all()  # the last line has one value of three
    assert (tile[7, 4:] == FRAME).all()
    assert (tile[7:, 4] == FRAME).all()
    assert (tile[1:10, 1:4] < N_COLOURS).all()


def test_channels_that_come_last_are_found_by_name() -> None:
    values = np.random.default_rng(0).random((1, 4, 5, 3))
    run: Any = FakeRun(FakeTap("conv", values, ("row", "y", "x", "channel")))
    panel = panel_of(draw(run, "montage", channels=[2, 0]).sheet)
    assert panel.tiles.shape == (2, 4, 5)
    assert (panel.tiles[0] == np.rint(values[0, ..., 2] / values[0][..., [0, 2]].max() * 230)).all()


def test_a_value_a_row_is_drawn() -> None:
    run: Any = FakeRun(FakeTap("loss", np.array([0.5, 1.0]), ("row",), "Loss"))
    assert panel_of(draw(run, "montage", rows="0:2").sheet).tiles.shape == (2, 1, 1)


def test_a_tap_of_four_axes_is_refused_or_left_out() -> None:
    video = FakeTap("video", np.ones((1, 2, 3, 4, 4)), ("row", "channel", "t", "y", "x"))
    run: Any = FakeRun(video, FakeTap("conv1", np.ones((1, 2, 3, 3))))
    with pytest.raises(
        DrawError, match=r"video cannot be drawn: a row of it is \(channel=2, t=3, y=4, x=4\) of"
    ):
        draw(run, "grid", layers="video")
    assert "video" not in words(draw(run, "grid").sheet)
    only: Any = FakeRun(video)
    with pytest.raises(DrawError, match="no tap that can be drawn"):
        draw(only, "grid")


def test_a_montage_of_one_channel_is_over_rows() -> None:
    run = a_run()
    run["conv1"].values[4, 5] = 0
    sheet = draw(run, "montage", rows="0:6", layers="conv1", channels=5).sheet
    assert panel_of(sheet).tiles.shape == (6, 8, 8)
    assert {"channel 5 · 6 rows · the numbers are rows", "all zero: row 4"} <= set(words(sheet))
    largest = run["conv1"].values[:, 5].max()
    assert (panel_of(sheet).tiles[3] == np.rint(run["conv1"].values[3, 5] / largest * 230)).all()


def test_a_montage_of_rows_and_channels_is_a_table() -> None:
    sheet = draw(a_run(), "montage", rows=[4, 1], layers="conv1", channels="first:3").sheet
    panel = panel_of(sheet)
    assert (panel.columns, panel.n_lines) == (3, 2)
    assert {"0", "1", "2", "row 1", "row 4"} <= set(words(sheet))


def test_a_table_too_wide_for_a_page_has_several_lines_a_row() -> None:
    run = maps_run(np.random.default_rng(0).random((3, 300, 7, 7), np.float32) + 0.1)
    sheet = draw(run, "montage", rows=[2, 0]).sheet
    assert sheet.width <= 2000
    panels = [panel for panel in sheet.panels if panel.tiles.size > 1]
    assert [len(panel.tiles) for panel in panels] == [300, 300]
    assert panels[0].y + panels[0].size[1] < panels[1].y - 12
    largest = run["conv1"].values[[2, 0]].max()
    for panel, row in zip(panels, (2, 0), strict=True):
        assert (panel.tiles == np.rint(run["conv1"].values[row] / largest * 230)).all()
    said = words(sheet)
    assert (said.count("299"), said.count("row 2"), said.count("row 0")) == (2, 1, 1)


def test_columns_of_a_table_are_those_of_each_row() -> None:
    sheet = draw(a_run(), "montage", rows=[4, 1], layers="conv1", channels="first:3", columns=2).sheet
    panels = [panel for panel in sheet.panels if panel.tiles.size > 1]
    assert [(panel.columns, panel.n_lines) for panel in panels] == [(2, 2), (2, 2)]


@pytest.mark.parametrize("shape", [(1, 2048, 56, 56), (1, 64, 224, 224), (40, 2, 112, 112)])
def test_a_montage_is_never_wider_than_a_page(shape: tuple[int, ...]) -> None:
    run = maps_run(np.ones(shape, np.float16))
    assert draw(run, "montage", rows=slice(None), magnification=1).sheet.width <= 2000
    channel = draw(run, "montage", rows=slice(None), channels=0, columns=60).sheet
    assert panel_of(channel).columns == min(60, shape[0])


def test_numbers_that_are_asked_for_are_drawn() -> None:
    run = maps_run(np.random.default_rng(0).random((1, 2048, 7, 7), np.float32))
    assert "2047" not in words(draw(run, "montage", magnification=1).sheet)
    for kind in ("montage", "grid"):
        sheet = draw(run, kind, channels="all", magnification=1, numbers=True).sheet
        assert {str(i) for i in range(2048)} <= set(words(sheet))
        boxes = [
            box for box, text in zip(_boxes(sheet.texts), sheet.texts, strict=True) if text.text.isdigit()
        ]
        pairs = pairwise(boxes)
        assert all(a[2] <= b[0] or a[1] != b[1] for a, b in pairs)


def test_a_measure_that_ranks_no_vector_is_refused() -> None:
    for by in ("variance", "sparsity"):
        with pytest.raises(DrawError, match=rf"{by} does not rank fc.*mean, maximum, l1 and l2"):
            draw(a_run(), "grid", layers="fc", channels=f"top:3:{by}")
    sheet = draw(a_run(), "grid", rows=[0, 1], layers="fc", channels="top:3:variance").sheet
    assert "3 of 10 features shown, by variance over these 2 rows" in " ".join(words(sheet))


def test_a_shape_is_never_cut() -> None:
    values = np.ones((1, 2048, 1, 1), np.float32)
    tap = FakeTap("avgpool", values, type="AdaptiveAvgPool2dOfAnAstonishinglyLongName")
    for kind in ("grid", "montage"):
        run: Any = FakeRun(tap)
        said = words(draw(run, kind, channels="first:1", columns=1).sheet)
        assert any(
            text.endswith("2048 \N{MULTIPLICATION SIGN} 1 \N{MULTIPLICATION SIGN} 1") and "…" not in text
            for text in said
        )


def test_names_break_at_a_dot_before_they_are_cut() -> None:
    assert wrap_name("layer1.0.conv2", 400, 13) == ["layer1.0.conv2"]
    assert wrap_name("features.denseblock4.denselayer16", 190, 13) == [
        *("features.denseblock4.", "denselayer16"),
    ]
    first, second = wrap_name("backbone.stages.2.blocks.11.attention.output.dense", 150, 13)
    assert first == "backbone.stages."
    assert second.startswith("2.")
    assert "…" in second
    assert len(wrap_name("a" * 80, 150, 13)) == 1


def test_without_pictures_there_is_no_column_for_them() -> None:
    sheet = draw(a_run(), "grid", rows=[0, 2], picture=False).sheet
    assert not sheet.photos
    assert min(panel.x for panel in sheet.panels) < 30
    assert "row 2 · 002.png · class cat · predicted dog (wrong)" in words(sheet)


def test_a_montage_says_what_it_shows() -> None:
    said = words(draw(a_run(), "montage", rows=2, layers="conv1").sheet)
    assert {"conv1", "all 16 channels", "row 2 · 002.png · class cat · predicted dog (wrong)"} <= set(said)


@pytest.mark.parametrize("columns", [1, 3, 99])
def test_columns_can_be_given(columns: int) -> None:
    panel = panel_of(draw(a_run(), "montage", layers="conv1", columns=columns).sheet)
    assert panel.columns == min(columns, 16)


def test_a_picture_without_end_is_refused() -> None:
    with pytest.raises(DrawError, match="smaller magnification"):
        draw(a_run(), "montage", layers="conv1", magnification=1000)


# Words


def _boxes(texts: tuple[Text, ...]) -> list[tuple[float, float, float, float]]:
    boxes = []
    for text in texts:
        width = text_width(text.text, text.size, text.bold)
        left = text.x - {"left": 0, "center": width / 2, "right": width}[text.align]
        boxes.append((left, text.y - 0.75 * text.size, left + width, text.y))
    return boxes


@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
@pytest.mark.parametrize(
    "options",
    [{}, {"scope": (0, 1)}, {"channels": "all"}, {"scope": "row"}, {"picture": False}, {"numbers": True}],
)
def test_nothing_overlaps_and_nothing_leaves_the_sheet(rows: list[int], options: dict[str, Any]) -> None:
    run = a_run()
    long = "backbone.stages.2.blocks.11.attention.output.dense"
    run.taps[long] = FakeTap(long, run["conv1"].values.copy(), type="AVeryLongNameOfAModule")
    run[long].values[0, :4] = np.nan
    sheet = draw(run, "grid", rows=rows, layers=[long, "conv1", "fc"], **options).sheet
    boxes = _boxes(sheet.texts)
    images = [(x, y, x + p.shape[1], y + p.shape[0]) for x, y, p in sheet.pictures()]
    for x0, y0, x1, y1 in (*boxes, *images):
        assert min(x0, y0) >= 0
        assert x1 <= sheet.width + 1
        assert y1 <= sheet.height
    for i, (ax0, ay0, ax1, ay1) in enumerate(boxes):
        for bx0, by0, bx1, by1 in boxes[i + 1 :]:
            assert ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0
    for i, (ax0, ay0, ax1, ay1) in enumerate(images):
        for bx0, by0, bx1, by1 in images[i + 1 :]:
            assert ax1 <= bx0 + 2 or bx1 <= ax0 + 2 or ay1 <= by0 + 2 or by1 <= ay0 + 2


def test_long_names_lose_their_middle() -> None:
    name = "backbone.stages.2.blocks.11.attention.output.dense"
    short = shorten(name, 150, 13)
    head, tail = short.split("…")
    assert name.startswith(head)
    assert name.endswith(tail)
    assert abs(len(head) - len(tail)) <= 1
    assert text_width(short, 13) <= 150
    assert shorten("conv1", 150, 13) == "conv1"
    assert shorten("飞机" * 30, 60, 13).count("…") == 1


def test_notes_are_wrapped_by_words() -> None:
    assert wrap("one two three", text_width("one two", 10) + 1, 10) == ["one two", "three"]
    assert wrap("", 100, 10) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.0, "0"), (1.0, "1"), (3.14159, "3.14"), (31415.9, "3.14e4"), (-2.5e-7, "-2.5e-7")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_a_specification_can_be_drawn_as_it_is() -> None:
    spec = GridSpec(rows=(2,), layers=("conv1",), channels="top:4", scope="figure")
    picture = draw(a_run(), spec)
    assert picture.spec == spec
    montage = MontageSpec(rows=(2,), layers=("conv1",))
    assert draw(a_run(), montage).sheet.width == draw(a_run(), "montage", rows=2, layers="conv1").sheet.width
    with pytest.raises(DrawError, match="says it all"):
        draw(a_run(), spec, rows=3)


# Scales that are cut, signs, pages


def said(sheet: Sheet) -> str:
    return " ".join(words(sheet))


@pytest.mark.parametrize("kind", ["grid", "montage"])
@pytest.mark.parametrize("clip", [80, 99.5, (10, 90)])
def test_what_percentiles_cut_off_is_marked_counted_and_said(kind: str, clip: Any) -> None:
    run = a_run()
    for layer, name in (("conv1", "viridis"), ("layer1.0", "RdBu_r")):
        sheet = draw(run, kind, layers=layer, channels="first:9", clip=clip).sheet
        values = run[layer].values[0, :9]
        (bar,) = sheet.bars
        assert bar.colormap == name
        if isinstance(clip, tuple):
            low, high = (np.percentile(values, one, method="inverted_cdf") for one in clip)
            assert "clipped at percentiles 10 and 90" in said(sheet)
        else:
            sizes = np.abs(values) if layer == "layer1.0" else values
            high = np.percentile(sizes, clip, method="inverted_cdf")
            low = -high if layer == "layer1.0" else 0.0
            assert f"clipped at percentile {clip}" in said(sheet)
        assert (bar.low, bar.high) == (low, high)
        tiles = panel_of(sheet).tiles
        over, under = values > high, values < low
        assert ((tiles == Mark.OVER) == over).all()
        assert ((tiles == Mark.UNDER) == under).all()
        assert over.any()
        channels = ", ".join(str(c) for c in np.flatnonzero(over.any((1, 2))))
        assert f"{over.sum()} over {number(high)} in" in said(sheet)
        assert any(f"{over.sum()} over {number(high)} in {channels}" in note for note in sheet.notes)
        assert ("under" in said(sheet)) == under.any()


@pytest.mark.parametrize("scope", ["row", "channel", "figure"])
def test_percentiles_are_of_what_shares_a_scale(scope: str) -> None:
    run = a_run()
    sheet = draw(
        run, "grid", rows=[0, 1], layers=["conv1", "fc"], channels="first:4", scope=scope, clip=75
    ).sheet
    maps, vectors = run["conv1"].values[[0, 1], :4], run["fc"].values[[0, 1], :4]
    panels = [panel for panel in sheet.panels if panel.tiles.shape[1:] == (8, 8)]
    shown = np.stack([panel.tiles for panel in panels])
    if scope == "figure":
        both = np.abs(np.concatenate([maps.ravel(), vectors.ravel()]))
        limits = np.percentile(both, 75, method="inverted_cdf")
    else:
        axes = (1, 2, 3) if scope == "row" else (0, 2, 3)
        limits = np.percentile(maps, 75, axis=axes, method="inverted_cdf", keepdims=True)
    assert ((shown == Mark.OVER) == (maps > limits)).all()
    if scope != "figure":
        n = (maps > limits).sum()
        assert f"{n} over its limits in" in said(sheet)
        for row, one in zip((0, 1), maps > limits, strict=True):
            assert any(
                note.startswith(f"conv1, row {row}: {one.sum()} over its limits in") for note in sheet.notes
            )


def test_percentiles_that_leave_no_range_cut_nothing_and_this_is_said() -> None:
    values = np.zeros((1, 3, 10, 10), np.float32)
    values[0, :2, 0, 0] = 1, 2
    values[0, 1] += np.arange(100, dtype=np.float32).reshape(10, 10) / 1000
    sheet = draw(maps_run(values[:, :1]), "grid", clip=90).sheet
    assert [(bar.low, bar.high) for bar in sheet.bars] == [(0, 1)]
    assert "from 0, not clipped: percentile 90 would leave no range" in said(sheet)
    sheet = draw(maps_run(values), "grid", clip=90, scope="channel").sheet
    assert "clipped at percentile 90 where that leaves a range" in said(sheet)
    tiles = panel_of(sheet).tiles
    assert (tiles[0] == Mark.OVER).sum() == 0
    assert (tiles[1] == Mark.OVER).sum() == 10
    assert "11 over" not in said(sheet)


def test_what_is_not_finite_counts_for_no_percentile() -> None:
    values = np.random.default_rng(0).random((1, 2, 8, 8)).astype(np.float32)
    spoiled = values.copy()
    spoiled[0, 1] = np.nan
    spoiled[0, 0, 0, :3] = np.inf, -np.inf, np.nan
    sheet = draw(maps_run(spoiled), "grid", clip=90).sheet
    finite = spoiled[np.isfinite(spoiled)]
    limit = np.percentile(finite, 90, method="inverted_cdf")
    assert sheet.bars[0].high == limit
    assert f"{(finite > limit).sum()} over" in said(sheet)
    assert {"+inf in 0", "-inf in 0", "NaN in 0, 1"} <= set(words(sheet))
    nothing = draw(maps_run(np.full((1, 2, 3, 3), np.nan)), "grid", clip=90).sheet
    assert "no finite value" in words(nothing)


@pytest.mark.parametrize("shape", ["positive", "signed"])
def test_the_sign_of_a_scale_can_be_chosen(shape: str) -> None:
    run = a_run()
    layer = "conv1" if shape == "positive" else "layer1.0"
    values = run[layer].values[0, :9]
    (bar,) = draw(run, "grid", layers=layer, sign="sequential").sheet.bars
    assert (bar.colormap, bar.low, bar.high) == ("viridis", min(values.min(), 0), values.max())
    sheet = draw(run, "grid", layers=layer, sign="diverging").sheet
    largest = np.abs(values).max()
    assert [(bar.colormap, bar.low, bar.high) for bar in sheet.bars] == [("RdBu_r", -largest, largest)]
    assert "symmetric around 0" in words(sheet)
    auto = draw(run, "grid", layers=layer).sheet
    assert ("symmetric around 0" if shape == "signed" else "from 0") in words(auto)


@pytest.mark.parametrize(
    "options", [{}, {"scope": "channel"}, {"scope": "row"}, {"clip": 90}, {"scope": (-1, 1)}]
)
@pytest.mark.parametrize("rows", [[0], [0, 3]])
def test_a_bar_is_true_of_every_tile_beside_it(rows: list[int], options: dict[str, Any]) -> None:
    """Wherever there is one: each value of these tiles has the colour that the bar gives it."""
    run = a_run()
    for layer in ("conv1", "layer1.0", "fc"):
        for kind in ("grid", "montage"):
            sheet = draw(run, kind, rows=rows, layers=layer, channels="first:5", **options).sheet
            panels = [panel for panel in sheet.panels if panel.tiles.size > 1]
            values = run[layer].values[rows, :5].reshape(-1, *panels[0].tiles.shape[1:])
            if options.get("scope") == "row" and kind == "grid":
                assert len(sheet.bars) == len(rows)
            elif (len(rows) > 1 and options.get("scope") == "row") or options.get("scope") == "channel":
                assert not sheet.bars
                assert "no bar: the scales differ" in words(sheet)
                continue
            shown = np.concatenate([panel.tiles for panel in panels])
            for i, bar in enumerate(sheet.bars):
                part = slice(5 * i, 5 * (i + 1)) if len(sheet.bars) > 1 else slice(None)
                line = bar.line.astype(float)
                at = np.linspace(bar.low, bar.high, len(line))
                ordinary = shown[part] < N_COLOURS
                told = np.interp(values[part][ordinary], at, line)
                assert np.abs(told - shown[part][ordinary]).max() <= 1.5
                assert (values[part][shown[part] == Mark.OVER] > bar.high).all()
                assert (values[part][shown[part] == Mark.UNDER] < bar.low).all()


@pytest.mark.parametrize("kind", ["grid", "montage"])
def test_channels_come_in_pages_that_leave_none_out(kind: str) -> None:
    run = maps_run(np.random.default_rng(0).random((1, 70, 3, 3), np.float32) + 0.1)
    seen: list[str] = []
    for page, n in ((1, 32), (2, 32), (3, 6)):
        sheet = draw(run, kind, channels=f"page:{page}:32").sheet
        assert f"{n} of 70 channels shown, page {page} of 3" in said(sheet)
        numbers = {text.text for text in sheet.texts if text.text.isdigit() and text.size == 9}
        seen += sorted(numbers & {str(c) for c in range(32 * (page - 1), 32 * page)}, key=int)
    assert seen == [str(c) for c in range(70)]
    with pytest.raises(
        SelectionError, match="page 4 of the channels of conv1 is not there; its 70 make 3 pages"
    ):
        draw(run, kind, channels="page:4:32")


@pytest.mark.parametrize("over", ["drawn", "data"])
def test_pages_of_a_ranking_follow_each_other(over: str) -> None:
    run = a_run()
    measures = run["conv1"].values[0 if over == "drawn" else slice(None)].mean((-2, -1))
    measures = measures if over == "drawn" else measures.mean(0)
    expected = np.argsort(-measures, kind="stable").tolist()
    got: list[int] = []
    for page in (1, 2, 3):
        sheet = draw(run, "grid", layers="conv1", channels=f"page:{page}:6:mean", over=over).sheet
        got += [
            int(text.text)
            for text in sheet.texts
            if text.text.isdigit()
            and text.ink.is_grey
            and text.size == 9
            and text.y < panel_of(sheet).y + panel_of(sheet).size[1]
        ]
        rows = "in this row" if over == "drawn" else "over all 6 rows"
        assert f"page {page} of 3, by mean {rows}" in said(sheet)
    assert got == expected


def test_a_ranking_says_over_which_rows_it_is() -> None:
    sheet = draw(a_run(), "grid", rows=[0, 2], layers="conv1", channels="top:2").sheet
    assert "2 of 16 channels shown, by mean over these 2 rows" in said(sheet)


# Stores that are not whole


@pytest.mark.parametrize("kind", ["grid", "montage"])
def test_a_picture_of_an_unfinished_store_says_so(kind: str) -> None:
    run = a_run(6)
    run._committed[4:] = False
    narrow = {"picture": False} if kind == "grid" else {}
    for options in (narrow, {"title": "a title"}):
        sheet = draw(run, kind, layers="conv1", channels=0, **options).sheet
        assert "the capture is not finished: 4 of 6 rows" in words(sheet)
        assert sheet.notes[0] == "the capture is not finished: 4 of 6 rows"
        boxes = _boxes(sheet.texts)
        assert max(box[2] for box in boxes) <= sheet.width
    run._committed[:] = True
    assert "finished" not in said(draw(run, kind, layers="conv1").sheet)


def test_lines_of_a_caption_are_about_as_long_as_each_other() -> None:
    text = "one scale for the layer over all 400 rows"
    width = text_width("one scale for the layer over all", 10) + 1
    assert wrap(text, width, 10) == ["one scale for the layer over all", "400 rows"]
    assert wrap_even(text, width, 10) == ("one scale for the layer", "over all 400 rows")
    assert wrap_even("one two", 1000, 10) == ("one two",)
    assert wrap_even("", 100, 10) == ()
    assert wrap_even("a " + "b" * 90, 100, 10) == tuple(wrap("a " + "b" * 90, 100, 10))


def test_colours_are_symmetric_where_limits_are_not_and_this_is_said() -> None:
    for options in ({"scope": (-1, 3)}, {"clip": (1, 90)}):
        assert "colours symmetric around 0" in said(draw(a_run(), "grid", layers="layer1.0", **options).sheet)
    sheet = draw(a_run(), "grid", layers="layer1.0", scope=(-2, 2)).sheet
    assert "symmetric around 0" in words(sheet)


def test_what_is_computed_has_no_scale_of_the_data_set() -> None:
    spec = GridSpec(rows=(0,), layers=("conv1",), scope="data")
    taken = take(a_run(), spec)
    computed = replace(taken, layers=(replace(taken.layers[0], data=None),))
    with pytest.raises(DrawError, match="no limits over the data set in a grid"):
        scaled(computed, spec)
