"""The reading side of a store: lazy numpy arrays over committed blocks.

Whole inner chunks are checked against their CRC-32C as they are read. A small window of each row of an
array without a codec (one channel over all rows, say) is read by itself and unchecked, because reading
what surrounds it would cost many times more; `open_run(path, check=True)` checks that too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import constants
from .axes import PLACES, dims_of
from .columns import is_text
from .dtypes import DType
from .errors import FormatError, SelectionError, StoreError, closest, why
from .fields import ReceptiveField
from .layout import ArraySpec
from .machine import n_cores
from .place import PathLike, Place, place_of
from .ragged import MASK, as_stored
from .reduce import Chain, Int8, Rows
from .reduce_arrays import dequantized
from .reduce_text import chain_from_json
from .shard import Shard, ShardRecord
from .store import (
    LOG,
    ROOT,
    Json,
    Manifest,
    check_record,
    commit_path,
    committed_blocks,
    decode_record,
    read_manifest,
    read_record,
    record_bytes,
    shard_path,
)
from .trust import check_room, empty, parse_json

if TYPE_CHECKING:
    from .report import StageReport
    from .summary import RunStatistics

Values = NDArray[Any]
Selector = slice | NDArray[np.intp]
# Inner chunks of one shard: the number of each, which of its rows are wanted, and where they go.
_Wanted = Sequence[tuple[int, NDArray[np.intp], NDArray[np.intp]]]

# Read a window by itself where it is at most this share of the rows' bytes.
_WINDOW_SHARE = 0.25
_LOG_BYTES = 64 * 1024
# Decoded by one thread at a time: many times what handing it over takes.
_DECODED_BYTES = 2 * 2**20


def open_run(path: PathLike | Place, *, check: bool = False, storage: Mapping[str, Any] | None = None) -> Run:
    """Open a store for reading; neither the model nor its framework is needed.

    Args:
        path: the store's folder, its URL (`s3://`, `gs://`, `az://`, `https://`), or a zip file of it.
        check: verify the checksum of every chunk that is touched, for small windows too.
        storage: for a URL: options of obstore's `from_url`; what is not said comes from the environment.

    Raises:
        StoreNotFoundError: nothing is there.
        FormatError: it is not a store, or one of a newer format.
        StoreError: what is there cannot be read.
    """
    return Run(place_of(path, storage), check=check)


class Run:
    """What was captured of one data set: `run["layer1"][17, :9]`.

    A store that is still being written, or whose capture was killed, shows its committed blocks;
    `refresh` looks for new ones.
    """

    def __init__(self, place: Place, *, check: bool = False) -> None:
        self.place = place
        self.check = check
        self.refresh()
        layout = self.manifest.layout
        about = self.manifest.facts["taps"]
        #: Tap name -> `Tap`, in the order of the model.
        self.taps: dict[str, Tap] = {
            tap.name: (ragged_tap() if tap.is_ragged else Tap)(self, i, about[tap.name])
            for i, tap in enumerate(layout.taps)
        }
        self._first_names = {alias: tap.name for tap in self.taps.values() for alias in tap.aliases}
        #: Column name -> `Array`: `id`, `label`, `prediction`, `picture` and the user's own.
        self.rows: dict[str, Array] = _Columns(
            (column.name, Array(self, len(layout.moved) + i)) for i, column in enumerate(layout.columns)
        )

    @property
    def path(self) -> Any:
        """Where the store is: a path, or a URL as text."""
        return self.place.path

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self.place, self.check, self.manifest)

    def __getitem__(self, name: str) -> Tap:
        try:
            return self.taps[self._first_names.get(name, name)]
        except KeyError:
            raise SelectionError(f"{self.path} holds no tap {name!r}. {closest(name, self.taps)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.taps)

    def __contains__(self, name: object) -> bool:
        return name in self.taps or name in self._first_names

    def __len__(self) -> int:
        """Return the number of taps."""
        return len(self.taps)

    def __repr__(self) -> str:
        state = "" if self.complete else f", {self.n_committed} captured"
        return f"<Run {self.path}: {len(self.taps)} taps x {self.n_rows} rows{state}>"

    def refresh(self) -> None:
        """Look for blocks that were committed since the store was opened."""
        self._root = self.place.stamp(ROOT)
        self.manifest: Manifest = read_manifest(self.place)
        try:
            self._blocks = committed_blocks(self.place, self.manifest.n_blocks)
        except FileNotFoundError as error:
            raise FormatError(f"{self.path} has no commit records: {why(error)}") from error
        if self.manifest.n_rows is not None:  # a record beyond the last block is of no rows
            self._blocks = {block for block in self._blocks if block < self.manifest.n_blocks}
        self.__dict__.pop("stats", None)
        self._records: dict[int, tuple[int, tuple[ShardRecord, ...]]] = {}

    def check_same(self) -> None:
        """Refuse to read on in a store that has replaced the one that was opened.

        Raises:
            StoreError: it has.
        """
        if self.place.stamp(ROOT) == self._root:
            return
        before = self.manifest
        try:
            self.refresh()  # a loop that ended has written how many rows there are
        except (FormatError, StoreError):
            same = False
        else:
            same = before.n_rows is None and _same(before, self.manifest)
        if not same:
            self._root = None
            raise StoreError(f"{self.path} was replaced or removed since it was opened; open it again")

    @property
    def n_rows(self) -> int:
        """Rows of the data set; of a loop that has not ended, the rows up to the last committed."""
        if self.manifest.n_rows is not None:
            return self.manifest.n_rows
        if not self._blocks:
            return 0
        last = max(self._blocks)
        return last * self.manifest.layout.block_rows + self.record(last)[0]

    @property
    def complete(self) -> bool:
        """Whether every block is committed."""
        return self.manifest.n_rows is not None and len(self._blocks) >= self.manifest.n_blocks

    def committed(self) -> NDArray[np.bool_]:
        """Return for each row whether it is captured and committed; shape (rows,).

        Raises:
            StoreError: there is not so much memory; `n_committed` takes none.
        """
        done = empty((self.n_rows,), np.dtype(np.bool_), f"a mask of all rows of {self.path}", np.zeros)
        size = self.manifest.layout.block_rows
        for block in self._blocks:
            done[block * size : (block + 1) * size] = True
        return done

    @property
    def n_committed(self) -> int:
        """How many rows are captured and committed."""
        if not self._blocks:
            return 0
        size = self.manifest.layout.block_rows
        return (len(self._blocks) - 1) * size + min(size, self.n_rows - max(self._blocks) * size)

    @property
    def blocks(self) -> list[int]:
        """Numbers of the committed blocks, in order."""
        return sorted(self._blocks)

    def record(self, block: int) -> tuple[int, tuple[ShardRecord, ...]]:
        """Return the commit record of `block`: its rows, and one record for each array.

        Raises:
            StoreError: the block is not committed.
        """
        if block not in self._blocks:
            size = self.manifest.layout.block_rows
            raise StoreError(
                f"rows {block * size} to {min((block + 1) * size, self.n_rows) - 1} of {self.path} are "
                f"not captured yet ({len(self._blocks)} of {self.manifest.n_blocks or 'unknown'} blocks "
                "are); run the same capture again to go on"
            )
        records = self._records  # another thread may refresh meanwhile
        if block not in records:
            found = read_record(self.place, block, len(self.manifest.layout.stored))
            records[block] = check_record(self.manifest, block, *found)
        return records[block]

    def records(self) -> list[tuple[ShardRecord, ...]]:
        """Return the records of all committed blocks, in order: one for each array."""
        unread = sorted(self._blocks - set(self._records))
        names = [commit_path(block) for block in unread]
        n_arrays = len(self.manifest.layout.stored)
        for block, name, data in zip(
            unread, names, self.place.read_many(names, record_bytes(n_arrays)), strict=True
        ):
            if data is not None:
                found = decode_record(data, f"{self.place}/{name}", n_arrays)
                self._records[block] = check_record(self.manifest, block, *found)
        return [self.record(block)[1] for block in sorted(self._blocks)]

    @cached_property
    def stats(self) -> RunStatistics:
        """What was computed while capturing, of committed rows: for each tap at least `nan` and `inf`."""
        from .summary import RunStatistics

        return RunStatistics(self)

    def rows_of(self, block: int) -> slice:
        """Return the rows of a committed block."""
        first = block * self.manifest.layout.block_rows
        return slice(first, first + self.record(block)[0])

    def shard(self, array: ArraySpec, block: int) -> Shard:
        """Return the shard that holds `block` of `array`.

        Raises:
            StoreError: it is not committed, or not kept.
        """
        layout = self.manifest.layout
        record = self.record(block)[1][layout.stored_at[array.path]]
        name = shard_path(array, block)
        # An open file stays what it was when another takes its name, whose record may be equal.
        stamp = self.place.stamp(name) if self.place.keeps_open else None
        return _open_shard(self.place, name, *as_stored(array, layout)[:2], record, stamp)

    @property
    def info(self) -> Json:
        """The manifest, as in the root's attribute `layertap`."""
        return self.manifest.to_json()

    @property
    def left_out(self) -> dict[str, str]:
        """What patterns chose of the model and is not captured, by its name, with the reason."""
        return dict(self.manifest.facts.get("left_out", {}))

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names by label, where they are known."""
        names = self.manifest.facts.get("classes")
        return None if names is None else tuple(names)

    @property
    def mean(self) -> tuple[float, ...] | None:
        """Mean that the model's input was normalised with, for each channel, in units of 0..1."""
        return self._preprocess("mean")

    @property
    def std(self) -> tuple[float, ...] | None:
        """Standard deviation that the model's input was normalised with, like `mean`."""
        return self._preprocess("std")

    def check_committed(self, rows: range | NDArray[np.intp]) -> None:
        """Refuse rows of which some are not committed, without a look at all of them.

        Raises:
            StoreError: with the first block that is not.
        """
        size = self.manifest.layout.block_rows
        if not isinstance(rows, range):
            for block in np.unique(rows // size).tolist():
                self.record(block)
            return
        while rows:
            block = rows[0] // size
            self.record(block)
            edge = (block + 1) * size if rows.step > 0 else block * size - 1
            rows = rows[max(1, -(-(edge - rows[0]) // rows.step)) :]

    def _preprocess(self, key: str) -> tuple[float, ...] | None:
        values = self.manifest.facts.get("preprocess", {}).get(key)
        return None if values is None else tuple(values)

    @property
    def n_bytes(self) -> int:
        """Bytes of all committed shards on disk."""
        return sum(shard.n_bytes for records in self.records() for shard in records)

    @property
    def log(self) -> list[Json]:
        """What each run that made the store kept of itself, the oldest first: when, where, how fast."""
        names: list[str] = []
        entries = []
        with contextlib.suppress(OSError):  # no reader needs it
            names = sorted(name for name in self.place.names(LOG) or () if name.endswith(".json"))
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                entry = parse_json(self.place.read(f"{LOG}/{name}", _LOG_BYTES))
                if isinstance(entry, dict):
                    entries.append(entry)
        return entries

    @property
    def report(self) -> StageReport | None:
        """Where the time of the last run went that is in the log."""
        from .report import StageReport

        entries = self.log
        return replace(StageReport.of_log(entries[-1]), left_out=self.left_out) if entries else None

    def torch_dataset(
        self,
        taps: Sequence[str] | str | None = None,
        columns: Sequence[str] | str = (),
        *,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        rows: Any = None,
        memory: str | int = "256MiB",
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        part: str | None = None,
        collate: str = "list",
    ) -> Any:
        """Return a data set for `torch.utils.data.DataLoader`: of rows, or with `batch_size` of batches.

        Without `batch_size` it is a `Dataset`: `dataset[i]` is a dict of the taps' tensors `(*shape)` and the
        columns' values of one row, `dataset[[i, j]]` of a batch. Each row is read by itself, at random:
        `DataLoader(dataset, batch_size=64, shuffle=True)`.

        With `batch_size` it is an `IterableDataset` of dicts of tensors `(rows, *shape)`, which reads in the
        order of the files and mixes what it holds: `DataLoader(stream, batch_size=None)`. Call
        `stream.set_epoch(epoch)` before each epoch; `layertap.capture.shuffle` says how well it mixes.
        Workers and ranks share the rows: none comes twice and none is left out.

        Only committed rows are in it; where some are missing, a warning says so.

        Args:
            taps: names of taps; all of them where none are named.
            columns: names of columns; `row` is the number of the row.
            transform: called with each item, in the worker; what it returns takes the item's place. Workers
                that are spawned need one that can be pickled.
            rows: a slice, a list of row numbers or a mask of all rows; each row counts once.
            memory: what all workers of this process together may hold beside the batches themselves.
            batch_size: rows of a batch.
            shuffle: batches of rows in a random order, else in that of the rows (with workers, each has some
                consecutive ones).
            seed: of the random order.
            drop_last: leave out what makes no full batch; then every rank has as many batches.
            part: rank of ranks such as `3/16`; else what `torch.distributed`, or `RANK` and `WORLD_SIZE` say.
            collate: how a batch of a ragged tap comes, whose single rows are tensors of their own shapes: a
                `list` of these; `pad`, a tensor of the longest, with zeros behind, and `<tap>/mask`; or
                `offsets`, a tensor of all rows, one behind the other, with `<tap>/offsets` (row `i` is
                `values[offsets[i] : offsets[i + 1]]`) and `<tap>/sizes`. Of rows with more axes than
                (token, feature) that tensor is flat. `dataset.collate` is a loader's `collate_fn`.

        Raises:
            SelectionError: the store has no such tap, column or row.
            PlanError: `memory` does not hold what is read at once.
            MissingPackageError: torch is not installed.
        """
        from .views import packaged

        options = transform, rows, memory, batch_size, shuffle, seed, drop_last, part, collate
        made = packaged("layertap.backends.torch_dataset", "torch", "torch").torch_dataset
        return made(self, taps, columns, *options)

    def xarray(self) -> Any:
        """Return all taps and columns as a lazy `xarray.Dataset`.

        Columns with one value a row are coordinates of `row`. An axis that has another size in another tap,
        or the name of a tap, is called `<tap>_<axis>`. See `Array.dask` for what is read when, and errors.
        """
        from .views import as_dataset

        return as_dataset(self)

    def zarr(self) -> Any:
        """Return the store as a read-only `zarr.Group`; its bfloat16 arrays open too from then on."""
        import zarr

        from . import bfloat16

        bfloat16.register()
        return zarr.open_group(self.place.zarr(), mode="r")


def _opened_again(place: Place, check: bool, manifest: Manifest) -> Run:
    """Open the store of a pickled run, which must be the same store."""
    run = Run(place, check=check)
    if not _same(manifest, run.manifest):
        raise StoreError(f"{run.path} was replaced since the run was pickled; open it again")
    return run


def _same(before: Manifest, now: Manifest) -> bool:
    """Return whether `now` is the manifest of the same store: a loop that ended has written its rows."""
    return now == before or (before.n_rows is None and replace(now, n_rows=None) == before)


class _Columns(dict[str, "Array"]):
    def __missing__(self, name: str) -> Array:
        raise SelectionError(f"the store has no column {name!r}. {closest(name, self)}")


class Array:
    """A tap or a column, read as it is indexed: ints, slices, lists of ints, boolean masks, `...`.

    Every axis is selected by itself (as `numpy.ix_` does), so `tap[[3, 5], [0, 2]]` is 2 rows by 2
    channels. Text columns give `str` and arrays of `str`.
    """

    def __init__(self, run: Run, index: int) -> None:
        self._run = run
        self._index = index
        self._text = is_text(self._spec)

    @property
    def _spec(self) -> ArraySpec:
        return self._run.manifest.layout.arrays[self._index]

    @property
    def run(self) -> Run:
        """The run that it belongs to."""
        return self._run

    @property
    def stored_as(self) -> tuple[int, ...]:
        """The arrays of the store's layout that its values are made of, by their places there."""
        return (self._index,)

    def made_of(self, stored: Sequence[Values]) -> Values:
        """Return its values of some rows from what each array of `stored_as` holds of them."""
        return stored[0]

    @property
    def name(self) -> str:
        """The tap's or column's name."""
        return self._spec.name

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes, `row` first."""
        return self._spec.dims[:-1] if self._text else self._spec.dims

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, rows first."""
        inner = self._spec.shape[:-1] if self._text else self._spec.shape
        return (self._run.n_rows, *inner)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> DType:
        """Element type; bfloat16 is `ml_dtypes.bfloat16`, text is `str`."""
        return np.dtype(np.str_) if self._text else self._spec.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{d}={n}" for d, n in zip(self.dims, self.shape, strict=True))
        return f"<{type(self).__name__} {self.name}: {self.dtype} ({sizes})>"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Values:
        if copy is False:
            raise ValueError("an array on disk cannot be had without a copy")
        values: Values = self[...]
        return values if dtype is None else values.astype(dtype)

    def __getitem__(self, key: Any) -> Any:
        selectors, dropped = _selectors(key, self.shape, self.name)
        if self._text:
            return _text(self._read([*selectors, slice(None)]), 0 in dropped)
        values = self._read(selectors)
        return values[tuple(0 if axis in dropped else slice(None) for axis in range(values.ndim))]

    def dask(self, rows: int | None = None) -> Any:
        """Return a lazy `dask.array.Array` of the same shape.

        Its chunks are blocks, or as many inner chunks of a long block as come near 128 MiB. Text is of type
        `object`. It can be pickled and computed wherever the store is reached. Rows that are not committed
        raise `StoreError` when they are computed.

        Args:
            rows: rows of a chunk, best a multiple of an inner chunk's.

        Raises:
            MissingPackageError: dask is not installed.
        """
        from .views import as_dask

        return as_dask(self, rows)

    def xarray(self) -> Any:
        """Return a lazy `xarray.DataArray`; columns with one value a row are its coordinates.

        Raises:
            MissingPackageError: xarray or dask is not installed.
        """
        from .views import as_data_array

        return as_data_array(self)

    def stored(self, rows: slice) -> Values:
        """Return `rows` as they lie in the store: text as UTF-8 bytes with zeros behind."""
        return self._read([rows, *[slice(None)] * len(self._spec.shape)])

    def _read(self, selectors: Sequence[Selector]) -> Values:
        spec, layout = self._spec, self._run.manifest.layout
        inner = tuple(selectors[1:])
        sizes = (self._run.n_rows, *spec.shape)
        shape = [_length(s, n) for s, n in zip(selectors, sizes, strict=True)]
        if 0 in shape:
            return np.empty(shape, spec.dtype)
        if spec.path not in layout.stored_at:
            raise StoreError(
                f"{self._run.path} holds statistics alone (values=False, --stats-only), so the values of "
                f"{self.name} cannot be read; run.stats[{self.name!r}] has what there is"
            )
        what = f"{' x '.join(map(str, shape))} of {self.name}"
        self._run.check_committed(_range(selectors[0], sizes[0]))
        check_room(8 * max(shape), what)  # the indices by themselves
        out: Values = empty(shape, spec.dtype, what)
        rows = _indices(selectors[0], sizes[0])
        chunk_rows = layout.chunk_rows(spec)
        window = None if self._run.check else _window(spec, inner)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        starts = np.flatnonzero(np.diff(ordered // chunk_rows, prepend=-1))
        parts: dict[int, list[tuple[int, NDArray[np.intp], NDArray[np.intp]]]] = {}
        for start, stop in zip(starts, [*starts[1:], len(ordered)], strict=True):
            first = int(ordered[start])
            block, chunk = first // layout.block_rows, first % layout.block_rows // chunk_rows
            parts.setdefault(block, []).append((chunk, ordered[start:stop] % chunk_rows, order[start:stop]))

        def fill(part: tuple[int, _Wanted]) -> None:
            block, wanted = part
            shard = self._shard(block)
            if window is None and _are_whole(inner, spec):
                wanted = _fill_whole(shard, chunk_rows, out, wanted)
            read = _whole_chunks if window is None else _windows
            for values, target in read(shard, spec, wanted, window):
                out[_slice(target)] = _select(values, inner if window is None else _rest(inner, spec))

        self._run.check_same()
        pieces: list[tuple[int, _Wanted]] = list(parts.items())
        n_at_once = self._run.place.parallel
        if n_at_once < 2 and spec.codec != "none":  # processors decode side by side
            n_chunks = max(1, _DECODED_BYTES // (chunk_rows * spec.row_bytes))
            pieces, n_at_once = list(_cut(parts, n_chunks)), n_cores()
        n_at_once = min(n_at_once, len(pieces))
        if n_at_once < 2:
            for piece in pieces:
                fill(piece)
            return out
        with ThreadPoolExecutor(n_at_once) as pool:
            for _ in pool.map(fill, pieces):
                pass
        return out

    def _shard(self, block: int) -> Shard:
        return self._run.shard(self._spec, block)


class Tap(Array):
    """The captured values of one layer; see `Array` for how it is indexed.

    What was reduced to int8 is given as the float32 that it stands for; `parts` has the codes and scales as
    they are stored. Of what was reduced to the largest values, `parts` has the positions.
    """

    def __init__(self, run: Run, index: int, about: Json) -> None:
        super().__init__(run, index)
        self._about = about
        numbers = run.manifest.layout.numbers[index]
        #: Every array of the tap as it is stored: `values`, and what else a reduction made.
        self.parts: dict[str, Array] = {
            run.manifest.layout.arrays[number].path.rpartition("/")[2]: Array(run, number)
            for number in numbers
        }
        self._scale = self._scales() if self._spec.codes else None
        #: Name of the layer that was tapped.
        self.layer: str = about.get("layer", self.name)
        #: Type of the layer, `Conv2d` for example.
        self.type: str = about.get("type", "")
        #: What of the layer it is: `output`, `input`, `grad` or `attention`.
        self.kind: str = about.get("kind", "output")
        #: The tap's name under other names of the same layer.
        self.aliases: tuple[str, ...] = tuple(about.get("aliases", ()))
        #: Element type of what was tapped, before any cast.
        self.source_dtype: str = about.get("source_dtype", str(self.dtype))
        #: Shape of one row of the layer's output, before any reduction.
        self.source_shape: tuple[int, ...] = tuple(about.get("source_shape", self.shape[1:]))

    @cached_property
    def field(self) -> ReceptiveField | None:
        """Where each place of the layer looks in the model's input; None where a capture did not ask."""
        said = self._about.get("field")
        return None if said is None else ReceptiveField.from_json(said, self.source_shape)

    @property
    def source_dims(self) -> tuple[str, ...]:
        """Names of the axes of `source_shape`."""
        return tuple(self._about.get("source_dims") or dims_of(self.source_shape, self.kind)[1:])

    @property
    def source_places(self) -> tuple[int, ...]:
        """Sizes of the axes of places of the layer's output: tokens, or y and x; empty where it has none."""
        sizes = zip(self.source_dims, self.source_shape, strict=True)
        places = tuple(size for dim, size in sizes if dim in PLACES)
        return places if len(self.source_shape) == len(places) + 1 <= 3 else ()

    @property
    def reduction(self) -> Chain:
        """What was done to the layer's output; a chain without steps where nothing was."""
        return chain_from_json((self._about.get("reduction") or {}).get("steps", []))

    @property
    def error(self) -> str:
        """How far its values lie from the layer's output, step by step in words."""
        return str((self._about.get("reduction") or {}).get("error", "lossless"))

    @property
    def raw(self) -> Array:
        """The values as they are stored: int8 codes and not what they stand for."""
        return next(iter(self.parts.values()))

    @property
    def positions(self) -> Array:
        """Where the largest values were: channels, or places counted along the other axes.

        Raises:
            SelectionError: the tap was not reduced to these.
        """
        if "positions" not in self.parts:
            raise SelectionError(f"{self.name} has no positions: its reduction is {self.reduction}")
        return self.parts["positions"]

    @property
    def is_ragged(self) -> bool:
        """Whether its rows differ in shape."""
        return self._spec.is_ragged

    @property
    def bound(self) -> tuple[int, ...]:
        """The shape of a row; of a tap whose rows differ, the greatest."""
        return self.shape[1:]

    def of_one_shape(self, rows: Sequence[int]) -> Tap:
        """Return this tap; see `RaggedTap.of_one_shape`."""
        return self

    @property
    def mask(self) -> Array:
        """Of a tap that is padded: which places are the row's own.

        Raises:
            SelectionError: the tap is not padded.
        """
        if MASK not in self.parts:
            raise SelectionError(f"{self.name} has no mask: its rows are not padded")
        return self.parts[MASK]

    @property
    def constants(self) -> dict[str, Values]:
        """What a reader needs beside the rows: `basis` and `mean` of a projection."""
        listed = self._about.get("constants", ())
        return {one["name"]: constants.read(self._run.place, one) for one in listed}

    @property
    def dtype(self) -> DType:
        """Element type; of int8 codes that of what they stand for."""
        return super().dtype if self._scale is None else np.dtype(np.float32)

    def _scales(self) -> Array:
        """Return the scales of the codes.

        Raises:
            FormatError: there are none, or they do not fit.
        """
        spec, scale = self._spec, self.parts.get("scale")
        rows = Rows(spec.shape, spec.dims[1:], spec.dtype)
        expected = Int8().after(rows)["scale"]
        found = None if scale is None else (scale._spec.shape, scale._spec.dims[1:], scale._spec.dtype)
        if found != (expected.shape, expected.dims, expected.dtype) or spec.dtype != np.int8:
            raise FormatError(f"{self._run.path} holds no scales that fit the int8 codes of {self.name}")
        assert scale is not None
        return scale

    def _read(self, selectors: Sequence[Selector]) -> Values:
        values = super()._read(selectors)
        if self._scale is None:
            return values
        dims = self._scale.dims
        chosen = [s for dim, s in zip(self.dims, selectors, strict=True) if dim in dims]
        scale = self._scale._read(chosen)
        shape = iter(scale.shape)
        return dequantized(values, scale.reshape([next(shape) if dim in dims else 1 for dim in self.dims]))


def ragged_tap() -> type[Tap]:
    """Return what reads a tap whose rows differ in shape."""
    from .ragged_reader import RaggedTap

    return RaggedTap


# A few shards stay open: their indexes need not be read and checked again. What falls out is closed when
# nothing holds it any more.
@lru_cache(maxsize=64)
def _open_shard(
    place: Place, name: str, spec: ArraySpec, layout: Any, record: ShardRecord, stamp: Any
) -> Shard:
    return Shard(place, name, spec, layout, record)


def _selectors(key: Any, shape: tuple[int, ...], name: str) -> tuple[list[Selector], frozenset[int]]:
    """Return one selector for each axis, and the axes that were indexed by a single int."""
    keys = list(key) if isinstance(key, tuple) else [key]
    n_given = sum(k is not Ellipsis for k in keys)
    if n_given > len(shape):
        raise SelectionError(f"{name} has {len(shape)} axes; {n_given} were indexed")
    n_ellipses = len(keys) - n_given
    if n_ellipses > 1:
        raise SelectionError(f"{name} is indexed with one `...` at most; {n_ellipses} were given")
    if n_ellipses == 0:
        keys.append(Ellipsis)
    at = next(i for i, k in enumerate(keys) if k is Ellipsis)
    keys[at : at + 1] = [slice(None)] * (len(shape) - n_given)
    selectors: list[Selector] = []
    dropped = set()
    for axis, (k, size) in enumerate(zip(keys, shape, strict=True)):
        if isinstance(k, slice):
            selectors.append(_checked(k, size, name))
            continue
        try:
            array = np.asarray(k)
        except (TypeError, ValueError) as error:
            raise SelectionError(f"{name} cannot be indexed by {k!r} on axis {axis}: {error}") from None
        if array.dtype == np.bool_ and array.shape == (size,):
            array = np.flatnonzero(array)
        elif array.size == 0:
            array = array.astype(np.intp)
        if array.dtype.kind not in "iu" or array.ndim > 1:
            raise SelectionError(
                f"{name} is indexed by ints, slices, lists of ints and masks; axis {axis} got {k!r}"
            )
        if array.size and (array.min() < -size or array.max() >= size):
            raise SelectionError(f"{name} has {size} entries on axis {axis}; {k!r} is outside")
        array = array.astype(np.intp)
        if array.ndim == 0:
            dropped.add(axis)
        selectors.append(np.atleast_1d(np.where(array < 0, array + size, array)))
    return selectors, frozenset(dropped)


def chosen_rows(key: Any, n_rows: int, name: str) -> tuple[NDArray[np.intp], bool]:
    """Return the rows that `key` chooses, and whether it is a single int.

    Raises:
        SelectionError: it chooses none that are there.
        StoreError: there is no memory for so many numbers.
    """
    selectors, dropped = _selectors((key,), (n_rows,), name)
    check_room(8 * _length(selectors[0], n_rows), f"the numbers of the chosen rows of {name}")
    return _indices(selectors[0], n_rows), 0 in dropped


def _checked(key: slice, size: int, name: str) -> slice:
    try:
        key.indices(size)
    except (TypeError, ValueError) as error:
        raise SelectionError(f"{name} cannot be indexed by {key}: {error}") from None
    return key


def _indices(selector: Selector, size: int) -> NDArray[np.intp]:
    if isinstance(selector, slice):
        return np.arange(*selector.indices(size), dtype=np.intp)
    return selector


def _range(selector: Selector, size: int) -> range | NDArray[np.intp]:
    return range(*selector.indices(size)) if isinstance(selector, slice) else selector


def _length(selector: Selector, size: int) -> int:
    return len(_range(selector, size))


def _slice(indices: NDArray[np.intp]) -> slice | NDArray[np.intp]:
    """Return a slice where `indices` count up by one: it selects without a copy."""
    first, n = int(indices[0]), len(indices)
    if n == 1 or (int(indices[-1]) - first == n - 1 and bool((np.diff(indices) == 1).all())):
        return slice(first, first + n)
    return indices


def _rows(data: NDArray[np.uint8], spec: ArraySpec) -> Values:
    return data.view(spec.dtype).reshape(-1, *spec.shape)


def _select(values: Values, inner: Sequence[Selector]) -> Values:
    for axis, selector in enumerate(inner, start=1):
        values = values[(slice(None),) * axis + (selector,)]
    return values


def _window(spec: ArraySpec, inner: Sequence[Selector]) -> slice | None:
    """Return the entries of the first inner axis to read by themselves, or None to read it all."""
    if not inner or spec.codec != "none":
        return None
    wanted = _indices(inner[0], spec.shape[0])
    if wanted.size == 0:
        return None
    span = slice(int(wanted.min()), int(wanted.max()) + 1)
    return span if span.stop - span.start <= _WINDOW_SHARE * spec.shape[0] else None


def _rest(inner: Sequence[Selector], spec: ArraySpec) -> list[Selector]:
    """Return `inner` as it applies to what `_window` read."""
    wanted = _indices(inner[0], spec.shape[0])
    return [wanted - wanted.min(), *inner[1:]]


def _are_whole(inner: Sequence[Selector], spec: ArraySpec) -> bool:
    """Return whether all of each row is selected, in order."""
    sizes = zip(inner, spec.shape, strict=True)
    return all(isinstance(s, slice) and s.indices(n) == (0, n, 1) for s, n in sizes)


def _cut(parts: Mapping[int, _Wanted], n: int) -> Iterator[tuple[int, _Wanted]]:
    """Yield what is wanted of each block in pieces of at most `n` chunks."""
    for block, wanted in parts.items():
        for start in range(0, len(wanted), n):
            yield block, wanted[start : start + n]


def _fill_whole(
    shard: Shard,
    chunk_rows: int,
    out: Values,
    wanted: _Wanted,
) -> _Wanted:
    """Read the chunks that are wanted whole and in order straight to their place; return the others."""
    whole, others = [], []
    for chunk, rows, target in wanted:
        place = _slice(target)
        if len(rows) == chunk_rows and isinstance(place, slice) and isinstance(_slice(rows), slice):
            whole.append((chunk, out[place].reshape(-1).view(np.uint8).data))
        else:
            others.append((chunk, rows, target))
    shard.fill(whole)
    return others


def _whole_chunks(
    shard: Shard,
    spec: ArraySpec,
    wanted: _Wanted,
    window: slice | None,
) -> Iterator[tuple[Values, NDArray[np.intp]]]:
    """Yield the values of rows and where they go, for (chunk, rows in it, where they go) of one shard."""
    chunks = shard.chunks([chunk for chunk, _, _ in wanted])
    for (_, rows, target), data in zip(wanted, chunks, strict=True):
        yield _rows(data, spec)[_slice(rows)], target


def _windows(
    shard: Shard,
    spec: ArraySpec,
    wanted: _Wanted,
    window: slice | None,
) -> Iterator[tuple[Values, NDArray[np.intp]]]:
    """Do the same for a window of each row, read by itself."""
    assert window is not None
    entry_bytes = spec.row_bytes // spec.shape[0]
    shape = (window.stop - window.start, *spec.shape[1:])
    starts = [
        (chunk, row * spec.row_bytes + window.start * entry_bytes)
        for chunk, rows, _ in wanted
        for row in rows.tolist()
    ]
    n_bytes = shape[0] * entry_bytes
    data = shard.windows([(chunk, start, start + n_bytes) for chunk, start in starts])
    for _, rows, target in wanted:
        values: Values = np.empty((len(rows), *shape), spec.dtype)
        for i in range(len(rows)):
            values[i] = np.frombuffer(next(data), spec.dtype).reshape(shape)
        yield values, target


def _text(encoded: NDArray[np.uint8], single: bool) -> Any:
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in encoded]
    if single:
        return texts[0]
    # numpy gives each text the room of the longest, four bytes a character.
    check_room(4 * len(texts) * max(map(len, texts), default=0), f"an array of {len(texts)} texts")
    return np.array(texts, np.str_)
