"""A finished store in one zip file: easy to send and to serve, read in place without unpacking.

Members are stored without compression (the store's own codec has done what can be done), so that a range of
a member is a range of the file: one row is a small read here too, over a network as on a disk.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import constants
from .errors import FormatError, StoreError, StoreExistsError, StoreNotFoundError, why
from .files import PART, sync_folder
from .place import Blob, PathLike, Place, place_of
from .store import ROOT, commit_path, committed_blocks, metadata_files, read_manifest, shard_path
from .trust import check_length

# The fixed part of a local header (APPNOTE.TXT of PKWARE, 4.3.7): the lengths of name and extra field end it.
_HEADER = struct.Struct("<4s22xHH")
_SIGNATURE = b"PK\x03\x04"
_ENCRYPTED = 1
_COPY_BYTES = 8 * 2**20
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same store gives the same file


class ZipPlace(Place):
    """A zip file at a place.

    Args:
        base: where the file is.
        name: what it is called there.
        path: what the user calls it.

    Raises:
        StoreNotFoundError: there is no such file.
        FormatError: it is no zip file of stored members.
    """

    def __init__(self, base: Place, name: str, path: Any) -> None:
        self._base, self._name, self._path = base, name, path
        self.parallel, self.keeps_open = base.parallel, base.keeps_open
        try:
            self._file = base.blob(name)
            with zipfile.ZipFile(io.BufferedReader(_Raw(self._file), 64 * 1024)) as members:
                self._members = {info.filename: info for info in members.infolist()}
        except FileNotFoundError:
            raise StoreNotFoundError(f"there is no store at {path}; layertap pack makes one") from None
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            raise FormatError(f"{path} is no zip file that can be read: {error}") from None
        for info in self._members.values():
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
                raise FormatError(
                    f"{path} holds {info.filename} compressed or encrypted; a store's members are stored as "
                    "they are. Unpack it, or make it with layertap pack"
                )

    def __reduce__(self) -> tuple[type, tuple[Place, str, Any]]:
        path = self._path.absolute() if isinstance(self._path, Path) else self._path
        return ZipPlace, (self._base, self._name, path)

    @classmethod
    def at(cls, path: str) -> ZipPlace:
        """Open the zip file at `path` on a disk."""
        from .local import LocalPlace

        return cls(LocalPlace(Path(path).parent), Path(path).name, Path(path))

    @property
    def path(self) -> Any:
        """The zip file's path or URL."""
        return self._path

    def read(self, name: str, most: int) -> bytes:
        """Return a member's bytes."""
        member = self.blob(name)
        check_length(f"{self}/{name}", member.n_bytes, most)
        return member.read(0, member.n_bytes)

    def blob(self, name: str) -> Blob:
        """Return a member's range of the file."""
        info = self._members.get(name)
        if info is None:
            raise FileNotFoundError(2, "no such member", f"{self}/{name}")
        header = self._file.read(info.header_offset, _HEADER.size)
        if len(header) < _HEADER.size or header[:4] != _SIGNATURE:
            raise FormatError(f"{self} is damaged: there is no member at byte {info.header_offset}")
        _, name_bytes, extra_bytes = _HEADER.unpack(header)
        return _Member(
            self._file, info.header_offset + _HEADER.size + name_bytes + extra_bytes, info.file_size
        )

    def names(self, folder: str) -> list[str]:
        """List the members in a folder."""
        parts = (name.rpartition("/") for name in self._members)
        return [name for parent, _, name in parts if parent == folder]

    def stamp(self, name: str) -> Any:
        """Return the zip file's own."""
        return self._base.stamp(self._name)

    def exists(self) -> bool:
        """Return True: there is a file."""
        return True

    def zarr(self) -> Any:
        """Return zarr-python's own view of the file."""
        if not isinstance(self._path, Path):
            raise StoreError(f"zarr-python reads zip files on a disk alone; copy {self} there")
        from zarr.storage import ZipStore

        return ZipStore(self._path, mode="r", read_only=True)


class _Member(Blob):
    """A range of the zip file. The file stays open as long as its place is there."""

    def __init__(self, file: Blob, start: int, n_bytes: int) -> None:
        self._file, self._start, self._n_bytes = file, start, n_bytes

    @property
    def n_bytes(self) -> int:
        return self._n_bytes

    def read(self, start: int, n_bytes: int) -> bytes:
        return self._file.read(self._start + start, max(0, min(n_bytes, self._n_bytes - start)))

    def read_many(self, extents: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        yield from self._file.read_many([(self._start + start, n_bytes) for start, n_bytes in extents])

    def fill(self, wanted: Sequence[tuple[int, memoryview]]) -> bool:
        if any(start + buffer.nbytes > self._n_bytes for start, buffer in wanted):
            return False
        return self._file.fill([(self._start + start, buffer) for start, buffer in wanted])


class _Raw(io.RawIOBase):
    """What `zipfile` reads: a blob with a position."""

    def __init__(self, blob: Blob) -> None:
        self._blob, self._at = blob, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._blob.n_bytes}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        left = self._blob.n_bytes - self._at
        data = self._blob.read(self._at, min(len(buffer), left)) if left > 0 else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def pack(
    path: PathLike | Place,
    file: PathLike,
    *,
    overwrite: bool = False,
    storage: Mapping[str, Any] | None = None,
) -> Path:
    """Pack a finished store into one zip file, which `open` reads in place.

    Args:
        path: the store, a folder or a URL.
        file: the file to make; its name ends in `.zip`.
        overwrite: replace a file that is there.
        storage: see `layertap.open`.

    Returns:
        The file's path. It is there whole or not at all.

    Raises:
        StoreError: the store is not finished, or the file cannot be written.
        StoreExistsError: there is such a file, and `overwrite` is false.
    """
    place, target = place_of(path, storage), Path(file)
    if target.suffix.lower() != ".zip":
        raise StoreError(f"{target} does not end in .zip, by which a packed store is known")
    if target.exists() and not overwrite:
        raise StoreExistsError(f"{target} exists; choose another name, or overwrite=True (--overwrite)")
    manifest = read_manifest(place)
    missing = manifest.n_blocks - len(committed_blocks(place, manifest.n_blocks))
    if manifest.n_rows is None or missing:
        raise StoreError(f"{place} is not finished; run its capture again to the end, then pack it")
    blocks = range(manifest.n_blocks)
    files = metadata_files(manifest)
    names = [ROOT, *(name for name in files if name != ROOT), *map(commit_path, blocks)]
    names += [constants.file_of(one) for one in manifest.constants_json]
    names += [shard_path(array, block) for array in reversed(manifest.layout.stored) for block in blocks]
    made = target.with_name(target.name + PART)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with made.open("wb") as raw:
            with zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as members:
                for name in names:
                    _add(members, place, name)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(made, target)
        sync_folder(target.parent)
    except OSError as error:
        raise StoreError(f"cannot pack {place} into {target}: {why(error)}") from error
    finally:
        made.unlink(missing_ok=True)
    return target


def _add(members: zipfile.ZipFile, place: Place, name: str) -> None:
    blob = place.blob(name)
    info = zipfile.ZipInfo(name, _EPOCH)
    info.external_attr, info.file_size = 0o644 << 16, blob.n_bytes
    starts = range(0, info.file_size, _COPY_BYTES)
    extents = [(start, min(_COPY_BYTES, info.file_size - start)) for start in starts]
    with members.open(info, "w") as member:
        for data in blob.read_many(extents):
            member.write(data)
    blob.close()
