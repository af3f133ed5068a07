"""Data sets for `torch.utils.data.DataLoader` over what was captured.

Values go from the files into the memory of a tensor, and are copied once on the way where they are mixed. In
a worker of a data loader a batch is made in shared memory at once, so that it need not be copied there to
reach the process that trains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils.data

from ..capture.chunks import Bytes1D, Bytes2D, Chunks, Indices
from ..capture.columns import is_text
from ..capture.dtypes import dtype_name
from ..capture.errors import PlanError, SelectionError
from ..capture.layout import ArraySpec
from ..capture.parts import Part
from ..capture.plan import parse_bytes
from ..capture.ragged import usual_axes
from ..capture.ragged_reader import RaggedTap
from ..capture.rowset import RowSet
from ..capture.shuffle import Order, Share, Windows, group_bytes_of, kept_bytes_of, stream
from ..capture.trust import check_room
from .torch_slabs import TORCH_DTYPES

if TYPE_CHECKING:
    from ..capture.reader import Array, Run

Transform = Callable[[dict[str, Any]], Any]

#: How a batch of rows that differ in shape may come.
COLLATES = ("list", "pad", "offsets")
#: Name under which `columns` gives the number of a row in the data set.
ROW = "row"


class _Values:
    """Tensors for some rows of taps and columns, and the memory that they lie in."""

    def __init__(
        self,
        of: dict[str, Array],
        specs: Sequence[ArraySpec],
        n_rows: int,
        shared: bool,
        varying: Sequence[str] = (),
    ) -> None:
        self._of, self._specs, self._n_rows, self._varying = of, specs, n_rows, varying
        for spec in specs:
            check_room(n_rows * spec.row_bytes, f"a batch of {n_rows} rows of {spec.name}")
        self._flat = [_bytes(n_rows * spec.row_bytes, shared) for spec in specs]
        #: One for each array of the store; shape (rows, row_bytes).
        self.arrays: list[Bytes2D] = [
            flat.numpy().reshape(n_rows, spec.row_bytes) for spec, flat in zip(specs, self._flat, strict=True)
        ]

    def named(self) -> dict[str, Any]:
        """Return the values by name: tensors of shape (rows, *shape); of texts and ragged rows, lists."""
        places = iter(range(len(self._specs)))
        found = {
            name: self._of_one(one, [next(places) for _ in one.stored_as]) for name, one in self._of.items()
        }
        for name in self._varying:
            values, extents = next(places), next(places)
            sizes = self.arrays[extents].view(np.int64)[:, 1:]
            tensors, targets = row_tensors(self._specs[values], sizes)
            for target, row in zip(targets, self.arrays[values], strict=True):
                target[:] = row[: len(target)]
            found[name] = tensors
        return found

    def _of_one(self, one: Array, places: list[int]) -> Any:
        spec, first = self._specs[places[0]], self.arrays[places[0]]
        if is_text(spec):
            return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in first]
        if len(places) == 1:
            flat = self._flat[places[0]].view(TORCH_DTYPES[dtype_name(spec.dtype)])
            return flat.view(self._n_rows, *spec.shape)
        stored = [
            self.arrays[i].reshape(-1).view(self._specs[i].dtype).reshape(self._n_rows, *self._specs[i].shape)
            for i in places
        ]
        return torch.from_numpy(one.made_of(stored))


def row_tensors(
    spec: ArraySpec, sizes: Indices, shared: bool = False
) -> tuple[list[torch.Tensor], list[Bytes1D]]:
    """Return a tensor for each row of a ragged tap, all in one piece of memory, and the bytes of each."""
    n_bytes = sizes.prod(1) * spec.dtype.itemsize
    check_room(int(n_bytes.sum()), f"a batch of {len(sizes)} rows of {spec.name}")
    flat, ends = _bytes(int(n_bytes.sum()), shared), np.cumsum(n_bytes).tolist()
    cut = [flat[end - n : end] for end, n in zip(ends, n_bytes.tolist(), strict=True)]
    dtype = TORCH_DTYPES[dtype_name(spec.dtype)]
    tensors = [one.view(dtype).view(shape) for one, shape in zip(cut, sizes.tolist(), strict=True)]
    return tensors, [one.numpy() for one in cut]


def collated(name: str, how: str, rows: Sequence[torch.Tensor], bound: Sequence[int]) -> dict[str, Any]:
    """Return a batch of rows that differ in shape, by the names under which it is in an item.

    Args:
        name: that of the tap.
        how: `list`, `pad` or `offsets`; see `Run.torch_dataset`.
        rows: the rows.
        bound: the greatest shape of a row.

    Raises:
        SelectionError: they differ in another axis than those that usually vary.
    """
    if how == "list":
        return {name: list(rows)}
    axes = usual_axes(len(bound))
    sizes = torch.tensor([list(row.shape) for row in rows], dtype=torch.int64).reshape(len(rows), len(bound))
    for axis, most in enumerate(bound):
        if axis not in axes and bool((sizes[:, axis] != most).any()):
            raise SelectionError(
                f"rows of {name} differ in axis {axis} too, so collate={how!r} cannot tell what is theirs: "
                "take collate='list'"
            )
    if how == "pad":
        longest = sizes.amax(0).tolist() if len(rows) else [0] * len(bound)
        shape = [n if axis in axes else bound[axis] for axis, n in enumerate(longest)]
        values = rows[0].new_zeros((len(rows), *shape)) if len(rows) else torch.zeros((0, *shape))
        mask = torch.zeros((len(rows), *(shape[axis] for axis in axes)), dtype=torch.bool)
        for row, target, own in zip(rows, values, mask, strict=True):
            target[tuple(map(slice, row.shape))] = row
            own[tuple(slice(row.shape[axis]) for axis in axes)] = True
        return {name: values, f"{name}/mask": mask}
    first = axes == (0,)
    flat = [row if first else row.reshape(-1) for row in rows]
    ends = torch.tensor([0, *map(len, flat)], dtype=torch.int64).cumsum(0)
    return {name: torch.cat(flat), f"{name}/offsets": ends, f"{name}/sizes": sizes}


def _bytes(n_bytes: int, shared: bool) -> torch.Tensor:
    if not shared:
        return torch.empty(n_bytes, dtype=torch.uint8)
    # As torch's own collate does: what is not shared is copied into shared memory when it leaves the worker.
    storage: Any = torch.UntypedStorage._new_shared(n_bytes, device="cpu")  # type: ignore[no-untyped-call]
    flat: torch.Tensor = torch.empty(0, dtype=torch.uint8).set_(storage)
    return flat


class _Chosen:
    """What both kinds of data set have in common: arrays and rows of a run."""

    def __init__(
        self,
        run: Run,
        taps: Sequence[str] | str | None,
        columns: Sequence[str] | str,
        transform: Transform | None,
        rows: RowSet,
        memory: str | int,
        collate: str = "list",
    ) -> None:
        self.run = run
        if collate not in COLLATES:
            raise PlanError(f"there is no collate={collate!r}; choose one of {', '.join(COLLATES)}")
        self._how = collate
        self.transform = transform
        #: Names of the taps, in the order of the values.
        self.taps = _names(taps, list(run))
        #: Names of the columns, behind them.
        self.columns = _names(columns, [])
        #: By the names that they were asked for by, of which a tap may have several.
        taps_of = {name: run[name] for name in self.taps}
        self._varying = {name: tap for name, tap in taps_of.items() if isinstance(tap, RaggedTap)}
        self._of: dict[str, Array] = {n: tap for n, tap in taps_of.items() if n not in self._varying}
        self._of |= {name: run.rows[name] for name in self.columns if not self._is_row(name)}
        self._numbers = [number for one in self._of.values() for number in one.stored_as]
        self._n_alike = len(self._numbers)
        self._numbers += [number for tap in self._varying.values() for number in tap.arrays]
        names = [*self.taps, *self.columns]
        for name in names:
            if names.count(name) > 1:
                raise SelectionError(
                    f"{name!r} is asked for twice; a tap and a column of one name go into two data sets"
                )
        if not self._numbers:
            raise SelectionError("nothing is asked for; name at least one tap or column of the store")
        self._memory = parse_bytes(memory)
        #: The rows of the data set, in increasing order.
        self.rows = rows
        self._chunks: tuple[int, Chunks] | None = None

    def _is_row(self, name: str) -> bool:
        return name == ROW and ROW not in self.run.rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_chunks": None}

    def _own_chunks(self, keep_bytes: int) -> Chunks:
        if self._chunks is None or self._chunks[0] != keep_bytes:
            self._chunks = keep_bytes, Chunks(self.run, self._numbers, keep_bytes)
        return self._chunks[1]

    def _item(self, values: dict[str, Any], rows: Any) -> dict[str, Any]:
        return {
            name: rows if self._is_row(name) and name not in self.taps else values[name]
            for name in (*self.taps, *self.columns)
        }

    def _batch(self, values: dict[str, Any], rows: Any) -> dict[str, Any]:
        """Return an item of many rows, those that differ in shape as was asked for."""
        item = self._item(values, rows)
        for name, tap in self._varying.items():
            item |= collated(name, self._how, values[name], tap.bound)
        return item

    def _about(self) -> str:
        some = "" if len(self.rows) == self.run.n_rows else f" of {self.run.n_rows}"
        return f"{self.run.path}: {len(self.rows)}{some} rows of {', '.join([*self.taps, *self.columns])}"


class RowDataset(_Chosen, torch.utils.data.Dataset[Any]):
    """Rows by their position: `dataset[i]` is a dict of one row's values, `dataset[[i, j]]` of a batch.

    Tensors have the shape of one row, `(*shape)`, or of a batch, `(rows, *shape)`, and the stored type; texts
    are `str`, or a list of them. Rows are in the order of the data set, and those that are not committed are
    left out; `dataset.rows[i]` is the number of row `i` in the store.

    Of a tap without a codec a row is read by itself, and checked only where it is an inner chunk, or the run
    was opened with `check=True`; a data loader's whole batch is read at once.
    """

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<RowDataset {self._about()}>"

    def __getitem__(self, index: Any) -> Any:
        """Return a row, or the rows of a list or slice as one batch.

        Raises:
            SelectionError: there is no such row.
            StoreError: it cannot be read.
            ChecksumError: it is not what was written.
        """
        positions = self._positions(index)
        values, rows = self._read(np.atleast_1d(positions), shared=positions.ndim == 1 and _in_worker())
        if positions.ndim == 1:
            item = self._batch(values, torch.from_numpy(rows))
        else:
            item = self._item({name: value[0] for name, value in values.items()}, int(rows[0]))
        return item if self.transform is None else self.transform(item)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return one item for each index, as a data loader asks for a batch; each chunk is read once."""
        values, rows = self._read(self._positions(list(indices)), shared=False)
        columns = {
            name: value if isinstance(value, list) else value.unbind(0) for name, value in values.items()
        }
        items = [
            self._item({name: column[i] for name, column in columns.items()}, row)
            for i, row in enumerate(rows.tolist())
        ]
        return items if self.transform is None else [self.transform(item) for item in items]

    def _positions(self, index: Any) -> Indices:
        if isinstance(index, int) and 0 <= index < len(self):  # what a loader asks for, one by one
            return np.array(index)
        if isinstance(index, slice):
            return np.arange(*index.indices(len(self)), dtype=np.int64)
        positions = np.asarray(index)
        if positions.size == 0:
            positions = positions.astype(np.int64)
        if positions.dtype.kind not in "iu" or positions.ndim > 1:
            raise SelectionError(f"rows are asked for by ints, lists of ints and slices; got {index!r}")
        if positions.size and not -len(self) <= positions.min() <= positions.max() < len(self):
            raise SelectionError(f"the data set has {len(self)} rows; {index!r} is outside")
        return np.where(positions < 0, positions + len(self), positions).astype(np.int64)

    def _read(self, positions: Indices, *, shared: bool) -> tuple[dict[str, Any], Indices]:
        rows = self.rows[positions]
        info = torch.utils.data.get_worker_info()
        chunks = self._own_chunks(self._memory // (info.num_workers if info else 1))
        values = _Values(self._of, chunks.specs[: self._n_alike], len(rows), shared)
        if len(rows):
            for array, target in enumerate(values.arrays):
                chunks.rows(array, rows, target)
        named = values.named()
        for array, name in enumerate(self._varying):
            named[name] = self._read_varying(chunks, self._n_alike + 2 * array, rows, shared)
        return named, rows

    def _read_varying(self, chunks: Chunks, array: int, rows: Indices, shared: bool) -> list[torch.Tensor]:
        if not len(rows):
            return []
        extents = chunks.extents(array, rows)
        tensors, targets = row_tensors(chunks.specs[array], extents[:, 1:], shared)
        chunks.elements(array, rows, extents, targets)
        return tensors

    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        """Return a batch of items, as a loader's `collate_fn`; rows that differ in shape as asked for."""
        made: dict[str, Any] = {}
        for name in items[0]:
            some = [item[name] for item in items]
            if name in self._varying:
                made |= collated(name, self._how, some, self._varying[name].bound)
            else:
                made[name] = torch.utils.data.default_collate(some)
        return made


class BatchStream(_Chosen, torch.utils.data.IterableDataset[Any]):
    """Whole batches in a random order, at the rate at which the store is read in order.

    Each item is a dict of tensors `(rows, *shape)` in the stored type, and of lists of texts. Give it to
    `DataLoader(stream, batch_size=None, num_workers=...)`: batches are made already. Every value is checked
    against its CRC-32C.

    `layertap.capture.shuffle` says how rows are mixed: `mixed_rows` of them at a time, from `mixed_windows`
    places of the data set. Each rank and each worker has rows of its own; together they make every row once
    an epoch. The order follows from the seed, the epoch, the memory, and the numbers of ranks and workers.
    """

    def __init__(
        self,
        *chosen: Any,
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        part: str | None,
    ) -> None:
        super().__init__(*chosen)
        if batch_size < 1:
            raise PlanError(f"batch_size={batch_size} is no number of rows")
        self.batch_size, self.shuffle, self.seed, self.drop_last = batch_size, shuffle, seed, drop_last
        self._rank = _rank() if part is None else Part.parse(part)
        # In shared memory: the workers that a loader keeps learn of the next epoch by it.
        self._now: torch.Tensor = torch.zeros(2, dtype=torch.int64)
        self._now.share_memory_()  # type: ignore[no-untyped-call]
        self._n_done = 0
        self._resumed: tuple[int, int] | None = None
        self._orders: dict[int, Order] = {}
        self._order(1)  # what does not fit is refused now

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_orders": {}}

    def __len__(self) -> int:
        """Return the batches of an epoch on this rank."""
        return self._order(1).n_batches(Share(self._rank, Part()))

    def __repr__(self) -> str:
        how = f"{self.mixed_rows} mixed at a time" if self.shuffle else "in order"
        return f"<BatchStream {self._about()}, in batches of {self.batch_size}, {how}>"

    @property
    def mixed_windows(self) -> int:
        """Runs of consecutive rows that are mixed with each other, without workers."""
        return self._order(1).windows.mixed

    @property
    def mixed_rows(self) -> int:
        """Rows that are mixed with each other, without workers, which share the memory and mix fewer each."""
        windows = self._order(1).windows
        return min(len(self.rows), windows.mixed * windows.length)

    @property
    def epoch(self) -> int:
        """The epoch whose order comes next."""
        return int(self._now[0])

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch from the next iteration on, in the workers too."""
        if epoch != self.epoch:
            self._now[0], self._now[1] = epoch, 0
            self._n_done = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` goes on from: epoch, and the batches that this rank has had of it.

        In a worker it is what goes on in the same worker. A loader that does not ask its workers knows
        nothing of what they made: count the batches that you took, and put the number in as `"batches"`.
        """
        return {"epoch": self.epoch, "batches": self._n_done, "order": self._said()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on behind the batches that were had; what they alone need is not read.

        Raises:
            PlanError: the state is that of another order.
        """
        said, now = state.get("order", {}), self._said()
        differing = [
            f"{key} {said.get(key)} there, {now[key]} now" for key in now if said.get(key) != now[key]
        ]
        if differing:
            raise PlanError(f"that state belongs to another order of batches: {'; '.join(differing)}")
        self._n_done = state["batches"]
        if _in_worker():  # a loader that restores its workers tells each its own
            self._resumed = state["epoch"], state["batches"]
            self._now[0] = state["epoch"]
        else:
            self._now[0], self._now[1] = state["epoch"], state["batches"]

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        worker = Part(info.id + 1, info.num_workers) if info else Part()
        order, share = self._order(worker.n), Share(self._rank, worker)
        epoch, n_had = self._now.tolist()
        if self._resumed is not None and self._resumed[0] == epoch:
            n_had = self._resumed[1]
        self._resumed = None
        skip = share.done(n_had)
        self._n_done = skip * worker.n
        chunks = self._own_chunks(kept_bytes_of(self._memory // worker.n))

        def make(n_rows: int) -> _Values:
            return _Values(self._of, chunks.specs, n_rows, info is not None, list(self._varying))

        self.run.check_same()
        for rows, values in stream(chunks, order, epoch, share, make, skip):
            self._n_done += worker.n
            item = self._batch(values.named(), torch.from_numpy(rows))
            yield item if self.transform is None else self.transform(item)

    def _order(self, n_workers: int) -> Order:
        if n_workers not in self._orders:
            group_bytes = group_bytes_of(self._memory // n_workers)
            chunks = Chunks(self.run, self._numbers, 0)
            windows = Windows.plan(chunks, self.rows, group_bytes)
            self._orders[n_workers] = Order(windows, self.batch_size, self.shuffle, self.seed, self.drop_last)
        return self._orders[n_workers]

    def _said(self) -> dict[str, Any]:
        return {
            "rows": len(self.rows),
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
            "memory": self._memory,
            "ranks": self._rank.n,
        }


def torch_dataset(
    run: Run,
    taps: Sequence[str] | str | None,
    columns: Sequence[str] | str,
    transform: Transform | None,
    rows: Any,
    memory: str | int,
    batch_size: int | None,
    shuffle: bool,
    seed: int,
    drop_last: bool,
    part: str | None,
    collate: str,
) -> RowDataset | BatchStream:
    """Return a data set of `run`; see `Run.torch_dataset`."""
    chosen = run, taps, columns, transform, _committed(run, rows), memory, collate
    if batch_size is not None:
        return BatchStream(
            *chosen, batch_size=batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last, part=part
        )
    if shuffle or drop_last or part is not None:
        raise PlanError(
            "shuffle=, drop_last= and part= are for batches, so give batch_size= too; rows without it are "
            "shuffled by their loader: DataLoader(dataset, batch_size=..., shuffle=True)"
        )
    return RowDataset(*chosen)


def _names(names: Sequence[str] | str | None, default: list[str]) -> tuple[str, ...]:
    if names is None:
        return tuple(default)
    return (names,) if isinstance(names, str) else tuple(names)


def _committed(run: Run, rows: Any) -> RowSet:
    """Return the rows to read: those of `rows`, as an index of rows is, that are committed."""
    size, n_rows = run.manifest.layout.block_rows, run.n_rows
    starts = np.array(run.blocks, np.int64) * size
    there = RowSet.of_spans(starts, np.minimum(starts + size, n_rows))
    wanted = _selected(rows, n_rows)
    chosen = there & wanted
    if len(chosen) < len(wanted):
        warnings.warn(
            f"{run.path} is not finished: {len(chosen)} of the {len(wanted)} rows asked for are captured, "
            "and the data set has those alone. Run its capture again to go on, and make the data set anew",
            stacklevel=4,
        )
    return chosen


def _selected(rows: Any, n_rows: int) -> RowSet:
    if rows is None:
        rows = slice(None)
    if isinstance(rows, slice | range):
        every = range(n_rows)[rows] if isinstance(rows, slice) else rows
        every = every if every.step > 0 else every[::-1]
        if every.step == 1:
            rows_of = RowSet.of_spans([every.start], [every.stop])
        else:
            rows_of = RowSet.of_rows(np.arange(every.start, every.stop, every.step))
    else:
        numbers = np.asarray(rows)
        if numbers.dtype == np.bool_ and numbers.shape == (n_rows,):
            numbers = np.flatnonzero(numbers)
        if numbers.size and (numbers.dtype.kind not in "iu" or numbers.ndim != 1):
            raise SelectionError("rows= is a slice, a list of row numbers, or a mask of all rows")
        rows_of = RowSet.of_rows(numbers)
    if len(rows_of) and (rows_of[0] < 0 or rows_of[len(rows_of) - 1] >= n_rows):
        raise SelectionError(f"the store has rows 0 to {n_rows - 1}; rows= names others")
    return rows_of


def _rank() -> Part:
    """Return which rank this process is, as torch or what started it says."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Part(torch.distributed.get_rank() + 1, torch.distributed.get_world_size())
    return Part.of_environment()


def _in_worker() -> bool:
    return torch.utils.data.get_worker_info() is not None
