"""The element types of ONNX and of a store."""

from __future__ import annotations

from onnx import TensorProto

from ..capture.dtypes import DTYPES, DType, dtype_name

# The table of the onnx package gives float32 for bfloat16 in older versions.
_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT8E4M3FN: "float8_e4m3fn",
    TensorProto.FLOAT8E5M2: "float8_e5m2",
    TensorProto.INT8: "int8",
    TensorProto.INT16: "int16",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.UINT8: "uint8",
    TensorProto.UINT16: "uint16",
    TensorProto.UINT32: "uint32",
    TensorProto.UINT64: "uint64",
    TensorProto.BOOL: "bool",
    TensorProto.COMPLEX64: "complex64",
    TensorProto.COMPLEX128: "complex128",
}
_ELEMENTS = {name: element for element, name in _NAMES.items()}


def dtype_of(element: int) -> DType | None:
    """Return the numpy type of an ONNX element type; None for texts and for what a store cannot hold."""
    return DTYPES.get(_NAMES.get(element, ""))


def element_of(dtype: DType) -> int:
    """Return the ONNX element type of a numpy type.

    Raises:
        FormatError: a store cannot hold the type.
    """
    return _ELEMENTS[dtype_name(dtype)]
