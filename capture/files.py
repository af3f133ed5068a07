"""Durable files on the local disk.

`fsync`, then dropping the pages, after every shard is what keeps writing at the disk's speed: left
alone, the kernel's write-back turns a steady stream into bursts, and fresh page cache costs up to
2.5 CPU seconds a gigabyte (ext4, Linux 6).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Bytes = bytes | bytearray | memoryview

#: Suffix of a file that is being written; no reader looks at such a file.
PART = ".part"

_IOV_MAX = 1024  # Linux's and macOS's limit of buffers in one writev
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class DurableFile:
    """A new file at `path` + `PART`, on the disk for certain once the block is left without an error.

    The final name is the caller's to give, by `publish`, once everything that belongs together is durable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_bytes = 0
        self._fd = -1

    def __enter__(self) -> DurableFile:
        self._fd = os.open(part(self.path), _NEW, 0o666)
        return self

    def write(self, buffers: Sequence[Bytes]) -> None:
        """Append all of `buffers`, gathered by the kernel where it can, in their order."""
        for start in range(0, len(buffers), _IOV_MAX):
            self._gather(list(buffers[start : start + _IOV_MAX]))

    def _gather(self, buffers: list[Bytes]) -> None:
        while buffers:
            if hasattr(os, "writev"):
                n = os.writev(self._fd, buffers)
            else:
                n = os.write(self._fd, buffers[0])
            self.n_bytes += n
            buffers = _rest(buffers, n)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        fd, self._fd = self._fd, -1
        try:
            if kind is None:
                getattr(os, "fdatasync", os.fsync)(fd)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
            if kind is not None:
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
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file, durable and all or nothing."""
    with DurableFile(path) as file:
        file.write([data])
    publish(path)
    sync_folder(path.parent)


def _rest(buffers: list[Bytes], n_written: int) -> list[Bytes]:
    for i, buffer in enumerate(buffers):
        size = memoryview(buffer).nbytes
        if n_written < size:
            return [memoryview(buffer)[n_written:], *buffers[i + 1 :]]
        n_written -= size
    return []
