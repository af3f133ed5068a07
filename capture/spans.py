"""What each thread did when: spans of a capture, as a timeline that Perfetto and chrome://tracing open.

The format is the Trace Event Format of Chromium (JSON, complete events `X`, times in microseconds).
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Spans shorter than this are left out: they cannot be seen, and a long run has many.
LEAST_S = 1e-6


@dataclass(frozen=True)
class Span:
    """What one thread did, from one instant to another."""

    name: str
    """What it did: a stage of `stages.Stages`, or a tap that was copied."""
    thread: str
    """Name of the thread."""
    start_s: float
    """When it began, by `time.perf_counter`."""
    end_s: float
    """When it ended."""
    about: dict[str, Any]
    """What it was done to: block, array, row."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


class Spans:
    """Takes spans from many threads."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, name: str, start_s: float, end_s: float, **about: Any) -> None:
        """Take what the calling thread did; appending to a list is atomic, so there is no lock."""
        if end_s - start_s >= LEAST_S:
            thread = threading.current_thread()
            named = "model" if thread is threading.main_thread() else thread.name
            self.spans.append(Span(name, named, start_s, end_s, about))

    def to_json(self) -> dict[str, Any]:
        """Return the timeline; it begins at 0."""
        pid, threads = os.getpid(), dict[str, int]()
        events: list[dict[str, Any]] = []
        first_s = min((span.start_s for span in self.spans), default=0.0)
        for span in sorted(self.spans, key=lambda span: (span.start_s, -span.end_s)):
            number = threads.setdefault(span.thread, len(threads))
            events.append(
                {
                    "name": span.name,
                    "ph": "X",
                    "pid": pid,
                    "tid": number,
                    "ts": round(1e6 * (span.start_s - first_s), 3),
                    "dur": round(1e6 * span.seconds, 3),
                    "args": span.about,
                }
            )
        named = [
            {"name": "thread_name", "ph": "M", "pid": pid, "tid": number, "args": {"name": name}}
            for name, number in threads.items()
        ]
        process = {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": "layertap capture"}}
        return {"traceEvents": [process, *named, *events], "displayTimeUnit": "ms"}

    def save(self, path: str | Path) -> None:
        """Write the timeline as JSON."""
        Path(path).write_text(json.dumps(self.to_json()))
