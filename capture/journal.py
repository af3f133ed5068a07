"""What a store keeps of the runs that made it, apart from what readers need: locks, times, hosts, rates.

It lies in the folder `log` inside the array `commits`, where Zarr readers do not look.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import struct
import sys
import time
import weakref
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .errors import StoreError
from .pipeline import Stages
from .store import COMMITS

try:
    import fcntl
except ImportError:  # Windows has none; there two writers are not kept apart
    fcntl = None  # type: ignore[assignment]


class StoreLock:
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
            self._fd = os.open(_folder(path) / "lock", os.O_RDWR | os.O_CREAT, 0o666)
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

    def release(self) -> None:
        """Let the next one in."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


#: Locks of this process, which are not those of its children.
_held: weakref.WeakSet[StoreLock] = weakref.WeakSet()


def _release_in_child() -> None:
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def _lock_bytes(fd: int, first: int, n: int) -> None:
    if fcntl is None:
        return
    if hasattr(fcntl, "F_OFD_SETLK"):
        # Belongs to the open file, not to the process: two captures of one process are kept apart too.
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, first, n, 0))
    else:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, n, first)


def write_log(path: Path, started: float, stages: Stages, failed: bool) -> None:
    """Keep when, where and how fast a run went, where there is room: no capture fails for its log."""
    entry = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 3),
        "failed": failed,
        "host": platform.node(),
        "pid": os.getpid(),
        **{key: round(value, 3) for key, value in vars(stages).items()},
    }
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(started))}-{platform.node()}-{os.getpid()}.json"
    with contextlib.suppress(OSError):
        (_folder(path) / name).write_text(json.dumps(entry, indent=1) + "\n")


def versions(backend: str) -> dict[str, str]:
    """Return the versions of what makes a store's values."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("layertap", "numpy", backend):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _folder(path: Path) -> Path:
    folder = path / COMMITS / "log"
    folder.mkdir(exist_ok=True)
    return folder
