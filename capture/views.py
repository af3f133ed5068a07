"""Other libraries' arrays over a run, each in one line: lazy, and read by layertap's own reader.

That reader checks what it reads, knows which rows are committed, and opens buckets and zip files, which those
libraries' own way to a Zarr store does not all do. Nothing is read before it is computed; rows that are not
committed are then the same `StoreError` as in `run[...]`, so a part of a store that is being written can be
computed as soon as it is there.
"""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .columns import is_text
from .errors import MissingPackageError, SelectionError
from .layout import largest_divisor
from .trust import check_room

if TYPE_CHECKING:
    from .reader import Array, Run

#: Bytes of a dask chunk at most, where an inner chunk is not longer.
PIECE_BYTES = 128 * 2**20


class Source:
    """What dask and xarray slice: an `Array` whose texts are objects, as their length is not known."""

    def __init__(self, array: Array) -> None:
        assert array.stored_as  # rows that differ in shape say here that they make no array
        self._array = array
        self.shape, self.ndim = array.shape, array.ndim
        self.dtype = np.dtype(object) if array.dtype.kind == "U" else array.dtype

    def __getitem__(self, key: Any) -> NDArray[Any]:
        values: NDArray[Any] = np.asarray(self._array[key])
        return values.astype(object) if self.dtype.kind == "O" else values

    def __dask_tokenize__(self) -> Any:
        run = self._array.run
        return type(self).__name__, str(run.path), run.info["crc32c"], self._array.name, len(run.blocks)


def as_dask(array: Array, rows: int | None = None) -> Any:
    """Return a tap or column as a `dask.array.Array`; see `Array.dask`."""
    dask_array = packaged("dask.array", "dask", "dask")
    size = _piece_rows(array) if rows is None else rows
    if size < 1:
        raise SelectionError(f"a chunk has one row at least; {rows} were asked for")
    source = Source(array)
    chunks = (min(size, max(1, len(array))), *source.shape[1:])
    return dask_array.from_array(source, chunks=chunks, asarray=False, lock=False)


def as_data_array(array: Array) -> Any:
    """Return a tap or column as an `xarray.DataArray`; see `Array.xarray`."""
    xarray = packaged("xarray", "xarray", "xarray")
    run = array.run
    taken = {array.name, *array.dims}
    coords = {"row": _numbers(run)}
    coords |= {
        _free(name, taken): _coordinate(column) for name, column in run.rows.items() if column.ndim == 1
    }
    attributes = {key: getattr(array, key) for key in ("layer", "type") if hasattr(array, key)}
    return xarray.DataArray(as_dask(array), coords, array.dims, array.name, attributes)


def as_dataset(run: Run) -> Any:
    """Return all taps and columns as an `xarray.Dataset`; see `Run.xarray`."""
    xarray = packaged("xarray", "xarray", "xarray")
    sizes = Counter(dim for dim, _ in {pair for tap in run.taps.values() for pair in _sizes(tap)})
    variables: dict[str, Any] = {}
    for name, tap in run.taps.items():
        dims = [
            dim if dim == "row" or (sizes[dim] == 1 and dim not in run.taps) else f"{name}_{dim}"
            for dim in tap.dims
        ]
        variables[name] = xarray.Variable(dims, as_dask(tap), {"layer": tap.layer, "type": tap.type})
    taken = {*variables, *(dim for variable in variables.values() for dim in variable.dims)}
    coords: dict[str, Any] = {"row": _numbers(run)}
    for name, column in run.rows.items():
        if column.ndim == 1:
            coords[_free(name, taken)] = _coordinate(column)
        else:
            variables[_free(name, taken)] = xarray.Variable(column.dims, as_dask(column))
    return xarray.Dataset(variables, coords, {"store": str(run.path)})


def _numbers(run: Run) -> NDArray[np.int64]:
    check_room(8 * run.n_rows, f"the numbers of all rows of {run.path}")
    return np.arange(run.n_rows)


def _coordinate(column: Array) -> Any:
    from .views_xarray import lazy

    return lazy(Source(column), column.dims)


def _sizes(array: Array) -> list[tuple[str, int]]:
    assert array.stored_as  # as above
    return list(zip(array.dims[1:], array.shape[1:], strict=True))


def _free(name: str, taken: set[str]) -> str:
    """Return a column's name, another where a tap or an axis has it."""
    return f"rows.{name}" if name in taken else name


def _piece_rows(array: Array) -> int:
    """Return the rows of a block, or of as many inner chunks as a dask chunk should hold."""
    layout = array.run.manifest.layout
    spec = layout.arrays[array.stored_as[0]]
    if is_text(spec):
        return layout.block_rows
    size = layout.chunk_rows(spec)
    n_chunks = max(1, PIECE_BYTES // (size * spec.row_bytes))
    return size * largest_divisor(layout.block_rows // size, n_chunks)


def packaged(module: str, package: str, extra: str) -> Any:
    """Return a module that needs a package which not everybody has.

    Raises:
        MissingPackageError: the package is not installed; with the line that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise MissingPackageError(
            f"this view of a run needs {package}; install it with: pip install 'layertap[{extra}]'"
        ) from error
