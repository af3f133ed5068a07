"""Statistics that are computed while streaming, against plain numpy in float64."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture.axes import dims_of
from layertap.capture.dtypes import BFLOAT16
from layertap.capture.layout import ArraySpec, Layout, slab_bytes
from layertap.capture.measure import _floats, forget_scratch, measure, scratch_bytes
from layertap.capture.plan import Settings, plan_layout, slots_of
from layertap.capture.statistics import BINS, BLOCKS, NAMES, ROWS, Choice, Statistics, cells, edges
from layertap.capture.summary import TapStatistics
from layertap.capture.testing import contents
from layertap.capture.verify import repair, verify
from layertap.render import view
from layertap.render.spec import GridSpec
from numpy.typing import NDArray

Values = NDArray[Any]

N, STEP, CLASSES = 22, 4, ("a", "b", "c")
CLASS_OF = np.arange(N) % 3
SHAPES = {
    "maps": (3, 7, 6),
    "small": (70, 2, 2),
    "tokens": (9, 5),
    "many tokens": (300, 5),
    "vector": (11,),
    "number": (),
    "film": (2, 3, 4, 5),
    "large": (1, 300, 300),
}


def capture(path: Path, taps: dict[str, Values], **options: Any) -> lt.Run:
    """Store arrays that are there as if a model gave them."""
    n_rows = len(next(iter(taps.values())))
    options = {"stats": "all", "batch_size": STEP, "memory": "64MiB", "classes": CLASSES} | options
    source = lt.ArraySource(np.arange(n_rows), np.arange(n_rows) % 3)
    return lt.record_dataset(
        lambda rows: {name: values[rows] for name, values in taps.items()}, source, path, ["**"], **options
    )


def channels_first(values: Values) -> Values:
    """Return float64 (rows, channels, positions) of a tap by its number of axes."""
    values = values.astype(np.float64)
    if values.ndim in (2, 3):  # features are last
        return np.moveaxis(values, -1, 1).reshape(len(values), values.shape[-1], -1)
    return values.reshape(len(values), values.shape[1] if values.ndim > 1 else 1, -1)


def check_against_numpy(run: lt.Run, name: str, values: Values) -> None:
    """Hold everything that is kept of a tap to what numpy says, channel by channel."""
    its, plain = run.stats[name], channels_first(values)
    for channel in range(plain.shape[1]):
        all_of_it = plain[:, channel].ravel()
        finite = all_of_it[np.isfinite(all_of_it)]
        counts = (its.count, its.n_nan, its.n_inf, its.n_zero)
        expected = (finite.size, np.isnan(all_of_it).sum(), np.isinf(all_of_it).sum(), (finite == 0).sum())
        assert tuple(count[channel] for count in counts) == expected  # type: ignore[index]
        check_moments(its, channel, finite)
        check_histogram(its, channel, finite)
    check_pooled_and_top(run, name, plain)
    finite_or_zero = np.where(np.isfinite(plain), plain, 0)
    gram = np.einsum("rcp,rdp->cd", finite_or_zero, finite_or_zero)
    assert its.gram is not None
    np.testing.assert_allclose(its.gram, gram, rtol=1e-12, atol=1e-12 * np.abs(gram).max())
    assert (its.nan, its.inf) == (np.isnan(plain).sum(), np.isinf(plain).sum())


def check_moments(its: TapStatistics, channel: int, finite: Values) -> None:
    assert its.minimum is not None
    assert its.maximum is not None
    assert its.mean is not None
    assert its.variance is not None
    if not finite.size:
        found = (its.minimum, its.maximum, its.mean, its.variance)
        assert all(np.isnan(one[channel]) for one in found)
        return
    assert (its.minimum[channel], its.maximum[channel]) == (finite.min(), finite.max())
    scale = 5e-6 * finite.std() + 1e-13 * np.abs(finite).max()
    assert abs(its.mean[channel] - finite.mean()) <= scale
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(
            its.variance[channel], finite.var(), rtol=1e-5, atol=1e-28 * finite.max() ** 2
        )


def check_histogram(its: TapStatistics, channel: int, finite: Values) -> None:
    assert its.histogram is not None
    with np.errstate(over="ignore"):
        short = finite.astype(np.float32).astype(np.float64)
    upper = edges()[BINS // 2 + 1 : -1]
    side = np.searchsorted(upper, np.abs(short), side="right")
    bins = BINS // 2 + np.where(np.signbit(short), -side, side)
    assert np.array_equal(its.histogram[channel], np.bincount(bins, minlength=BINS))


def check_pooled_and_top(run: lt.Run, name: str, plain: Values) -> None:
    its = run.stats[name]
    finite = np.isfinite(plain)
    n = finite.sum(2)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        means = np.where(finite, plain, 0).sum(2) / n
    maxima = np.where(finite, plain, -np.inf).max(2)
    wide = np.abs(np.where(finite, plain, 0)).max(2)
    assert (np.isnan(run.stats.pooled(name)) == (n == 0)).all()
    assert (np.abs(run.stats.pooled(name) - means)[n > 0] <= (5e-6 * wide)[n > 0]).all()
    assert np.array_equal(run.stats.pooled(name, "maximum"), np.where(n > 0, maxima, np.nan), equal_nan=True)
    assert its.top_rows is not None
    assert its.top_values is not None
    assert its.top_positions is not None
    order = np.argsort(-maxima, axis=0, kind="stable")[:9].T
    known = np.take_along_axis(n.T, order, 1) > 0
    assert np.array_equal(its.top_rows, np.where(known, order, -1))
    assert np.array_equal(its.top_values[known], np.take_along_axis(maxima.T, order, 1)[known])
    sizes = [n for dim, n in zip(run[name].dims[1:], run[name].shape[1:], strict=True) if dim != its.axis]
    for channel, rank in np.argwhere(known):
        line = np.where(finite, plain, -np.inf)[order[channel, rank], channel]
        expected = np.unravel_index(line.argmax(), sizes) if sizes else ()
        assert tuple(its.top_positions[channel, rank]) == expected


def test_a_tap_without_a_finite_value_has_statistics(tmp_path):
    values = np.full((N, 3, 2, 2), np.nan, np.float32)
    values[0, 1] = np.inf
    run = capture(tmp_path / "run.zarr", {"maps": values})
    check_against_numpy(run, "maps", values)
    assert (run.stats["maps"].top_rows == -1).all()
    with np.errstate(all="raise"):
        assert np.isnan(run.stats.cka(["maps"])).all()


def adversarial(shape: tuple[int, ...], dtype: Any) -> Values:
    """Values with zeros of both signs, ties, a dead channel, and what is not finite where there is such."""
    rng = np.random.default_rng(len(shape))
    values = rng.standard_normal((N, *shape)) * 30
    values[values > 40] = 40
    values[np.abs(values) < 8] = 0
    values = values.astype(dtype)
    if np.dtype(dtype).kind in "fV":
        flat = values.reshape(N, -1)
        flat[1] = -0.0
        flat[5, 0], flat[6, -1], flat[7, flat.shape[1] // 2] = np.nan, np.inf, -np.inf
        flat[20] = np.nan
    return values


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, BFLOAT16, np.float64, np.int8, np.uint16, np.int32, np.int64, np.bool_],
    ids=str,
)  # fmt: skip
def test_all_of_it_is_what_numpy_says(tmp_path: Path, dtype: Any) -> None:
    taps = {name: adversarial(shape, dtype) for name, shape in SHAPES.items()}
    run = capture(tmp_path / "s", taps)
    for name, values in taps.items():
        check_against_numpy(run, name, values)
    assert list(verify(tmp_path / "s")) == []


@pytest.mark.parametrize(
    "make",
    {
        "a mean a million times the deviations": lambda z: 1e6 + z,
        "one unit in the last place around 1e6": lambda z: np.where(z > 0, 1e6 + 0.0625, 1e6),
        "constant": lambda z: np.full_like(z, 3.3),
        "a constant whose sum overflows": lambda z: np.full_like(z, 1e38),
        "zero": lambda z: 0 * z,
        "rows far apart": lambda z: z + 1e5 * np.arange(N)[:, None, None, None],
        "squares that overflow": lambda z: 1e37 * z,
        "squares that vanish": lambda z: 1e-30 * z,
        "squares that overflow, and sums that do not": lambda z: 1e19 * z,
        "squares of which little is left": lambda z: 1e-22 * z,
        "one unit in the last place, of sums that are rounded one way": lambda z: np.where(
            z > 0, np.nextafter(np.float32(1.7950949), np.float32(2)), np.float32(1.7950949)
        ),
        "subnormal": lambda z: 1e-41 * z,
        "one far off": lambda z: np.where(np.arange(z[0].size).reshape(z[0].shape) == 0, 1e8, z),
    }.items(),
    ids=lambda item: item[0],
)
def test_hard_values_have_the_moments_that_float64_gives(tmp_path: Path, make: Any) -> None:
    noise = np.random.default_rng(0).standard_normal((N, 3, 20, 20))
    values = make[1](noise).astype(np.float32)
    taps = {"maps": values, "tokens": values.reshape(N, 3, 400).transpose(0, 2, 1).copy()}
    run = capture(tmp_path / "s", taps)
    for name in taps:
        its = run.stats[name]
        for channel in range(3):
            one = values[:, channel].astype(np.float64)
            assert its.mean is not None
            assert its.variance is not None
            assert abs(its.mean[channel] - one.mean()) <= 5e-6 * one.std() + 1e-14 * np.abs(one).max()
            np.testing.assert_allclose(its.variance[channel], one.var(), rtol=1e-5)


def test_every_float16_is_the_float32_that_numpy_makes_of_it() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)[None, None]
    with np.errstate(invalid="ignore"):
        ours, numpys = _floats(halves), halves.astype(np.float32)
    assert np.array_equal(ours, numpys, equal_nan=True)
    assert np.array_equal(np.signbit(ours), np.signbit(numpys))


def test_dead_channels_are_those_that_are_never_anything_but_zero(tmp_path: Path) -> None:
    values = np.zeros((N, 4, 5, 5), np.float32)
    values[3, 1, 2, 2], values[4, 2, 0, 0] = 1e-30, np.nan
    values[:, 3] = -0.0
    its = capture(tmp_path / "s", {"maps": values}).stats["maps"]
    assert its.dead is not None
    assert its.zero_fraction is not None
    assert its.dead.tolist() == [True, False, False, True]
    assert its.zero_fraction.tolist() == [1, 1 - 1 / 550, 1, 1]


def test_complex_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(lt.PlanError, match="maps holds complex numbers"):
        capture(tmp_path / "s", {"maps": np.ones((N, 3), np.complex64)})
    assert not (tmp_path / "s").exists()


def test_quantiles_are_right_to_an_eighth_and_exact_at_the_ends(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((N, 3, 30, 30)).astype(np.float32)
    values[:, 1] = np.maximum(values[:, 1], 0)
    its = capture(tmp_path / "s", {"maps": values}).stats["maps"]
    wanted = [0, 0.1, 0.25, 0.5, 0.9, 0.999, 1]
    expected = np.quantile(values, wanted, (0, 2, 3))
    np.testing.assert_allclose(its.quantile(wanted), expected, rtol=0.13, atol=1e-3)
    assert np.array_equal(its.quantile([0, 1]), expected[[0, -1]])
    assert its.quantile(0.5).shape == (3,)


def test_mean_maps_are_means_over_the_rows_of_each_class_and_the_cells(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    taps = {"maps": rng.standard_normal((N, 5, 20, 6)), "tokens": rng.standard_normal((N, 11, 4))}
    run = capture(tmp_path / "s", taps)
    for label in range(3):
        mean = taps["maps"][label == CLASS_OF].mean(0)
        by_line = np.stack([mean[:, cell].mean(1) for cell in cells(20, 8)], 1)
        maps = run.stats["maps"].class_maps
        assert maps is not None
        assert maps.shape == (3, 5, 8, 6)
        np.testing.assert_allclose(maps[label], by_line, rtol=1e-12, atol=1e-12)
        mean = taps["tokens"][label == CLASS_OF].mean(0)
        maps = run.stats["tokens"].class_maps
        assert maps is not None
        expected = np.stack([mean[cell].mean(0) for cell in cells(11, 8)], 1)
        np.testing.assert_allclose(maps[label], expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            run.stats.class_means("maps")[label], taps["maps"][label == CLASS_OF].mean((0, 2, 3)), atol=1e-12
        )


def spec(shape: tuple[int, ...], dtype: Any = np.float32, name: str = "t") -> ArraySpec:
    return ArraySpec(name, f"taps/{name}/values", dims_of(shape), shape, np.dtype(dtype))


@pytest.mark.parametrize(
    ("n_classes", "shape", "grid"),
    [
        (10, (16, 56, 56), (8, 8)),
        (10, (16, 56, 3), (8, 3)),
        (100, (64, 56, 56), (4, 4)),
        (1000, (64, 56, 1), (2, 1)),
        (1000, (64, 56, 56), ()),
        (10, (197, 768), (8,)),
        (10, (64,), ()),
        (0, (16, 56, 56), ()),
    ],
)
def test_mean_maps_stay_small_however_many_classes_there_are(
    n_classes: int, shape: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    (tap,) = Statistics.of([spec(shape)], NAMES, 9, n_classes).taps
    assert tap.grid == grid
    assert sum(8 * (f.stop - f.start) for f in tap.fields if f.name == "class_sum") <= 2**20


def test_the_f_ratio_is_that_of_the_analysis_of_variance(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = (
        rng.standard_normal((N, 3, 4, 4)) + CLASS_OF[:, None, None, None] * np.array([0, 1, 9])[:, None, None]
    )
    values[5, 1] = np.nan
    run = capture(tmp_path / "s", {"maps": values})
    labels = CLASS_OF.copy()
    labels[7] = -1
    for given, known in ((None, CLASS_OF), (labels, labels)):
        found = run.stats.f_ratio("maps", given)
        for channel in range(3):
            means = values[:, channel].mean((1, 2))
            used = (known >= 0) & np.isfinite(means)
            groups = [means[used & (known == label)] for label in range(3)]
            between = sum(len(g) * (g.mean() - means[used].mean()) ** 2 for g in groups) / 2
            within = sum(((g - g.mean()) ** 2).sum() for g in groups) / (used.sum() - 3)
            np.testing.assert_allclose(found[channel], between / within, rtol=1e-10)
    with pytest.raises(lt.SelectionError, match="one for each of 22 rows"):
        run.stats.f_ratio("maps", CLASS_OF[:5])


def test_cka_is_the_formula_and_does_not_change_with_scale_shift_or_rotation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((N, 6))
    turned = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    taps = {"a": features, "b": 3 * features @ turned + 100, "c": rng.standard_normal((N, 4))}
    run = capture(tmp_path / "s", taps)

    def centred(name: str) -> Values:
        return np.asarray(taps[name] - taps[name].mean(0))

    def cka(x: Values, y: Values) -> float:
        norm = np.linalg.norm
        return float(norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y)))

    expected = [[cka(centred(a), centred(b)) for b in taps] for a in taps]
    found = run.stats.cka()
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose([found[0, 1], *np.diag(found)], 1, rtol=1e-10)
    assert found[0, 2] < 0.9
    assert np.array_equal(run.stats.cka(["c", "a"]), found[np.ix_([2, 0], [2, 0])])


# Splitting, resuming, damage

TAPS_OF_60 = {
    "maps": np.random.default_rng(1).standard_normal((60, 8, 16, 16)).astype(np.float32).clip(0),
    "logits": np.random.default_rng(2).standard_normal((60, 10)).astype(np.float32),
}


class Failing(lt.ArraySource):
    """Rows that end with an error at one of them."""

    def __init__(self, last: int) -> None:
        super().__init__(np.arange(60), np.arange(60) % 3)
        self.last = last

    def batch(self, rows: range) -> lt.Batch:
        if self.last in rows:
            raise OSError("the disk is gone")
        return super().batch(rows)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks be of two steps, whatever the memory."""
    for name in ("_BLOCK_BYTES", "_SHARD_BYTES"):
        monkeypatch.setattr(f"layertap.capture.plan.{name}", 2 * slab_bytes((spec((8, 16, 16)),), STEP) // 5)


def capture_60(path: Path, last: int = -1, **options: Any) -> lt.Run:
    options = {"memory": "64MiB", "writers": 1, "stats": "all"} | options
    return lt.record_dataset(
        lambda rows: {name: values[rows] for name, values in TAPS_OF_60.items()},
        Failing(last), path, ["**"], batch_size=STEP, classes=CLASSES, **options,
    )  # fmt: skip


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("values", [True, False], ids=["values", "statistics alone"])
def test_a_store_is_the_same_bytes_however_the_work_was_split(tmp_path: Path, values: bool) -> None:
    run = capture_60(tmp_path / "whole", values=values)
    whole = contents(tmp_path / "whole")
    assert run.manifest.n_blocks > 5
    capture_60(tmp_path / "writers", values=values, writers=5)
    for part in ("2/3", "3/3", "1/3"):
        capture_60(tmp_path / "parts", values=values, part=part)
    for last in (13, 37, 59):
        with pytest.raises(OSError, match="the disk is gone"):
            capture_60(tmp_path / "resumed", last, values=values)
    assert 0 < lt.open(tmp_path / "resumed").n_committed < 60
    capture_60(tmp_path / "resumed", values=values)
    for name in ("writers", "parts", "resumed"):
        assert contents(tmp_path / name) == whole, name
        again = lt.open(tmp_path / name)
        for tap in TAPS_OF_60:
            for field, kept in vars(run.stats[tap]).items():
                assert np.asarray(vars(again.stats[tap])[field]).tobytes() == np.asarray(kept).tobytes(), (
                    field
                )
        assert again.stats.cka().tobytes() == run.stats.cka().tobytes()
    assert list(verify(tmp_path / "whole")) == []


@pytest.mark.usefixtures("small_blocks")
def test_blocks_merge_to_what_numpy_says_of_all_rows(tmp_path: Path) -> None:
    run = capture_60(tmp_path / "s")
    assert run.manifest.n_blocks > 5
    for name, values in TAPS_OF_60.items():
        check_against_numpy(run, name, values)
    maps = run.stats["maps"].class_maps
    assert maps is not None
    expected = TAPS_OF_60["maps"][1::3].astype(np.float64).mean(0).reshape(8, 8, 2, 8, 2).mean((2, 4))
    np.testing.assert_allclose(maps[1], expected, rtol=1e-12)


@pytest.mark.usefixtures("small_blocks")
def test_a_loop_of_ones_own_gives_the_same_store_statistics(tmp_path: Path) -> None:
    run = capture_60(tmp_path / "s")

    def model(rows: Values) -> dict[str, Values]:
        return {name: values[rows] for name, values in TAPS_OF_60.items()}

    with lt.record(model, tmp_path / "loop", ["**"], stats="all", classes=CLASSES, memory="64MiB") as rec:
        for first in range(0, 60, STEP):
            rows = np.arange(first, first + STEP)
            rec(rows)
            rec.annotate(label=rows % 3)
    loop = lt.open(tmp_path / "loop")
    assert loop.manifest.n_blocks == run.manifest.n_blocks
    for file in (f"{BLOCKS}/c.1.0", f"{ROWS}/c.1.0"):
        assert (tmp_path / "loop" / file).read_bytes() == (tmp_path / "s" / file).read_bytes()


@pytest.mark.usefixtures("small_blocks")
def test_an_unfinished_store_tells_of_its_committed_blocks_alone(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        capture_60(tmp_path / "s", 37)
    run = lt.open(tmp_path / "s")
    done = run.committed()
    assert 0 < done.sum() < 60
    its = run.stats["maps"]
    kept = TAPS_OF_60["maps"][done].astype(np.float64)
    assert its.count is not None
    assert its.mean is not None
    assert its.top_rows is not None
    assert its.count.tolist() == [done.sum() * 256] * 8
    np.testing.assert_allclose(its.mean, kept.mean((0, 2, 3)), rtol=1e-6)
    assert its.top_rows.max() < done.sum()
    assert len(run.stats.pooled("maps")) == done.sum()
    assert np.isfinite(run.stats.f_ratio("maps")).all()
    (tmp_path / "s" / "commits" / "c.0.0").unlink()
    run.refresh()
    count = run.stats["maps"].count
    assert count is not None
    assert count[0] == (done.sum() - run.manifest.layout.block_rows) * 256


@pytest.mark.usefixtures("small_blocks")
def test_no_committed_block_gives_no_counts_and_nothing_else(tmp_path: Path) -> None:
    capture_60(tmp_path / "s")
    for record in (tmp_path / "s" / "commits").glob("c.*"):
        record.unlink()
    its = lt.open(tmp_path / "s").stats["maps"]
    assert its.count is not None
    assert its.mean is not None
    assert its.count.sum() == 0
    assert np.isnan(its.mean).all()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("file", [f"{BLOCKS}/c.2.0", f"{ROWS}/c.2.0"])
def test_a_flipped_bit_in_them_is_found_and_made_good(tmp_path: Path, file: str) -> None:
    capture_60(tmp_path / "s")
    whole = contents(tmp_path / "s")
    data = bytearray((tmp_path / "s" / file).read_bytes())
    data[20] ^= 4
    (tmp_path / "s" / file).write_bytes(data)
    (damage,) = verify(tmp_path / "s")
    assert damage.file == file
    with pytest.raises(lt.ChecksumError):
        run = lt.open(tmp_path / "s", check=True)
        (run.stats.pooled("maps"), run.stats["maps"])
    assert repair(tmp_path / "s", [damage]) == [2]
    capture_60(tmp_path / "s")
    assert contents(tmp_path / "s") == whole


@pytest.mark.usefixtures("small_blocks")
def test_another_blocks_statistics_do_not_pass_for_these(tmp_path: Path) -> None:
    """The commit record binds them: each file by itself is sound."""
    capture_60(tmp_path / "s")
    folder = tmp_path / "s" / BLOCKS
    shutil.copy(folder / "c.3.0", folder / "c.2.0")
    assert [damage.file for damage in verify(tmp_path / "s")] == [f"{BLOCKS}/c.2.0"]


@pytest.mark.usefixtures("small_blocks")
def test_they_are_packed_with_the_rest(tmp_path: Path) -> None:
    run = capture_60(tmp_path / "s", values=False)
    packed = lt.open(lt.pack(tmp_path / "s", tmp_path / "s.zip"))
    for field, kept in vars(run.stats["maps"]).items():
        assert np.array_equal(vars(packed.stats["maps"])[field], kept), field
    assert np.array_equal(packed.stats.pooled("logits"), run.stats.pooled("logits"))
    assert list(verify(tmp_path / "s.zip")) == []


def test_a_block_adds_two_files_however_many_taps_there_are(tmp_path: Path) -> None:
    taps = {f"tap{i}": np.ones((N, 3, 4, 4), np.float32) for i in range(30)}
    files = {}
    for stats in ("none", "cheap", "all"):
        run = capture(tmp_path / stats, taps, stats=stats)
        files[stats] = {file for file in contents(tmp_path / stats) if not file.endswith("zarr.json")}
    added = files["all"] - files["none"]
    assert added == files["cheap"] - files["none"]
    assert len(added) == 2 * run.manifest.n_blocks


# Statistics alone


@pytest.mark.usefixtures("small_blocks")
def test_statistics_alone_write_no_activations(tmp_path: Path) -> None:
    both = capture_60(tmp_path / "both")
    alone = capture_60(tmp_path / "alone", values=False)
    files = contents(tmp_path / "alone")
    assert not [file for file in files if file.startswith("taps")]
    for file, data in contents(tmp_path / "both").items():
        if file.startswith(("statistics/", "rows/")) and "zarr.json" not in file:
            assert files[file] == data, file
    assert alone.manifest.layout.block_rows == both.manifest.layout.block_rows
    n_values = sum(values.nbytes for values in TAPS_OF_60.values())
    written = {run: sum(map(len, contents(run.path).values())) for run in (both, alone)}
    assert both.n_bytes - alone.n_bytes >= n_values
    assert written[both] - written[alone] >= n_values
    assert (alone.stats["maps"].nan, alone.stats["maps"].inf) == (0, 0)


@pytest.mark.usefixtures("small_blocks")
def test_values_that_were_not_written_cannot_be_read_or_drawn(tmp_path: Path) -> None:
    run = capture_60(tmp_path / "s", values=False)
    assert run["maps"].shape == (60, 8, 16, 16)
    for ask in (
        lambda: run["maps"][3, :2],
        lambda: lt.draw(run, "grid", rows=[3], layers="maps"),
        lambda: lt.draw(run, "montage", rows=3, layers="maps"),
    ):
        with pytest.raises(lt.StoreError, match="holds statistics alone"):
            ask()
    assert run.rows["label"][:4].tolist() == [0, 1, 2, 0]


def test_statistics_alone_are_the_cheap_ones_unless_others_are_named(tmp_path: Path) -> None:
    taps = {"maps": np.ones((N, 3, 4, 4), np.float32)}
    run = capture(tmp_path / "s", taps, stats=None, values=False)
    assert run.stats.names == ("channels", "pooled", "top")
    with pytest.raises(lt.PlanError, match="nothing to keep"):
        capture(tmp_path / "none", taps, stats="none", values=False)


@pytest.mark.usefixtures("small_blocks")
def test_a_capture_of_other_statistics_is_another_plan(tmp_path: Path) -> None:
    capture_60(tmp_path / "s", stats="cheap")
    for options, said in (
        ({"stats": None}, "statistics"),
        ({"stats": "cheap,top:3"}, "top_rows"),
        ({"stats": "cheap", "values": False}, "values there, statistics alone now"),
    ):
        with pytest.raises(lt.StoreExistsError, match=said):
            capture_60(tmp_path / "s", **options)


# Choosing


def test_choices_are_read() -> None:
    assert Choice.parse(None).names == Choice.parse("none").names == ()
    assert Choice.parse("all").names == NAMES
    assert Choice.parse("gram,top:16") == Choice(("channels", "top", "gram"), 16, True)
    with pytest.raises(lt.PlanError, match="stats=True does not say which"):
        Choice.parse(True)
    assert Choice.parse(["classes"]) == Choice(("channels", "pooled", "classes"), 9, False)
    for wrong in ("gramm", "top:0", "top:x", "top:1025", "gram:2", "top:", "\u0663"):
        with pytest.raises(lt.PlanError):
            Choice.parse(wrong)


def test_classes_need_names_and_labels_where_they_are_asked_for_by_name(tmp_path: Path) -> None:
    taps = {"maps": np.ones((N, 3, 4, 4), np.float32)}
    with pytest.raises(lt.PlanError, match="there are no names"):
        capture(tmp_path / "s", taps, stats="classes", classes=None)
    assert "classes" not in capture(tmp_path / "s", taps, stats="all", classes=None).stats.names


def test_what_was_not_kept_is_said_with_how_to_keep_it(tmp_path: Path) -> None:
    run = capture(tmp_path / "s", {"maps": np.ones((N, 3, 4, 4), np.float32)}, stats="channels")
    for ask in (
        lambda: run.stats.cka(),
        lambda: run.stats.f_ratio("maps"),
        lambda: run.stats.pooled("maps"),
        lambda: run.stats["maps"].quantile(0.5),
    ):
        with pytest.raises(lt.SelectionError, match="capture with stats="):
            ask()
    with pytest.raises(lt.SelectionError, match="holds no tap 'mups'"):
        run.stats["mups"]
    assert run.stats["maps"].gram is None


def test_wide_taps_have_no_gram_matrix() -> None:
    for n, there in ((1024, True), (1025, False)):
        (tap,) = Statistics.of([spec((n,))], NAMES, 9, 0).taps
        assert ("gram" in {field.name for field in tap.fields}) is there


# Trust


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["channels", "tea"]},
        {"names": ["pooled"]},
        {"names": "channels"},
        {"top_rows": 2**40},
        {"classes": -1},
        {"taps": {}},
        {"blocks": {"path": "../secret", "pieces": 1, "piece_entries": 5}},
        {"rows": None},
    ],
    ids=str,
)
def test_a_manifest_that_says_something_else_of_them_is_refused(tmp_path: Path, change: Any) -> None:
    run = capture(tmp_path / "s", {"maps": np.ones((N, 3, 4, 4), np.float32)})
    taps, said = run.manifest.layout.taps, run.info["statistics"]
    assert Statistics.from_json(json.loads(json.dumps(said)), taps) == run.manifest.layout.statistics
    with pytest.raises(lt.FormatError):
        Statistics.from_json(said | change, taps)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("field", "value"),
    [("count", -1), ("zero", 0.5), ("top_row", 2.0**60), ("top_position", 256), ("nan", np.nan)],
)
def test_counts_and_places_that_cannot_be_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: float
) -> None:
    from layertap.capture import pipeline

    def lying(*args: Any) -> None:
        measure(*args)
        args[0].statistics.taps[args[1]].views(args[5])[field].flat[0] = value

    monkeypatch.setattr(pipeline, "measure", lying)
    capture_60(tmp_path / "s")
    with pytest.raises(lt.FormatError, match=f"has a {field} that cannot be"):
        lt.open(tmp_path / "s").stats["maps"]


