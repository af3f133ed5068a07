"""The plan: memory and disk arithmetic, and refusals whose advice works."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from itertools import product
from pathlib import Path

import layertap as lt
import ml_dtypes
import numpy as np
import pytest
from layertap.capture.axes import dims_of
from layertap.capture.backend import Learned
from layertap.capture.errors import NoSpaceError, PlanError
from layertap.capture.layout import CHUNK_BYTES, ArraySpec, slab_bytes
from layertap.capture.local import LocalPlace
from layertap.capture.plan import (
    Settings,
    check_space,
    parse_bytes,
    plan_layout,
    show_bytes,
    slots_of,
    store_bytes,
    tap_arrays,
)
from layertap.capture.shard import buffer_bytes
from layertap.capture.taps import TapName

MIB = 2**20


def spec(name: str, n: int, dtype: object = np.float32, codec: str = "none") -> ArraySpec:
    return ArraySpec(name, f"taps/{name}/values", ("row", "x"), (n,), np.dtype(dtype), codec)


def learned(shape: tuple[int, ...], dtype: object = np.float32, name: str = "conv1") -> Learned:
    return Learned(TapName(name), "Conv2d", shape, np.dtype(dtype))


# Amounts


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1", 1),
        ("100B", 100),
        (1073741824, 2**30),
        ("1073741824", 2**30),
        ("1GiB", 2**30),
        ("1 GiB", 2**30),
        (" 512 MB ", 512 * 10**6),
        ("512mib", 512 * MIB),
        ("1.5KiB", 1536),
        ("2TB", 2 * 10**12),
        ("0.5kb", 500),
        ("1.9", 1),
    ],
)
def test_an_amount_of_memory_is_read(text: str | int, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "1 gigabyte", "1G", "-1", "-1GiB", 0, "0GiB", "0.5", "1e9", "1,5GiB", "1 2", None, "nan"],
)
def test_what_is_no_amount_of_memory_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(PlanError, match="write 1GiB, 512MiB"):
        parse_bytes(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0B"),
        (1, "1B"),
        (1023, "1023B"),
        (1024, "1KiB"),
        (1536, "1.5KiB"),
        (100 * 1024, "100KiB"),
        (1000 * 1024, "1000KiB"),
        (2**20 - 1, "1024KiB"),
        (2**30, "1GiB"),
        (1.25 * 2**30, "1.25GiB"),
        (2**40, "1TiB"),
        (5000 * 2**40, "5000TiB"),
    ],
)
def test_an_amount_is_shown_as_people_read_it(n_bytes: float, text: str) -> None:
    assert show_bytes(n_bytes) == text


def test_what_is_shown_can_be_read_again_to_about_the_same() -> None:
    for n_bytes in np.unique(np.geomspace(1, 2**45, 3000).astype(np.int64)).tolist():
        assert parse_bytes(show_bytes(n_bytes)) == pytest.approx(n_bytes, rel=0.006)


# Taps


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((), ("row",)),
        ((10,), ("row", "feature")),
        ((7, 10), ("row", "token", "feature")),
        ((3, 8, 8), ("row", "channel", "y", "x")),
        ((3, 8, 9), ("row", "channel", "y", "x")),
        ((8, 8, 8), ("row", "channel", "y", "x")),
        ((5, 1, 1), ("row", "channel", "y", "x")),
        ((8, 8, 3), ("row", "channel", "y", "x")),
        ((64, 64, 48), ("row", "channel", "y", "x")),
        ((64, 64, 96), ("row", "y", "x", "feature")),
        ((1, 1, 5), ("row", "channel", "y", "x")),
        ((3, 2, 8, 8), ("row", "channel", "t", "y", "x")),
        ((1, 2, 3, 4, 5), ("row", "axis_1", "axis_2", "axis_3", "axis_4", "axis_5")),
    ],
)
def test_axes_have_the_usual_names(shape: tuple[int, ...], dims: tuple[str, ...]) -> None:
    assert dims_of(shape) == dims


@pytest.mark.parametrize(
    ("cast", "dtype", "stored"),
    [
        (None, np.float64, np.float64),
        ("float16", np.float32, np.float16),
        ("bfloat16", np.float16, ml_dtypes.bfloat16),
        ("float32", ml_dtypes.bfloat16, np.float32),
        ("float16", np.int64, np.int64),
        ("float16", np.bool_, np.bool_),
        ("float16", np.complex64, np.complex64),
    ],
)
def test_a_cast_is_for_floating_point_values(cast: str | None, dtype: object, stored: object) -> None:
    array = tap_arrays([learned((3, 8, 8), dtype)], Settings(dtype=cast, codec="zstd"))[0]
    assert array.dtype == np.dtype(stored)
    assert (array.name, array.path) == ("conv1", "taps/conv1/values")
    assert (array.dims, array.shape, array.codec) == (("row", "channel", "y", "x"), (3, 8, 8), "zstd")


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(PlanError, match="'int8'; choose one of float16, bfloat16, float32"):
        tap_arrays([learned((3,))], Settings(dtype="int8"))[0]
    with pytest.raises(PlanError, match="'gzip'; choose one of none, lz4, zstd"):
        tap_arrays([learned((3,))], Settings(codec="gzip"))[0]
    with pytest.raises(PlanError, match=r"conv1 gives no values: the shape of one row is \(3, 0\)"):
        tap_arrays([learned((3, 0))], Settings())[0]


# Memory

INPUTS = [
    (taps, columns, step_rows, n_rows, Settings(codec=codec, memory=memory, writers=writers))
    for (taps, columns), step_rows, n_rows, codec, memory, writers in product(
        [
            ((spec("a", 100),), ()),
            ((spec("a", 65_536), spec("b", 3)), (spec("label", 1, np.int64),)),
            ((spec("a", 1_000_003, np.uint8),), (spec("id", 100, np.uint8), spec("p", 3072, np.uint8))),
            (tuple(spec(f"t{i}", 5000) for i in range(30)), ()),
        ],
        [1, 7, 64, 250],
        [None, 1, 1000, 10**6],
        ["none", "zstd"],
        [100_000, MIB, 8 * MIB, 64 * MIB, 333_333_333, 2**32],
        [1, 3],
    )
]


def needed_memory(
    taps: tuple[ArraySpec, ...], columns: tuple[ArraySpec, ...], step_rows: int, n: int, settings: Settings
) -> int:
    """What is not blocks, of `n` steps: the first step's copies, and the writers' largest buffers."""
    staging = settings.staging_bytes
    buffers = [buffer_bytes(array, step_rows, n, staging) for array in (*taps, *columns)]
    least = CHUNK_BYTES if settings.codec == "none" else staging + 2 * CHUNK_BYTES
    return slab_bytes(taps, step_rows) + settings.n_writers * max(least, *buffers)


def test_blocks_are_whole_steps_and_two_or_three_of_them_fit_the_memory() -> None:
    planned = refused = 0
    for taps, columns, step_rows, n_rows, settings in INPUTS:
        rest = needed_memory(taps, columns, step_rows, 1, settings)
        try:
            layout = plan_layout(taps, columns, step_rows, n_rows, settings)
        except PlanError:
            refused += 1
            assert 2 * slab_bytes((*taps, *columns), step_rows) + rest > settings.memory_bytes
            continue
        planned += 1
        assert (layout.taps, layout.columns, layout.step_rows) == (taps, columns, step_rows)
        assert layout.block_rows >= step_rows
        assert layout.block_rows % step_rows == 0
        n_slots = slots_of(layout, settings)
        assert n_slots in (2, 3)
        buffers = needed_memory(taps, columns, step_rows, layout.steps_per_block, settings)
        assert n_slots * layout.block_bytes + buffers <= settings.memory_bytes
        assert (n_slots == 3) is (3 * layout.slab_bytes + rest <= settings.memory_bytes)
        if n_rows is not None:  # no block is longer than the data set needs
            assert layout.block_rows - step_rows < n_rows
    assert planned > 100
    assert refused > 100


def test_a_refusal_says_what_would_fit_and_that_fits() -> None:
    seen = set()
    for taps, columns, step_rows, n_rows, settings in INPUTS:
        try:
            plan_layout(taps, columns, step_rows, n_rows, settings)
            continue
        except PlanError as error:
            message = str(error)
        assert f"a batch of {step_rows} rows takes" in message
        advised = re.search(r"Give memory=(\S+) or more", message)
        assert advised
        more = Settings(codec=settings.codec, memory=advised[1], writers=settings.writers)
        layout = plan_layout(taps, columns, step_rows, n_rows, more)
        assert slots_of(layout, more) >= 2
        # Not much more than it takes.
        rest = needed_memory(taps, columns, step_rows, 1, settings)
        needed = 2 * slab_bytes((*taps, *columns), step_rows) + rest
        assert needed <= more.memory_bytes <= 1.02 * needed + 1
        smaller = re.search(r"a batch size of at most (\d+)", message)
        seen.add(bool(smaller))
        fits = int(smaller[1]) if smaller else 0
        assert fits < step_rows
        if fits:
            plan_layout(taps, columns, fits, n_rows, settings)
        with pytest.raises(PlanError):
            plan_layout(taps, columns, fits + 1, n_rows, settings)
    assert seen == {True, False}


def test_a_store_whose_blocks_do_not_fit_says_what_would_and_that_fits() -> None:
    taps = (spec("a", 65_537),)
    layout = plan_layout(taps, (), 64, None, Settings(memory="1GiB", writers=1))
    for writers in (1, 2, 5):
        small = Settings(memory="4MiB", writers=writers)
        with pytest.raises(PlanError, match="4MiB are given") as caught:
            slots_of(layout, small)
        advised = re.search(r"need memory=([\w.]+),", str(caught.value))
        assert advised
        assert slots_of(layout, Settings(memory=advised[1], writers=writers)) == 2


def test_advice_is_followed_by_hand(tmp_path: Path) -> None:
    rows = np.ones((64, 12_345), np.float32)

    def capture(memory: str) -> lt.Run:
        return lt.record_dataset(
            lambda batch: {"a": batch}, rows, tmp_path / "run.zarr", ["a"], memory=memory, writers=1
        )

    with pytest.raises(PlanError) as caught:
        capture("2MiB")
    assert not (tmp_path / "run.zarr").exists()
    assert capture(re.search(r"memory=(\S+)", str(caught.value))[1]).complete  # type: ignore[index]


def test_the_writers_default_to_three_and_to_half_of_the_cores_where_they_encode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for cores, encoders in ((1, 1), (2, 2), (5, 2), (8, 4), (64, 8)):
        monkeypatch.setattr("layertap.capture.plan.n_cores", lambda cores=cores: cores)
        assert Settings().n_writers == 3
        assert Settings(codec="zstd").n_writers == encoders
    # Each has buffers of its own, which little memory does not hold.
    assert Settings(codec="lz4", memory="256MiB").n_writers == 4
    assert Settings(codec="lz4", memory="4MiB").n_writers == 2
    assert Settings(writers=5).n_writers == Settings(codec="zstd", writers=5).n_writers == 5


def test_a_staging_buffer_is_a_small_share_of_the_memory_in_whole_pages() -> None:
    for memory, n_bytes in (("1MiB", MIB // 2), ("256MiB", MIB // 2), ("1GiB", 2 * MIB), ("64GiB", 4 * MIB)):
        assert Settings(memory=memory).staging_bytes == n_bytes
    assert Settings(memory="1001MB").staging_bytes == 1_001_000_000 // 512 // 4096 * 4096


def test_memory_that_is_advised_holds_the_writers_that_it_has_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("layertap.capture.plan.n_cores", lambda: 64)
    taps = (
        spec("a", 5 * MIB, codec="zstd"),
    )  # rows of 20 MiB: what a writer needs more than it has a share of
    with pytest.raises(PlanError) as caught:
        plan_layout(taps, (), 2, None, Settings(codec="zstd", memory="190MiB"))
    advised = re.search(r"memory=(\S+)", str(caught.value))
    assert advised
    more = Settings(codec="zstd", memory=advised[1])
    assert more.n_writers > 2
    assert slots_of(plan_layout(taps, (), 2, None, more), more) >= 2


# Disk

Usage = namedtuple("Usage", ["total", "used", "free"])


def test_the_bytes_of_a_store_are_its_rows() -> None:
    layout = plan_layout((spec("a", 100),), (spec("label", 1, np.int64),), 4, 8, Settings())
    assert store_bytes(layout, 1000) == 1000 * (400 + 8)
    assert store_bytes(layout, 1000, ratio=4) == 1000 * (100 + 8)


def test_a_store_that_the_disk_cannot_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * MIB, 90 * MIB, 10 * MIB))
    check_space(LocalPlace(tmp_path / "run.zarr"), 10 * MIB)
    with pytest.raises(NoSpaceError, match="needs 10MiB and 10MiB are free") as caught:
        check_space(LocalPlace(tmp_path / "run.zarr"), 10 * MIB + 1)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_a_capture_that_the_disk_cannot_hold_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 1, 999))
    with pytest.raises(NoSpaceError):
        lt.record_dataset(lambda batch: {"a": batch}, np.ones((10, 100)), tmp_path / "run.zarr", ["a"])
    assert not list(tmp_path.iterdir())


def test_free_bytes_are_those_of_the_nearest_folder_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> Usage:
        asked.append(Path(path))
        return Usage(3, 2, 1)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    monkeypatch.chdir(tmp_path)
    assert LocalPlace(tmp_path / "not" / "there" / "run.zarr").free_bytes() == 1
    assert LocalPlace(Path("relative/run.zarr")).free_bytes() == 1
    assert asked == [tmp_path, tmp_path]
