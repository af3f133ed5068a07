"""Statistics, drawn: every bar, box, number and colour is that of plain numpy over the values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.capture.errors import DrawError, SelectionError
from layertap.render import Sheet, StatisticsSpec, draw
from layertap.render.axes import Axis, written
from layertap.render.cli import render
from layertap.render.colormaps import N_COLOURS, Mark
from layertap.render.kinds import spec_from_json
from layertap.render.lettering import text_width
from layertap.render.relations import cka, clustered
from layertap.render.sheet import Box, Fill, Ink, Line, Panel, Text
from layertap.render.tally import Tally, tallied
from numpy.typing import NDArray

Values = NDArray[Any]
N = 40


def taps() -> dict[str, Values]:
    rng = np.random.default_rng(5)
    conv = rng.standard_normal((N, 6, 5, 4))
    conv[:, 1] = 0.5 * conv[:, 0] + conv[:, 1]
    conv[:, 3], conv[:, 4] = 0, 0.1  # a mean of it is not quite it
    spoiled = rng.standard_normal((N, 4, 3, 3))
    spoiled[2, 1, 0, 0], spoiled[3, 2, 1, 1] = np.nan, -np.inf
    relu = np.maximum(rng.standard_normal((N, 8, 6, 6)) - 0.3 * np.arange(8)[:, None, None], 0)
    vector = conv.mean((2, 3)) @ rng.standard_normal((6, 7)) + rng.standard_normal((N, 7)) * 0.1
    found = {"conv": conv, "relu": relu, "spoiled": spoiled, "tokens": rng.standard_normal((N, 9, 5))}
    return {name: values.astype(np.float32) for name, values in (found | {"fc": vector}).items()}


def captured(path: Path, arrays: dict[str, Values], **options: Any) -> lt.Run:
    n_rows = len(next(iter(arrays.values())))
    source = lt.ArraySource(np.arange(n_rows), np.arange(n_rows) % 2)
    return lt.record_dataset(
        lambda rows: {name: one[rows] for name, one in arrays.items()},
        source,
        path,
        ["**"],
        **({"batch_size": 8, "memory": "64MiB"} | options),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, lt.Run]:
    """Stores of the same values with and without statistics, and with statistics alone."""
    folder = tmp_path_factory.mktemp("statistics")
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "stats": {"stats": "all"},
        "cheap": {"stats": "cheap"},
        "alone": {"stats": "all", "values": False},
        "cheap alone": {"stats": "cheap", "values": False},
    }
    return {name: captured(folder / name, taps(), **some) for name, some in options.items()}


@pytest.fixture(params=["plain", "stats", "cheap", "alone"])
def run(request: pytest.FixtureRequest, runs: dict[str, lt.Run]) -> lt.Run:
    return runs[request.param]


def words(sheet: Sheet) -> str:
    return " ".join(text.text for text in sheet.texts)


def boxes_of(sheet: Sheet, ink: Ink | Fill) -> list[Box]:
    return [shape for shape in sheet.shapes if isinstance(shape, Box) and shape.ink is ink]


def overlapping(sheet: Sheet) -> Iterator[tuple[Text, Text]]:
    """Yield texts that stand on each other, or beyond the sheet."""
    places = []
    for text in sheet.texts:
        width = text_width(text.text, text.size, text.bold)
        left = text.x - {"left": 0, "center": width / 2, "right": width}[text.align]
        places.append((left, text.y - 0.75 * text.size, left + width, text.y + 1, text))
        if left < 0 or left + width > sheet.width or not 0 < text.y < sheet.height:
            yield text, text
    for a, b in combinations(places, 2):
        if a[2] > b[0] and b[2] > a[0] and a[3] > b[1] and b[3] > a[1]:
            yield a[4], b[4]


# What is counted


def test_a_pass_counts_what_a_capture_counts(runs: dict[str, lt.Run]) -> None:
    kept, read = (tallied(runs[name], list(taps()), None, N, 0, "histogram") for name in ("stats", "plain"))
    assert kept.source == "kept while capturing: all 40 rows"
    assert read.source == "read from the store: all 40 rows"
    for a, b in zip(kept.layers, read.layers, strict=True):
        for field in ("count", "n_nan", "n_inf", "n_zero", "minimum", "maximum", "histogram"):
            assert np.array_equal(getattr(a, field), getattr(b, field), equal_nan=True), (a.name, field)
        assert (a.nan, a.inf, a.axis) == (b.nan, b.inf, b.axis)
        np.testing.assert_allclose(b.mean, a.mean, atol=1e-5)
        np.testing.assert_allclose(b.variance, a.variance, rtol=1e-4, atol=1e-12)


def test_a_tally_in_pieces_is_that_of_plain_numpy() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((12, 3, 10)) * [[[1]], [[1e4]], [[1e-7]]][0][0] + 5
    values[2, 1, 3], values[7, 0, 0], values[:, 2, :4] = np.nan, np.inf, 0
    own = rng.random(values.shape) < 0.7
    for mask in (None, own):
        tally = Tally(3)
        for start in (0, 5, 6):
            stop = {0: 5, 5: 6, 6: 12}[start]
            tally.add(values[start:stop], None if mask is None else mask[start:stop])
        its = tally.statistics("x", "channel")
        for c in range(3):
            all_of_it = values[:, c][mask[:, c]] if mask is not None else values[:, c].ravel()
            finite = all_of_it[np.isfinite(all_of_it)]
            assert its.count is not None
            assert its.mean is not None
            assert its.variance is not None
            assert its.histogram is not None
            assert (its.count[c], its.histogram[c].sum()) == (finite.size, finite.size)
            assert its.n_nan[c] == np.isnan(all_of_it).sum()  # type: ignore[index]
            assert its.n_inf[c] == np.isinf(all_of_it).sum()  # type: ignore[index]
            assert its.n_zero[c] == (finite == 0).sum()  # type: ignore[index]
            assert its.minimum[c] == finite.min()  # type: ignore[index]
            assert its.maximum[c] == finite.max()  # type: ignore[index]
            np.testing.assert_allclose((its.mean[c], its.variance[c]), (finite.mean(), finite.var()))


def test_padded_places_are_not_counted(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Embedding(9, 4)

        def forward(self, ids: Any) -> Any:
            return self.layer(ids)

    torch.manual_seed(0)
    model, lengths = Encoder(), (4, 9, 6)
    for name, options in (("pad", {"pad": "layer:12,-7"}), ("ragged", {"ragged": "layer:12"})):
        with lt.record(model, tmp_path / name, layers=["layer"], **options):
            for n in lengths:
                model(torch.arange(2 * n).reshape(2, n) % 9)
        its = tallied(lt.open(tmp_path / name), ["layer"], None, N, 0, "histogram").layers[0]
        own = np.concatenate([model(torch.arange(2 * n) % 9).detach().numpy() for n in lengths])
        assert its.count is not None
        assert its.minimum is not None
        assert its.count.tolist() == [2 * sum(lengths)] * 4
        assert (its.minimum == own.min(0)).all()
        assert "layer" in words(draw(lt.open(tmp_path / name), "statistics").sheet)


# The table


def test_an_overview_says_what_is_zero_constant_and_not_finite(run: lt.Run) -> None:
    sheet = draw(run, "statistics").sheet
    said = [text.text for text in sheet.texts]
    assert {"all zero: 3", "constant: 4", "1 NaN in 1", "1 infinite in 2"} <= set(said)
    assert {"none of 8 channels", "none of 5 features", "none of 7 features"} <= set(said)
    assert {"conv: all zero: 3", "conv: constant: 4", "spoiled: 1 NaN in 1"} <= set(sheet.notes)
    for values in taps().values():
        finite = values[np.isfinite(values)]
        assert any(text.startswith(f"{finite.min():.3g} to ") for text in said)
    assert f"{100 * (taps()['relu'] == 0).mean():.3g} %" in said
    assert not list(overlapping(sheet))


def test_histograms_have_the_shares_of_the_values(run: lt.Run) -> None:
    sheet = draw(run, "statistics", what="histograms", layers="tokens").sheet
    values = taps()["tokens"].astype(np.float64)
    bars = boxes_of(sheet, Fill.MIDDLE)
    assert len(bars) == 200
    tallest = max(bar.height for bar in bars)
    assert tallest == 96
    counts = np.array([bar.height for bar in bars]) / tallest
    # Bars are even within the bins that were counted, an eighth of an octave each: sums over many agree.
    edges = np.linspace(values.min(), values.max(), 201)
    expected = np.histogram(values, edges)[0].astype(float)
    shares = np.cumsum(counts) / counts.sum()
    assert np.abs(shares - np.cumsum(expected) / expected.sum()).max() < 0.02
    most = float(next(t.text for t in sheet.texts if t.text.endswith(" %")).removesuffix(" %")) / 100
    assert most == pytest.approx(1 / counts.sum(), rel=0.1)


def test_heights_are_those_of_counts_or_of_their_logarithms(runs: dict[str, lt.Run]) -> None:
    values = np.repeat([1.0, 2.0, 3.0], [9, 99, 999]).astype(np.float32)[:, None]
    heights = {}
    for log in ("none", "counts"):
        run = captured(runs["plain"].path.parent / log, {"x": values}, batch_size=123)
        sheet = draw(run, "statistics", what="histograms", log=log).sheet
        bars = boxes_of(sheet, Fill.MIDDLE)
        # 1.0 fills the bin from 1 to 1.125, an eighth of the first half of the axis: so many bars share it.
        heights[log] = bars[0].height / max(bar.height for bar in bars)
    n_first, n_last = 12.5, 1.0
    assert heights["none"] == pytest.approx(9 / n_first / (999 / n_last), abs=0.02)
    assert heights["counts"] > 0.05


def test_zeros_are_left_out_of_histograms_and_said(run: lt.Run) -> None:
    sheet = draw(run, "statistics", layers="relu").sheet
    values = taps()["relu"]
    bars = [box for box in boxes_of(sheet, Fill.MIDDLE) if box.x < 478]
    heights = np.array([box.height for box in bars])
    expected = np.histogram(values[values != 0], 80, (0, values.max()))[0]
    assert len(bars) == 80
    assert np.abs(heights.cumsum() / heights.sum() - expected.cumsum() / expected.sum()).max() < 0.04
    zeros = (taps()["relu"] == 0).mean((0, 2, 3))
    counts, _ = np.histogram(zeros, 20, (0, 1))
    line = next(s for s in sheet.shapes if isinstance(s, Line) and s.ink is Fill.DARK)
    at = line.points[0][0]
    shares = [box for box in boxes_of(sheet, Fill.MIDDLE) if 508 <= box.x < 508 + 110]
    found = [round(box.height / 48 * counts.max()) for box in shares if box.height]
    assert found == counts[counts > 0].tolist()
    assert at - 508 == pytest.approx(109 * (taps()["relu"] == 0).mean(), abs=0.51)
    widths = {box.x - 508: box.width for box in shares if box.height}
    assert list(widths) == [round(110 * i / 20) for i in np.flatnonzero(counts)]


def test_ranges_are_least_quantiles_and_greatest(run: lt.Run) -> None:
    sheet = draw(run, "statistics", what="ranges", layers=["relu", "tokens"]).sheet
    values = taps()["tokens"].astype(np.float64)
    low, high = min(values.min(), 0), max(values.max(), taps()["relu"].max())
    quantiles = np.quantile(values, (0.01, 0.25, 0.5, 0.75, 0.99))
    light, dark = boxes_of(sheet, Fill.LIGHT)[1], boxes_of(sheet, Fill.MIDDLE)[1]
    x = 18 + 190 + 30

    def value(pixel: float) -> float:
        return float(low + (pixel - x) / 503 * (high - low))

    ends = (light.x, dark.x, dark.x + dark.width - 1, light.x + light.width - 1)
    off = [abs(value(p) - q) for p, q in zip(ends, quantiles[[0, 1, 3, 4]], strict=True)]
    assert max(off) < 0.1
    ends_of = [s for s in sheet.shapes if isinstance(s, Line) and s.ink is Ink.GREY]
    across = [s for s in ends_of if s.points[0][1] == light.y + 7 == s.points[1][1]]
    assert [value(p) for p, _ in across[0].points] == pytest.approx([values.min(), values.max()], abs=0.01)


def test_dead_channels_are_all_listed(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((9, 300, 2, 2)).astype(np.float32)
    values[:, ::2] = 0
    run = captured(tmp_path / "run.zarr", {"conv": values})
    sheet = draw(run, "statistics", what="dead").sheet
    listed = " ".join(text.text for text in sheet.texts if text.x == 238 and text.size == 10)
    numbers = listed.removeprefix("all zero: 150 of 300 channels: ").split(", ")
    assert numbers == [str(channel) for channel in range(0, 300, 2)]
    assert "all zero: 150 channels (0, 2" in words(draw(run, "statistics").sheet)
    assert not list(overlapping(sheet))


def test_what_bins_cannot_show_is_not_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, size in (("large", 1e7), ("small", 1e-7)):
        values = (rng.standard_normal((9, 4, 3, 3)) * size).astype(np.float32)
        sheet = draw(captured(tmp_path / name, {"x": values}), "statistics").sheet
        assert "no histogram:" in words(sheet)
        assert not boxes_of(sheet, Fill.LIGHT)


@pytest.mark.parametrize("value", [0.0, -3.0, np.nan])
@pytest.mark.parametrize("log", ["none", "both"])
def test_a_layer_of_one_value_is_drawn(tmp_path: Path, value: float, log: str) -> None:
    run = captured(tmp_path / "run.zarr", {"x": np.full((3, 2, 2, 2), value, np.float32)})
    for what in ("overview", "histograms", "ranges", "sparsity", "dead", "cka", "correlation"):
        sheet = draw(run, "statistics", what=what, log=log).sheet
        assert not list(overlapping(sheet))
    said = words(draw(run, "statistics", log=log).sheet)
    assert ("no finite value" if value != value else f"every value is {value:g}") in said


@pytest.mark.parametrize("n", [1, 2, 60, 130])
def test_any_number_of_layers_has_room(tmp_path: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    name = "encoder.layers.{}.a_long_name_of_a_module.and_what_is_in_it.conv" if n != 130 else "l{}"
    values = {name.format(i): rng.standard_normal((3, 2, 2, 2)).astype(np.float32) for i in range(n)}
    run = captured(tmp_path / "run.zarr", values)
    last = -(-n // 64)
    for what in ("overview", "cka"):
        sheet = draw(run, "statistics", what=what, page=1 if what == "cka" else last).sheet
        assert not list(overlapping(sheet))
    names = words(draw(run, "statistics", page=last).sheet)
    if n == 130:
        assert "layers 129 to 130 of 130, page 3 of 3" in names
        with pytest.raises(DrawError, match="no page 4 of 130 layers; 3 hold them"):
            draw(run, "statistics", page=4)
    else:
        assert ("page" in names) is False


def test_values_as_large_as_there_are_warn_of_nothing(tmp_path: Path) -> None:
    values = np.array([1e308, -1e308, 1e200, 3.0, 0.0, 1e-300] * 4).reshape(6, 4)
    for what in ("overview", "ranges", "cka"):
        sheet = draw(captured(tmp_path / what, {"x": values}), "statistics", what=what).sheet
        assert not list(overlapping(sheet))


# Matrices


def gram_cka(x: Values, y: Values) -> float:
    """Return linear CKA by the products of rows, as an independent reference."""
    n = len(x)
    middle = np.eye(n) - 1 / n
    a, b = middle @ x @ x.T @ middle, middle @ y @ y.T @ middle
    return float(np.trace(a @ b) / np.sqrt(np.trace(a @ a) * np.trace(b @ b)))


def means(values: Values) -> Values:
    values = values.astype(np.float64)
    return values.mean(1) if values.ndim == 3 else values.reshape(*values.shape[:2], -1).mean(2)


def test_cka_has_its_numbers_and_colours(run: lt.Run) -> None:
    names = ["conv", "relu", "tokens", "fc"]
    sheet = draw(run, "statistics", what="cka", layers=names).sheet
    features = [means(taps()[name]) for name in names]
    expected = np.array([[gram_cka(x, y) for y in features] for x in features])
    numbers = [text for text in sheet.texts if text.over]
    found = [text.text for text in sorted(numbers, key=lambda t: (t.y, t.x))]
    assert found == [f"{value:.2f}" for value in expected.ravel()]
    tile = sheet.panels[0].tiles[0]
    assert np.abs(tile - expected * (N_COLOURS - 1)).max() <= 0.6
    assert [(bar.low, bar.high) for bar in sheet.bars] == [(0.0, 1.0)]
    assert {"0 conv", "1 relu", "2 tokens", "3 fc"} <= {text.text for text in sheet.texts}


def test_cka_is_the_same_by_either_product() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.standard_normal((9, 4)), rng.standard_normal((9, 40))
    few[3, 1] = np.nan
    kept = np.delete(np.arange(9), 3)
    for features in ([few, few[:, :2]], [few, many]):
        assert cka(features)[0, 1] == pytest.approx(gram_cka(features[0][kept], features[1][kept]))


def test_a_layer_that_has_no_means_spoils_no_other(tmp_path: Path) -> None:
    values = taps() | {"still": np.ones((N, 3), np.float32), "nan": np.full((N, 2), np.nan, np.float32)}
    for stats in ("none", "all"):
        run = captured(tmp_path / stats, values, stats=stats)
        sheet = draw(run, "statistics", what="cka", layers=["conv", "still", "nan", "fc"]).sheet
        known = sheet.panels[0].tiles[0] != Mark.CONSTANT
        usable = np.array([True, False, False, True])
        assert (known == np.outer(usable, usable)).all()
        assert "constant or not finite: 1, 2" in words(sheet)


def test_few_rows_are_cautioned_against(runs: dict[str, lt.Run]) -> None:
    layers = ["conv", "fc"]
    few = words(draw(runs["plain"], "statistics", what="cka", layers=layers, rows="0:5").sheet)
    assert "of 5 chosen rows" in few
    assert "CKA is high for any two layers" in few.replace("\n", " ")
    assert "high for any" not in words(draw(runs["plain"], "statistics", what="cka", layers=layers).sheet)


@pytest.mark.parametrize("layer", ["conv", "spoiled", "tokens", "fc"])
def test_correlations_are_those_of_numpy(run: lt.Run, layer: str, runs: dict[str, lt.Run]) -> None:
    if run is runs["alone"] and layer == "spoiled":
        with pytest.raises(DrawError, match="neither 'gram' statistics"):
            draw(run, "statistics", what="correlation", layers=layer)
        return
    sheet = draw(run, "statistics", what="correlation", layers=layer).sheet
    values = taps()[layer].astype(np.float64)
    vectors = values if values.ndim == 2 else values.reshape(-1, 5) if layer == "tokens" else None
    if vectors is None:
        vectors = np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])
    vectors = vectors[np.isfinite(vectors).all(1)]
    varies = vectors.std(0) > 0
    expected = np.corrcoef(vectors[:, varies].T)
    panel = max(sheet.panels, key=lambda panel: panel.tiles.size)
    tile = panel.tiles[0]
    assert np.abs(tile[np.ix_(varies, varies)] - (expected + 1) / 2 * (N_COLOURS - 1)).max() <= 0.6
    assert (tile[~varies] == Mark.CONSTANT).all()
    assert (tile[:, ~varies] == Mark.CONSTANT).all()
    assert ("constant: 3, 4" in words(sheet)) is (layer == "conv")
    apart = expected[~np.eye(len(expected), dtype=bool)]
    assert f"{np.abs(apart).mean():.2f}" in words(sheet)
    assert [(bar.low, bar.high) for bar in sheet.bars] == [(-1.0, 1.0)]


def test_a_mean_far_from_zero_does_not_spoil_correlations(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = 1e8 + rng.standard_normal((400, 5)) @ rng.standard_normal((5, 5))
    run = captured(tmp_path / "run.zarr", {"x": values}, stats="all", batch_size=100)
    tile = draw(run, "statistics", what="correlation").sheet.panels[0].tiles[0]
    expected = np.corrcoef(values.T)
    assert np.abs(tile - (expected + 1) / 2 * (N_COLOURS - 1)).max() <= 0.6


@pytest.mark.parametrize("stats", ["none", "all"])
def test_constant_channels_of_any_value_have_no_correlation(tmp_path: Path, stats: str) -> None:
    values = np.random.default_rng(0).standard_normal((333, 9))
    values[:, 2:] = [0.1, 1 / 3, 7e-5, 1e5 + 0.1, -0.7, 2e9 / 7, 1 / 7]
    run = captured(tmp_path / "run.zarr", {"x": values}, stats=stats, batch_size=100)
    tile = draw(run, "statistics", what="correlation").sheet.panels[0].tiles[0]
    assert (tile[2:] == Mark.CONSTANT).all()
    assert (tile[:, 2:] == Mark.CONSTANT).all()
    assert (tile[:2, :2] != Mark.CONSTANT).all()


def test_clusters_stand_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    groups = np.arange(30) % 3
    values = rng.standard_normal((200, 3))[:, groups] + 0.3 * rng.standard_normal((200, 30))
    values[:, 7] = 1
    run = captured(tmp_path / "run.zarr", {"x": values.astype(np.float32)}, batch_size=50)
    sheet = draw(run, "statistics", what="correlation", order="clusters").sheet
    note = next(note for note in sheet.notes if "as drawn" in note)
    order = [int(i) for i in note.rpartition(": ")[2].split(", ")]
    assert sorted(order) == list(range(30))
    assert order[-1] == 7
    assert (np.diff(groups[order[:-1]]) != 0).sum() == 2
    whole = np.corrcoef(values[:, order[:-1]].T)
    tile = max(sheet.panels, key=lambda panel: panel.tiles.size).tiles[0][:-1, :-1]
    assert np.abs(tile - (whole + 1) / 2 * (N_COLOURS - 1)).max() <= 0.6


def merged(distance: Values) -> list[set[int]]:
    """Return the clusters of average linkage in the order of their distances, by looking at every pair."""
    clusters, found = [{i} for i in range(len(distance))], []
    while len(clusters) > 1:
        a, b = min(
            combinations(clusters, 2), key=lambda two: distance[np.ix_(sorted(two[0]), sorted(two[1]))].mean()
        )
        clusters = [one for one in clusters if one not in (a, b)] + [a | b]
        found.append(a | b)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_every_cluster_of_average_linkage_stands_side_by_side(seed: int) -> None:
    correlation = np.corrcoef(np.random.default_rng(seed).standard_normal((17, 9)))
    order = clustered(correlation).tolist()
    for cluster in merged(1 - correlation):
        places = sorted(order.index(channel) for channel in cluster)
        assert places == list(range(places[0], places[0] + len(cluster)))


# Axes


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "limits", [(0, 1), (-3.2, 8.1), (0, 1e7), (-2e-9, 1e-9), (0.31, 0.32), (-1e4, 5), (12345, 12346), (0, 30)]
)
@pytest.mark.parametrize("width", [90, 240, 600])
def test_ticks_are_round_apart_and_where_they_say(limits: tuple[float, float], width: int, log: bool) -> None:
    axis = Axis(*limits, 7, width, log)
    assert (axis.at(limits[0]), axis.at(limits[1])) == (7, 7 + width - 1)
    ticks = axis.ticks()
    if not (log and limits[0] / limits[1] > 0.1):
        assert len(ticks) > 1
    right = -np.inf
    for value, text in ticks:
        assert limits[0] <= value <= limits[1] + 1e-9 * abs(limits[1])
        assert float(text) == pytest.approx(value, rel=1e-6, abs=1e-12 * max(map(abs, limits)))
        half = text_width(text, 9) / 2
        assert axis.at(value) - half >= right + 5
        right = axis.at(value) + half
    assert len({text for _, text in ticks}) == len(ticks)


def test_bins_of_an_axis_are_as_wide_as_each_other() -> None:
    for log in (False, True):
        axis = Axis(-2.0, 7.0, 0, 91, log)
        edges = axis.edges(90)
        assert (edges[0], edges[-1]) == (-2.0, 7.0)
        assert np.abs(90 * axis.share(edges) - np.arange(91)).max() < 1e-9
    assert [written(v, s) for v, s in ((0.05, 0.01), (1500, 500), (2e-7, 1e-7), (3e8, 1e8), (0, 1))] == [
        *("0.05", "1500", "2e-7", "3e8", "0"),
    ]


# What is asked for


def test_rows_that_are_named_are_read_whatever_is_kept(runs: dict[str, lt.Run]) -> None:
    values = taps()["tokens"][[3, 5]]
    for name in ("plain", "stats"):
        said = words(draw(runs[name], "statistics", rows=[3, 5], layers="tokens").sheet)
        assert f"{values.min():.3g} to {values.max():.3g}" in said
        assert "of 2 chosen rows" in said
    with pytest.raises(DrawError, match="nor values to compute them from"):
        draw(runs["alone"], "statistics", rows=[3])


def test_a_sample_is_bounded_seeded_and_said(runs: dict[str, lt.Run]) -> None:
    first, again, other = (
        draw(runs["plain"], "statistics", layers="fc", sample=7, seed=seed) for seed in (1, 1, 2)
    )
    assert "of 7 of 40 rows, drawn at random (seed 1)" in words(first.sheet)
    assert first.png() == again.png()
    assert first.png() != other.png()
    assert "all 40 rows" in words(draw(runs["plain"], "statistics", layers="fc", sample=40).sheet)


def test_an_unfinished_capture_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_BLOCK_BYTES", "_SHARD_BYTES"):
        monkeypatch.setattr(f"layertap.capture.plan.{name}", 4000)
    for stats in ("none", "all"):
        part = captured(tmp_path / stats, taps(), stats=stats, part="1/2")
        assert 0 < part.n_committed < N
        sheet = draw(part, "statistics", layers="tokens").sheet
        assert f"{part.n_committed} captured rows; the capture is not finished" in words(sheet)
        values = taps()["tokens"][: part.n_committed]
        assert f"{values.min():.3g} to {values.max():.3g}" in words(sheet)


def test_statistics_that_were_not_kept_are_asked_for(runs: dict[str, lt.Run]) -> None:
    with pytest.raises(DrawError, match=r"'histogram'.*stats='all'"):
        draw(runs["cheap alone"], "statistics")
    assert "all zero: 1 of 6" in words(draw(runs["cheap alone"], "statistics", what="dead").sheet)
    assert draw(runs["cheap alone"], "statistics", what="cka").sheet.bars


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"what": "histogram"}, "histograms"),
        ({"log": "x"}, "counts"),
        ({"order": "size"}, "no order"),
        ({"page": 0}, "page must be"),
        ({"page": 2}, "no page 2 of 5 layers; 1 hold"),
        ({"sample": 0}, "sample must be"),
        ({"layers": "con"}, "conv"),
        ({"rows": 99}, "0 to 39"),
        ({"channels": 3}, "no option 'channels'"),
        ({"rows": ()}, "no row"),
    ],
)
def test_bad_requests_are_refused(runs: dict[str, lt.Run], options: dict[str, Any], text: str) -> None:
    with pytest.raises((DrawError, SelectionError), match=text):
        draw(runs["plain"], "statistics", **options)


def test_a_correlation_takes_several_channels(tmp_path: Path) -> None:
    run = captured(tmp_path / "run.zarr", {"one": np.ones((3, 1, 2, 2), np.float32)})
    with pytest.raises(DrawError, match="no tap with more than one channel"):
        draw(run, "statistics", what="correlation")
    with pytest.raises(DrawError, match="has 1 channel; correlations are drawn of 2 to 4096"):
        draw(run, "statistics", what="correlation", layers="one")


def test_complex_numbers_have_none(tmp_path: Path) -> None:
    run = captured(
        tmp_path / "run.zarr", {"z": np.ones((3, 2), np.complex64), "x": np.ones((3, 2), np.float32)}
    )
    assert draw(run, "statistics").spec.layers == ("x",)
    with pytest.raises(DrawError, match="z has no statistics"):
        draw(run, "statistics", layers="z")


def test_the_same_picture_comes_from_its_specification(runs: dict[str, lt.Run], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for spec in (
        StatisticsSpec(layers=("conv", "fc"), log="both", title="قطة"),
        StatisticsSpec(what="correlation", layers=("fc",), order="clusters", rows=(3, 1, 4), seed=2),
        StatisticsSpec(what="cka", sample=9, page=1),
    ):
        again = spec_from_json(json.dumps(spec.to_json()))
        assert again == spec
        assert hash(again) == hash(spec)
        picture = draw(runs["plain"], spec)
        assert draw(runs["plain"], again).png() == picture.png()
        for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
            assert picture.save(tmp_path / name).read_bytes().startswith(start)


def test_painters_agree_on_boxes_and_lines(runs: dict[str, lt.Run]) -> None:
    pytest.importorskip("matplotlib")
    from dataclasses import replace

    from layertap.render.painters import painter

    for what in ("overview", "correlation"):
        sheet = replace(draw(runs["stats"], "statistics", what=what).sheet, texts=())
        assert (painter("pillow").array(sheet) == painter("matplotlib").array(sheet)).all()


def test_the_command_draws_what_the_call_draws(runs: dict[str, lt.Run], tmp_path: Path) -> None:
    run, out = runs["plain"], tmp_path / "x.png"
    arguments = ("correlation", "--layers", "fc", "--order", "clusters", "--rows", "0:20", "--out", str(out))
    result = CliRunner().invoke(render, ["statistics", str(run.path), *arguments])
    assert (result.exit_code, result.output) == (0, f"{out}\n")
    same = draw(run, "statistics", what="correlation", layers="fc", order="clusters", rows="0:20")
    assert out.read_bytes() == same.png()
    result = CliRunner().invoke(render, ["statistics", str(run.path), "--log", "both", "--out", str(out)])
    assert out.read_bytes() == draw(run, "statistics", log="both").png()
    result = CliRunner().invoke(render, ["statistics", str(run.path), "ovrview"])
    assert result.exit_code == 1
    assert "overview" in result.output


def test_panels_are_of_whole_pixels(runs: dict[str, lt.Run]) -> None:
    sheet = draw(runs["stats"], "statistics", what="correlation", layers="relu").sheet
    assert all(isinstance(panel, Panel) and panel.factor >= 1 for panel in sheet.panels)
