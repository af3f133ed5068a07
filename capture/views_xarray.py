"""Columns as xarray's own lazy arrays: not read before they are looked at, and plain numpy from then on.

As coordinates they are what rows are grouped and chosen by, which xarray does not do by a dask array.
"""

from __future__ import annotations

from typing import Any

import xarray
from xarray.backends import BackendArray
from xarray.core import indexing

from .views import Source


class LazyColumn(BackendArray):  # type: ignore[misc,unused-ignore]
    """One column, as what xarray reads through its own indexers."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.shape, self.dtype = source.shape, source.dtype

    def __getitem__(self, key: Any) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._source.__getitem__
        )


def lazy(source: Source, dims: tuple[str, ...]) -> Any:
    """Return a variable of `dims` that is read when it is looked at."""
    return xarray.Variable(dims, indexing.LazilyIndexedArray(LazyColumn(source)))
