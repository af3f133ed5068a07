"""Comparisons of layers, classes, outcomes and stores show what plain numpy says of the same values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.capture import reader
from layertap.capture.errors import DrawError, SelectionError
from layertap.render import ClassesSpec, LayersSpec, OutcomesSpec, StoresSpec, draw, means, stores
from layertap.render.cli import render
from layertap.render.colormaps import N_COLOURS, Mark
from layertap.render.depth import MOST_CHANNELS, Moments, measure
from layertap.render.kinds import spec_from_json
from layertap.render.layers import MEASURED_ROWS, common_side
from layertap.render.painters import painter
from layertap.render.selection import ChannelChoice
from layertap.render.sheet import Bar, Ink, Panel, Sheet
from numpy.typing import NDArray
from test_render_run import FakeArray, FakeRun, FakeTap, a_run

Values = NDArray[Any]
ALL = ChannelChoice("all")
MINUS = "\N{MINUS SIGN}"


def words(sheet: Sheet) -> list[str]:
    return [text.text for text in sheet.texts]


def tiles_of(sheet: Sheet) -> list[Panel]:
    """Return the panels of maps, without samples of marks and the bars of measures."""
    return [panel for panel in sheet.panels if panel.tiles.shape[1:] not in ((1, 1), (34, 26))]


def colours(values: Values, bar: Bar) -> Values:
    """Return the palette entries of values on a bar's scale, worked out anew."""
    low = -max(abs(bar.low), abs(bar.high)) if bar.colormap == "RdBu_r" else bar.low
    high = -low if bar.colormap == "RdBu_r" else bar.high
    return np.rint((values - low) / (high - low) * (N_COLOURS - 1))


def assert_shows(panel: Panel, values: Values, bar: Bar) -> None:
    """Hold a panel's entries to values, but for one of rounding."""
    assert panel.colormap == bar.colormap
    assert panel.tiles.shape == values.shape
    assert np.abs(panel.tiles - colours(values, bar)).max() <= 1


# Layers


def samples(values: Values) -> Values:
    """Return (channels, samples) in float64, each position of each row a sample."""
    return np.moveaxis(values.astype(np.float64), 1, 0).reshape(values.shape[1], -1)


def effective_rank(covariance: Values) -> float:
    singular = np.linalg.svd(covariance, compute_uv=False)
    p = singular / singular.sum()
    p = p[p > 1e-15]
    return float(np.exp(-(p * np.log(p)).sum()))


def mean_correlation(flat: Values) -> float:
    r = np.corrcoef(flat)
    return float(np.abs(r[np.triu_indices(len(r), 1)]).mean())


