"""What a store keeps of the runs that made it, apart from what readers need: times, hosts, rates."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version

from .pipeline import Stages
from .place import Place
from .store import LOG


def write_log(place: Place, started: float, stages: Stages, failed: bool) -> None:
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
        place.note(f"{LOG}/{name}", (json.dumps(entry, indent=1) + "\n").encode())


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of what makes a store's values."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("layertap", "numpy", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
