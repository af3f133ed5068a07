"""Where every byte goes: the arithmetic of slabs, chunks and blocks."""

from __future__ import annotations

from itertools import pairwise, product

import ml_dtypes
import numpy as np
import pytest
from layertap.capture.layout import ALIGNMENT, CHUNK_BYTES, ArraySpec, Layout, aligned, array_view, chunk_rows

ROW_BYTES = (
    1,
    2,
    3,
    40,
    511,
    4095,
    4096,
    4097,
    65536,
    100_000,
    CHUNK_BYTES - 1,
    CHUNK_BYTES,
    CHUNK_BYTES + 1,
)
STEP_ROWS = (1, 2, 3, 5, 7, 16, 61, 64, 96, 100, 256, 1000)
STEPS = (1, 2, 3, 4, 12, 13, 100)


def spec(name: str, shape: tuple[int, ...], dtype: object = np.float32) -> ArraySpec:
    dims = ("row", *(f"d{i}" for i in range(len(shape))))
    return ArraySpec(name, f"taps/{name}/values", dims, shape, np.dtype(dtype))


LAYOUTS = [
    Layout((spec("a", (3, 5)), spec("b", ())), (spec("label", (), np.int64),), 7, 21),
    Layout((spec("a", (1024,)),), (), 1, 1),
    Layout((spec("a", (1000,), np.uint8), spec("b", (1024,), np.uint8)), (), 4, 8),
    Layout((), (spec("id", (11,), np.uint8), spec("flag", (), np.bool_)), 64, 64),
    Layout((spec("h", (2, 3, 4), ml_dtypes.bfloat16), spec("z", (2,), np.complex128)), (), 5, 15),
]


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_a_chunk_divides_the_block_and_lies_in_one_slab_or_in_whole_slabs(row_bytes: int) -> None:
    for step_rows, steps in product(STEP_ROWS, STEPS):
        rows = chunk_rows(row_bytes, step_rows, steps)
        assert rows >= 1
        assert steps * step_rows % rows == 0
        assert step_rows % rows == 0 or rows % step_rows == 0


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_a_chunk_is_the_largest_that_stays_within_its_limit(row_bytes: int) -> None:
    for step_rows, steps in product(STEP_ROWS, STEPS):
        block = step_rows * steps
        fitting = [
            n
            for n in range(1, block + 1)
            if block % n == 0 and (step_rows % n == 0 or n % step_rows == 0) and n * row_bytes <= CHUNK_BYTES
        ]
        assert chunk_rows(row_bytes, step_rows, steps) == max(fitting, default=1)


@pytest.mark.parametrize(
    ("n_bytes", "expected"), [(0, 0), (1, 4096), (4095, 4096), (4096, 4096), (4097, 8192)]
)
def test_sizes_are_rounded_up_to_pages(n_bytes: int, expected: int) -> None:
    assert aligned(n_bytes) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_start_at_pages_and_do_not_overlap(layout: Layout) -> None:
    ends = [
        offset + array.row_bytes * layout.step_rows
        for offset, array in zip(layout.offsets, layout.arrays, strict=True)
    ]
    assert layout.offsets[0] == 0
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)
    assert all(end <= offset for end, (_, offset) in zip(ends, pairwise(layout.offsets), strict=False))
    assert ends[-1] <= layout.slab_bytes < ends[-1] + ALIGNMENT
    assert layout.slab_bytes % ALIGNMENT == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_taps_lie_in_front_in_one_piece(layout: Layout) -> None:
    n_taps = len(layout.taps)
    assert layout.arrays[:n_taps] == layout.taps
    assert all(offset < layout.device_bytes for offset in layout.offsets[:n_taps])
    assert all(offset >= layout.device_bytes for offset in layout.offsets[n_taps:])
    assert layout.device_bytes + sum(
        aligned(column.row_bytes * layout.step_rows) for column in layout.columns
    ) == (layout.slab_bytes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_is_its_slabs(layout: Layout) -> None:
    assert layout.steps_per_block * layout.step_rows == layout.block_rows
    assert layout.block_bytes == layout.steps_per_block * layout.slab_bytes


def test_a_row_without_axes_is_one_element() -> None:
    assert spec("a", (), np.float64).row_bytes == 8
    assert spec("a", (3, 4), ml_dtypes.bfloat16).row_bytes == 24


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_view_shares_the_memory_of_its_slab(layout: Layout) -> None:
    slab = np.zeros(layout.slab_bytes, np.uint8)
    for i, array in enumerate(layout.arrays):
        view = array_view(layout, i, slab)
        assert view.shape == (layout.step_rows, *array.shape)
        assert view.dtype == array.dtype
        assert np.shares_memory(view, slab)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_to_a_view_lies_at_its_offset_and_nowhere_else(layout: Layout) -> None:
    for i, array in enumerate(layout.arrays):
        slab = np.zeros(layout.slab_bytes, np.uint8)
        array_view(layout, i, slab).view(np.uint8)[...] = 1
        start, n_bytes = layout.offsets[i], array.row_bytes * layout.step_rows
        assert slab[start : start + n_bytes].all()
        assert slab.sum() == n_bytes
