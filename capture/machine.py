"""What this process may have: memory by the container's limit where there is one, and processors."""

from __future__ import annotations

import os
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Return the bytes that can still be had, or None where the system does not tell.

    The least of the machine's available memory and what each control group that holds this process has left
    (cgroup v2, or v1's memory controller); file pages that can be dropped count as available.
    """
    found = [_machine(), *(_left(folder, *names) for folder, *names in _groups())]
    known = [n_bytes for n_bytes in found if n_bytes is not None]
    return max(0, min(known)) if known else None


def n_cores() -> int:
    """Return the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _machine() -> int | None:
    for line in _read(PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _groups() -> list[tuple[Path, str, str]]:
    """Return each control group's folder, from this process's up, with the names of its limit and usage."""
    groups = []
    for line in _read(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = CGROUP, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = root / path.strip("/")
        # Inside a container the path is often the host's: then its own group is mounted as the root.
        groups += [(place, *names) for place in (folder, *folder.parents) if place.is_relative_to(root)]
    return groups


def _left(folder: Path, limit_name: str, usage_name: str) -> int | None:
    limit, usage = _read(folder / limit_name).strip(), _read(folder / usage_name).strip()
    if not limit.isdecimal() or not usage.isdecimal():
        return None
    droppable = 0
    for line in _read(folder / "memory.stat").splitlines():
        if line.startswith(("inactive_file ", "total_inactive_file ")):
            droppable = max(droppable, int(line.split()[1]))
    return int(limit) - int(usage) + droppable


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
