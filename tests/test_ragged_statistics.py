"""Statistics of rows that differ in shape, and of int8 codes: of the values that are there, and no others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from layertap.capture.axes import dims_of
from layertap.capture.layout import ArraySpec, Layout, array_view
from layertap.capture.measure import forget_scratch, measure, scratch_bytes
from layertap.capture.ragged import extents_spec, mask_spec
from layertap.capture.statistics import BINS, BLOCKS, NAMES, ROWS, Statistics, edges
from layertap.capture.testing import contents
from layertap.capture.verify import verify
from layertap.render.importance import candidates
from numpy.typing import NDArray

Values = NDArray[Any]

N_ROWS, STEP, CLASSES = 61, 4, ("a", "b", "c")

#: The bound of each tap; of `maps` and `channels` a size for each axis.
BOUNDS = {"tokens": "9x4", "maps": "5x8x9", "vector": "30", "wide": "3x70"}


def rows_of(kind: str, dtype: Any = np.float32) -> list[Values]:
    """Return rows with zeros, ties, what is not finite, and rows without any value."""
    rng = np.random.default_rng(len(kind))
    shapes = {
        "tokens": [(n, 4) for n in rng.integers(0, 10, N_ROWS)],
        "maps": [tuple(rng.integers(1, (6, 9, 10))) for _ in range(N_ROWS)],
        "vector": [(n,) for n in rng.integers(0, 31, N_ROWS)],
        "wide": [tuple(rng.integers(1, (4, 71))) for _ in range(N_ROWS)],
    }[kind]
    shapes[8:12] = [shapes[8]] * 4  # alike
    rows = [(rng.standard_normal(shape) * 30).round(1).astype(dtype) for shape in shapes]
    for i, row in enumerate(rows):
        row[np.abs(row.astype(np.float32)) < 8] = 0
        if np.dtype(dtype).kind == "f" and row.size and i % 5 == 2:
            row.flat[0], row.flat[row.size // 2] = (np.nan, np.inf) if i % 2 else (-np.inf, np.nan)
    return rows


class Lists(lt.Source):
    """Gives the numbers of rows, and their labels."""

    name, n_rows = "lists", N_ROWS

    def batch(self, rows: range) -> lt.Batch:
        return lt.Batch(rows, (np.array(rows),), columns={"label": np.array(rows) % 3})


def model_of(taps: dict[str, list[Values]]) -> Any:
    return lambda numbers: {name: [rows[i] for i in numbers.tolist()] for name, rows in taps.items()}


def capture(path: Path, taps: dict[str, list[Values]], how: str = "ragged", **options: Any) -> lt.Run:
    options = {"stats": "all", "batch_size": STEP, "memory": "64MiB", "classes": CLASSES} | options
    sizes = {name: BOUNDS[name] for name in taps}
    options[how] = [f"{name}:{size}" + (",77" if how == "pad" else "") for name, size in sizes.items()]
    return lt.record_dataset(options.pop("model", model_of(taps)), Lists(), path, ["**"], **options)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks be of a step or two, whatever the memory."""
    for name in ("_BLOCK_BYTES", "_SHARD_BYTES"):
        monkeypatch.setattr(f"layertap.capture.plan.{name}", 4096)


def by_channel(kind: str, row: Values) -> list[Values]:
    """Return the float64 values of each channel of a row, in the order of positions."""
    row = row.astype(np.float64)
    if kind == "vector":
        return [row]
    n = int(BOUNDS[kind].split("x")[-1 if row.ndim == 2 else 0])
    some = np.moveaxis(row, -1, 0) if row.ndim == 2 else row
    return [some[c].ravel() if c < len(some) else np.zeros(0) for c in range(n)]


