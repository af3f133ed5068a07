"""The progress bar of a capture, on standard error."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any

from .plan import show_bytes
from .stages import Stages

_LINE_S = 10  # where there is no terminal, a line at most this often


class Progress:
    """Rows, rate, bytes, the slowest stage and the time left; without a terminal, a line now and then.

    Whoever reads it may go away: no capture fails for its progress.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bar: Any = None
        self._shown = 0
        self._started = 0.0
        self._said_s = 0.0

    def start(self, n_rows: int) -> None:
        """Begin with `n_rows` to capture; what was done before counts for nothing in the rate."""
        import click

        self._started = time.perf_counter()
        self._bar = click.progressbar(
            length=n_rows,
            label="capturing",
            show_pos=True,
            item_show_func=lambda item: item,
            file=sys.stderr,
            width=24,
        )
        with contextlib.suppress(OSError):
            self._bar.render_progress()

    def show(self, stages: Stages) -> None:
        """Show the state after a commit; called by any writer thread."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        text = (
            f"{stages.n_rows / seconds:,.0f} rows/s  {show_bytes(stages.n_bytes)} at "
            f"{show_bytes(stages.n_bytes / seconds)}/s  slowest: {stages.slowest()}"
        )
        with self._lock, contextlib.suppress(OSError):
            if stages.n_rows <= self._shown:
                return
            n_new, self._shown = stages.n_rows - self._shown, stages.n_rows
            self._bar.update(n_new, text)
            if not sys.stderr.isatty() and seconds - self._said_s > _LINE_S:
                self._said_s = seconds
                print(f"{stages.n_rows:,} of {self._bar.length:,} rows  {text}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End the line."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.render_finish()
            self._bar = None
