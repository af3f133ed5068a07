"""The element types that a store can hold, by their Zarr v3 names.

numpy has no bfloat16; ml_dtypes (the package that JAX uses) brings it.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from .errors import FormatError

DType = np.dtype[Any]

BFLOAT16: DType = np.dtype(ml_dtypes.bfloat16)

#: Zarr v3 name -> numpy dtype, little-endian.
DTYPES: dict[str, DType] = {
    "bool": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "bfloat16": BFLOAT16,
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: The bits of the exponent: all set means NaN or infinite (IEEE 754, and bfloat16 alike).
EXPONENT_BITS: dict[DType, int] = {
    np.dtype(np.float16): 0x7C00,
    BFLOAT16: 0x7F80,
    np.dtype(np.float32): 0x7F800000,
    np.dtype(np.float64): 0x7FF0000000000000,
}


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


def is_float(dtype: DType) -> bool:
    """Return whether `dtype` is a real floating-point type, bfloat16 included."""
    return dtype in EXPONENT_BITS


def fill_value(dtype: DType) -> Any:
    """Return the Zarr v3 fill value: NaN where there is one, so that missing rows show."""
    if is_float(dtype):
        return "NaN"
    if dtype.kind == "c":
        return ["NaN", "NaN"]
    return False if dtype.kind == "b" else 0
