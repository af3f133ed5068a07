"""Where the time went: the arithmetic on given numbers, what would help, and where it is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import layertap as lt
import numpy as np
import pytest
from click.testing import CliRunner
from layertap.__main__ import main
from layertap.capture.report import StageReport
from layertap.capture.stages import WRITER_STAGES, Laps, Stages

GIB = 2**30
#: A disk that the model waits for: 4 GiB, half of it float32 values' second halves.
DISK = Stages(
    start_s=0.25,
    data_s=0.5,
    forward_s=2.0,
    wait_s=7.0,
    drain_s=0.25,
    checksum_s=1.0,
    write_s=16.0,
    sync_s=2.0,
    commit_s=0.5,
    writing_s=9.75,
    n_writers=2,
    n_rows=1000,
    n_shards=64,
    n_bytes=4 * GIB,
    raw_bytes=4 * GIB,
    castable_bytes=2 * GIB,
)


def test_the_stages_of_the_models_thread_add_up_to_the_wall() -> None:
    assert DISK.wall_s == 10.0
    report = StageReport(DISK)
    assert (report.slowest, report.slowest_s) == ("write", 9.75)
    assert report.overlap == 10 / 9.75
    assert StageReport(Stages()).overlap == 1.0


def test_the_table_is_aligned_and_gives_seconds_shares_bytes_and_rates() -> None:
    assert str(StageReport(DISK)).splitlines() == [
        "wall                10.00 s  100 %  4GiB  410MiB/s",
        "data                 0.50 s    5 %",
        "forward, copies      2.00 s   20 %  4GiB    2GiB/s",
        "waiting for a slot   7.00 s   70 %",
        "start, end           0.50 s    5 %",
        "checksum             0.50 s    5 %  4GiB    8GiB/s",
        "write                8.00 s   80 %  4GiB  512MiB/s",
        "sync, commit         1.25 s   12 %",
        "wall / slowest (write) 1.03; writing sets the pace: a cast to float16 leaves 50 % of the bytes, "
        "about 5.12 s in place of 10",
    ]


def test_stages_that_did_not_happen_have_no_line() -> None:
    names = [line[0] for line in StageReport(replace(DISK, encode_s=4.0, transfer_s=2.0)).lines()]
    assert names[5:7] == ["transfer", "encode"]
    assert not {"transfer", "encode"} & {line[0] for line in StageReport(DISK).lines()}
    assert str(StageReport(Stages())).endswith("wall / slowest (forward) 1.00; no block was written")


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"castable_bytes": 0}, "writing sets the pace: the values are narrow already"),
        # Half of the time goes with bytes, but the model waited 1.25 s in all.
        (
            {"wait_s": 1.0, "forward_s": 8.0, "data_s": 0.5},
            "writing sets the pace: a cast to float16 leaves 50 % of the bytes, about 8.75 s in place of 10",
        ),
        (
            {"encode_s": 32.0, "n_bytes": 3 * GIB},
            "encoding sets the pace, 128MiB/s a writer for 75 % of the bytes: a cast to float16",
        ),
        (
            {"sync_s": 40.0, "n_shards": 8192},
            "8,192 syncs set the pace, of 512KiB each: more memory makes larger shards",
        ),
        ({"sync_s": 40.0}, "writing sets the pace"),
        (
            {"forward_s": 8.0, "data_s": 1.0, "wait_s": 0.5, "writing_s": 5.0},
            "the model sets the pace: with a store that costs nothing, about 9 s in place of 10",
        ),
        (
            {"forward_s": 1.0, "data_s": 8.0, "wait_s": 0.5, "writing_s": 5.0},
            "the data set the pace: loaded ahead by more workers, about 5 s in place of 10",
        ),
        (
            {"forward_s": 1.0, "data_s": 8.0, "wait_s": 0.5, "writing_s": 0.5},
            "the data set the pace: loaded ahead by more workers, about 2 s in place of 10",
        ),
        (
            {"transfer_s": 19.0, "writing_s": 2.0},
            "the copies from the device set the pace: a cast to float16 leaves 50 % of the bytes, about 5.2",
        ),
        ({"start_s": 8.0, "wait_s": 0.0}, "a short run: its start and its end took 77 %"),
    ],
    ids=str,
)
def test_what_would_help_follows_from_the_numbers(changes: dict[str, Any], hint: str) -> None:
    assert StageReport(replace(DISK, **changes)).hint().startswith(hint)


def test_laps_divide_the_time_among_their_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0, 13.0, 17.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    laps = Laps(stages := Stages(sync_s=0.5))
    for stage in ("write", "sync", "write"):
        laps.lap(stage)
    assert (stages.write_s, stages.sync_s) == (5.0, 2.5)


def test_writers_add_up_and_leave_the_rest_alone() -> None:
    total = Stages(forward_s=1.0, **{f"{stage}_s": 1.0 for stage in WRITER_STAGES})
    total.add(Stages(forward_s=5.0, n_rows=3, **{f"{stage}_s": 2.0 for stage in WRITER_STAGES}))
    assert {getattr(total, f"{stage}_s") for stage in WRITER_STAGES} == {3.0}
    assert (total.forward_s, total.n_rows) == (1.0, 0)


def model(batch: Any) -> dict[str, Any]:
    return {"a": batch, "narrow": batch.astype(np.float16), "whole": batch.astype(np.int64)}


def values(n_rows: int = 40) -> Any:
    return np.random.default_rng(0).standard_normal((n_rows, 4, 32), np.float32)


def test_a_run_reports_what_passed_through_and_the_store_keeps_it(tmp_path: Path) -> None:
    with lt.record(model, tmp_path / "s", "**") as rec:
        for start in range(0, 40, 8):
            rec(values()[start : start + 8])
            rec.annotate(label=np.zeros(8, np.int64))
    stages = rec.report.stages
    run = lt.open(tmp_path / "s")
    assert (stages.n_rows, stages.n_shards, stages.n_bytes) == (40, 4, run.n_bytes)
    assert stages.raw_bytes == 40 * (4 * 32 * (4 + 2 + 8) + 8)
    assert stages.castable_bytes == 40 * 4 * 32 * 2
    assert min(stages.start_s, stages.data_s, stages.forward_s, stages.drain_s) > 0
    assert min(stages.checksum_s, stages.write_s, stages.sync_s, stages.commit_s, stages.writing_s) > 0
    assert stages.encode_s == 0
    [entry] = run.log
    assert {key: entry[key] for key in ("failed", "n_rows", "n_bytes")} == {
        "failed": False,
        "n_rows": 40,
        "n_bytes": run.n_bytes,
    }
    assert entry["seconds"] >= stages.wall_s - 0.01
    assert run.report is not None
    assert run.report.stages == Stages(**{key: round(value, 3) for key, value in vars(stages).items()})


def test_a_run_that_failed_is_in_the_log_too(tmp_path: Path) -> None:
    rows = values(4000)
    with pytest.raises(ZeroDivisionError), lt.record(model, tmp_path / "s", "a", memory="2MiB") as rec:
        for start in range(0, 4000, 8):
            rec(rows[start : start + 8])
            _ = 1 / (start < 3200)
    run = lt.open(tmp_path / "s")
    assert [entry["failed"] for entry in run.log] == [True]
    assert run.log[0]["n_rows"] == run.committed().sum() > 0


def test_a_log_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    run = lt.record_dataset(model, values(), tmp_path / "s", "a")
    log = tmp_path / "s" / "commits" / "log"
    [file] = log.glob("*.json")
    (log / "0-broken.json").write_text("{")
    assert run.log == [json.loads(file.read_text())]
    assert StageReport.of_log({"n_rows": 3, "of_another_version": 1}).stages == Stages(n_rows=3)
    file.unlink()
    assert (run.log, run.report) == ([], None)


def test_an_encoding_run_reports_what_it_encoded(tmp_path: Path) -> None:
    reports: list[StageReport] = []
    run = lt.record_dataset(
        model, np.zeros((40, 4, 32), np.float32), tmp_path / "s", "a", codec="zstd", on_report=reports.append
    )
    [report] = reports
    assert report.stages.encode_s > 0
    assert report.stages.n_bytes == run.n_bytes < report.stages.raw_bytes
    lt.record_dataset(
        model, np.zeros((40, 4, 32), np.float32), tmp_path / "s", "a", codec="zstd", on_report=reports.append
    )
    assert len(reports) == 1, "there is nothing to report of a store that was complete"


def test_the_command_prints_it_and_only_where_it_wrote(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def build():\n    return lambda batch: {'a': batch}\n")
    np.save(tmp_path / "x.npy", values())
    command = ["capture", f"{tmp_path}/m.py:build", f"{tmp_path}/x.npy", f"{tmp_path}/s", "--layers", "a"]
    first, second = (CliRunner().invoke(main, command) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, first.output
    assert "waiting for a slot" in first.stderr
    assert "wall / slowest (" in first.stderr
    assert "wall / slowest" not in first.stdout + second.stderr


def test_what_is_no_entry_of_a_log_is_passed_over(tmp_path: Path) -> None:
    run = lt.record_dataset(lambda batch: {"a": batch}, np.ones((8, 4), np.float32), tmp_path / "s", ["a"])
    log = tmp_path / "s" / "commits" / "log"
    (entry,) = run.log
    for i, text in enumerate(["[1, 2]", "3", "{", "[" * 10_000, '{"started": 1, "started": 2}', "\xff"]):
        (log / f"0{i}.json").write_text(text)
    assert lt.open(tmp_path / "s").log == [entry]
    (log / "9.json").write_text('{"n_rows": "many", "write_s": null, "wait_s": 2.5}')
    report = lt.open(tmp_path / "s").report
    assert report is not None
    assert report.stages.wait_s == 2.5
    assert str(report)
