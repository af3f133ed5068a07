"""Durable files on the local disk.

What passes through the page cache costs 0.3 to 2.5 CPU seconds a gigabyte, and the model wants those
processors. So large data go past it: whole pages straight from where they lie (0.04 seconds a gigabyte; ext4
on Linux 6), and what is unaligned or encoded by way of a page-aligned staging buffer (0.1, the copy
included). What is small, and the last part of a page, goes through the cache, is synced, and is dropped from
it: left alone, write-back turns a steady stream into bursts. Where direct writing is not to be had,
everything goes that way; the bytes of the file are the same. Preallocating the file changed nothing.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl

    _DIRECT = getattr(os, "O_DIRECT", 0)
except ImportError:  # Windows
    _DIRECT = 0

Bytes = bytes | bytearray | memoryview

#: Suffix of a file that is being written; no reader looks at such a file.
PART = ".part"

#: What direct writing aligns to: the page of every system that has it, a multiple of every disk's block.
PAGE = 4096

#: Limits of what a thread keeps for staging: the greater one is a quarter faster and costs a third less.
STAGING_BYTES, MOST_STAGING_BYTES = 512 * 1024, 4 * 1024 * 1024

#: Files that one writer keeps open until they are settled together; more would meet the limit of open files.
MOST_OPEN = 128

_DIRECT_BYTES = 64 * 1024  # less than this is not worth a write of its own to the disk
_COPIED_BYTES = 4096  # a copy of less costs less than giving up the interpreter's lock for it
_HAS_WRITEV = hasattr(os, "writev")
_IOV_MAX = 1024  # Linux's and macOS's limit of buffers in one writev
_FLAGS = (getattr(os, name, 0) for name in ("O_CLOEXEC", "O_BINARY", "O_NOFOLLOW"))  # a link leads elsewhere
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | sum(_FLAGS)


class _Staging(threading.local):
    """The staging buffer of a thread, made when first wanted; an open file takes it away."""

    n_bytes = STAGING_BYTES
    memory: memoryview | None = None

    def take(self) -> memoryview:
        memory, self.memory = self.memory, None
        return memory if memory is not None else memoryview(mmap.mmap(-1, self.n_bytes))

    def put_back(self, memory: memoryview | None) -> None:
        self.memory = self.memory or memory


_staging = _Staging()


def stage_by(n_bytes: int) -> None:
    """Let the files that this thread writes from now on be staged in `n_bytes`, a multiple of `PAGE`."""
    _staging.n_bytes, _staging.memory = n_bytes, None


class DurableFile:
    """A new file at `path` + `PART`, on the disk for certain once it is settled.

    It stays open until then, because an error of writing is told to those that had the file open. Files that
    are settled one after the other share what a file system does for all of them: it is faster to settle a
    block's files when all are written than each at its end.

    The final name is the caller's to give, by `publish`, once everything that belongs together is durable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        #: Bytes of the file so far, those that wait in the staging buffer included.
        self.n_bytes = 0
        self._fd = -1
        self._n_written = 0
        self._may_direct = bool(_DIRECT)
        self._is_direct = False
        self._staged: memoryview | None = None

    def __enter__(self) -> DurableFile:
        self._fd = os.open(part(self.path), _NEW, 0o666)
        return self

    def write(self, buffers: Sequence[Bytes], *, direct: bool = False) -> None:
        """Append all of `buffers` in their order; they may be changed once this returns.

        Args:
            buffers: what to write.
            direct: straight from where they lie past the page cache, gathered by the kernel, where the
                system has that. The file's length and every buffer's address and length must be multiples
                of `PAGE`.
        """
        if not buffers:
            return
        if direct or not self._can_direct():
            self._flush()
            self.n_bytes += sum(map(_size, buffers))
            for start in range(0, len(buffers), _IOV_MAX):
                self._gather(list(buffers[start : start + _IOV_MAX]), direct)
            return
        for buffer in buffers:
            self._stage(buffer)

    def _stage(self, buffer: Bytes) -> None:
        if self._staged is None:
            self._staged = _staging.take()
        view, size, room = memoryview(buffer), _size(buffer), len(self._staged)
        at = self.n_bytes - self._n_written
        self.n_bytes += size
        done = 0
        while done < size:
            n = min(size - done, room - at)
            _copy(self._staged[at : at + n], view[done : done + n])
            at, done = at + n, done + n
            if at == room:
                self._gather([self._staged], True)
                at = 0

    def _flush(self) -> None:
        """Write what is staged: whole pages directly where they are many, and the rest through the cache."""
        n = self.n_bytes - self._n_written
        if n == 0:
            return
        assert self._staged is not None
        n_direct = n // PAGE * PAGE if n >= _DIRECT_BYTES else 0
        if n_direct:
            self._gather([self._staged[:n_direct]], True)
        if n_direct < n:
            self._gather([self._staged[n_direct:n]], False)

    def _gather(self, buffers: list[Bytes], direct: bool) -> None:
        while buffers:
            direct = self._set_direct(direct and self._n_written % PAGE == 0)
            try:
                n = os.writev(self._fd, buffers) if _HAS_WRITEV else os.write(self._fd, buffers[0])
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise _named(error, part(self.path)) from None
                self._may_direct = False  # this file system wants another alignment
                continue
            self._n_written += n
            buffers = rest(buffers, n)

    def _can_direct(self) -> bool:
        """Return whether what is appended now can be staged to bypass the page cache."""
        return self._may_direct and (self.n_bytes > self._n_written or self._n_written % PAGE == 0)

    def _set_direct(self, on: bool) -> bool:
        """Switch direct writing on or off; return whether it is on."""
        on = on and self._may_direct
        if on == self._is_direct:
            return on
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~_DIRECT
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | (_DIRECT if on else 0))
        except OSError:
            self._may_direct = False
            return False
        self._is_direct = on
        return on

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        whole = False
        try:
            if kind is None:
                self._flush()
                whole = True
        finally:
            _staging.put_back(self._staged)
            self._staged = None
            if not whole:
                self.discard()

    def settle(self) -> None:
        """Sync the file and close it; may be called more than once."""
        if self._fd < 0:
            return
        try:
            getattr(os, "fdatasync", os.fsync)(self._fd)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as failure:
            self.discard()
            raise _named(failure, part(self.path)) from None
        except BaseException:
            self.discard()
            raise
        os.close(self._fd)
        self._fd = -1

    def discard(self) -> None:
        """Close and remove the file where it is not settled."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        os.close(fd)
        with contextlib.suppress(OSError):  # the error on its way says more than this one would
            part(self.path).unlink(missing_ok=True)


def part(path: Path) -> Path:
    """Return the name that the file at `path` has while it is written."""
    return path.with_name(path.name + PART)


def publish(path: Path) -> None:
    """Give a file written by `DurableFile` its final name; `sync_folder` makes that durable."""
    os.replace(part(path), path)


def sync_folder(path: Path) -> None:
    """Make the names inside a folder durable (a no-op where folders cannot be opened)."""
    if os.name != "posix":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        raise _named(error, path) from None
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file, durable and all or nothing."""
    with DurableFile(path) as file:
        file.write([data])
    file.settle()
    publish(path)
    sync_folder(path.parent)


def _named(error: OSError, path: Path) -> OSError:
    """Return the error of a call that took a descriptor, with the file's name."""
    error.filename = str(path)
    return error


def _size(buffer: Bytes) -> int:
    return memoryview(buffer).nbytes


def _copy(target: memoryview, source: memoryview) -> None:
    if source.nbytes < _COPIED_BYTES:
        target[:] = source
    else:  # numpy gives up the interpreter's lock meanwhile
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def rest(buffers: list[Bytes], n_written: int) -> list[Bytes]:
    """Return what is left of `buffers` behind their first `n_written` bytes."""
    for i, buffer in enumerate(buffers):
        size = _size(buffer)
        if n_written < size:
            return [memoryview(buffer)[n_written:], *buffers[i + 1 :]]
        n_written -= size
    return []
