"""What a store keeps of the runs that made it, apart from what readers need: locks, times, hosts, rates.

It lies in the folder `log` inside the array `commits`, where Zarr readers do not look.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
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
    """Keeps a second process from writing the same store; the kernel drops it when the process dies.

    Raises:
        StoreError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        folder = _folder(path)
        self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        if fcntl is None:
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise StoreError(f"another process is capturing into {path}; wait for it, or end it") from None

    def release(self) -> None:
        """Let the next one in."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_log(path: Path, started: float, stages: Stages, failed: bool) -> None:
    """Keep when, where and how fast a run went."""
    entry = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 3),
        "failed": failed,
        "host": platform.node(),
        "pid": os.getpid(),
        **{key: round(value, 3) for key, value in vars(stages).items()},
    }
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(started))}-{os.getpid()}.json"
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
