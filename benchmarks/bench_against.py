"""The same job done by layertap and by what one would pick instead.

    pip install -e '.[against]'
    python -m pytest benchmarks/bench_against.py --benchmark-only

The job: ResNet-20 over 4,000 pictures of CIFAR-10's test set (noise, where they are not at hand), batch 64,
in memory beforehand; the outputs of `conv1`, `layer1`, `layer2` and `layer3` in float32 (721 MB) lie on disk
at the end. Each run is a process of its own, after its imports and one forward; arms are interleaved. `over
the forward alone` is the ratio of the walls, round by round. `with sync` adds the seconds until the file
system has written what is left in memory; layertap and torchlens have done that for each file already.
`more MiB` is by how much the process's peak memory grew in the job, mapped files included.

Then each way is asked, and what it says is worked out from what it left on disk, against clones taken in
place: whether a layer whose output is overwritten by the next one has its own values; whether both calls of a
layer that runs twice are there; whether a layer that is not there is an error that names it; and what is
there after a run was killed in its eighth batch of ten and run again, with how many batches that took.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from layertap.capture.paired import Rounds, Timing, estimate, interleaved

pytest.importorskip("torch")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from against import FORWARD, WAYS  # noqa: E402
from harness import n_rounds, replayed, tell  # noqa: E402

pytestmark = [replayed, pytest.mark.timeout(3600)]

N_ROWS = 4000
CONTROL = "forward again"
QUESTIONS = ("in-place", "re-used", "misspelt")
_NEEDS = {"captum_av": "captum", "nnsight_way": "nnsight", "torchlens_way": "torchlens"}

Figures = dict[str, Any]


def there(way: str) -> bool:
    return way not in _NEEDS or find_spec(_NEEDS[way]) is not None


def child(way: str, task: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run one way in a process of its own, with nothing of this one's in memory."""
    return subprocess.run(
        [sys.executable, "-m", "against.job", way, task, *map(str, paths)],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def answer(way: str, task: str, *paths: Path) -> Figures:
    done = child(way, task, *paths)
    if done.returncode:
        raise RuntimeError(f"{way} {task} failed: {done.stderr[-2000:]}")
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


def pictures(file: Path) -> None:
    """Write the inputs: real pictures where they are at hand."""
    import layertap as lt

    sys.path.insert(0, str(HERE.parent / "tests"))
    import resnet20

    if resnet20.PICTURES.is_dir():
        folder = lt.PictureFolder(resnet20.PICTURES, lt.Preprocess(resnet20.MEAN, resnet20.STD))
        np.save(file, folder.batch(range(N_ROWS)).inputs[0])
    else:
        np.save(file, np.random.default_rng(0).standard_normal((N_ROWS, 3, 32, 32), np.float32))


@cache
def measured() -> tuple[Rounds, dict[str, list[Figures]]]:
    with TemporaryDirectory(prefix="against-") as made:
        inputs = Path(made) / "inputs.npy"
        pictures(inputs)
        found: dict[str, list[Figures]] = {}

        def run(arm: str, way: str) -> Timing:
            folder = Path(made) / arm.replace(" ", "-")
            folder.mkdir()
            figures = answer(way, "run", inputs, folder)
            shutil.rmtree(folder)
            os.sync()
            found.setdefault(arm, []).append(figures)
            return Timing(figures["wall_s"], figures["cpu_s"])

        ways = {FORWARD: FORWARD, CONTROL: FORWARD, **{way: way for way in WAYS if there(way)}}
        rounds = interleaved({arm: partial(run, arm, way) for arm, way in ways.items()}, n_rounds(3))
    return rounds, found


def asked(way: str) -> Mapping[str, str]:
    """Return what a way says to each question."""
    with TemporaryDirectory(prefix="against-") as made:
        says = {}
        for question in QUESTIONS:
            (folder := Path(made) / question).mkdir()
            says[question] = answer(way, question, folder)["says"]
        (folder := Path(made) / "killed").mkdir()
        killed = child(way, "killed", folder)
        assert killed.returncode == -signal.SIGKILL, f"{way} was not killed: {killed.stdout}{killed.stderr}"
        after = answer(way, "again", folder)
        batches = f", {after['forwards']} of {after['of']} batches run again" if "of" in after else ""
        says["killed and run again"] = after["says"] + batches
    return says


@pytest.mark.parametrize("way", [FORWARD, CONTROL, *WAYS])
def test_the_same_job(benchmark: Any, way: str) -> None:
    if not there(way):
        pytest.skip(f"{_NEEDS[way]} is not installed: pip install -e '.[against]'")
    rounds, found = measured()
    runs = found[way]
    figures: Figures = {}
    if way not in (FORWARD, CONTROL):
        whole = estimate([run["wall_s"] + run["sync_s"] for run in runs])
        figures = {
            "with sync, s": whole.to_json(2),
            "more MiB": round(statistics.median(run["more_MiB"] for run in runs)),
            "MB": round(runs[0]["bytes"] / 1e6),
            "files": runs[0]["files"],
            **asked(way),
        }
    tell(benchmark, rounds, way, group="the same job", over=FORWARD, **figures)
    benchmark.extra_info["arm"] = title(way)


def title(way: str) -> str:
    """Return what a way is called."""
    import ast

    if way == CONTROL:
        return way
    tree = ast.parse((HERE / "against" / f"{way}.py").read_text())
    names = next(
        node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
    )
    assert isinstance(names.value, ast.Tuple)
    return str(ast.literal_eval(names.value.elts[0]))
