"""What a gradient is the gradient of: one value for each row of a model's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import PlanError

#: The logit of the class that the model predicts, or of the one that the row is labelled with; the number of
#: a class; a callable from the model's output to one value a row.
Score = str | int | Callable[[Any], Any]

PREDICTION, LABEL = "prediction", "label"


def read_score(text: str) -> Score:
    """Return the score that a text on the command line names.

    Raises:
        PlanError: it is none.
    """
    if text.isdecimal():
        return int(text)
    check_score(text)
    return text


def check_score(score: Score) -> None:
    """Refuse what is no score.

    Raises:
        PlanError: it is none.
    """
    if score in (PREDICTION, LABEL) or callable(score):
        return
    if isinstance(score, bool) or not isinstance(score, int) or score < 0:
        raise PlanError(
            f"there is no score {score!r}; it is {PREDICTION!r}, {LABEL!r}, the number of a class, or (in "
            "Python) a callable that makes one value a row of the model's output"
        )


def score_text(score: Score) -> str:
    """Return how a store names `score`."""
    return getattr(score, "__qualname__", type(score).__name__) if callable(score) else str(score)


def logits_of(output: Any) -> Any:
    """Return the logits that a model's output is or holds as `logits`, as far as names tell."""
    return output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
