"""Reading all of a store and naming what is damaged; dropping it, so that a capture makes it again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import FormatError, LayertapError, StoreError
from .files import sync_folder, write_file
from .layout import ArraySpec
from .shard import Shard, ShardRecord
from .store import (
    Manifest,
    commit_path,
    committed_blocks,
    metadata_files,
    read_manifest,
    read_record,
    shard_name,
)


@dataclass(frozen=True)
class Damage:
    """Something in a store that is not what was written."""

    path: Path
    """The file."""
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
            return f"{self.path}: {self.why}"
        what = self.name or "all taps and columns"
        return f"rows {self.rows[0]} to {self.rows[1]}, {what}: {self.why}"


def verify(path: str | os.PathLike[str]) -> Iterator[Damage]:
    """Read every byte of the store at `path` that counts, and yield what is damaged, block by block.

    Raises:
        StoreNotFoundError: there is no store.
        FormatError: its root cannot be read, and without it nothing can.
    """
    store = Path(path)
    manifest = read_manifest(store)
    yield from _metadata(store, manifest)
    for block in sorted(committed_blocks(store)):
        yield from _block(store, manifest, block)


def repair(path: str | os.PathLike[str], damages: list[Damage]) -> list[int]:
    """Drop damaged blocks, so that the next capture makes them again, and write damaged metadata anew.

    Args:
        path: the store.
        damages: what `verify` yielded.

    Returns:
        The numbers of the blocks that were dropped.
    """
    store = Path(path)
    manifest = read_manifest(store)
    blocks = sorted({damage.block for damage in damages if damage.block is not None})
    for block in blocks:
        # The record goes first: from then on the block is not there, whatever becomes of its shards.
        commit_path(store, block).unlink(missing_ok=True)
    if blocks:
        sync_folder(commit_path(store, 0).parent)
    for block in blocks:
        for array in manifest.layout.arrays:
            _shard_path(store, array, block).unlink(missing_ok=True)
    files = metadata_files(manifest)
    for name in {damage.path.relative_to(store).as_posix() for damage in damages if damage.block is None}:
        write_file(store / name, files[name])
    return blocks


def _metadata(store: Path, manifest: Manifest) -> Iterator[Damage]:
    closing = metadata_files(_closed(store, manifest))
    for name, expected in metadata_files(manifest).items():
        file = store / name
        try:
            found = file.read_bytes()
        except OSError as error:
            yield Damage(file, f"cannot be read: {error.strerror}")
            continue
        if found not in (expected, closing[name]):
            yield Damage(file, "is not the metadata that belongs to this store")


def _closed(store: Path, manifest: Manifest) -> Manifest:
    """Return the manifest that a loop's end was about to write, where it had not come to the root yet."""
    blocks = committed_blocks(store)
    if manifest.n_rows is not None or not blocks:
        return manifest
    try:
        n_last, _ = read_record(store, max(blocks), len(manifest.layout.arrays))
    except (LayertapError, OSError):
        return manifest
    return replace(manifest, n_rows=max(blocks) * manifest.layout.block_rows + n_last)


def _block(store: Path, manifest: Manifest, block: int) -> Iterator[Damage]:
    arrays = manifest.layout.arrays
    first = block * manifest.layout.block_rows
    rows = first, first + manifest.rows_of(block) - 1
    file = commit_path(store, block)
    try:
        n_rows, records = read_record(store, block, len(arrays))
    except (LayertapError, OSError) as error:
        yield Damage(file, str(error), block, rows)
        return
    if not 0 < n_rows <= manifest.layout.block_rows or (
        manifest.n_rows is not None and n_rows != rows[1] - first + 1
    ):
        yield Damage(file, f"its record speaks of {n_rows} rows", block, rows)
        return
    for array, record in zip(arrays, records, strict=True):
        why = _shard(store, manifest, array, block, n_rows, record)
        if why is not None:
            yield Damage(_shard_path(store, array, block), why, block, rows, array.name)


def _shard(
    store: Path, manifest: Manifest, array: ArraySpec, block: int, n_rows: int, record: ShardRecord
) -> str | None:
    try:
        with Shard(_shard_path(store, array, block), array, manifest.layout, record) as shard:
            shard.check(n_rows)
    except (FormatError, StoreError) as error:
        return str(error)
    return None


def _shard_path(store: Path, array: ArraySpec, block: int) -> Path:
    return store / array.path / shard_name(block, len(array.dims))
