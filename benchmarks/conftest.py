"""What every benchmark's result says of the machine, and what it does not."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    for key in ("node", "release"):  # a host's name and its kernel's build say nothing of its speed
        machine_info.pop(key, None)
    machine_info["cpu"] = {"model": machine_info.get("cpu", {}).get("brand_raw"), "cores": os.cpu_count()}
    packages = {}
    for name in ("torch", "numpy", "zarr", "matplotlib", "pillow", "scikit-image", "torchvision"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    machine_info["packages"] = packages
