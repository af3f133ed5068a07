"""Compares two revisions in one run: the working tree with BASE, case by case, round by round.

    make bench-compare BASE=main
    python benchmarks/compare.py BASE [--rounds 15] [--margin 0.05] [CASE ...]

Each revision runs in a process of its own that is there from the beginning, and a second process of BASE is
the control; they take turns, one at a time, in random order within each round. What is run is `CASES`
below, of the working tree, by the public API of each revision; a case that BASE cannot run yet is named and
left out.

The command fails where a case takes longer, and the 90 % interval of new over base lies wholly above 1 +
margin. A difference that the rounds do not show to be one never fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NEW, BASE, AGAIN = "new", "base", "base again"


def _values() -> Any:
    import numpy as np

    return np.maximum(np.random.default_rng(0).standard_normal((512, 64, 16, 16), np.float32), 0)


def _stored(folder: Path, codec: str = "none") -> Any:
    """Return a run of maps, made by the arrays backend."""
    import layertap as lt
    import numpy as np

    values = _values()
    pictures = np.random.default_rng(1).integers(0, 256, (512, 32, 32, 3), np.uint8)

    def layers(rows: Any) -> dict[str, Any]:
        return {"a": values[: len(rows)], "b": values[: len(rows), :9], "c": values[: len(rows), 9:18]}

    return lt.record_dataset(
        layers, (pictures, np.arange(512) % 10), folder, "*", backend="arrays", codec=codec, overwrite=True
    )


def _write(folder: Path, codec: str) -> Callable[[], object]:
    return lambda: _stored(folder / "written", codec)


def _capture(folder: Path) -> Callable[[], object]:
    import layertap as lt
    import torch

    layers: list[Any] = []
    for _ in range(8):
        layers += [torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.ReLU(inplace=True)]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), *layers).eval()
    inputs = torch.zeros(256, 3, 32, 32)

    def run() -> None:
        with lt.record(model, folder / "captured", "**", overwrite=True) as rec, torch.no_grad():
            for batch in inputs.split(32):
                rec(batch)

    return run


def _read(folder: Path, codec: str, select: Any) -> Callable[[], object]:
    array = _stored(folder / "read", codec)["a"]
    return lambda: array[select]


def _open(folder: Path) -> Callable[[], object]:
    import layertap as lt

    path = _stored(folder / "opened").path
    return lambda: [lt.open(path)["a"][17] for _ in range(20)]


def _draw(folder: Path, kind: str, **options: Any) -> Callable[[], object]:
    import layertap as lt

    run = _stored(folder / "drawn")
    return lambda: [lt.draw(run, kind, rows=17, **options).png() for _ in range(5)]


def _help(folder: Path) -> Callable[[], object]:
    return lambda: subprocess.run(
        [sys.executable, "-m", "layertap", "--help"], check=True, capture_output=True
    )


#: What is compared: each makes what it needs in a folder, and returns what is timed.
CASES: Mapping[str, Callable[[Path], Callable[[], object]]] = {
    "capture": _capture,
    "write": lambda folder: _write(folder, "none"),
    "write-zstd": lambda folder: _write(folder, "zstd"),
    "read": lambda folder: _read(folder, "none", slice(None)),
    "read-zstd": lambda folder: _read(folder, "zstd", slice(None)),
    "read-channel": lambda folder: _read(folder, "none", (slice(None), 5)),
    "open-and-read-a-row": _open,
    "draw-grid": lambda folder: _draw(folder, "grid", layers=["b", "c"]),
    "draw-montage": lambda folder: _draw(folder, "montage", layers="a"),
    "help": _help,
}


@dataclass(frozen=True)
class Verdict:
    """What the rounds tell of one case."""

    case: str
    """Its name."""
    ratio: Any
    """New over base, an `Estimate`."""
    control: Any
    """Base over base."""
    margin: float
    """How much longer is not held against a change."""

    @property
    def is_slower(self) -> bool:
        """Whether even the lower end of the interval lies beyond the margin."""
        return bool(self.ratio.low > 1 + self.margin)

    def __str__(self) -> str:
        def shown(one: Any) -> str:
            return f"{one.median:5.3f} ({one.low:.3f} to {one.high:.3f})"

        slower = "  SLOWER" if self.is_slower else ""
        return f"{self.case:<20}  {shown(self.ratio)}  control {shown(self.control)}{slower}"


class Process:
    """A revision that runs cases when it is told to."""

    def __init__(self, tree: Path, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree / ".typings"), "PYTHONDONTWRITEBYTECODE": "1"}
        folder.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "compare.py"), "--serve", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, case: str) -> dict[str, Any]:
        """Run a case once; the first time it is set up and warmed before."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{case}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that ran {case} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.communicate()