# Memory


def block_of(shape: tuple[int, ...], dtype: Any) -> tuple[Layout, list[NDArray[np.uint8]]]:
    taps = [spec(shape, dtype)]
    label = ArraySpec("label", "rows/label", ("row",), (), np.dtype(np.int64))
    kept = Statistics.of(taps, NAMES, 9, 3)
    layout = Layout(tuple(taps), (label,), 16, 32, kept)
    slabs = [np.zeros(layout.slab_bytes, np.uint8) for _ in range(2)]
    for slab in slabs:
        values = slab[: 16 * taps[0].row_bytes].view(taps[0].dtype)
        values[:] = np.random.default_rng(0).standard_normal(values.size) * 100
    return layout, slabs


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int32], ids=str)
@pytest.mark.parametrize("shape", [(64, 28, 28), (512, 7, 7), (197, 256), (4096,), (1, 300, 300)], ids=str)
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
def test_what_a_writer_takes_is_what_the_plan_counts(
    shape: tuple[int, ...], dtype: Any, finite: bool
) -> None:
    layout, slabs = block_of(shape, dtype)
    assert layout.statistics is not None
    if not finite:
        slabs[0][: 16 * layout.taps[0].row_bytes].view(layout.taps[0].dtype)[::7] = (
            np.nan if np.dtype(dtype).kind == "f" else 0
        )
    entries = np.zeros(layout.statistics.block_bytes // 8)
    forget_scratch()
    tracemalloc.start()
    measure(layout, 0, slabs, 32, 0, entries)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    forget_scratch()
    counted = scratch_bytes(layout.statistics, 16)
    assert most <= counted
    assert counted < 48 * 2**20


def test_the_plan_counts_the_entries_of_every_block_and_the_scratch_of_every_writer() -> None:
    taps = [spec((512, 7, 7)), spec((1000,), name="logits")]
    kept = Statistics.of(taps, NAMES, 9, 10)
    least = kept.block_bytes * 3 + 2 * scratch_bytes(kept, 16)
    with pytest.raises(lt.PlanError, match="does not fit the memory") as refused:
        plan_layout(taps, (), 16, 1000, Settings(memory=least, writers=2, kept=kept))
    advised = str(refused.value).split("Give memory=")[1].split(" ")[0]
    settings = Settings(memory=advised, writers=2, kept=kept)
    layout = plan_layout(taps, (), 16, 1000, settings)
    assert layout.statistics is kept
    assert slots_of(layout, settings) >= 2
    assert least + 2 * layout.block_bytes <= settings.memory_bytes


# Drawing, commands


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("by", ["mean", "maximum", "variance", "l1", "sparsity"])
def test_the_most_important_channels_are_the_same_and_few_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    rng = np.random.default_rng(0)
    maps = (rng.standard_normal((N, 64, 8, 8)) * rng.uniform(0.1, 2, (64, 1, 1))).astype(np.float32)
    maps[:, 10:30] = np.maximum(maps[:, 10:30], 0)
    maps[:, 30:40] = 0  # equals
    maps[:, 41:44] = maps[:, 40:41]
    runs = [capture(tmp_path / stats, {"maps": maps}, stats=stats) for stats in ("cheap", "none")]
    asked: list[int] = []
    read = view.read_maps
    monkeypatch.setattr(view, "read_maps", lambda *args: (asked.append(len(args[3])), read(*args))[1])
    for rows in ([3], [0, 5, 21], range(N)):
        for n in (1, 9, 60, 64, 100):
            spec = GridSpec(rows=tuple(rows), layers=("maps",), channels=f"top:{n}:{by}", picture=False)
            (few,), (every,) = (view.take(run, spec).layers for run in runs)
            assert few.channels == every.channels
            assert few.values.tobytes() == every.values.tobytes()
    fewer = [here < everywhere for here, everywhere in zip(asked[::2], asked[1::2], strict=True)]
    assert any(fewer) is (by in ("mean", "maximum"))
    assert min(asked) == (1 if by in ("mean", "maximum") else 64)


def test_a_value_that_is_not_finite_makes_drawing_read_all_channels(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).standard_normal((N, 20, 4, 4)).astype(np.float32)
    maps[2, 3, 0, 0] = np.nan
    run = capture(tmp_path / "s", {"maps": maps}, stats="cheap")
    from layertap.render.importance import candidates

    assert candidates(run.stats, "maps", np.array([1]), "mean", 3) is None


@pytest.mark.usefixtures("small_blocks")
def test_the_commands_keep_and_print_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", np.maximum(TAPS_OF_60["maps"], 0), np.arange(60) % 3)
    (tmp_path / "model.py").write_text(
        "def build():\n    return lambda batch: {'maps': batch * (batch > 0), 'none': batch * 0}\n"
    )
    store = str(tmp_path / "s")
    command = ["capture", f"{tmp_path}/model.py:build", f"{tmp_path}/data.npz", store, "--layers", "**"]
    done = CliRunner().invoke(main, [*command, "--stats", "cheap,gram", "--stats-only", "--batch-size", "4"])
    assert done.exit_code == 0, done.output
    run = lt.open(store)
    assert run.stats.names == ("channels", "pooled", "top", "gram")
    assert not run.manifest.layout.values
    done = CliRunner().invoke(main, ["info", store, "--stats"])
    lines = done.output.splitlines()
    assert done.exit_code == 0, done.output
    assert lines[0] == "statistics of 60 rows: channels, pooled, top, gram"
    assert lines[2].split() == [
        "tap",
        "channels",
        "dead",
        "zeros",
        "minimum",
        "maximum",
        "mean",
        "NaN",
        "infinite",
    ]
    zeros = 100 * (TAPS_OF_60["maps"] <= 0).mean()
    cells = lines[3].split()
    assert cells[:6] == ["maps", "8", "0", f"{zeros:.1f}", "%", "0"]
    assert lines[4].split()[:5] == ["none", "8", "8", "100.0", "%"]
    assert CliRunner().invoke(main, ["info", store]).exit_code == 0


def test_info_of_a_store_without_them_says_how_to_keep_them(tmp_path: Path) -> None:
    capture(tmp_path / "s", {"maps": np.ones((N, 3, 4, 4), np.float32)}, stats=None)
    done = CliRunner().invoke(main, ["info", str(tmp_path / "s"), "--stats"])
    assert done.exit_code == 1
    assert "capture with --stats cheap" in done.output


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [None, "float16"], ids=["float32", "float16"])
def test_real_activations_have_the_statistics_of_the_values_that_are_stored(
    tmp_path: Path, cifar: Path, dtype: str | None
) -> None:
    """A trained ResNet-20 on pictures, in several blocks, held to what numpy says of the stored values."""
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    import resnet20

    layers = ["conv1", "layer1.2.bn2", "layer3", "linear"]
    pictures = lt.PictureFolder(cifar, lt.Preprocess(resnet20.MEAN, resnet20.STD))
    few = lt.SampleSource([pictures.batch(range(i, i + 1)).inputs[0][0] for i in range(0, 10_000, 50)])
    labels = np.asarray([pictures.batch(range(i, i + 1)).columns["label"][0] for i in range(0, 10_000, 50)])
    run = lt.record_dataset(
        resnet20.trained(),
        few,
        tmp_path / "s",
        layers,
        batch_size=16,
        dtype=dtype,
        stats="all",
    )
    assert run.manifest.n_blocks > 2
    for name in layers:
        check_against_numpy(run, name, run[name][...])
    f = run.stats.f_ratio("linear", labels)
    assert f.min() > 5  # each logit tells its class from the others
    assert run.stats.f_ratio("conv1", labels).max() < f.min()
    cka = run.stats.cka(layers)
    assert cka[2, 3] > 2 * cka[0, 3]
