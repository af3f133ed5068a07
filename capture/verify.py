"""Reading all of a store and naming what is damaged; dropping it, so that a capture makes it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import constants
from .errors import FormatError, LayertapError, StoreError, why
from .layout import ArraySpec
from .place import PathLike, Place, place_of
from .ragged import as_stored
from .shard import Shard, ShardRecord
from .store import (
    Manifest,
    check_record,
    commit_path,
    committed_blocks,
    metadata_files,
    read_manifest,
    read_record,
    shard_path,
)


@dataclass(frozen=True)
class Damage:
    """Something in a store that is not what was written."""

    file: str
    """The file's name inside the store."""
    why: str
    """What is wrong with it."""
    block: int | None = None
    """The block that is lost with it; None for metadata, which can be written again."""
    rows: tuple[int, int] | None = None
    """First and last row of the block."""
    name: str | None = None
    """The tap or column; None where the whole block is concerned."""

    def __str__(self) -> str:
        if self.rows is None:
            return f"{self.file}: {self.why}"
        what = self.name or "all taps and columns"
        return f"rows {self.rows[0]} to {self.rows[1]}, {what}: {self.why}"


def verify(path: PathLike | Place, storage: Mapping[str, Any] | None = None) -> Iterator[Damage]:
    """Read every byte of the store at `path` that counts, and yield what is damaged, block by block.

    Raises:
        StoreNotFoundError: there is no store.
        FormatError: its root cannot be read, and without it nothing can.
    """
    store = place_of(path, storage)
    manifest = read_manifest(store)
    yield from _metadata(store, manifest)
    for block in sorted(committed_blocks(store, manifest.n_blocks)):
        yield from _block(store, manifest, block)


def repair(
    path: PathLike | Place, damages: list[Damage], storage: Mapping[str, Any] | None = None
) -> list[int]:
    """Drop what is damaged, so that the next capture makes it again, and write damaged metadata anew.

    Args:
        path: the store.
        damages: what `verify` yielded.
        storage: see `open_run`.

    Returns:
        The numbers of the blocks that were dropped.
    """
    store = place_of(path, storage)
    manifest = read_manifest(store)
    blocks = sorted({damage.block for damage in damages if damage.block is not None})
    # The records go first: from then on the blocks are not there, whatever becomes of their shards.
    store.delete([commit_path(block) for block in blocks])
    store.delete([shard_path(array, block) for block in blocks for array in manifest.layout.stored])
    files = metadata_files(manifest)
    for name in {damage.file for damage in damages if damage.block is None}:
        try:
            if name in files:
                store.write(name, files[name])
            else:  # a basis: the capture knows it
                store.delete([name])
        except OSError as error:
            raise StoreError(f"{store}/{name} cannot be written: {why(error)}") from error
    return blocks


def _metadata(store: Place, manifest: Manifest) -> Iterator[Damage]:
    closing = metadata_files(_closed(store, manifest))
    for name, expected in metadata_files(manifest).items():
        try:
            found = store.read(name, max(len(expected), len(closing[name])))
        except OSError as error:
            yield Damage(name, f"cannot be read: {why(error)}")
            continue
        except FormatError:
            found = b""
        if found not in (expected, closing[name]):
            yield Damage(name, "is not the metadata that belongs to this store")
    for one in manifest.constants_json:
        try:
            constants.read(store, one)
        except (FormatError, StoreError) as error:
            yield Damage(constants.file_of(one), str(error))


def _closed(store: Place, manifest: Manifest) -> Manifest:
    """Return the manifest that a loop's end was about to write, where it had not come to the root yet."""
    if manifest.n_rows is not None or not (blocks := committed_blocks(store)):
        return manifest
    try:
        n_last, _ = read_record(store, max(blocks), len(manifest.layout.stored))
    except (LayertapError, OSError):
        return manifest
    return replace(manifest, n_rows=max(blocks) * manifest.layout.block_rows + n_last)


def _block(store: Place, manifest: Manifest, block: int) -> Iterator[Damage]:
    arrays = manifest.layout.stored
    first = block * manifest.layout.block_rows
    rows = first, first + manifest.rows_of(block) - 1
    file = commit_path(block)
    try:
        n_rows, records = check_record(manifest, block, *read_record(store, block, len(arrays)))
    except LayertapError as error:
        yield Damage(file, str(error), block, rows)
        return
    for array, record in zip(arrays, records, strict=True):
        problem = _shard(store, manifest, array, block, n_rows, record)
        if problem is not None:
            yield Damage(shard_path(array, block), problem, block, rows, array.name)


def _shard(
    store: Place, manifest: Manifest, array: ArraySpec, block: int, n_rows: int, record: ShardRecord
) -> str | None:
    try:
        stored, layout, n_rows = as_stored(array, manifest.layout, n_rows)
        with Shard(store, shard_path(array, block), stored, layout, record) as shard:
            shard.check(shard.n_there if array.is_ragged else n_rows)
    except (FormatError, StoreError) as error:
        return str(error)
    return None
