"""Draws many pictures, each of one row: one after the other, or in several processes.

Rows that follow each other are read together, so that a chunk that holds several of them is read once. The
processes are new ones ("spawn"): a fork of a process with threads may hang. Each opens the store for itself
and holds one task's rows.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..capture.errors import DrawError
from .kinds import kind as kind_of
from .picture import Picture
from .survey import found

if TYPE_CHECKING:
    from ..capture.reader import Run

#: Rows that a process draws before it takes others: as many as share most chunks.
TASK_ROWS = 128

_Done = tuple[Path, bool]


@dataclass(frozen=True)
class Batch:
    """What is drawn of each row, and how."""

    run: Run
    """The store."""
    kind: str
    """The kind of picture."""
    options: Mapping[str, Any]
    """What is named beside the rows."""
    painter: str | None
    """Who paints."""
    overwrite: bool
    """Whether files that are there are drawn anew."""

    def draw(self, rows: Sequence[int], paths: Sequence[Path]) -> Iterator[_Done]:
        """Draw each row into its file, and yield each file with whether it was drawn now."""
        wanted = [self.overwrite or not path.exists() for path in paths]
        kind = kind_of(self.kind)
        specs = [
            kind.choose(self.run, {**self.options, "rows": (row,)})
            for row, want in zip(rows, wanted, strict=True)
            if want
        ]
        sheets = zip(kind.sheets(self.run, specs), specs, strict=True)
        for path, want in zip(paths, wanted, strict=True):
            if want:
                sheet, spec = next(sheets)
                Picture(sheet, spec, self.painter).save(path)
            yield path, want


def draw_batch(batch: Batch, rows: Sequence[int], paths: Sequence[Path], jobs: int) -> Iterator[_Done]:
    """Draw each row into its file; yield the files in their order, with whether they were drawn now.

    Raises:
        DrawError: a process of several ended before its time.
    """
    starts = range(0, len(rows), TASK_ROWS)
    tasks = [(rows[i : i + TASK_ROWS], paths[i : i + TASK_ROWS]) for i in starts]
    if jobs < 2 or len(tasks) < 2:
        for task in tasks:
            yield from batch.draw(*task)
        return
    # What takes all rows of the data set is found once, here, with the first picture.
    yield from batch.draw(rows[:1], paths[:1])
    tasks[0] = rows[1:TASK_ROWS], paths[1:TASK_ROWS]
    pool = ProcessPoolExecutor(
        min(jobs, len(tasks)), get_context("spawn"), _start, (batch, dict(found(batch.run)))
    )
    try:
        for done in pool.map(_draw, tasks):
            yield from done
    except BrokenProcessPool as error:
        raise DrawError(
            "a process that drew ended before its time, perhaps for lack of memory; the same call goes on "
            "with what is missing, and fewer jobs take less memory. In a script, several jobs need the line "
            'if __name__ == "__main__": before the call'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_batch: Batch | None = None  # of a process that draws for another


def _start(batch: Batch, known: dict[tuple[Any, ...], Any]) -> None:
    """Make this process one that draws for another, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the other one stops this
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _take(batch, known)


def _take(batch: Batch, known: dict[tuple[Any, ...], Any]) -> None:
    global _batch
    _batch = batch
    found(batch.run).update(known)


def _end_with_parent() -> None:
    """Wait for the end of the process that started this one; one that is killed cannot tell."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _draw(task: tuple[Sequence[int], Sequence[Path]]) -> list[_Done]:
    assert _batch is not None
    return list(_batch.draw(*task))
