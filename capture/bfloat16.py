"""bfloat16 for zarr-python, which has no such type; TensorStore and zarrs have it under the same name.

`register` makes it known to the zarr-python of the process; `Run.zarr` does so. (zarr-python 3.1 collects
types from entry points and then never loads them, so the entry point alone does not help.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeGuard

import numpy as np
from zarr.core.dtype.common import HasItemSize
from zarr.dtype import ZDType, data_type_registry

try:
    from zarr.errors import DataTypeValidationError  # type: ignore[attr-defined,unused-ignore]
except ImportError:  # zarr-python before 3.2
    from zarr.dtype import DataTypeValidationError

from .dtypes import BFLOAT16

_NAME = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType[Any, Any], HasItemSize):
    """The upper half of a float32, as `ml_dtypes.bfloat16`; Zarr format 3 alone."""

    dtype_cls: ClassVar[type] = type(BFLOAT16)
    _zarr_v3_name: ClassVar[str] = _NAME

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        """Wrap the numpy dtype."""
        if dtype == BFLOAT16:
            return cls()
        raise DataTypeValidationError(f"{dtype} is not bfloat16")

    def to_native_dtype(self) -> Any:
        """Return the numpy dtype."""
        return BFLOAT16

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError("Zarr format 2 has no bfloat16")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == _NAME:
            return cls()
        raise DataTypeValidationError(f"{data!r} is not bfloat16")

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        """Return the type's name in metadata."""
        if zarr_format == 2:
            raise DataTypeValidationError("Zarr format 2 has no bfloat16")
        return _NAME

    def _check_scalar(self, data: object) -> TypeGuard[Any]:
        return isinstance(data, int | float | str | np.number) or np.asarray(data).dtype == BFLOAT16

    def cast_scalar(self, data: object) -> Any:
        """Return `data` as a bfloat16 scalar."""
        return BFLOAT16.type(data)

    def default_scalar(self) -> Any:
        """Return zero."""
        return BFLOAT16.type(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Literal[2, 3]) -> Any:
        """Read a fill value: a number, `NaN`, `Infinity`, `-Infinity`, or its bits in hexadecimal."""
        if isinstance(data, str) and data.startswith("0x"):
            if not re.fullmatch("0x[0-9a-fA-F]{4}", data):
                raise TypeError(f"{data!r} is not the bits of a bfloat16")
            return np.uint16(int(data, 16)).view(BFLOAT16)
        if isinstance(data, str) and data not in ("NaN", "Infinity", "-Infinity"):
            raise TypeError(f"{data!r} is not a bfloat16")
        return BFLOAT16.type(float(data))

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> Any:
        """Return a fill value as JSON."""
        value = float(data)  # type: ignore[arg-type]
        special: Mapping[str, str] = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
        return special.get(str(value), value)


def register() -> None:
    """Let zarr-python, and what stands on it (xarray, dask), open bfloat16 arrays in this process."""
    data_type_registry.register(_NAME, BFloat16)
