"""Columns: what is known of each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layertap as lt
import ml_dtypes
import numpy as np
import pytest
from layertap.capture.columns import TEXT_BYTES, column_spec, column_values
from layertap.capture.errors import DataError
from layertap.capture.taps import folder_name


def spec(name: str, values: Any, text_bytes: int | None = None) -> Any:
    return column_spec(name, folder_name(name), values, np.asarray, text_bytes)


TEXTS = ["a", "", "zwölf", "層🐸", " with spaces ", "a\nb", "a\0b"]


@pytest.mark.parametrize(
    "values",
    [TEXTS, tuple(TEXTS), np.array(TEXTS), np.array(TEXTS, np.dtypes.StringDType())],
    ids=["list", "tuple", "array", "string array"],
)
def test_texts_are_held_as_bytes_with_zeros_behind_them(values: Any) -> None:
    column = spec("id", values, 20)
    assert (column.path, column.dims, column.shape) == ("rows/id", ("row", "id_byte"), (20,))
    assert (column.dtype, column.codec) == (np.uint8, "zstd")
    encoded = column_values(column, values)
    assert [bytes(row).rstrip(b"\0").decode() for row in encoded] == TEXTS
    assert encoded.shape == (len(TEXTS), 20)


def test_texts_of_unknown_length_get_the_usual_room() -> None:
    assert spec("id", ["a"]).shape == (TEXT_BYTES,)


def test_a_text_that_is_too_long_is_shown_with_its_bytes_and_the_room() -> None:
    column = spec("id", ["four"], 4)
    assert column_values(column, ["ab", "four"]).shape == (2, 4)
    with pytest.raises(DataError, match=r"'id' has 6 bytes.* 4 are kept.*: äöü"):
        column_values(column, ["four", "äöü"])


def test_what_is_no_text_in_a_column_of_texts_is_shown() -> None:
    with pytest.raises(DataError, match="'id' holds texts; it got 7"):
        column_values(spec("id", ["a"]), ["a", 7])


@pytest.mark.parametrize(
    ("values", "shape", "dtype"),
    [
        ([1, 2, 3], (), np.int64),
        ([1.5, 2], (), np.float64),
        ([True, False], (), np.bool_),
        (np.array([1, 2], np.uint8), (), np.uint8),
        (np.zeros((2, 3), np.float16), (3,), np.float16),
        (np.zeros((2, 3), ml_dtypes.bfloat16), (3,), ml_dtypes.bfloat16),
        ([[1, 2], [3, 4]], (2,), np.int64),
        (np.zeros((2, 3, 4, 5), np.complex64), (3, 4, 5), np.complex64),
    ],
)
def test_numbers_keep_their_shape_and_type(values: Any, shape: tuple[int, ...], dtype: Any) -> None:
    column = spec("score", values)
    assert (column.path, column.shape, column.dtype) == ("rows/score", shape, np.dtype(dtype))
    assert column.dims == ("row", *(f"score_{i + 1}" for i in range(len(shape))))
    assert column.codec == "none"
    assert np.array_equal(column_values(column, values), np.asarray(values))


def test_the_axes_of_a_picture_have_names() -> None:
    column = spec("picture", np.zeros((2, 8, 9, 3), np.uint8))
    assert column.dims == ("row", "picture_y", "picture_x", "picture_channel")
    assert column.shape == (8, 9, 3)


def test_an_odd_name_gets_a_safe_folder() -> None:
    assert spec("../x y", [1]).path == "rows/~2e.~2fx~20y"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([None, None], "holds object"),
        ([b"bytes"], "holds |S5"),
        (["text", 7], "holds <U"),
        ([{"a": 1}], "holds object"),
        (np.array(["2020-01-01"], "datetime64[D]"), "holds datetime64"),
        (np.zeros((2, 0)), r"of shape \(2, 0\)"),
        ([[1], [1, 2]], "rows of one shape"),
        (np.zeros(2, ">f4"), "holds >f4"),
    ],
    ids=str,
)
def test_what_no_column_can_hold_is_refused(values: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        spec("thing", values)
    assert "'thing'" in str(caught.value)


@pytest.mark.parametrize("values", [np.zeros((2, 4)), np.zeros(2), [[1, 2], [3, 4]], [1, 2], [[1], [1, 2]]])
def test_rows_of_another_shape_than_the_first_are_refused(values: Any) -> None:
    column = spec("box", np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"'box'.* shape"):
        column_values(column, values)


def test_columns_of_every_kind_come_back_from_a_store(tmp_path: Path) -> None:
    n, step = 11, 4
    rng = np.random.default_rng(0)
    texts = [TEXTS[i % len(TEXTS)] for i in range(n)]
    columns = {
        "id": texts,
        "label": rng.integers(0, 10, n),
        "picture": rng.integers(0, 256, (n, 6, 5, 3), np.uint8),
        "weight": rng.standard_normal(n).astype(np.float16),
        "boxes": rng.standard_normal((n, 2, 4)),
        "good/bad": rng.integers(0, 2, n).astype(bool),
    }
    inputs = rng.standard_normal((n, 3)).astype(np.float32)
    with lt.record(lambda batch: {"a": batch}, tmp_path / "run.zarr", ["a"]) as recorder:
        for i in range(0, n, step):
            recorder(inputs[i : i + step])
            recorder.annotate(**{name: values[i : i + step] for name, values in columns.items()})
    run = lt.open(tmp_path / "run.zarr")
    assert set(run.rows) == set(columns)
    assert run.rows["id"][...].tolist() == texts
    for name, values in columns.items():
        if name != "id":
            assert run.rows[name].dtype == values.dtype
            assert np.array_equal(run.rows[name][...], values)
