"""What every benchmark's result says of the machine and of how it was made, and what it does not."""

from __future__ import annotations

import os
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "torchvision", "numpy", "zarr", "zarrs", "tensorstore", "matplotlib", "pillow"),
    *("scikit-image", "obstore", "crc32c", "captum", "nnsight", "torchlens", "thingsvision"),
    *("jax", "flax", "keras", "onnx", "onnxruntime"),
)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    for key in ("node", "release"):  # a host's name and its kernel's build say nothing of its speed
        machine_info.pop(key, None)
    model = machine_info.get("cpu", {}).get("brand_raw")
    machine_info["cpu"] = {"model": model, "cores": os.cpu_count()}
    machine_info["memory_GiB"] = _memory_gib()
    machine_info["gpu"] = _gpu()
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    machine_info["packages"] = packages


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep the command, without where its results went."""
    given = [a for a in config.invocation_params.args if not str(a).startswith("--benchmark-json")]
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("LAYERTAP_BENCH_")]
    output_json["command"] = shlex.join([*settings, "python", "-m", "pytest", *map(str, given)])
    commit = output_json.get("commit_info", {})
    output_json["commit_info"] = {key: commit.get(key) for key in ("id", "time", "dirty")}


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, OSError, ValueError):
        return None


def _gpu() -> str | None:
    if not Path("/proc/driver/nvidia").exists():
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
