"""What benchmarks tell: replayed arms, tables from results, and whether a revision is slower than another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from layertap.capture.paired import Rounds, Timing, estimate

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def rounds() -> Rounds:
    return Rounds({"off": [Timing(1.0, 2.0), Timing(3.0, 6.0)], "on": [Timing(2.0, 2.0), Timing(6.0, 6.0)]})


@pytest.mark.usefixtures("modules")
def test_an_entry_has_the_seconds_of_the_rounds_that_were_interleaved(tmp_path: Path) -> None:
    (tmp_path / "bench_it.py").write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(BENCHMARKS)!r}]\n"
        "from harness import replayed, tell\n"
        "from layertap.capture.paired import Rounds, Timing\n"
        "pytestmark = replayed\n"
        "def test_it(benchmark):\n"
        "    timings = [Timing(4.0, 1.0), Timing(8.0, 3.0)]\n"
        "    tell(benchmark, Rounds({'a': timings}), 'a', group='g', over='a', each=2, bytes=7)\n"
    )
    command = [sys.executable, "-m", "pytest", "bench_it.py", "--benchmark-json=out.json", "-q"]
    subprocess.run(
        [*command, "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", "/dev/null"],
        # Inside of a worker of pytest-xdist, pytest-benchmark measures nothing.
        env={key: value for key, value in os.environ.items() if "XDIST" not in key},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    (entry,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert entry["stats"]["data"] == [2.0, 4.0]
    assert entry["group"] == "g"
    assert entry["extra_info"]["ratio"]["median"] == 1.0
    assert (entry["extra_info"]["cpu_s"], entry["extra_info"]["bytes"]) == (1.0, 7)


@pytest.mark.usefixtures("modules")
def test_the_page_of_results_is_written_from_them() -> None:
    import performance

    for file, text in performance.pages().items():
        assert file.read_text() == text
    assert performance.README.read_text() == performance.readme()


@pytest.mark.usefixtures("modules")
def test_a_table_has_every_arm_and_figure() -> None:
    import performance

    entries = [
        {
            "fullname": "benchmarks/bench_hooks.py::test_x[on]",
            "name": "test_x[on]",
            "group": "a case",
            "extra_info": {
                "arm": arm,
                "over": "off",
                "ratio": rounds().over(arm, "off").to_json(),
                "cpu_s": 0.5,
                "MB": 1234,
            },
            "stats": {"data": rounds().wall(arm)},
        }
        for arm in ("off", "on")
    ]
    assert list(performance.tables(entries)) == [
        "| a case | median | over off | processor | MB |\n| --- | --- | --- | --- | --- |\n"
        "| off | 2 s | 1 (1 to 1) | 500 ms | 1,234 |\n| on | 4 s | 2 (2 to 2) | 500 ms | 1,234 |"
    ]
    figures = {"rows": 5, "ratio": {"median": 1.5, "interval_90": [1.0, 2.0], "all": [1.0, 2.0]}, "all": [1]}
    alone = [{"fullname": "f::test_y", "name": "test_y[one]", "group": None, "extra_info": figures}]
    assert list(performance.tables(alone)) == [
        "| y | one |\n| --- | --- |\n| rows | 5 |\n| ratio | 1.5 (1 to 2) |"
    ]
    assert performance.cell({"median": 1.5, "interval_90": [1.5, 1.5], "all": [1.5]}) == "1.5"


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("ratios", "is_slower"),
    [
        ([1.2] * 9, True),
        ([1.04] * 9, False),
        ([0.5] * 9, False),
        ([0.9, 1.3, 1.0, 1.6, 0.8, 1.2, 1.1, 0.95, 1.4], False),
    ],
    ids=["slower", "within the margin", "quicker", "noise"],
)
def test_only_what_the_rounds_show_to_be_slower_fails(ratios: list[float], is_slower: bool) -> None:
    import compare

    verdict = compare.Verdict("a case", estimate(ratios), estimate([1.0] * 9), 0.05)
    assert verdict.is_slower is is_slower
    assert ("SLOWER" in str(verdict)) is is_slower


class _Fake:
    """Answers as a revision's process would."""

    def __init__(self, wall_s: float | None) -> None:
        self.wall_s, self.asked = wall_s, 0

    def ask(self, case: str) -> dict[str, Any]:
        self.asked += 1
        return {"error": "TypeError: no"} if self.wall_s is None else {"wall_s": self.wall_s}


@pytest.mark.usefixtures("modules")
def test_a_case_that_the_base_cannot_run_is_named_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    import compare

    processes = {"new": _Fake(2.0), "base": _Fake(1.0), "base again": _Fake(1.0)}
    (verdict,) = compare.compare(processes, ["read"], 4, 0.05)
    assert verdict.is_slower
    assert (verdict.ratio.median, verdict.control.median) == (2.0, 1.0)
    assert [process.asked for process in processes.values()] == [5, 5, 5]
    assert compare.compare({**processes, "base": _Fake(None)}, ["read"], 4, 0.05) == []
    assert "left out: base: TypeError: no" in capsys.readouterr().out


def _knows_git() -> bool:
    known = shutil.which("git") and subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=BENCHMARKS, capture_output=True
    )
    return bool(known) and known.returncode == 0


@pytest.mark.skipif(not _knows_git(), reason="compares revisions, and this is no repository that git reads")
def test_two_revisions_are_compared_in_one_run() -> None:
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "HEAD", "read", "--rounds", "2"]
    made = subprocess.run([*command, "--margin", "1000"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("read  ")
    assert "control" in made.stdout
    unknown = subprocess.run([*command[:2], "HEAD", "nothing"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert "no case is called nothing; there are capture, write" in unknown.stderr
    listed = ["git", "-C", str(BENCHMARKS.parent), "worktree", "list"]
    assert (
        "layertap-compare-" not in subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    )
