"""What is said of all captured rows is true of all of them, whether statistics tell or the rows are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
import test_ragged
from layertap.capture import shard
from layertap.capture.errors import SelectionError
from layertap.render import draw, survey
from layertap.render.importance import MEASURES, importance, ranked
from layertap.render.scale import cut_of, place_of_percentile
from layertap.render.survey import Totals, found, percentiles
from numpy.typing import NDArray
from test_render_layout import panel_of, words
from test_render_run import FakeRun, FakeTap

Values = NDArray[Any]
N = 40


def maps(signed: bool = False, n: int = N) -> Values:
    """Return maps that differ in strength from channel to channel, row to row and class to class."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((n, 12, 5, 5)).astype(np.float32)
    values = values if signed else np.maximum(values, 0)
    values *= np.linspace(0.5, 2, 12, dtype=np.float32)[:, None, None]
    values[:, 7] += 3 * (np.arange(n) % 4)[:, None, None]  # the class is written here
    values[:, 2] = 0
    return values


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Any]:
    """Capture `conv` into a store; rows have the labels 0 to 3 in turn."""

    def capture(values: Values, **options: Any) -> Any:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.zarr"
        labels = np.arange(len(values)) % 4
        data = np.arange(len(values)), labels
        lt.record_dataset(
            lambda rows: {"conv": values[np.asarray(rows)]},
            data,
            path,
            "*",
            backend="arrays",
            batch_size=8,
            classes=list("abcd"),
            **options,
        )
        return lt.open(path)

    return capture


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return a list that gets the file and number of every inner chunk that is read."""
    read: list[tuple[str, int]] = []
    decoded, plain = shard.Shard._decoded, shard.Shard._fill_plain

    def count(self: Any, i: int, *rest: Any, **options: Any) -> Any:
        read.append((self.name, i))
        return decoded(self, i, *rest, **options)

    def count_plain(self: Any, wanted: Any) -> None:
        read.extend((self.name, i) for i, _ in wanted)
        plain(self, wanted)

    monkeypatch.setattr(shard.Shard, "_decoded", count)
    monkeypatch.setattr(shard.Shard, "_fill_plain", count_plain)
    return read


def of_conv(read: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(name, i) for name, i in read if "taps/conv" in name]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("stats", [None, "cheap"])
def test_limits_of_the_data_set_are_those_of_all_rows(store: Any, signed: bool, stats: str | None) -> None:
    values = maps(signed)
    values[5, 3, 0, :2], values[6, 4, 0, 0] = np.nan, np.inf
    run = store(values, stats=stats)
    finite = values[np.isfinite(values)].astype(float)
    largest = max(-finite.min(), finite.max()) if signed else finite.max()
    for options in ({"rows": 0}, {"rows": [9, 1], "channels": "first:2"}, {"rows": 3, "channels": [2]}):
        sheet = draw(run, "grid", scope="data", **options).sheet
        (bar,) = sheet.bars
        assert (bar.low, bar.high) == (-largest if signed else 0, largest)
        assert "one scale for the layer over all 40 rows" in " ".join(words(sheet))


def test_statistics_tell_the_limits_and_no_row_is_read_for_them(store: Any, chunks: Any) -> None:
    values = maps().repeat(12, axis=2).repeat(12, axis=3)
    draw(store(values, stats="channels"), "grid", rows=0, scope="data", over="data", channels="top:3")
    assert len(set(of_conv(chunks))) <= 1
    chunks.clear()
    run = store(values)
    draw(run, "grid", rows=0, scope="data")
    shards = [run.shard(run["conv"]._spec, block) for block in run.blocks]
    n_chunks = sum(one.n_there // one.chunk_rows for one in shards)
    assert len(set(of_conv(chunks))) == n_chunks > 1


def test_rows_are_read_in_pieces_and_once_for_a_run(
    store: Any, chunks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store(maps())
    monkeypatch.setattr(survey, "PIECE_BYTES", 8 * 8 * maps()[0].size)
    sizes: list[int] = []
    of = np.isfinite
    monkeypatch.setattr(survey.np, "isfinite", lambda values: sizes.append(np.size(values)) or of(values))
    draw(run, "grid", rows=0, scope="data")
    assert sizes[:5] == [8 * maps()[0].size] * 5  # 40 rows
    monkeypatch.undo()
    chunks.clear()
    draw(run, "grid", rows=1, scope="data")
    assert len(of_conv(chunks)) <= 1
    assert {key[0] for key in found(run)} == {"limits"}


def test_more_rows_are_looked_at_again() -> None:
    values = maps()
    committed = np.arange(N) < 8
    run: Any = FakeRun(FakeTap("conv", values), committed=committed)
    first = draw(run, "grid", rows=0, scope="data").sheet
    assert first.bars[0].high == values[:8].max() < values.max()
    assert "one scale for the layer over all 8 rows" in " ".join(words(first))
    committed[:] = True
    assert draw(run, "grid", rows=0, scope="data").sheet.bars[0].high == values.max()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("absolute", [False, True])
def test_percentiles_are_the_values_at_their_place_in_order(dtype: Any, absolute: bool) -> None:
    rng = np.random.default_rng(1)
    values = (rng.standard_normal(3001) * 10.0 ** rng.integers(-30, 30, 3001)).astype(dtype)
    values[::7], values[5], values[6], values[8] = 0, np.nan, np.inf, -0.0
    wanted = [0.001, 1, 25, 50, 75, 99.5, 99.9, 100]
    plain = np.sort(np.abs(values[np.isfinite(values)]) if absolute else values[np.isfinite(values)])
    expected = [plain[place_of_percentile(one, len(plain))] for one in wanted]
    pieces = np.array_split(values, 7)
    assert percentiles(lambda: pieces, wanted, np.dtype(dtype), absolute=absolute) == expected
    assert [np.mean(plain <= one) * 100 >= share for one, share in zip(expected, wanted, strict=True)]
    assert all(np.mean(plain > one) * 100 <= 100 - share for one, share in zip(expected, wanted, strict=True))


def test_percentiles_of_nothing_are_nan() -> None:
    empty = [np.full(4, np.nan, np.float32), np.empty(0, np.float32)]
    assert np.isnan(percentiles(lambda: empty, [1, 99], np.dtype(np.float32))).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("clip", [90, 99.5, (5, 95)])
def test_percentiles_of_the_data_set_are_exact_or_said_to_be_about(
    store: Any, signed: bool, clip: Any
) -> None:
    values = maps(signed)
    low, high = cut_of(values, clip, symmetric=signed)
    low = low if np.isfinite(low) else 0.0
    (bar,) = draw(store(values), "grid", rows=0, scope="data", clip=clip).sheet.bars
    assert (bar.low, bar.high) == (low, high)
    sheet = draw(store(values, stats="histogram"), "grid", rows=0, scope="data", clip=clip).sheet
    (bar,) = sheet.bars
    assert high <= bar.high <= 1.15 * high
    said = " ".join(words(sheet))
    if (
        clip == (5, 95) and not signed
    ):  # a percentile of 0: the bin around it tells nothing, so rows were read
        assert "clipped at percentiles 5 and 95" in said
        assert (bar.low, bar.high) == (low, high)
    else:
        assert "clipped at about percentile" in said
        assert bar.low == -bar.high if clip != (5, 95) and signed else bar.low <= low


@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize("stats", [None, "channels"])
@pytest.mark.parametrize("signed", [False, True])
def test_a_ranking_over_all_rows_is_that_of_all_rows(
    store: Any, by: str, stats: str | None, signed: bool
) -> None:
    values = maps(signed)
    values[5, 3, 0, :2], values[6, 4, 0, 0], values[:, 9] = np.nan, np.inf, np.nan
    spec = f"top:5:{by}"
    sheet = draw(store(values, stats=stats), "grid", rows=3, channels=spec, over="data").sheet
    expected = ranked(importance(values, by))[:5]
    numbers = [text.text for text in sheet.texts if text.y == panel_of(sheet).y - 3 and text.text.isdigit()]
    assert numbers == [str(c) for c in expected[:3]]  # the first line of tiles
    assert f"5 of 12 channels shown, by {by} over all 40 rows" in " ".join(words(sheet))


@pytest.mark.parametrize("by", MEASURES)
def test_totals_of_pieces_are_those_of_all_together(by: str) -> None:
    values = maps(signed=True)
    values[5, 3, 0, :2], values[6, 4, 0, 0], values[:, 9] = np.nan, -np.inf, np.nan
    totals = Totals.of(np.array_split(values, 9))
    np.testing.assert_allclose(totals.importance(by), importance(values, by), rtol=1e-12)


def plain_f_ratio(values: Values, labels: Values) -> Values:
    """Return the ratio of the mean squares between and within classes, of the means of maps."""
    means = values.astype(np.float64).mean((2, 3))
    groups = [means[labels == label] for label in np.unique(labels)]
    between = sum(len(g) * (g.mean(0) - means.mean(0)) ** 2 for g in groups) / (len(groups) - 1)
    within = sum(((g - g.mean(0)) ** 2).sum(0) for g in groups) / (len(means) - len(groups))
    with np.errstate(invalid="ignore"):
        return np.asarray(between / within)


@pytest.mark.parametrize("stats", [None, "pooled"])
def test_channels_are_ranked_by_how_well_they_tell_the_classes_apart(store: Any, stats: str | None) -> None:
    values = maps(signed=True)
    sheet = draw(store(values, stats=stats), "grid", rows=3, channels="top:4:f_ratio").sheet
    expected = ranked(plain_f_ratio(values, np.arange(N) % 4))[:4]
    assert expected[0] == 7
    numbers = [text for text in words(sheet) if text.isdigit()][:4]
    assert numbers == [str(c) for c in expected]
    assert "4 of 12 channels shown, by class F-ratio over all 40 rows" in " ".join(words(sheet))


@pytest.mark.parametrize("stats", [None, "pooled"])
def test_rows_without_a_class_count_for_no_ranking_by_classes(tmp_path: Path, stats: str | None) -> None:
    values, labels = maps(signed=True), np.arange(N) % 4
    labels[5:30] = -1
    path = tmp_path / "a.zarr"
    lt.record_dataset(
        lambda rows: {"conv": values[rows]}, (np.arange(N), labels), path, "*", backend="arrays", stats=stats
    )
    sheet = draw(lt.open(path), "grid", rows=3, channels="top:4:f_ratio").sheet
    expected = ranked(plain_f_ratio(values[labels >= 0], labels[labels >= 0]))[:4]
    assert [text for text in words(sheet) if text.isdigit()][:4] == [str(c) for c in expected]
    assert "by class F-ratio over the 15 rows that have a class" in " ".join(words(sheet))


def test_a_ranking_by_classes_needs_labels(tmp_path: Path) -> None:
    data = np.arange(8)
    lt.record_dataset(lambda rows: {"conv": maps()[rows]}, data, tmp_path / "a.zarr", "*", backend="arrays")
    with pytest.raises(SelectionError, match="no column 'label'"):
        draw(lt.open(tmp_path / "a.zarr"), "grid", rows=0, channels="top:2:f_ratio")


def test_a_class_token_counts_for_nothing_where_it_is_not_drawn(store: Any) -> None:
    tokens = np.random.default_rng(0).random((8, 17, 6)).astype(np.float32)
    tokens[:, 0] = 100
    tokens[:, 0, 2], tokens[:, 1:, 4] = 1e6, 2
    for stats in (None, "cheap"):
        run = store(tokens, stats=stats)
        sheet = draw(run, "grid", rows=0, scope="data", channels="top:1:maximum", over="data").sheet
        assert sheet.bars[0].high == 2
        assert "4" in words(sheet)


def test_the_scale_of_the_data_set_holds_for_rows_of_every_shape(tmp_path: Path) -> None:
    run = test_ragged.capture(tmp_path / "s")
    every = np.concatenate([2 * row for row in test_ragged.Sequences().rows])
    for row in (0, 5):
        sheet = draw(run, "grid", rows=row, layers="twice", scope="data", channels="top:2", over="data").sheet
        assert [(bar.low, bar.high) for bar in sheet.bars] == [(-np.abs(every).max(), np.abs(every).max())]
        assert sheet.texts[2].text == str(every.mean(0).argmax())
