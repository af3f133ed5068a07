"""A store in a folder of a local or shared disk.

A new store appears under its name with all of its metadata at once, because it is made beside it and renamed:
of several processes that make the same store, one wins and the others find it made. Locks are the kernel's:
they go when their process dies.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import struct
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import StoreError, StoreExistsError
from .files import MOST_OPEN, PART, DurableFile, part, publish, rest, sync_folder, write_file
from .place import Blob, Bytes, Place
from .store import COMMITS, LOG, check_removable
from .trust import check_folders, open_plain, read_plain

try:
    import fcntl
except ImportError:  # Windows has none; there two writers are not kept apart
    fcntl = None  # type: ignore[assignment]

_IOV_MAX = 1024  # Linux's and macOS's limit of buffers in one preadv
_HAS_PREADV = hasattr(os, "preadv")
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_ABANDONED_S = 600  # making a store takes a moment; nobody is still at it after this


@dataclass(frozen=True)
class LocalPlace(Place):
    """A folder."""

    folder: Path
    """Where it is."""

    keeps_open = True

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return LocalPlace, (self.folder.absolute(),)  # another process may stand in another folder

    @classmethod
    def at(cls, path: str) -> LocalPlace:
        """Return the place at `path`; a link is followed, so that a store may be replaced behind it."""
        return cls(Path(path).resolve() if os.path.islink(path) else Path(path))

    @property
    def path(self) -> Path:
        """The folder's path."""
        return self.folder

    def read(self, name: str, most: int) -> bytes:
        """Return a plain file's bytes."""
        return read_plain(self.folder / name, most)

    def check_folders(self, names: Sequence[str]) -> None:
        """Follow every link on the way to each of `names`."""
        check_folders(self.folder, names)

    def blob(self, name: str) -> Blob:
        """Open a file."""
        return LocalBlob(self.folder / name)

    def names(self, folder: str) -> list[str]:
        """List a folder."""
        with os.scandir(self.folder / folder) as entries:
            return [entry.name for entry in entries]

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Return a file's inode and time of change."""
        try:
            status = os.stat(self.folder / name)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def exists(self) -> bool:
        """Return whether there is anything but an empty folder."""
        return self.folder.exists() and not is_empty_folder(self.folder)

    def zarr(self) -> Any:
        """Return the path."""
        return self.folder

    def new_file(self, name: str) -> DurableFile:
        """Begin a file beside its final name."""
        return DurableFile(self.folder / name)

    def publish(self, names: Sequence[str]) -> None:
        """Rename files, and make the names durable."""
        for name in names:
            publish(self.folder / name)
        for folder in dict.fromkeys((self.folder / name).parent for name in names):
            sync_folder(folder)

    def abandon(self, names: Sequence[str]) -> None:
        """Remove what has no name yet."""
        for name in names:
            part(self.folder / name).unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file beside its final name and rename it; its folder may have to be made again."""
        file = self.folder / name
        if self.folder.is_dir():  # a store that was removed is not begun anew
            file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, data)

    def note(self, name: str, data: bytes) -> None:
        """Write a file as it goes."""
        (self.folder / name).write_bytes(data)

    def delete(self, names: Sequence[str]) -> None:
        """Unlink files."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        for folder in dict.fromkeys((self.folder / name).parent for name in names):
            if folder.is_dir():
                sync_folder(folder)

    def make(self, files: Mapping[str, bytes], *, overwrite: bool, blocks: range | None) -> FileLock:
        """Make the store beside its place and rename it there, locked already."""
        # Nobody may be writing what is removed.
        replaced = self.lock(None) if overwrite and (self.folder / COMMITS).is_dir() else None
        try:
            return self._make(files, overwrite, blocks)
        finally:
            if replaced is not None:
                replaced.release()

    def _make(self, files: Mapping[str, bytes], overwrite: bool, blocks: range | None) -> FileLock:
        path = self.folder
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path)
            made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
        except OSError as error:
            raise StoreError(f"cannot make a store in {path.parent}: {error.strerror}") from error
        lock = None
        try:
            made.chmod(0o777 & ~_umask())
            _write_all(made, files)
            lock = LocalPlace(made).lock(blocks)
            if overwrite and path.exists():
                self.remove()
            try:
                os.rename(made, path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                raise StoreExistsError(f"{path} exists already") from error
            sync_folder(path.parent)
        except BaseException:
            if lock is not None:
                lock.release()
            shutil.rmtree(made, ignore_errors=True)
            raise
        return lock

    def lock(self, blocks: range | None) -> FileLock:
        """Lock bytes of a file; see `FileLock`."""
        return FileLock(self.folder, blocks)

    def remove(self) -> None:
        """Take the store's name away, then its files.

        Raises:
            StoreExistsError: what is there is not a store; it is left as it is.
        """
        check_removable(self)
        path = self.folder
        doomed = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
        os.rename(path, doomed / "store")
        shutil.rmtree(doomed)

    def free_bytes(self) -> int:
        """Return what the disk has free."""
        folder = self.folder.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def durable_rate(self, data: Bytes) -> float | None:
        """Write a file that has no name for long where the store would be, and take it away.

        Raises:
            StoreError: nothing can be written there.
        """
        folder = self.folder.absolute().parent
        while not folder.exists():
            folder = folder.parent
        probe = DurableFile(folder / f".{self.folder.name}.probe.{os.getpid()}")
        start = time.perf_counter()
        try:
            with probe:
                probe.write([data])
            probe.settle()
        except OSError as error:
            raise StoreError(f"nothing can be written in {folder}: {error.strerror}") from error
        finally:
            seconds = time.perf_counter() - start
            with contextlib.suppress(OSError):  # the error on its way says more than this one would
                part(probe.path).unlink(missing_ok=True)
        return memoryview(data).nbytes / seconds


class LocalBlob(Blob):
    """An open file of the local disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._fd = open_plain(path)

    @property
    def n_bytes(self) -> int:
        """Its size as it is now."""
        return os.fstat(self._fd).st_size

    def read(self, start: int, n_bytes: int) -> bytes:
        """Read without moving anything that another thread relies on."""
        n_bytes = min(n_bytes, max(0, self.n_bytes - start))  # what a hostile index asks for is not allocated
        data = os.pread(self._fd, n_bytes, start)
        while len(data) < n_bytes:
            more = os.pread(self._fd, n_bytes - len(data), start + len(data))
            if not more:
                break
            data += more
        return data

    def fill(self, wanted: Sequence[tuple[int, memoryview]]) -> bool:
        """Read buffers whose places in the file follow each other in one call, straight into them."""
        if not _HAS_PREADV:
            return super().fill(wanted)
        buffers: list[Bytes] = []
        end = 0
        for start, buffer in wanted:
            if buffers and start != end:
                if not self._fill(end, buffers):
                    return False
                buffers = []
            buffers.append(buffer)
            end = start + buffer.nbytes
        return self._fill(end, buffers)

    def _fill(self, end: int, buffers: list[Bytes]) -> bool:
        at = end - sum(memoryview(buffer).nbytes for buffer in buffers)
        while buffers:
            n_bytes = os.preadv(self._fd, buffers[:_IOV_MAX], at)
            if n_bytes == 0:
                return False
            at, buffers = at + n_bytes, rest(buffers, n_bytes)
        return True

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._fd >= 0:
            close(self._fd)  # at the end of the interpreter, `os` may be gone already


class FileLock:
    """Keeps a second process from writing the same blocks; the kernel drops it when the process dies.

    A child that was forked meanwhile (a data loader's worker) has the same open file: it closes it at once,
    or the lock would outlive the capture for as long as the child does.

    Each block is one byte of a lock file, and a process locks the bytes of its blocks: parts that do not
    overlap pass each other, whatever their numbers.

    Args:
        path: the store.
        blocks: the blocks to write; None for all there will ever be.

    Raises:
        StoreError: another process holds some of them.
    """

    def __init__(self, path: Path, blocks: range | None) -> None:
        first, n = (0, 0) if blocks is None else (blocks.start, len(blocks))  # 0 bytes: to the end
        try:
            (path / LOG).mkdir(exist_ok=True)
            self._fd = os.open(path / LOG / "lock", os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        except OSError as error:
            raise StoreError(f"cannot write into {path}: {error.strerror}") from error
        try:
            if blocks is None or n:
                _lock_bytes(self._fd, first, n)
        except OSError as error:
            os.close(self._fd)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise StoreError(f"cannot lock {path}: {error.strerror}") from error
            raise StoreError(
                f"another process is capturing into {path}; wait for it, end it, or give each its --part"
            ) from None
        _held.add(self)

    def check(self) -> None:
        """Do nothing: the kernel takes a lock from no living process."""

    def release(self) -> None:
        """Let the next one in."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


#: Locks of this process, which are not those of its children.
_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _release_in_child() -> None:
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files of a folder that nobody looks at yet, and make all durable together."""
    written = []
    try:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with DurableFile(folder / name) as file:
                file.write([data])
            written.append(file)
            if len(written) == MOST_OPEN:
                _settle(written)
        _settle(written)
    finally:
        for file in written:
            file.discard()
    made = {parent for name in files for parent in (folder / name).parents if folder in parent.parents}
    for parent in (*made, folder):
        sync_folder(parent)


def _settle(written: list[DurableFile]) -> None:
    for file in written:
        file.settle()
        publish(file.path)
    written.clear()


def is_empty_folder(path: Path) -> bool:
    """Return whether there is a folder at `path` with nothing in it."""
    return path.is_dir() and not any(path.iterdir())


def _lock_bytes(fd: int, first: int, n: int) -> None:
    if fcntl is None:
        return
    if hasattr(fcntl, "F_OFD_SETLK"):
        # Belongs to the open file, not to the process: two captures of one process are kept apart too.
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, first, n, 0))
    else:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, n, first)


def _sweep(path: Path) -> None:
    """Remove what processes that were killed while they made a store at `path` have left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PART}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
