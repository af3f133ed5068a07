"""Which rows the web page lists, and what it says of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..capture.errors import SelectionError, closest
from .selection import by_outcome, class_column, row_classes
from .view import class_name, row_views

if TYPE_CHECKING:
    from ..capture.reader import Run

_AT_ONCE = 16_384  # ids that are searched at a time
_MOST_CLASSES = 4096
_MOST_TEXT = 300  # characters of a column's value that are shown
_ROW_COLUMNS = ("id", "label", "prediction", "picture")


@dataclass(frozen=True)
class RowFilter:
    """What the rows have in common."""

    label: str | None = None
    """The class, by its name or number."""
    prediction: str | None = None
    """The class that was predicted, likewise."""
    outcome: str | None = None
    """`right` or `wrong` predictions."""
    text: str | None = None
    """What the row's id contains, in upper or lower case."""

    def rows(self, run: Run) -> NDArray[np.uint32]:
        """Return the captured rows that fit, in order; there may be none.

        Raises:
            SelectionError: there is no such class, or the store has no column that tells.
            DrawError: the outcome is neither right nor wrong.
        """
        chosen = np.flatnonzero(run.committed())
        for name, wanted in (("label", self.label), ("prediction", self.prediction)):
            if wanted is not None:
                chosen = chosen[row_classes(run, name, chosen) == _key(run, name, wanted)]
        if self.outcome is not None:
            chosen = by_outcome(run, chosen, self.outcome)
        if self.text is not None:
            if "id" not in run.rows:
                raise SelectionError("the store keeps no ids of its rows, so they cannot be searched")
            chosen = chosen[_contains(run, chosen, self.text)]
        return chosen.astype(np.uint32)


def _key(run: Run, name: str, wanted: str) -> int | str:
    """Return the label that a class is stored as."""
    classes = run.classes or ()
    if row_classes(run, name, np.empty(0, np.intp)).dtype.kind == "U":
        return wanted
    if wanted in classes:
        return classes.index(wanted)
    digits = wanted.removeprefix("class ")
    if digits.isascii() and digits.isdigit() and len(digits) < 19:
        return int(digits)
    raise SelectionError(f"there is no class {wanted!r}. {closest(wanted, classes)}")


def _contains(run: Run, rows: NDArray[np.intp], text: str) -> NDArray[np.bool_]:
    found = np.zeros(len(rows), np.bool_)
    wanted = text.casefold()
    for first in range(0, len(rows), _AT_ONCE):
        ids = run.rows["id"][rows[first : first + _AT_ONCE]]
        found[first : first + _AT_ONCE] = [wanted in str(one).casefold() for one in ids.tolist()]
    return found


def classes_of(run: Run) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return each class with how many rows have it and are predicted to, and how many are right and wrong."""
    rows = np.flatnonzero(run.committed())
    labels, predictions = (class_column(run, name, rows) for name in ("label", "prediction"))
    counts: dict[Any, list[int]] = {label: [0, 0] for label in range(len(run.classes or ()))}
    for i, column in enumerate((labels, predictions)):
        if column is not None:
            for label, n in zip(*np.unique(column, return_counts=True), strict=True):
                counts.setdefault(label.item(), [0, 0])[i] = int(n)
    found: list[dict[str, Any]] = []
    for label, (n_labelled, n_predicted) in counts.items():
        name = class_name(run.classes, label)
        if name is not None and len(found) < _MOST_CLASSES:
            found.append({"name": name, "labelled": n_labelled, "predicted": n_predicted})
    outcome = {}
    if labels is not None and predictions is not None and labels.dtype.kind == predictions.dtype.kind:
        n_right = int((labels == predictions).sum())
        outcome = {"right": n_right, "wrong": len(rows) - n_right}
    return found, outcome


def facts_of(run: Run, rows: Sequence[int], columns: bool = False) -> list[dict[str, Any]]:
    """Return what is known of each row, as JSON; with `columns`, the user's own too.

    Raises:
        SelectionError: a row is not there.
    """
    check_rows(run, rows)
    facts: list[dict[str, Any]] = [
        {"row": one.row, "id": one.name, "true": one.true, "predicted": one.predicted, "right": one.right}
        for one in row_views(run, tuple(rows), False)
    ]
    if columns:
        for name, column in run.rows.items():
            if name in _ROW_COLUMNS or len(column.shape) != 1:
                continue
            for one, value in zip(facts, column[np.array(rows)].tolist(), strict=True):
                one.setdefault("columns", {})[name] = str(value)[:_MOST_TEXT]
    return facts


def check_rows(run: Run, rows: Sequence[int]) -> None:
    """Refuse rows that are not there.

    Raises:
        SelectionError: with the row.
    """
    for row in rows:
        if not 0 <= row < run.n_rows:
            has = f"0 to {run.n_rows - 1}" if run.n_rows else "none"
            raise SelectionError(f"row {row} is not there; there are {has}")
