"""The progress bar says rows, rate, bytes, the slowest stage and the time left."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest
from layertap.capture.pipeline import Stages
from layertap.capture.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_commit_is_shown_with_rows_rate_bytes_slowest_stage_and_time_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    clock = iter(range(100))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))  # the bar's own clock, for the time left
    progress = Progress()
    progress.start(1000)
    progress.show(Stages(n_rows=250, n_bytes=3 * 2**20, forward_s=1.0, data_s=0.1))
    progress.show(Stages(n_rows=500, n_bytes=6 * 2**20, forward_s=2.0, data_s=0.1))
    progress.stop()
    shown = sys.stderr.getvalue().split("\r")
    last = next(text for text in reversed(shown) if "rows/s" in text)
    for words in ("500/1000", "rows/s", "6MiB at ", "iB/s", "slowest: forward"):
        assert words in last
    assert re.search(r"500/1000 +\d\d:\d\d:\d\d ", "".join(shown))


@pytest.mark.parametrize(
    ("stages", "slowest"),
    [
        (Stages(forward_s=2, data_s=1), "forward"),
        (Stages(forward_s=1, data_s=2), "data"),
        (Stages(forward_s=2, data_s=1, writing_s=4), "write"),
        (Stages(forward_s=2, data_s=1, writing_s=2.5), "forward"),
        (Stages(forward_s=2, data_s=1, writing_s=4, transfer_s=12, n_writers=2), "transfer"),
    ],
)
def test_the_slowest_stage_is_the_one_that_the_others_wait_for(stages, slowest):
    assert stages.slowest() == slowest
