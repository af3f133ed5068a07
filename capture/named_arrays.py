"""Arrays that go to a model by the names of its arguments: `input_ids`, `attention_mask` and the like."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from .data import Batch, Source, label_columns, rows_crc
from .errors import DataError

#: What is a label and no argument, if it is there.
LABELS = ("label", "labels", "y")


def are_named(data: Any) -> bool:
    """Return whether `data` maps names to arrays."""
    return (
        isinstance(data, Mapping)
        and bool(data)
        and all(isinstance(key, str) and hasattr(data[key], "shape") for key in data)
    )


class NamedArrays(Source):
    """A dict of arrays, each an argument of the model by its name; `label`, `labels` or `y` is the label.

    Args:
        arrays: name -> array (rows, ...), of numpy or of the model's framework.
        name: what the store calls the data.

    Raises:
        DataError: they differ in length, or there are no rows.
    """

    def __init__(self, arrays: Mapping[str, Any], *, name: str = "arrays") -> None:
        sizes = {key: array.shape[0] if len(array.shape) else 0 for key, array in arrays.items()}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            said = ", ".join(f"{key} {size:,}" for key, size in sizes.items())
            raise DataError(f"the arrays of {name} must have the same rows, one at least; they have {said}")
        label = next((key for key in LABELS if key in arrays), None)
        self.arrays = {key: array for key, array in arrays.items() if key != label}
        self.labels = None if label is None else arrays[label]
        if not self.arrays:
            raise DataError(f"{name} holds labels alone")
        self.name = name
        self.n_rows = next(iter(sizes.values()))

    @property
    def resizes(self) -> bool:
        """No: the arrays go to the model as they are."""
        return False

    def batch(self, rows: range) -> Batch:
        """Cut out `rows`."""
        window = slice(rows.start, rows.stop)
        columns = {} if self.labels is None else label_columns(self.labels[window])
        return Batch(rows, (), {key: array[window] for key, array in self.arrays.items()}, columns)

    def fingerprint(self) -> str:
        """Hash names, shapes, types and bytes: of large sets, each row's beginning, middle and end."""
        digest = hashlib.sha256()
        for key, values in self.arrays.items():
            array = np.asarray(values)
            digest.update(f"{key}{array.shape}{array.dtype}{rows_crc(array):08x}".encode())
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels).tobytes())
        return f"arrays:{self.n_rows}:{digest.hexdigest()[:32]}"
