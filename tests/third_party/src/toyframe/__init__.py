"""An invented framework: a model is a list of named functions, run one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Watcher = Callable[[str, Any], None]


class Toy:
    """Named functions of numpy arrays; a name may come more than once."""

    def __init__(self, *steps: tuple[str, Callable[[Any], Any]]) -> None:
        self.steps = steps
        self.watchers: list[Watcher] = []

    def __call__(self, values: Any) -> Any:
        for name, step in self.steps:
            values = step(values)
            for watch in self.watchers:
                watch(name, values)
        return values