@pytest.mark.parametrize("piece_bytes", [1, 2**25])
def test_what_is_measured_of_a_layer_is_what_numpy_says(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(means, "PIECE_BYTES", piece_bytes)
    rng = np.random.default_rng(0)
    values = np.maximum(np.einsum("ij,rjyx->riyx", rng.random((8, 5)), rng.normal(3, 2, (12, 5, 6, 7))), 0)
    values = (values * (values > 3) + 1000).astype(np.float32) - 1000
    rows = np.array([0, 3, 4, 11])
    found = measure(FakeRun(FakeTap("a", values)), "a", rows)
    flat = samples(values[rows])
    assert found.resolution == (6, 7)
    assert found.zeros == (flat == 0).mean() > 0.01
    assert found.correlation == pytest.approx(mean_correlation(flat), rel=1e-10)
    assert found.rank == pytest.approx(effective_rank(np.cov(flat)), rel=1e-8)


def test_effective_rank_is_one_of_copies_and_their_number_of_independent_channels() -> None:
    base = np.linspace(-1, 1, 64)
    copies, independent = Moments(3), Moments(4)
    copies.add(np.stack([base, -2 * base, 5 * base + 9]))
    independent.add(np.eye(4).repeat(16, axis=1) + 0.0)
    independent.products = np.eye(4)
    assert copies.rank() == pytest.approx(1)
    assert copies.correlation() == pytest.approx(1)
    assert independent.rank() == pytest.approx(4)


def test_dead_constant_and_unfinite_channels_have_no_part_in_correlation_and_rank() -> None:
    values = np.random.default_rng(1).random((6, 7, 4, 4), np.float32)
    values[:, 1], values[:, 2] = 0, 0.1
    values[2, 3, 0, 0], values[5, 4, 1, 1] = np.nan, np.inf
    found = measure(FakeRun(FakeTap("a", values)), "a", np.arange(6))
    flat = samples(values[:, [0, 5, 6]])
    assert found.n_left_out == 2
    assert found.zeros == (values == 0).sum() / np.isfinite(values).sum()
    assert found.correlation == pytest.approx(mean_correlation(flat))
    assert found.rank == pytest.approx(effective_rank(np.cov(flat)))


def test_what_cannot_be_measured_is_no_number() -> None:
    one = measure(FakeRun(FakeTap("a", np.zeros((3, 4), np.float32), ("row", "feature"))), "a", np.arange(3))
    assert one.zeros == 1
    assert np.isnan([one.correlation, one.rank]).all()
    assert one.resolution == ()
    wide = Moments(MOST_CHANNELS + 1)
    wide.add(np.ones((MOST_CHANNELS + 1, 1)))
    assert wide.products is None
    assert np.isnan([wide.correlation(), wide.rank()]).all()
    huge = Moments(2)
    huge.add(np.array([[1e200, 2e200, 0], [1.0, 2.0, 4.0]]))
    assert np.isnan(huge.rank())


def test_measuring_reads_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((40, 4, 8, 8), np.float32)
    monkeypatch.setattr(means, "PIECE_BYTES", 3 * 8 * values[0].size)
    read: list[int] = []
    monkeypatch.setattr(means, "read_maps", _counting(read))
    run = FakeRun(FakeTap("a", values))
    measure(run, "a", np.arange(40))
    means.mean_maps(run, "a", [np.arange(20), np.arange(10, 40)], ALL)
    assert max(read) == 3
    assert sum(read) == 2 * 40  # each row once, though it is in two groups


def _counting(read: list[int]) -> Any:
    real = means.read_maps

    def counted(tap: Any, rows: Values, *rest: Any) -> Values:
        read.append(len(rows))
        return real(tap, rows, *rest)

    return counted


def layers_run() -> Any:
    rng = np.random.default_rng(3)
    return FakeRun(
        FakeTap("conv1", rng.random((80, 4, 28, 28), np.float32)),
        FakeTap("conv2", 5 * rng.random((80, 16, 14, 14), np.float32)),
        FakeTap("conv3", 2 * rng.random((80, 9, 7, 7), np.float32)),
        FakeTap("fc", rng.random((80, 5), np.float32), ("row", "feature"), "Linear"),
        picture=rng.integers(0, 256, (80, 32, 32, 3), np.uint8),
    )


def test_layers_stand_side_by_side_at_one_size_and_under_one_scale() -> None:
    run = layers_run()
    sheet = draw(run, "layers", rows=7).sheet
    panels = sheet.panels[:4]
    assert [panel.tile_size for panel in panels[:3]] == [(56, 56)] * 3
    assert len({panel.y for panel in panels}) == 1
    (bar,) = sheet.bars
    values = [run[name].values[7] for name in ("conv1", "conv2", "conv3", "fc")]
    assert (bar.low, bar.high) == (0, max(one.max() for one in values))
    for panel, one in zip(panels, values, strict=True):
        assert_shows(panel, one[:9].reshape(-1, *(one.shape[1:] or (1, 1))), bar)
    assert "one scale for all layers" in words(sheet)
    assert "Maps of row 7, each 56 pixels long. Measured over 64 rows." in words(sheet)


def test_unless_they_are_named_only_what_layers_give_is_drawn() -> None:
    run = layers_run()
    run.taps["conv1"].kind, run.taps["conv3"].kind = "attention", "grad"
    assert [name for name in run.taps if name in words(draw(run, "layers", rows=7).sheet)] == ["conv2", "fc"]
    sheet = draw(run, "layers", rows=7, layers=["conv1", "fc"]).sheet
    assert [name for name in run.taps if name in words(sheet)] == ["conv1", "fc"]
    for tap in run.taps.values():
        tap.kind = "grad"
    assert [name for name in run.taps if name in words(draw(run, "layers", rows=7).sheet)] == list(run.taps)


def test_each_layer_may_have_its_own_scale() -> None:
    run = layers_run()
    sheet = draw(run, "layers", rows=7, scope="layer").sheet
    assert [bar.high for bar in sheet.bars] == [tap.values[7, :9].max() for tap in run.taps.values()]
    assert words(sheet).count("one scale for the layer") == 4


def test_of_several_rows_their_mean_is_drawn_and_measured() -> None:
    run = layers_run()
    sheet = draw(run, "layers", rows="10:30", layers="conv2", channels="top:3").sheet
    mean = run["conv2"].values[10:30].mean(axis=0, dtype=np.float64)
    top = np.argsort(-mean.mean((1, 2)))[:3]
    assert_shows(sheet.panels[0], mean[top], sheet.bars[0])
    assert [text for text in words(sheet) if text.isdigit()][:3] == [str(c) for c in top]
    assert "Maps of the mean of 20 rows," in words(sheet)[0]
    assert "Measured over 20 rows." in " ".join(words(sheet)[:2])
    assert not sheet.photos


def test_the_numbers_beneath_a_layer_are_those_of_it() -> None:
    run = layers_run()
    run["conv2"].values[:, :4] = 0
    sheet = draw(run, "layers", rows=7, measured="0:50", layers=["conv1", "conv2"]).sheet
    flat = samples(run["conv2"].values[:50])
    said = words(sheet)
    assert {"28 \N{MULTIPLICATION SIGN} 28", "14 \N{MULTIPLICATION SIGN} 14", "25 %"} <= set(said)
    assert f"{mean_correlation(flat[4:]):.3g}" in said
    assert f"{effective_rank(np.cov(flat)):.3g} of 16" in said
    bars = [panel.tiles[0] for panel in sheet.panels if panel.tiles.shape[1:] == (34, 26)]
    full = [(bar[:, 0] == bar.min()).mean() if bar.min() != bar.max() else None for bar in bars]
    # Resolution, zeros, correlation and rank, each of both layers.
    assert full[1] == 0.5
    assert full[3] == pytest.approx(0.25, abs=1 / 34)
    assert full[7] == pytest.approx(effective_rank(np.cov(flat)) / 16, abs=1 / 34)


def test_rows_that_differ_in_shape_are_measured_each_in_its_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    rows = [rng.random((n, 3), np.float32) for n in (4, 2, 0, 7, 2)]

    def batches(numbers: Values) -> dict[str, Values]:
        return {"texts": rows[int(numbers[0])][None]}

    source = lt.ArraySource(np.arange(5))
    run = lt.record_dataset(batches, source, tmp_path / "r.zarr", ["**"], batch_size=1, ragged="**:7x3")
    found = measure(run, "texts", np.array([0, 1, 2, 3, 4]))
    flat = np.concatenate(rows).astype(np.float64).T
    assert (found.resolution, found.varies, found.n_samples) == ((7,), True, 15)
    assert found.correlation == pytest.approx(mean_correlation(flat))
    assert found.rank == pytest.approx(effective_rank(np.cov(flat)))
    assert "up to 7" in words(draw(run, "layers", rows=3).sheet)


def test_of_a_store_that_is_not_finished_it_is_said() -> None:
    run = a_run(30)
    run._committed[20:] = False
    for kind, options in (
        ("classes", {}),
        ("outcomes", {}),
        ("layers", {}),
        ("stores", {"other": a_run(30)}),
    ):
        sheet = draw(run, kind, layers="conv1", **options).sheet
        assert "The capture is not finished: 20 of 30 rows." in words(sheet)
    assert "Means over 20 rows, by class." in words(draw(run, "classes", layers="conv1").sheet)


def test_a_rank_that_few_samples_bound_is_said_to_be() -> None:
    run = FakeRun(FakeTap("fc", np.random.default_rng(2).random((6, 9)), ("row", "feature"), "Linear"))
    sheet = draw(run, "layers").sheet
    assert "fc: 6 samples of 9 channels have a rank below 6" in words(sheet)
    assert measure(run, "fc", np.arange(6)).rank < 5


def test_one_row_is_measured_with_others_spread_over_all() -> None:
    spec = draw(layers_run(), "layers").spec
    assert spec.rows == (0,)
    assert spec.measured is None
    big = FakeRun(FakeTap("a", np.arange(1000, dtype=np.float32).reshape(1000, 1, 1, 1).repeat(2, 3)))
    assert f"Measured over {MEASURED_ROWS} rows." in words(draw(big, "layers").sheet)[0]


@pytest.mark.parametrize("sizes", [(32, 16, 8), (56, 28, 14, 7), (112, 1, 7), (224, 7), (13,)])
def test_tiles_have_one_side_where_whole_multiples_do(sizes: tuple[int, ...]) -> None:
    side = common_side(sizes)
    assert len({round(side / size) * size for size in sizes if size > 1}) == 1
    assert side >= max(sizes)


def test_maps_that_cannot_be_of_one_size_are_said_to_differ() -> None:
    run = FakeRun(
        *(FakeTap(f"c{n}", np.ones((2, 1, n, n), np.float32) * [[1, 2] * n][0][:n]) for n in (55, 27))
    )
    assert "54 to 55 pixels long" in words(draw(run, "layers").sheet)[0]


def test_many_layers_go_on_in_another_line() -> None:
    run = FakeRun(*(FakeTap(f"c{i}", np.random.default_rng(i).random((2, 9, 8, 8))) for i in range(12)))
    sheet = draw(run, "layers").sheet
    panels = tiles_of(sheet)
    assert len(panels) == 12
    assert len({panel.y for panel in panels}) == 2
    assert words(sheet).count("effective rank") == 2
    assert sheet.width < 2000


# Classes


def test_cells_of_kept_means_that_hold_unlike_numbers_of_values_are_said_to_be_about_so_large() -> None:
    assert means._of_neighbours((8, 8), (4, 4)) == "each cell a mean of 2 \N{MULTIPLICATION SIGN} 2 values"
    assert means._of_neighbours((7, 6), (6, 6)).startswith("each cell a mean of about 1.17 ")


def test_a_large_picture_stands_clear_of_the_layers() -> None:
    run = layers_run()
    for side in (32, 100, 224, 320, 1000):
        run.rows["picture"].values = np.zeros((len(run.rows["picture"].values), side, side, 3), np.uint8)
        sheet = draw(run, "layers", rows=1).sheet
        (photo,) = sheet.photos
        assert photo.x + photo.size[0] < min(panel.x for panel in sheet.panels)


def test_the_means_of_classes_and_their_difference_are_what_numpy_says() -> None:
    run = a_run(40)
    sheet = draw(run, "classes", classes=["dog", "cat"], layers=["layer1.0"], channels=[3, 0, 7]).sheet
    values = run["layer1.0"].values[:, [3, 0, 7]].astype(np.float64)
    dog, cat = values[1::2].mean(0), values[::2].mean(0)
    means_bar, signed_bar = sheet.bars
    for panel, mean in zip(sheet.panels, (dog, cat), strict=False):
        assert_shows(panel, mean, means_bar)
    assert_shows(sheet.panels[2], dog - cat, signed_bar)
    largest = np.abs(dog - cat).max()
    assert (signed_bar.low, signed_bar.high) == pytest.approx((-largest, largest))
    assert {"dog", "cat", f"dog {MINUS} cat", "20 rows"} <= set(words(sheet))
    assert f"dog {MINUS} cat: red where dog is greater, blue where cat is." in words(sheet)
    assert "few rows" not in words(sheet)


def test_positive_means_run_from_zero_and_their_difference_around_it() -> None:
    sheet = draw(a_run(40), "classes", layers="conv1", minus="cat").sheet
    assert [(bar.colormap, bar.low == 0, bar.low == -bar.high) for bar in sheet.bars] == [
        ("viridis", True, False),
        ("RdBu_r", False, True),
    ]


def test_channels_are_ranked_by_all_that_is_compared() -> None:
    run = a_run(40)
    run["conv1"].values[1::2, 11] += 5
    sheet = draw(run, "classes", layers="conv1", channels="top:2").sheet
    assert words(sheet)[words(sheet).index("11") + 1].isdigit()
    (shown,) = [text for text in words(sheet) if text.startswith("2 of 16 channels")]
    assert shown.endswith("by mean")
    assert sheet.panels[0].tiles.shape == (2, 8, 8)


def test_channels_come_in_pages() -> None:
    run = a_run(40)
    sheet = draw(run, "classes", layers="conv1", channels="page:2:6:variance").sheet
    values = run["conv1"].values.astype(np.float64)
    both = np.stack([values[::2].mean(0), values[1::2].mean(0)])
    second = np.argsort(-both.var(axis=(0, 2, 3)), kind="stable")[6:12]
    assert_shows(sheet.panels[0], both[0, second], sheet.bars[0])
    assert "6 of 16 channels shown, page 2 of 3, by variance" in words(sheet)
    in_order = draw(run, "classes", layers="conv1", channels="page:3:6").sheet
    assert_shows(in_order.panels[0], both[0, 12:], in_order.bars[0])


def test_what_lies_beyond_a_percentile_is_marked() -> None:
    sheet = draw(a_run(40), "classes", layers="conv1", minus="cat", clip=99).sheet
    assert (sheet.panels[0].tiles == Mark.OVER).any()
    assert (sheet.panels[2].tiles == Mark.OVER).any()
    assert (sheet.panels[2].tiles == Mark.UNDER).any()
    assert sum("percentile" in text for text in words(sheet)) >= 2
    shared = draw(a_run(40), "layers", rows=2, clip=90).sheet
    assert any("percentile 90" in text for text in words(shared))


def test_classes_of_few_rows_are_marked() -> None:
    run = a_run(22)
    run.rows["label"].values[:] = [0] * 19 + [1] * 3
    sheet = draw(run, "classes", layers="conv1").sheet
    (few,) = [text for text in sheet.texts if text.text == "few rows"]
    (three,) = [text for text in sheet.texts if text.text == "3 rows"]
    assert few.ink is Ink.WRONG
    assert 0 < few.y - three.y < 20


def test_a_class_is_taken_from_each_of_the_others() -> None:
    run = a_run(40)
    run.rows["label"].values[:] = np.arange(40) % 4
    run.classes = ("cat", "dog", "owl", "fox")
    sheet = draw(
        run, "classes", layers="conv1", classes=["0", "2", "fox"], minus="1", channels="first:4"
    ).sheet
    values = run["conv1"].values[:, :4].astype(np.float64)
    mean = [values[k::4].mean(0) for k in range(4)]
    for panel, k in zip(sheet.panels[4:], (0, 2, 3), strict=True):
        assert_shows(panel, mean[k] - mean[1], sheet.bars[1])
    assert f"fox {MINUS} dog" in words(sheet)


def test_of_many_classes_ten_are_drawn_and_it_is_said() -> None:
    run = a_run(48)
    run.rows["label"].values[:] = np.arange(48) % 12
    sheet = draw(run, "classes", layers="conv1", channels=0).sheet
    assert len(sheet.panels) == 10
    assert "10 of 12 classes" in words(sheet)[0]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"classes": ["cut"]}, SelectionError, "cat"),
        ({"classes": "cat,dog", "minus": "dig"}, SelectionError, "dog"),
        ({"classes": ["cat"], "minus": "cat"}, DrawError, "no class but cat"),
        ({"classes": ["cat", "dog"], "rows": [0, 2]}, DrawError, "of class dog"),
        ({"scope": "row"}, DrawError, "one scale"),
        ({"scope": "layers"}, DrawError, "no scope"),
        ({"channels": [16]}, SelectionError, "0 to 15"),
        ({"channels": "best"}, DrawError, "first:9"),
        ({"channels": "page:3:9"}, SelectionError, "2 pages"),
        ({"scope": "data"}, DrawError, "one scale"),
        ({"over": "data"}, DrawError, "no option 'over'"),
        ({"channels": "top:4:f_ratio"}, DrawError, "ranked by"),
        ({"classes": []}, DrawError, "no class to draw"),
        ({"klasses": ["cat"]}, DrawError, "classes"),
    ],
)
def test_what_cannot_be_compared_is_told(options: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        draw(a_run(), "classes", layers="conv1", **options)


def test_without_labels_or_predictions_it_is_said_what_is_missing() -> None:
    run = a_run()
    del run.rows["prediction"]
    with pytest.raises(SelectionError, match=r"no column 'prediction'.*rec.annotate\(prediction=...\)"):
        draw(run, "outcomes")
    del run.rows["label"]
    with pytest.raises(SelectionError, match=r"no column 'label'.*rec.annotate\(label=...\)"):
        draw(run, "classes")


def test_labels_that_are_text_name_classes() -> None:
    run = a_run(6)
    run.rows["label"] = FakeArray("label", ("row",), np.array(["قط", "犬", "قط", "", "犬", "犬"]))
    sheet = draw(run, "classes", layers="conv1", channels=[1]).sheet
    expected = run["conv1"].values[[1, 4, 5], 1].mean(0, dtype=np.float64)
    assert_shows(
        sheet.panels[0 if words(sheet).index("犬") < words(sheet).index("قط") else 1],
        expected[None],
        sheet.bars[0],
    )
    assert sum(text.endswith("rows") for text in words(sheet)) >= 2


def test_values_that_are_not_finite_are_in_no_mean_and_named() -> None:
    run = a_run(40)
    values = run["conv1"].values
    values[0, 0, 0, 0], values[2, 0, 0, 0], values[::2, 1, 2, 2] = np.nan, np.inf, np.nan
    values[:, 2] = 0
    found = means.mean_maps(run, "conv1", [np.arange(0, 40, 2), np.arange(1, 40, 2)], ALL)
    assert found.layer.values[0, 0, 0, 0] == pytest.approx(values[4::2, 0, 0, 0].mean(dtype=np.float64))
    assert np.isnan(found.layer.values[0, 1, 2, 2])
    assert found.n_left_out == 22
    sheet = draw(run, "classes", layers="conv1", minus="dog").sheet
    assert {"NaN in 1", "all zero: 2", "differences: NaN in 1", "differences: all zero: 2"} <= set(
        words(sheet)
    )
    assert "22 values not finite, left out of the means" in words(sheet)
    assert "conv1, cat: NaN in 1" in sheet.notes
    assert f"conv1, cat {MINUS} dog: NaN in 1" in sheet.notes
    assert sheet.panels[0].tiles[1, 2, 2] == Mark.NAN


def test_the_mean_of_one_row_is_that_row() -> None:
    values = np.array([[[[np.inf, -np.inf], [np.nan, 3.0]]]], np.float32)
    found = means.mean_maps(FakeRun(FakeTap("a", values)), "a", [np.array([0])], ALL)
    assert np.array_equal(found.layer.values, values, equal_nan=True)


def test_of_one_channel_marks_name_the_classes() -> None:
    run = a_run(40)
    run["conv1"].values[::2, 3] = 0
    assert "all zero: cat" in words(draw(run, "classes", layers="conv1", channels=3).sheet)


def test_scales_are_of_the_layer_the_figure_a_channel_or_given() -> None:
    run = a_run(40)
    run["layer1.0"].values[:] *= 7
    layers = ["conv1", "layer1.0"]
    of_layers = draw(run, "classes", layers=layers, minus="cat").sheet
    of_figure = draw(run, "classes", layers=layers, minus="cat", scope="figure").sheet
    assert len({bar.high for bar in of_layers.bars}) == 4
    assert len({bar.high for bar in of_figure.bars}) == 2
    assert {"one scale for the figure"} <= set(words(of_figure))
    of_channels = draw(run, "classes", layers="conv1", minus="cat", scope="channel").sheet
    assert not of_channels.bars
    given = draw(run, "classes", layers="conv1", minus="cat", scope=(0.4, 0.6)).sheet
    assert [(bar.low, bar.high) for bar in given.bars[:1]] == [(0.4, 0.6)]
    assert given.bars[1].low == -given.bars[1].high
    assert (given.panels[0].tiles == Mark.OVER).any()


def captured(path: Path, taps: dict[str, Values], **options: Any) -> lt.Run:
    """Store arrays that are there as if a model gave them, with three classes."""
    n = len(next(iter(taps.values())))
    options = {"batch_size": 4, "memory": "64MiB", "classes": ("a", "b", "c")} | options
    source = lt.ArraySource(np.arange(n), np.arange(n) % 3)
    return lt.record_dataset(
        lambda rows: {name: values[rows] for name, values in taps.items()}, source, path, ["**"], **options
    )


def test_the_means_that_a_store_keeps_are_drawn_without_its_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    taps = {
        "small": rng.random((30, 4, 6, 5), np.float32),
        "large": rng.random((30, 4, 16, 16), np.float32),
        "vector": rng.random((30, 7), np.float32),
    }
    run = captured(tmp_path / "kept.zarr", taps, stats="all", values=False)
    sheet = draw(run, "classes", classes="a,b").sheet
    mean = {name: [one[k::3].mean(0, dtype=np.float64) for k in (0, 1)] for name, one in taps.items()}
    blocks = [values.reshape(4, 8, 2, 8, 2).mean((2, 4)) for values in mean["large"]]
    panels, bars = tiles_of(sheet), sheet.bars
    assert_shows(panels[0], mean["small"][0], bars[0])
    assert_shows(panels[2], mean["small"][0] - mean["small"][1], bars[1])
    assert_shows(panels[3], blocks[0], bars[2])
    assert_shows(panels[5], blocks[0] - blocks[1], bars[3])
    vectors = [panel for panel in sheet.panels if panel.tiles.shape == (7, 1, 1)]
    assert_shows(vectors[0], mean["vector"][0][:, None, None], bars[4])
    assert words(sheet).count("from the statistics of the store") == 3
    assert words(sheet).count("each cell a mean of 2 \N{MULTIPLICATION SIGN} 2 values") == 1
    with pytest.raises(lt.StoreError, match="statistics alone"):
        draw(run, "classes", classes="a,b", exact=True)


def test_values_are_read_where_the_means_that_are_kept_do_not_do(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    values = rng.random((30, 4, 16, 16), np.float32)
    spoiled = values.copy()
    spoiled[0, 0, 0, 0] = np.nan
    run = captured(tmp_path / "kept.zarr", {"fine": values, "spoiled": spoiled}, stats="all")
    for options in ({"exact": True}, {"rows": range(29)}, {"layers": "spoiled"}):
        sheet = draw(run, "classes", **({"layers": "fine"} | options)).sheet
        assert "from the statistics of the store" not in words(sheet)
        n = 29 if "rows" in options else 30
        assert_shows(sheet.panels[1], values[1:n:3].mean(0, dtype=np.float64), sheet.bars[0])
    whole = draw(run, "classes", layers="fine", rows=range(30)).sheet
    assert "from the statistics of the store" in words(whole)


def test_means_of_neighbouring_tokens_and_of_other_classes_are_read_anew(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    taps = {"tokens": rng.random((30, 16, 5), np.float32), "few": rng.random((30, 4, 5), np.float32)}
    run = captured(tmp_path / "kept.zarr", taps, stats="all")
    for name, kept in (("tokens", 0), ("few", 1)):
        sheet = draw(run, "classes", layers=name, channels="all").sheet
        assert words(sheet).count("from the statistics of the store") == kept
        mean = taps[name][1::3].mean(0, dtype=np.float64).T
        side = round(mean.shape[1] ** 0.5)
        assert_shows(sheet.panels[1], mean.reshape(5, side, side), sheet.bars[0])
    labels = np.arange(30) % 4  # one more than there are names
    source = lt.ArraySource(np.arange(30), labels)
    run = lt.record_dataset(
        lambda rows: {"few": taps["few"][rows]},
        source,
        tmp_path / "b.zarr",
        ["**"],
        stats="all",
        classes="abc",
    )
    sheet = draw(run, "classes", channels="all").sheet
    assert "class 3" in words(sheet)
    assert_shows(
        sheet.panels[3], taps["few"][3::4].mean(0, dtype=np.float64).T.reshape(5, 2, 2), sheet.bars[0]
    )


def test_rows_without_a_class_are_in_none() -> None:
    run = a_run(24)
    run.rows["label"].values[:5] = -1
    sheet = draw(run, "classes", layers="conv1").sheet
    assert {"cat", "dog"} <= set(words(sheet))
    assert len(sheet.panels) == 2
    assert "Means over 19 rows, by class." in words(sheet)
    run.rows["label"].values[:] = -1
    with pytest.raises(DrawError, match="has a class"):
        draw(run, "classes", layers="conv1")


# Right against wrong


def test_right_and_wrong_are_compared_over_all_and_within_a_class() -> None:
    run = a_run(60)  # every third is wrong, and classes alternate
    sheet = draw(run, "outcomes", layers="layer1.0", channels="first:2", classes=["dog"]).sheet
    values = run["layer1.0"].values[:, :2].astype(np.float64)
    label, wrong = np.arange(60) % 2, np.arange(60) % 3 == 2
    sides = [values[~wrong].mean(0), values[wrong].mean(0)]
    sides += [values[(label == 1) & ~wrong].mean(0), values[(label == 1) & wrong].mean(0)]
    for panel, mean in zip([sheet.panels[i] for i in (0, 1, 3, 4)], sides, strict=True):
        assert_shows(panel, mean, sheet.bars[0])
    assert_shows(sheet.panels[2], sides[0] - sides[1], sheet.bars[1])
    assert_shows(sheet.panels[5], sides[2] - sides[3], sheet.bars[1])
    assert {"40 rows", "20 rows", "10 rows", "all classes", "true class dog"} <= set(words(sheet))
    assert "(66.7 % are)" in words(sheet)[0]


def test_where_nothing_is_wrong_there_is_no_difference() -> None:
    run = a_run(6)
    run.rows["prediction"].values[:] = run.rows["label"].values
    run.rows["label"].values[0] = -1
    sheet = draw(run, "outcomes", layers="conv1").sheet
    assert len(sheet.panels) == 1
    assert {"right", "5 rows", "wrong", "0 rows", "no prediction is wrong"} <= set(words(sheet))
    assert "1 row without label or prediction left out." in words(sheet)[0]
    assert len(sheet.bars) == 1


# Stores


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs by the name of their store, which `open_run` finds."""
    stores: dict[str, Any] = {}
    monkeypatch.setattr(reader, "open_run", lambda path: stores[Path(path).name])
    return stores


def two_runs() -> tuple[Any, Any]:
    """Two runs of the same rows, whose order differs."""
    run, other = a_run(6), a_run(6)
    for tap in other.taps.values():
        tap.values = (tap.values * 0.5 + 0.1)[::-1].astype(np.float32)
    other.rows["id"].values = other.rows["id"].values[::-1]
    other.rows["prediction"].values = other.rows["prediction"].values[::-1]
    other.path = "other.zarr"
    return run, other


def test_rows_of_two_stores_are_matched_by_id_and_subtracted() -> None:
    run, other = two_runs()
    sheet = draw(run, "stores", other=other, rows=[4, 1], layers=["layer1.0"], channels=[0, 5]).sheet
    values = run["layer1.0"].values[:, [0, 5]].astype(np.float64)
    for i, row in enumerate((4, 1)):
        a, b = values[row], values[row] * 0.5 + 0.1
        for panel, one in zip(sheet.panels[3 * i :], (a, b), strict=False):
            assert_shows(panel, one, sheet.bars[0])
        assert_shows(sheet.panels[3 * i + 2], a - b, sheet.bars[1])
    assert "Rows are matched by id." in words(sheet)
    assert "B: other.zarr" in words(sheet)
    assert f"A {MINUS} B: red where A is greater, blue where B is." in words(sheet)
    assert words(sheet).count("predicted dog") + words(sheet).count("predicted cat") == 4
    assert len(sheet.photos) == 2


def test_stores_are_named_by_as_much_of_their_paths_as_tells_them_apart() -> None:
    apart = stores._told_apart
    assert apart("/data/before.zarr", "/data/after.zarr/") == ("before.zarr", "after.zarr")
    assert apart("/data/1/run.zarr", "s3://bucket/2/run.zarr") == ("1/run.zarr", "2/run.zarr")
    assert apart("run.zarr", "/data/run.zarr") == ("run.zarr", "data/run.zarr")
    assert apart("/data/run.zarr", "/data/run.zarr") == ("run.zarr", "run.zarr")


def test_without_ids_rows_are_matched_by_their_numbers() -> None:
    run, other = two_runs()
    del other.rows["id"]
    sheet = draw(run, "stores", other=other, rows=2, layers="conv1", channels="all").sheet
    assert_shows(sheet.panels[1], other["conv1"].values[2], sheet.bars[0])
    assert "Rows are matched by index." in words(sheet)


def test_the_means_of_two_stores_are_over_the_rows_that_both_have() -> None:
    run, other = two_runs()
    other._committed = np.array([False, True, True, True, True, True])  # lacks row 5 of the first
    sheet = draw(run, "stores", other=other, mean=True, layers="conv1", channels="first:3").sheet
    mean = run["conv1"].values[:5, :3].mean(0, dtype=np.float64)
    assert_shows(sheet.panels[0], mean, sheet.bars[0])
    assert_shows(sheet.panels[2], mean * 0.5 - 0.1, sheet.bars[1])
    assert "Means over 5 rows that both have, matched by id." in words(sheet)


def test_layers_of_other_names_are_given_as_pairs_and_of_other_shapes_not_subtracted() -> None:
    run, other = two_runs()
    sheet = draw(run, "stores", other=other, layers="layer1.0=conv1, conv1", channels="first:3").sheet
    assert (
        "no difference: a row is 32 \N{MULTIPLICATION SIGN} 8 \N{MULTIPLICATION SIGN} 8 in A and 16 "
        in " ".join(words(sheet))
    )
    assert "A: layer1.0, B: conv1" in words(sheet)
    assert [len(panel.tiles) for panel in sheet.panels] == [3] * 5
    a, b = run["layer1.0"].values[0, :3], other["conv1"].values[5, :3]
    assert_shows(sheet.panels[0], a, sheet.bars[0])
    assert_shows(sheet.panels[1], b, sheet.bars[0])  # one scale, though shapes differ
    assert len(sheet.bars) == 3
    spec = draw(run, "stores", other=other, layers=[("layer1.0", "conv1")]).spec
    assert (spec.layers, spec.other_layers) == (("layer1.0",), ("conv1",))


def test_layers_that_only_one_store_has_are_left_out_unless_named() -> None:
    run, other = two_runs()
    del other.taps["fc"]
    assert draw(run, "stores", other=other).spec.layers == ("conv1", "layer1.0")
    with pytest.raises(SelectionError, match=r"other\.zarr holds no tap 'fc'.*fc=ITS\.NAME"):
        draw(run, "stores", other=other, layers="fc")
    other.taps = {"stem": FakeTap("stem", run["conv1"].values)}
    with pytest.raises(SelectionError, match="conv1=stem"):
        draw(run, "stores", other=other)


def test_rows_that_cannot_be_matched_are_named() -> None:
    run, other = two_runs()
    other._committed[2] = False
    with pytest.raises(DrawError, match=r"row 3 \(id '003.png'\)"):
        draw(run, "stores", other=other, rows=3)
    other.rows["id"].values[:] = "000.png"
    with pytest.raises(SelectionError, match="rows 0 and 1"):
        draw(run, "stores", other=other, rows=0)
    other.rows["id"].values = np.array([f"{i}.jpg" for i in range(6)])
    with pytest.raises(DrawError, match="no captured row in common"):
        draw(run, "stores", other=other)
    with pytest.raises(DrawError, match="--other"):
        draw(run, "stores")


def test_identical_stores_have_no_difference_to_see() -> None:
    run = a_run()
    sheet = draw(run, "stores", other=a_run(), layers="conv1").sheet
    assert "no bar: every value is 0" in words(sheet)
    assert (sheet.panels[2].tiles == Mark.ZERO).all()


def test_a_difference_of_nothing_is_in_the_middle_of_the_scale() -> None:
    run, other = a_run(), a_run()
    for one in (run, other):
        one["conv1"].values[:, 3, 1, 1] = np.nan
    sheet = draw(run, "stores", other=other, layers=["conv1", "fc"], channels=[3, 5]).sheet
    middle = (N_COLOURS - 1) // 2
    assert (sheet.panels[2].tiles[1] == Mark.ZERO).all()
    assert sorted(set(sheet.panels[2].tiles[0].ravel().tolist())) == [middle, Mark.NAN]
    (fc,) = [p for p in sheet.panels if p.tiles.shape == (2, 1, 1) and p.colormap == "RdBu_r"][-1:]
    assert fc.tiles.ravel().tolist() == [middle] * 2


def test_a_specification_alone_redraws_two_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(8).random((9, 3, 5, 5), np.float32)
    monkeypatch.chdir(tmp_path)
    run = captured(Path("a.zarr"), {"conv": values})
    captured(Path("b.zarr"), {"stem": values**2})
    first = draw(run, "stores", other="b.zarr", layers="conv=stem", rows=[5, 2], painter="pillow")
    text = json.dumps(first.spec.to_json())
    monkeypatch.chdir("/")
    spec = spec_from_json(text)
    assert spec == first.spec
    again = draw(lt.open(tmp_path / "a.zarr"), spec, painter="pillow")
    assert [panel.tiles.tobytes() for panel in again.sheet.panels] == [
        panel.tiles.tobytes() for panel in first.sheet.panels
    ]
    with pytest.raises(lt.StoreNotFoundError):
        draw(run, "stores", other=tmp_path / "absent.zarr")


# All of them


def pictures() -> dict[str, Any]:
    run, other = two_runs()
    run["conv1"].values[0, 2], run["conv1"].values[0, 3, 1, 1] = 0, np.nan
    return {
        "layers": draw(run, "layers", channels="top:4", scope=(-1, 1)),
        "classes": draw(run, "classes", classes=["cat", "dog"], channels="all", columns=10, title="飞机"),
        "outcomes": draw(run, "outcomes", classes=["cat"], channels="top:4:variance", colormap="magma"),
        "stores": draw(run, "stores", other=other, rows=[0, 5], layers="conv1", numbers=False),
    }


@pytest.mark.parametrize("kind", ["layers", "classes", "outcomes", "stores"])
def test_a_specification_comes_back_from_json_equal(kind: str) -> None:
    spec = pictures()[kind].spec
    again = spec_from_json(json.dumps(spec.to_json()))
    assert again == spec
    assert (
        type(again)
        is {
            "layers": LayersSpec,
            "classes": ClassesSpec,
            "outcomes": OutcomesSpec,
            "stores": StoresSpec,
        }[kind]
    )
    assert hash(again) == hash(spec)


@pytest.mark.parametrize("kind", ["layers", "classes", "outcomes", "stores"])
def test_painters_agree_on_the_images_and_text_touches_none(kind: str) -> None:
    pytest.importorskip("matplotlib")
    sheet = pictures()[kind].sheet
    bare = Sheet(sheet.width, sheet.height, sheet.panels, sheet.photos, sheet.bars)
    expected = np.full((sheet.height, sheet.width, 3), 255, np.uint8)
    where = np.zeros(expected.shape[:2], np.bool_)
    for x, y, pixels in sheet.pictures():
        inside = (slice(y, y + pixels.shape[0]), slice(x, x + pixels.shape[1]))
        assert not where[inside].any()
        expected[inside], where[inside] = pixels, True
    for name in ("pillow", "matplotlib"):
        assert (painter(name).array(bare) == expected).all()
    texts = Sheet(sheet.width, sheet.height, texts=sheet.texts)
    inked = (painter("pillow").array(texts) < 250).any(axis=2)
    maps = np.zeros_like(where)
    for panel in sheet.panels:
        for i in range(len(panel.tiles)):
            x, y = panel.place(i)
            maps[y : y + panel.tile_size[1], x : x + panel.tile_size[0]] = True
    assert not (inked & maps).any()
    assert not inked[[0, -1]].any()
    assert not inked[:, [0, -1]].any()


@pytest.mark.parametrize("kind", ["layers", "classes", "outcomes", "stores"])
def test_texts_do_not_lie_on_each_other(kind: str) -> None:
    sheet = pictures()[kind].sheet
    seen = np.zeros((sheet.height, sheet.width), np.bool_)
    for text in sheet.texts:
        # A line of its own height is all that a text can touch.
        top = max(round(text.y) - 20, 0)
        moved = replace(text, y=text.y - top)
        inked = (painter("pillow").array(Sheet(sheet.width, 30, texts=(moved,))) < 250).any(axis=2)
        part = seen[top : top + 30]
        assert not (part & inked[: len(part)]).any(), text
        part |= inked[: len(part)]


def test_the_commands_draw_what_the_calls_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    opened["run.zarr"], opened["other.zarr"] = two_runs()
    run = opened["run.zarr"]
    calls: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("layers", ("--rows", "2", "--measured", "0:4"), {"rows": 2, "measured": "0:4"}),
        ("classes", ("--classes", "dog,cat", "--exact"), {"classes": ["dog", "cat"], "exact": True}),
        ("outcomes", ("--classes", "cat", "--rows", "0:5"), {"classes": ["cat"], "rows": "0:5"}),
        ("stores", ("--other", "other.zarr", "--mean"), {"other": "other.zarr", "mean": True}),
    ]
    for kind, arguments, options in calls:
        shared = ("--layers", "conv1", "--channels", "top:4", "--out", f"{kind}.png")
        result = CliRunner().invoke(render, [kind, "run.zarr", *arguments, *shared])
        assert (result.exit_code, result.output) == (0, f"{kind}.png\n")
        same = draw(run, kind, layers="conv1", channels="top:4", **options)
        assert Path(f"{kind}.png").read_bytes() == same.png()
    result = CliRunner().invoke(render, ["classes", "run.zarr", "--classes", "cut"])
    assert result.exit_code == 1
    assert "cat" in result.output
    result = CliRunner().invoke(
        render, ["stores", "run.zarr", "--other", "other.zarr", "--rows", "0:2", "--out", "{row}.png"]
    )
    assert result.output.split() == ["0.png", "1.png"]


def test_a_trained_network_and_a_disturbed_one_differ_from_where_it_was_disturbed_on(
    cifar: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    import resnet20

    folder = tmp_path / "pictures"
    for name in ("cat", "ship"):
        (folder / name).mkdir(parents=True)
        for file in sorted((cifar / name).iterdir())[:12]:
            (folder / name / file.name).write_bytes(file.read_bytes())
    layers = ["layer1", "layer2", "layer3"]
    normalised: dict[str, Any] = {"mean": resnet20.MEAN, "std": resnet20.STD}
    model = resnet20.trained()
    run = lt.record_dataset(model, folder, tmp_path / "a.zarr", layers, **normalised)
    with torch.no_grad():
        for weights in model.layer2.parameters():
            weights += 0.1 * weights.std() * torch.randn(weights.shape)
    other = lt.record_dataset(model, folder, tmp_path / "b.zarr", layers, **normalised)
    sheet = draw(run, "stores", other=other, layers=layers, mean=True, channels="top:9").sheet
    assert [bar.colormap for bar in sheet.bars] == ["viridis", "viridis", "RdBu_r", "viridis", "RdBu_r"]
    expected = run["layer3"][...].mean(0, dtype=np.float64) - other["layer3"][...].mean(0, dtype=np.float64)
    shown = [int(text) for text in words(sheet) if text.isdigit() and text != "0"][-9:]
    assert_shows(tiles_of(sheet)[-1], expected[shown], sheet.bars[-1])
    depth = [measure(run, name, np.arange(24)) for name in layers]
    assert [one.resolution for one in depth] == [(32, 32), (16, 16), (8, 8)]
    assert [one.rank for one in depth] == pytest.approx(
        [effective_rank(np.cov(samples(run[name][...]))) for name in layers], rel=1e-6
    )
