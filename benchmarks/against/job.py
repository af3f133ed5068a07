"""One way in a process of its own: the timed job, or a question; the answer is a line of JSON.

python -m against.job WAY run INPUTS.npy FOLDER
python -m against.job WAY in-place|re-used|misspelt|killed|again FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import subjects

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import resnet20

LAYERS = ("conv1", "layer1", "layer2", "layer3")
BATCH = 64
_SMALL = 8  # rows of a batch in questions, of which there are five
_DIE_AT, _LARGE = 8, (640, 3, 64, 64)  # a forward of ten, of 30 MB of activations each

Answer = dict[str, Any]


def run(way: Any, inputs: Path, folder: Path) -> Answer:
    """Do the job and say what it took."""
    values = np.load(inputs)
    model = resnet20.trained() if resnet20.WEIGHTS.is_file() else resnet20.untrained()
    with torch.no_grad():
        model(torch.from_numpy(values[:BATCH]))
    before_kib = _peak_kib()
    cpu, started = time.process_time(), time.perf_counter()
    way.store(model, values, LAYERS, folder, BATCH)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    peak_kib = _peak_kib()
    started = time.perf_counter()
    os.sync()
    sync_s = time.perf_counter() - started
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "sync_s": sync_s,
        "peak_MiB": peak_kib / 1024,
        "more_MiB": (peak_kib - before_kib) / 1024,
        "bytes": sum(file.stat().st_size for file in files),
        "files": len(files),
    }


def in_place(way: Any, folder: Path) -> Answer:
    """Whether a layer whose output is overwritten later has its own values."""
    model, inputs = subjects.made(subjects.InPlace), _inputs()
    (expected,) = subjects.outputs(model, "conv", inputs, _SMALL)
    way.store(model, inputs, ["conv"], folder, _SMALL)
    return {"says": _held(_all(way.load(folder)), [expected], "the values of the next layer")}


def re_used(way: Any, folder: Path) -> Answer:
    """Whether both calls of a layer are kept."""
    model, inputs = subjects.made(subjects.Reused), _inputs()
    expected = subjects.outputs(model, "conv", inputs, _SMALL)
    way.store(model, inputs, ["conv"], folder, _SMALL)
    found = _all(way.load(folder))
    n_kept = sum(any(_same(one, values) for values in found) for one in expected)
    if n_kept == 2:
        return {"says": "right"}
    if n_kept == 1:
        return {"says": f"only the {'first' if any(_same(expected[0], v) for v in found) else 'last'}"}
    if any(len(values) == 2 * len(inputs) for values in found):
        return {"says": "both calls mixed in one array"}
    return {"says": "neither"}


def misspelt(way: Any, folder: Path) -> Answer:
    """Whether a layer that is not there is an error that names it."""
    model, inputs = subjects.made(subjects.InPlace), _inputs()
    try:
        way.store(model, inputs, ["convv"], folder, _SMALL)
    except Exception as error:
        return {"says": "right" if "convv" in str(error) else f"an error without the name: {_short(error)}"}
    return {"says": "no error"}


def killed(way: Any, folder: Path) -> Answer:
    """Be killed in a later batch."""
    os.environ["DIE_AT"] = str(_DIE_AT)
    way.store(subjects.made(subjects.Dies), _inputs(_LARGE), ["conv"], folder, BATCH)
    return {"says": "was not killed"}


def again(way: Any, folder: Path) -> Answer:
    """Whether the same call after that leaves all values."""
    model, inputs = subjects.made(subjects.Dies), _inputs(_LARGE)
    (expected,) = subjects.outputs(model, "conv", inputs, BATCH)
    subjects.counts.n = 0
    try:
        way.store(model, inputs, ["conv"], folder, BATCH)
        n_forwards, found = subjects.counts.n, _all(way.load(folder))
    except Exception as error:
        return {"says": f"an error: {_short(error)}", "forwards": subjects.counts.n}
    held = _held(found, [expected], "other values")
    if held != "right" and len(found) == 1 and len(found[0]) < len(inputs):
        held = f"{len(found[0])} of {len(inputs)} rows, and no error"
    return {"says": held, "forwards": n_forwards, "of": -(-len(inputs) // BATCH)}


QUESTIONS: dict[str, Callable[[Any, Path], Answer]] = {
    "in-place": in_place,
    "re-used": re_used,
    "misspelt": misspelt,
    "killed": killed,
    "again": again,
}


def _inputs(shape: tuple[int, ...] = (5 * _SMALL, 3, 16, 16)) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _all(found: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    return [values for values in found.values() if values.size]


def _held(found: list[NDArray[Any]], expected: list[NDArray[Any]], otherwise: str) -> str:
    if not found:
        return "nothing"
    return "right" if all(any(_same(one, values) for values in found) for one in expected) else otherwise


def _same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:100]


def _peak_kib() -> int:
    """Return the most memory that this process has had, on Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def main(name: str, task: str, *paths: str) -> None:
    warnings.simplefilter("ignore")
    way = import_module(f"against.{name}")
    if task == "run":
        answer = run(way, Path(paths[0]), Path(paths[1]))
    else:
        try:
            answer = QUESTIONS[task](way, Path(paths[0]))
        except Exception as error:
            answer = {"says": f"an error: {_short(error)}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
