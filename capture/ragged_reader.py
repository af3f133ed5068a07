"""Reading taps whose rows differ in shape: first where the rows lie, then the chunks that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import DType
from .errors import SelectionError
from .layout import EXTENTS
from .ragged import check_extents, flat
from .reader import Selector, Tap, Values, chosen_rows
from .shard import Shard
from .trust import check_room, empty


class RaggedTap(Tap):
    """A tap whose rows differ in shape.

    `tap[17]` is one row in its own shape, `tap[17, :9]` a part of it; `tap[10:20]`, `tap[[3, 5]]` and a mask
    of all rows give lists of such arrays, and `tap[10:20, :9]` the part of each. Whole inner chunks are read,
    each once, and checked.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows alone: there is no shape that all of them have. See `shapes`."""
        return (self._run.n_rows,)

    @property
    def bound(self) -> tuple[int, ...]:
        """The greatest shape that a row could have."""
        return self._spec.shape

    @property
    def shapes(self) -> NDArray[np.int64]:
        """The shape of each row; (rows, axes)."""
        return self._extents(slice(None))[:, 1:]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each row's elements begin in `values`; (rows,)."""
        return self._extents(slice(None))[:, 0]

    @property
    def values(self) -> Elements:
        """The elements of all rows, as they lie in the store, one-dimensional, with gaps between blocks."""
        return Elements(self)

    def __repr__(self) -> str:
        dims = ", ".join(f"{d}<={n}" for d, n in zip(self.dims[1:], self.bound, strict=True))
        return f"<RaggedTap {self.name}: {self.dtype} (row={len(self)}, {dims})>"

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Values:
        raise self._no_array()

    @property
    def arrays(self) -> tuple[int, int]:
        """The arrays of the store's layout that hold its elements and its extents, by their places there."""
        values, extents = self._run.manifest.layout.numbers[self._index]
        return values, extents

    @property
    def stored_as(self) -> tuple[int, ...]:
        """Refuse: what reads many rows into one array cannot read these.

        Raises:
            SelectionError: always.
        """
        raise self._no_array()

    def __getitem__(self, key: Any) -> Any:
        key, *inner = key if isinstance(key, tuple) else (key,)
        chosen, single = chosen_rows(key, len(self), self.name)
        try:
            found = [row[tuple(inner)] if inner else row for row in self._rows(chosen)]
        except IndexError as error:
            raise SelectionError(f"a row of {self.name} cannot be indexed so: {error}") from None
        return found[0] if single else found

    def of_one_shape(self, rows: Sequence[int]) -> Tap:
        """Return a tap whose rows all have the shape of `rows`, which alone can be read of it, in one array.

        Raises:
            SelectionError: they differ in shape.
        """
        shapes = self._extents(np.asarray(rows, np.intp))[:, 1:]
        other = next((i for i, shape in enumerate(shapes) if (shape != shapes[0]).any()), None)
        if other is not None:
            first, second = (tuple(shapes[i].tolist()) for i in (0, other))
            raise SelectionError(
                f"rows {rows[0]} and {rows[other]} of {self.name} have the shapes {first} and {second}; take "
                "rows of one shape together, or one by one"
            )
        return _OneShape(self, tuple(shapes[0].tolist()))

    def stored(self, rows: slice) -> Values:
        """Refuse: rows lie one behind the other in `values`."""
        raise self._no_array()

    def _read(self, selectors: Sequence[Selector]) -> Values:
        raise self._no_array()

    def _no_array(self) -> SelectionError:
        return SelectionError(
            f"the rows of {self.name} differ in shape and make no array. Read them as run[{self.name!r}][17] "
            "or [10:20], name other taps, or capture it with pad= in place of ragged="
        )

    def _extents(self, rows: Any) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self.parts[EXTENTS][rows].astype(np.int64)
        return found

    def _rows(self, rows: NDArray[np.intp]) -> list[Values]:
        layout = self._run.manifest.layout
        room = flat(self._spec, layout)[1].block_rows
        distinct, back = np.unique(rows, return_inverse=True)
        if not distinct.size:
            return []
        extents = self._extents(distinct)
        check_extents(self._run.path, self._spec, layout, distinct, extents)
        sizes = extents[:, 1:].prod(1)
        what = f"{len(distinct)} rows of {self.name}"
        check_room(int(sizes.sum()) * self._spec.dtype.itemsize, what)
        found = [empty((n,), self._spec.dtype, what) for n in sizes.tolist()]
        blocks = distinct // layout.block_rows
        self._run.check_same()
        for block in np.unique(blocks).tolist():
            these = np.flatnonzero(blocks == block)
            starts = extents[these, 0] - block * room
            self._fill(self._shard(block), starts.tolist(), [found[i] for i in these.tolist()])
        shaped = [one.reshape(shape) for one, shape in zip(found, extents[:, 1:].tolist(), strict=True)]
        return [shaped[i] for i in back.tolist()]

    def _fill(self, shard: Shard, starts: Sequence[int], targets: Sequence[Values]) -> None:
        """Fill `targets` with the elements of a block from `starts` on; these are in order."""
        chunk = shard.chunk_rows
        needed = sorted(
            {
                number
                for start, target in zip(starts, targets, strict=True)
                if target.size
                for number in range(start // chunk, (start + target.size - 1) // chunk + 1)
            }
        )
        at = 0
        for number, data in zip(needed, shard.chunks(needed), strict=True):
            first, elements = number * chunk, data.view(self._spec.dtype)
            i = at
            while i < len(starts) and starts[i] < first + chunk:
                start, target = starts[i], targets[i]
                low, high = max(start, first), min(start + target.size, first + chunk)
                if low < high:
                    target[low - start : high - start] = elements[low - first : high - first]
                if start + target.size <= first + chunk and i == at:
                    at += 1
                i += 1


class _OneShape(RaggedTap):
    """A ragged tap as if all rows had one shape, which those have that are read."""

    def __init__(self, tap: RaggedTap, row: tuple[int, ...]) -> None:
        self._row = row
        super().__init__(tap._run, tap._index, tap._about)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._run.n_rows, *self._row)

    @property
    def bound(self) -> tuple[int, ...]:
        return self._row

    def __getitem__(self, key: Any) -> Any:
        key, *inner = key if isinstance(key, tuple) else (key,)
        rows = super().__getitem__(key)
        rows = np.stack(rows) if isinstance(rows, list) else rows
        for axis, selector in enumerate(inner, start=1):
            rows = rows[(slice(None),) * axis + (selector,)]
        return rows


class Elements:
    """The elements of a ragged tap, one-dimensional, read as they are sliced."""

    def __init__(self, tap: RaggedTap) -> None:
        self._tap = tap
        run = tap._run
        self._room = flat(tap._spec, run.manifest.layout)[1].block_rows
        self._n = -(-run.n_rows // run.manifest.layout.block_rows) * self._room

    @property
    def shape(self) -> tuple[int]:
        """How many there is room for."""
        return (self._n,)

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self._tap.dtype

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, key: slice) -> Values:
        if not isinstance(key, slice) or key.step not in (None, 1):
            raise SelectionError(f"the elements of {self._tap.name} are read by slices without a step")
        start, stop, _ = key.indices(self._n)
        found = empty((max(0, stop - start),), self.dtype, f"elements of {self._tap.name}", np.zeros)
        at = start
        while at < stop:
            block, within = divmod(at, self._room)
            end = min(stop, (block + 1) * self._room)
            shard = self._tap._shard(block)
            there = min(shard.n_there, within + end - at) - within
            if there > 0:
                self._tap._fill(shard, [within], [found[at - start : at - start + there]])
            at = end
        return found