def check_against_numpy(run: lt.Run, kind: str, rows: list[Values]) -> None:
    """Hold all that is kept of a tap to what numpy says of the values that are there."""
    its, split = run.stats[kind], [by_channel(kind, row) for row in rows]
    means, maxima = run.stats.pooled(kind), run.stats.pooled(kind, "maximum")
    for name in ("count", "n_nan", "n_inf", "n_zero", "minimum", "maximum", "mean", "variance", "histogram"):
        assert getattr(its, name) is not None, name
    for c in range(len(split[0])):
        whole = np.concatenate([row[c] for row in split])
        finite = whole[np.isfinite(whole)]
        counted = [its.count[c], its.n_nan[c], its.n_inf[c], its.n_zero[c]]
        assert counted == [finite.size, np.isnan(whole).sum(), np.isinf(whole).sum(), (finite == 0).sum()]
        assert (its.minimum[c], its.maximum[c]) == (finite.min(), finite.max())
        np.testing.assert_allclose(its.mean[c], finite.mean(), atol=5e-6 * finite.std())
        np.testing.assert_allclose(its.variance[c], finite.var(), rtol=1e-5)
        upper = edges()[BINS // 2 + 1 : -1]
        side = np.searchsorted(upper, np.abs(finite.astype(np.float32)), side="right")
        bins = BINS // 2 + np.where(np.signbit(finite), -side, side)
        assert np.array_equal(its.histogram[c], np.bincount(bins, minlength=BINS))
        highest = []
        for i, row in enumerate(split):
            known = row[c][np.isfinite(row[c])]
            assert np.isnan(means[i, c]) == np.isnan(maxima[i, c]) == (known.size == 0)
            if known.size:
                np.testing.assert_allclose(means[i, c], known.mean(), rtol=1e-5, atol=1e-5)
                assert maxima[i, c] == maxima.dtype.type(known.max())
                highest.append((-known.max(), i))
        top = [i for _, i in sorted(highest)][:9]
        assert its.top_rows[c, : len(top)].tolist() == top
        assert (its.top_rows[c, len(top) :] == -1).all()
        for rank, i in enumerate(top):
            index = list(its.top_positions[c, rank])
            if kind != "vector":
                index.insert(len(index) if rows[i].ndim == 2 else 0, c)
            at = by_channel(kind, rows[i])[c]
            first = np.flatnonzero(at == at[np.isfinite(at)].max())[0]
            assert rows[i][tuple(index)] == its.top_values[c, rank] == at[first]
    assert its.class_maps is None
    assert its.class_rows is None


def check_gram(run: lt.Run, kind: str, rows: list[Values]) -> None:
    expected: Any = 0
    for row in rows:
        some = [np.where(np.isfinite(one), one, 0) for one in by_channel(kind, row)]
        longest = max(map(len, some))
        filled = np.stack([np.pad(one, (0, longest - len(one))) for one in some])
        expected = expected + filled @ filled.T
    np.testing.assert_allclose(run.stats[kind].gram, expected, rtol=1e-10, atol=1e-9)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("how", ["ragged", "pad"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int16], ids=str)
def test_they_are_what_numpy_says_of_the_values_that_are_there(tmp_path: Path, how: str, dtype: Any) -> None:
    taps = {kind: rows_of(kind, dtype) for kind in BOUNDS}
    run = capture(tmp_path / "s", taps, how)
    assert run.manifest.n_blocks > 5
    for kind, rows in taps.items():
        check_against_numpy(run, kind, rows)
        check_gram(run, kind, rows)
    assert list(verify(tmp_path / "s")) == []
    labels = np.arange(N_ROWS) % 3
    means = run.stats.pooled("tokens").astype(np.float64)
    for label in range(3):
        with np.errstate(invalid="ignore"):
            expected = np.nanmean(means[labels == label], 0)
        np.testing.assert_allclose(run.stats.class_means("tokens")[label], expected)


class Padded(lt.Source):
    """Sequences that are padded with a large value to the longest of each batch, on either side."""

    name, n_rows = "padded", N_ROWS

    def __init__(self, left: bool, holes: bool = False) -> None:
        self.rows, self.left, self.holes = rows_of("tokens"), left, holes

    def batch(self, rows: range) -> lt.Batch:
        some = [self.rows[row] for row in rows]
        longest = max(1, max(map(len, some)))
        values = np.full((len(some), longest, 4), 1e6, np.float32)
        mask = np.zeros((len(some), longest), np.int64)
        for i, row in enumerate(some):
            where = np.arange(longest - len(row), longest) if self.left else np.arange(len(row))
            if self.holes:
                where = np.sort(np.random.default_rng(rows[i]).permutation(longest)[: len(row)])
            values[i, where], mask[i, where] = row, 1
        return lt.Batch(rows, (values,), {"attention_mask": mask}, {"label": np.array(rows) % 3})


def masked(path: Path, source: Padded, **options: Any) -> lt.Run:
    options = {"stats": "all", "batch_size": STEP, "classes": CLASSES, "memory": "64MiB"} | options
    return lt.record_dataset(
        lambda batch, attention_mask: {"tokens": batch}, source, path, ["tokens"], **options
    )


@pytest.mark.usefixtures("small_blocks")
def test_what_pads_a_batch_is_counted_nowhere_and_changes_no_byte_of_ragged_ones(tmp_path: Path) -> None:
    listed = capture(tmp_path / "listed", {"tokens": rows_of("tokens")})
    for name, left in (("right", False), ("left", True)):
        run = masked(tmp_path / name, Padded(left), ragged="tokens:9x4")
        check_against_numpy(run, "tokens", Padded(left).rows)
        for found, true in zip(run["tokens"][:], Padded(left).rows, strict=True):
            assert found.tobytes() == true.tobytes(), (
                "rows that were moved to be measured are not moved again"
            )
        for block in range(run.manifest.n_blocks):
            for file in (f"{BLOCKS}/c.{block}.0", f"{ROWS}/c.{block}.0"):
                assert (run.path / file).read_bytes() == (listed.path / file).read_bytes(), file
    for name, source in (
        ("padded right", Padded(False)),
        ("padded left", Padded(True)),
        ("padded with holes", Padded(False, holes=True)),
    ):
        run = masked(tmp_path / name, source, pad="tokens:12,7")
        its = run.stats["tokens"]
        assert its.maximum is not None
        assert its.count is not None
        assert its.maximum.max() < 1000
        plain = listed.stats["tokens"]
        assert plain.count is not None
        assert its.count.tolist() == plain.count.tolist()
        assert np.array_equal(its.histogram, plain.histogram)
        assert np.array_equal(its.top_rows, plain.top_rows)
        np.testing.assert_allclose(its.variance, plain.variance, rtol=1e-6)
        assert its.top_rows is not None
        assert its.top_positions is not None
        for row, at in zip(its.top_rows[2], its.top_positions[2], strict=True):
            assert (
                run["tokens"][row][at[0], 2]
                == run["tokens"][row][run["tokens"].mask[row]][:, 2][
                    np.isfinite(run["tokens"][row][run["tokens"].mask[row]][:, 2])
                ].max()
            )


@pytest.mark.usefixtures("small_blocks")
def test_a_mask_with_a_hole_is_refused_where_only_statistics_are_kept_too(tmp_path: Path) -> None:
    with pytest.raises(lt.CaptureError, match="leaves tokens of tokens out between"):
        masked(tmp_path / "s", Padded(False, holes=True), ragged="tokens:9x4", values=False)


ALL = {kind: rows_of(kind) for kind in BOUNDS}


class FailingAt(Lists):
    """Rows that end with an error at one of them."""

    def __init__(self, last: int) -> None:
        self.last = last

    def batch(self, rows: range) -> lt.Batch:
        if self.last in rows:
            raise OSError("the disk is gone")
        return super().batch(rows)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("how", ["ragged", "pad"])
@pytest.mark.parametrize("values", [True, False], ids=["values", "statistics alone"])
def test_a_store_is_the_same_bytes_however_the_work_was_split(tmp_path: Path, values: bool, how: str) -> None:
    model = model_of(ALL)

    def take(name: str, last: int = -1, **options: Any) -> lt.Run:
        sizes = [f"{kind}:{size}" for kind, size in BOUNDS.items()]
        options = {how: sizes, "stats": "all", "batch_size": STEP, "classes": CLASSES} | options
        options = {"memory": "64MiB", "writers": 1, "values": values} | options
        return lt.record_dataset(model, FailingAt(last), tmp_path / name, ["**"], **options)

    run = take("whole")
    whole = contents(tmp_path / "whole")
    assert run.manifest.n_blocks > 5
    take("writers", writers=5)
    for part in ("2/3", "3/3", "1/3"):
        take("parts", part=part)
    for last in (13, 37, 59):
        with pytest.raises(OSError, match="the disk is gone"):
            take("resumed", last)
    assert 0 < lt.open(tmp_path / "resumed").n_committed < N_ROWS
    take("resumed")
    for name in ("writers", "parts", "resumed"):
        assert contents(tmp_path / name) == whole, name
        again = lt.open(tmp_path / name)
        for kind in BOUNDS:
            for field, kept in vars(run.stats[kind]).items():
                same = np.asarray(vars(again.stats[kind])[field]).tobytes() == np.asarray(kept).tobytes()
                assert same, field
    if not values:
        assert not [file for file in whole if file.startswith("taps") and "zarr.json" not in file]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
import layertap as lt
import layertap.capture.plan as plan
import test_ragged_statistics as test
plan._BLOCK_BYTES = plan._SHARD_BYTES = 4096
whole = test.model_of(test.ALL)

def model(numbers):
    if int(sys.argv[2]) in numbers:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(numbers)

options = dict(batch_size=4, stats="all", classes=test.CLASSES, memory="64MiB", writers=2)
ragged = [f"{kind}:{size}" for kind, size in test.BOUNDS.items()]
lt.record_dataset(model, test.Lists(), sys.argv[1], ["**"], ragged=ragged, **options)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_capture_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    def run(path: Path, row: int) -> int:
        command = [sys.executable, "-c", KILLED, str(path), str(row), str(Path(__file__).parent)]
        return subprocess.run(command, env=os.environ, timeout=120, check=False).returncode

    assert run(tmp_path / "whole", -1) == 0
    assert run(tmp_path / "run", 47) == -signal.SIGKILL
    assert lt.open(tmp_path / "run").n_committed > 0
    assert run(tmp_path / "run", -1) == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


# int8


@pytest.mark.usefixtures("small_blocks")
def test_of_int8_codes_they_are_those_of_the_values_that_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    taps: dict[str, Values] = {
        "maps": rng.standard_normal((N_ROWS, 6, 5, 8)).astype(np.float32) * 40,
        "tokens": rng.standard_normal((N_ROWS, 9, 4)).astype(np.float32),
        "vector": rng.standard_normal((N_ROWS, 7)).astype(np.float32),
        "number": rng.standard_normal(N_ROWS).astype(np.float32),
        "film": rng.standard_normal((N_ROWS, 2, 3, 4, 5)).astype(np.float32),
        "axes": rng.standard_normal((N_ROWS, 2, 3, 2, 2, 2)).astype(np.float32),
    }
    for values in taps.values():
        flat = values.reshape(N_ROWS, -1)
        flat[3, 0], flat[4, -1], flat[5, 0], flat[6] = np.nan, np.inf, -np.inf, 0
    options: Any = {"batch_size": STEP, "memory": "64MiB", "stats": "all", "classes": CLASSES}

    def take(path: Path, taps: dict[str, Values], **more: Any) -> lt.Run:
        def model(numbers: Any) -> dict[str, Values]:
            return {name: values[numbers] for name, values in taps.items()}

        return lt.record_dataset(model, Lists(), path, ["**"], **options, **more)

    coded = take(tmp_path / "coded", taps, reduce="int8")
    assert coded.manifest.n_blocks > 5
    plain = take(tmp_path / "plain", {name: coded[name][:] for name in taps})
    assert plain.manifest.layout.block_rows == coded.manifest.layout.block_rows
    for name in taps:
        assert coded.stats[name].count is not None
        for field, kept in vars(plain.stats[name]).items():
            found = np.asarray(vars(coded.stats[name])[field])
            assert found.tobytes() == np.asarray(kept).tobytes(), (name, field)
        assert coded.stats.pooled(name).tobytes() == plain.stats.pooled(name).tobytes()
    assert coded.stats.pooled("maps").dtype == np.float32
    parts = [take(tmp_path / "parts", taps, reduce="int8", part=part) for part in ("2/2", "1/2")]
    assert contents(parts[-1].path) == contents(coded.path)


# Memory and drawing


@pytest.mark.parametrize("role", ["ragged", "padded", "codes"])
@pytest.mark.parametrize("shape", [(512, 64), (1, 700, 700), (40_000,), (700, 7, 7)], ids=str)
@pytest.mark.parametrize("names", [("channels",), NAMES], ids=["few", "all"])
def test_what_a_writer_takes_is_what_the_plan_counts(
    role: str, shape: tuple[int, ...], names: tuple[str, ...]
) -> None:
    codes = role == "codes"
    dtype = np.dtype(np.int8 if codes else np.float32)
    tap = ArraySpec(
        "t", "taps/t/values", dims_of(shape), shape, dtype, codes=codes, role="" if codes else role
    )
    axes = {1: (0,), 2: (0,), 3: (1, 2)}[len(shape)]
    if codes:
        scaled = () if len(shape) == 1 else (shape[-1],) if len(shape) == 2 else (shape[0],)
        dims = ("row", *({2: ("feature",), 3: ("channel",)}.get(len(shape), ())))
        part = ArraySpec("t/scale", "taps/t/scale", dims, scaled, np.dtype(np.float32))
    else:
        part = extents_spec(tap) if role == "ragged" else mask_spec(tap, axes)
    kept = Statistics.of([tap], names, 9, 0)
    layout = Layout((tap,), (), 16, 32, kept, True, (part,))
    slabs = [np.zeros(layout.slab_bytes, np.uint8) for _ in range(2)]
    rng = np.random.default_rng(0)
    for slab in slabs:
        values, beside = (array_view(layout, i, slab) for i in (0, 1))
        values[:] = rng.standard_normal(values.shape) * 100
        values.reshape(-1)[::7] = -128 if codes else np.nan
        if role == "ragged":
            sizes = [tuple(n - rng.integers(0, 5) if i in axes else n for i, n in enumerate(shape))] * 16
            table = beside.view(np.int64)
            table[:, 1:] = sizes
            table[:, 0] = np.arange(16) * int(np.prod(shape))
        elif role == "padded":
            beside[:] = rng.random(beside.shape) < 0.7
        else:
            beside[:] = 1
    entries = np.zeros(kept.block_bytes // 8)
    forget_scratch()
    tracemalloc.start()
    measure(layout, 0, slabs, 32, 0, entries)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    forget_scratch()
    assert most <= scratch_bytes(kept, 16)


def test_of_padded_rows_all_channels_are_read_to_rank_them(tmp_path: Path) -> None:
    rows = [np.nan_to_num(row, posinf=0, neginf=0) for row in rows_of("maps")]
    ragged, padded = (capture(tmp_path / how, {"maps": rows}, how) for how in ("ragged", "pad"))
    whole = next(i for i, row in enumerate(rows) if len(row) == 5)
    part = next(i for i, row in enumerate(rows) if len(row) < 4)
    assert candidates(ragged.stats, "maps", np.array([whole]), "mean", 2) is not None
    assert candidates(ragged.stats, "maps", np.array([part]), "mean", 2) is None
    assert candidates(padded.stats, "maps", np.array([whole]), "mean", 2) is None