def serve(folder: Path) -> None:
    """Run the cases that standard input names; tell seconds, or what went wrong, on standard output."""
    import time

    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is not an answer
    ready: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        case = line.strip()
        answer: dict[str, Any]
        try:
            if case not in ready:
                (folder / case).mkdir()
                ready[case] = CASES[case](folder / case)
                ready[case]()
            cpu, started = time.process_time(), time.perf_counter()
            ready[case]()
            answer = {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
        except Exception as error:  # the other revision may well run it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=told, flush=True)


def compare(
    processes: Mapping[str, Process], cases: Sequence[str], rounds: int, margin: float
) -> list[Verdict]:
    """Return what each case tells, leaving out those that a revision cannot run."""
    from layertap.capture.paired import estimate, ratios

    verdicts = []
    for case in cases:
        walls, problems = _asked(processes, case, rounds)
        if problems:
            print(f"{case:<20}  left out: {'; '.join(f'{n}: {why}' for n, why in problems.items())}")
            continue
        found = (estimate(ratios(walls[name], walls[BASE])) for name in (NEW, AGAIN))
        verdicts.append(Verdict(case, *found, margin))
        print(verdicts[-1], flush=True)
    return verdicts


def _asked(
    processes: Mapping[str, Process], case: str, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the seconds of each process in each round but the first, and why those that fail do."""
    from layertap.capture.paired import interleaved

    walls: dict[str, list[float]] = {name: [] for name in processes}
    problems: dict[str, str] = {}

    def ask(name: str) -> None:
        if problems:  # a case that one revision cannot run tells nothing of the others
            return
        answer = processes[name].ask(case)
        if "error" in answer:
            problems[name] = answer["error"]
        else:
            walls[name].append(answer["wall_s"])

    interleaved({name: partial(ask, name) for name in processes}, rounds, warm=1)
    return {name: found[1:] for name, found in walls.items()}, problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the working tree with a revision; return 1 where it is slower."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", nargs="?", help="a revision of git")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--margin", type=float, default=0.05, help="how much longer is let through (0.05)")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve is not None:
        serve(given.serve)
        return 0
    if given.base is None:
        parser.error("name a revision to compare with: make bench-compare BASE=main")
    if unknown := [case for case in given.cases if case not in CASES]:
        parser.error(f"no case is called {unknown[0]}; there are {', '.join(CASES)}")
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory(prefix="layertap-compare-") as temporary:
        folder = Path(temporary)
        tree = folder / "tree"
        added = subprocess.run(
            [*git, "worktree", "add", "--detach", str(tree), given.base], capture_output=True
        )
        if added.returncode:
            parser.error(f"git knows no revision {given.base}: {added.stderr.decode().strip()}")
        try:
            trees = {NEW: ROOT, BASE: tree, AGAIN: tree}
            processes = {name: Process(of, folder / name) for name, of in trees.items()}
            try:
                verdicts = compare(processes, given.cases or list(CASES), given.rounds, given.margin)
            finally:
                for process in processes.values():
                    process.close()
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=False)
    slower = [verdict.case for verdict in verdicts if verdict.is_slower]
    if slower:
        print(f"slower than {given.base} by more than {given.margin:.0%}: {', '.join(slower)}")
    return bool(slower)


if __name__ == "__main__":
    sys.exit(main())
