"""The element types that a store can hold, by their Zarr v3 names.

numpy has no bfloat16 and no float8; ml_dtypes (the package that JAX uses) brings them. Zarr has no float8
either: its bytes are held as `uint8`, and an attribute of the array says what they are.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from .errors import FormatError

DType = np.dtype[Any]

BFLOAT16: DType = np.dtype(ml_dtypes.bfloat16)
FLOAT8_E4M3FN: DType = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8_E5M2: DType = np.dtype(ml_dtypes.float8_e5m2)

#: Zarr v3 name -> numpy dtype, little-endian.
DTYPES: dict[str, DType] = {
    "bool": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "bfloat16": BFLOAT16,
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
    "float8_e4m3fn": FLOAT8_E4M3FN,
    "float8_e5m2": FLOAT8_E5M2,
}

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: int8 codes of what is not a number from -126 to 126 times a scale.
CODE_NAN, CODE_INF, CODE_MINUS_INF, LARGEST_CODE = -128, 127, -127, 126

#: The bits of the exponent: all set means NaN or infinite (IEEE 754, and bfloat16 alike).
EXPONENT_BITS: dict[DType, int] = {
    np.dtype(np.float16): 0x7C00,
    BFLOAT16: 0x7F80,
    np.dtype(np.float32): 0x7F800000,
    np.dtype(np.float64): 0x7FF0000000000000,
    FLOAT8_E5M2: 0x7C,
    FLOAT8_E4M3FN: 0x7F,  # the one NaN of each sign; it has no infinity
}
#: What Zarr calls an array of a type that it does not know.
_HELD_AS = {FLOAT8_E4M3FN: "uint8", FLOAT8_E5M2: "uint8"}


def dtype_name(dtype: DType) -> str:
    """Return the Zarr v3 name of a numpy dtype.

    Raises:
        FormatError: a store cannot hold it.
    """
    try:
        return _NAMES[np.dtype(dtype).newbyteorder("=")]
    except KeyError:
        raise FormatError(f"a store cannot hold {dtype}; it holds {', '.join(DTYPES)}") from None


def named_dtype(name: str) -> DType:
    """Return the numpy dtype of a Zarr v3 name.

    Raises:
        FormatError: this version knows no such type.
    """
    try:
        return DTYPES[name]
    except (KeyError, TypeError):
        raise FormatError(f"unknown data type {name!r}; this version knows {', '.join(DTYPES)}") from None


def held_as(dtype: DType) -> str:
    """Return the Zarr v3 type that arrays of `dtype` have: its own name, where Zarr has it."""
    return _HELD_AS.get(dtype) or dtype_name(dtype)


def is_float(dtype: DType) -> bool:
    """Return whether `dtype` is a real floating-point type, bfloat16 and float8 included."""
    return dtype in EXPONENT_BITS


def fill_value(dtype: DType) -> Any:
    """Return the Zarr v3 fill value: NaN where there is one, so that missing rows show."""
    if dtype in _HELD_AS:
        return 0x7F  # a NaN of either float8
    if is_float(dtype):
        return "NaN"
    if dtype.kind == "c":
        return ["NaN", "NaN"]
    return False if dtype.kind == "b" else 0
