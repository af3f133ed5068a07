"""The container's limit counts, not the machine's."""

from __future__ import annotations

from pathlib import Path

import layertap as lt
import numpy as np
import pytest
from layertap.capture import machine, plan

GIB = 2**30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    write(
        tmp_path / "proc" / "meminfo",
        f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {32 * GIB // 1024} kB\n",
    )
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_container_the_machine_counts(system):
    assert machine.available_bytes() == 32 * GIB


def test_a_limit_of_the_group_or_of_one_above_it_counts(system):
    write(system / "proc" / "self" / "cgroup", "0::/jobs/42\n")
    write(system / "cgroup" / "jobs" / "42" / "memory.max", "max\n")
    write(system / "cgroup" / "jobs" / "42" / "memory.current", f"{GIB}\n")
    assert machine.available_bytes() == 32 * GIB
    write(system / "cgroup" / "jobs" / "memory.max", f"{8 * GIB}\n")
    write(system / "cgroup" / "jobs" / "memory.current", f"{3 * GIB}\n")
    assert machine.available_bytes() == 5 * GIB
    write(system / "cgroup" / "jobs" / "memory.stat", f"anon 1\ninactive_file {GIB}\n")
    assert machine.available_bytes() == 6 * GIB


def test_a_group_that_is_mounted_as_the_root_counts(system):
    write(system / "proc" / "self" / "cgroup", "0::/docker/abc\n")
    write(system / "cgroup" / "memory.max", f"{2 * GIB}\n")
    write(system / "cgroup" / "memory.current", f"{GIB}\n")
    assert machine.available_bytes() == GIB


def test_the_older_kind_of_group_counts(system):
    write(system / "proc" / "self" / "cgroup", "4:cpu,memory:/job\n3:pids:/job\n")
    write(system / "cgroup" / "memory" / "job" / "memory.limit_in_bytes", f"{4 * GIB}\n")
    write(system / "cgroup" / "memory" / "job" / "memory.usage_in_bytes", f"{5 * GIB}\n")
    assert machine.available_bytes() == 0


def test_a_system_that_does_not_tell_is_no_limit(system):
    (system / "proc" / "meminfo").unlink()
    assert machine.available_bytes() is None


def test_a_capture_that_the_container_cannot_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "available_bytes", lambda: 100_000)
    with pytest.raises(lt.PlanError, match=r"97\.7KiB of memory are left here"):
        lt.record_dataset(lambda b: {"a": b}, np.ones((64, 4096), np.float32), tmp_path / "s", "a")
    assert not (tmp_path / "s").exists()


def test_the_processors_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {1, 3, 5}, raising=False)
    assert machine.n_cores() == 3
    monkeypatch.delattr(machine.os, "sched_getaffinity")
    for known, cores in ((7, 7), (None, 1)):
        monkeypatch.setattr(machine.os, "cpu_count", lambda known=known: known)
        assert machine.n_cores() == cores
