"""Constants: the few arrays of a store that have no rows, such as the basis that a tap was projected by.

Each is one chunk, written with the metadata. The manifest says its CRC-32C, which binds it to the plan: a
capture that would go on with another basis is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import trust
from .checksum import CRC_BYTES, crc32c, sealed, unsealed
from .dtypes import dtype_name, named_dtype
from .errors import ChecksumError, FormatError, StoreError, why
from .place import Place

Json = dict[str, Any]
Values = NDArray[Any]


def describe(group: str, constants: Mapping[str, tuple[tuple[str, ...], Values]]) -> list[Json]:
    """Return what the manifest says of a tap's constants: name -> names of the axes, and values."""
    return [
        {
            "name": name,
            "path": f"{group}/{name}",
            "dims": list(dims),
            "shape": list(values.shape),
            "dtype": dtype_name(values.dtype),
            "crc32c": crc32c(_data(values)),
        }
        for name, (dims, values) in constants.items()
    ]


def check(one: Any, group: str, what: str) -> None:
    """Hold what a manifest says of a constant to its form.

    Raises:
        FormatError: with what is wrong.
    """
    name = trust.name(one["name"], f"a constant of {what}")
    if one["path"] != f"{group}/{name}":
        raise FormatError(f"a constant of {what} has the path {trust.shown(one['path'])}")
    trust.check_path(one["path"], f"a constant of {what}")
    shape = [
        trust.whole(n, f"an axis of {name} of {what}", 1, trust.LONGEST_AXIS)
        for n in trust.listed(one["shape"], f"the shape of {name} of {what}")
    ]
    for dim in trust.listed(one["dims"], f"the axes of {name} of {what}"):
        trust.name(dim, f"an axis' name of {name} of {what}")
    if not shape or len(one["dims"]) != len(shape) or len(shape) > trust.MOST_AXES:
        raise FormatError(f"{name} of {what} has {len(one['dims'])} names for {len(shape)} axes")
    trust.whole(one["crc32c"], f"the checksum of {name} of {what}", 0, 2**32 - 1)
    named_dtype(one["dtype"])


def file_of(one: Json) -> str:
    """Return the name inside the store of the chunk that holds a constant."""
    return f"{one['path']}/{'.'.join(['c', *['0'] * len(one['shape'])])}"


def encoded(values: Values) -> bytes:
    """Return a constant's chunk."""
    return sealed(_data(values))


def read(place: Place, one: Json) -> Values:
    """Return a constant.

    Raises:
        ChecksumError: it is not what was written.
        StoreError: it cannot be read.
    """
    dtype, name = named_dtype(one["dtype"]), f"{place}/{file_of(one)}"
    n_bytes = dtype.itemsize
    for n in one["shape"]:
        n_bytes *= n
    trust.check_room(n_bytes, name)
    try:
        stored = place.read(file_of(one), n_bytes + CRC_BYTES)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{name} cannot be read: {why(error)}") from error
    data = unsealed(stored)
    if data is None or len(data) != n_bytes or crc32c(data) != one["crc32c"]:
        raise ChecksumError(f"{name} is damaged: it is not what the manifest says")
    values: Values = np.frombuffer(data, dtype).reshape(one["shape"])
    return values


def _data(values: Values) -> bytes:
    return np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
