"""Columns: what is known of each row beside its activations.

Text is held as UTF-8 in a uint8 array with zeros behind it, because every Zarr reader has uint8 and few
have text; zstd packs the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import DTYPES
from .errors import DataError
from .layout import ArraySpec

#: Bytes kept for each text of a column whose longest text is not known beforehand.
TEXT_BYTES = 1024

_NUMBERS = ("label", "prediction")
_NOT_NUMBERS = (
    "{name!r} holds {holds}; it is the number of each row's class, one whole number a row. Names of classes "
    "go to classes=, and anything else into a column of another name"
)


def column_spec(
    name: str, folder: str, values: Any, to_numpy: Callable[[Any], NDArray[Any]], text_bytes: int | None
) -> ArraySpec:
    """Return how a column is stored, from the values of the first batch.

    Raises:
        DataError: they are not numbers, texts or arrays of one shape.
    """
    if _is_text(values):
        if name in (*_NUMBERS, "picture"):
            raise DataError(_NOT_NUMBERS.format(name=name, holds="texts"))
        width, dtype = text_bytes or TEXT_BYTES, np.dtype(np.uint8)
        return ArraySpec(name, f"rows/{folder}", ("row", text_dim(name)), (width,), dtype, "zstd")
    try:
        array = to_numpy(values)
    except ValueError as error:
        raise DataError(f"the column {name!r} does not hold rows of one shape: {error}") from error
    if array.dtype not in DTYPES.values() or 0 in array.shape:
        raise DataError(
            f"the column {name!r} holds {array.dtype} of shape {array.shape}; a column holds numbers, texts "
            "or arrays of one shape"
        )
    _check_meaning(name, array)
    if name == "picture":
        dims: tuple[str, ...] = ("picture_y", "picture_x", "picture_channel")
    else:
        dims = tuple(f"{name}_{i + 1}" for i in range(array.ndim - 1))
    return ArraySpec(name, f"rows/{folder}", ("row", *dims), array.shape[1:], array.dtype)


def _check_meaning(name: str, array: NDArray[Any]) -> None:
    """Hold the columns that have a meaning of their own to it."""
    if name in _NUMBERS and (array.ndim != 1 or array.dtype.kind not in "iub"):
        raise DataError(_NOT_NUMBERS.format(name=name, holds=f"{array.dtype} of shape {array.shape}"))
    if name == "picture" and (array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3)):
        raise DataError(
            f"'picture' holds {array.dtype} of shape {array.shape}; pictures are uint8 (rows, height, width, "
            "1 or 3). Give what the model got as input=, or keep it as another column"
        )


def column_values(column: ArraySpec, values: Any) -> Any:
    """Return the values of a batch ready to be copied into `column`.

    Raises:
        DataError: rows of another shape, or a text that is too long.
    """
    if is_text(column):
        return _encode(values, column)
    try:
        shape = tuple(values.shape[1:]) if hasattr(values, "shape") else np.shape(values)[1:]
    except ValueError as error:
        raise DataError(f"the column {column.name!r} does not hold rows of one shape: {error}") from error
    if shape != column.shape:
        raise DataError(
            f"the column {column.name!r} has rows of shape {shape}; in the first batch it was {column.shape}"
        )
    return values if hasattr(values, "shape") else np.asarray(values)


def check_cast(dtype: Any, stored: Any, fits: bool) -> None:
    """Refuse values that a column cannot hold.

    Raises:
        DataError: with both types.
    """
    if not fits:
        raise DataError(
            f"a column of this batch holds {dtype} and the first batch made it {stored}, which does not hold "
            "all of that; give every batch the same type"
        )


def text_dim(name: str) -> str:
    """Return the name of the axis that makes the column `name` one of texts."""
    return f"{name}_byte"


def is_text(column: ArraySpec) -> bool:
    """Return whether a column holds texts: the name of its last axis tells."""
    return column.dims[-1] == text_dim(column.name)


def encoded_text(text: str) -> bytes:
    """Return a text's bytes in UTF-8; file names that are not UTF-8 keep theirs."""
    return text.encode("utf-8", "surrogateescape")


def _is_text(values: Any) -> bool:
    if hasattr(values, "dtype"):
        return getattr(values.dtype, "kind", None) in ("U", "T")
    return isinstance(values, Sequence) and all(isinstance(value, str) for value in values)


def _encode(values: Sequence[str], column: ArraySpec) -> NDArray[np.uint8]:
    width = column.shape[0]
    encoded = np.zeros((len(values), width), np.uint8)
    for row, text in zip(encoded, values, strict=True):
        if not isinstance(text, str):
            raise DataError(f"the column {column.name!r} holds texts; it got {text!r}")
        data = encoded_text(text)
        if len(data) > width:
            raise DataError(
                f"a text of {column.name!r} has {len(data)} bytes and {width} are kept: {text[:60]}..."
            )
        row[: len(data)] = np.frombuffer(data, np.uint8)
    return encoded
