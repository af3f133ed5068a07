"""layertap's backend for toyframe."""

from __future__ import annotations

from typing import Any

from layertap.capture.backend import Backend, Session, Surveyed
from layertap.capture.data import Batch
from layertap.capture.returned import Returned, ReturnedSession, surveyed
from layertap.capture.taps import OUTPUT, Choice, Layer, Patterns, TapName, select

from . import Toy


class ToyBackend(Backend):
    """Models of toyframe."""

    name = "toyframe"

    def accepts(self, model: Any) -> bool:
        """Return whether `model` is one of toyframe's."""
        return isinstance(model, Toy)

    def layers(self, model: Toy) -> list[Layer]:
        """Return its steps in their order, each name once."""
        steps = dict(reversed(model.steps))  # of a name that comes twice, the first function
        names = dict.fromkeys(name for name, _ in model.steps)
        return [Layer(name, (steps[name].__name__,), steps[name], kinds=(OUTPUT,)) for name in names]

    def session(self, model: Toy, layers: Patterns) -> Session:
        """Choose among the steps; a name that matches nothing is an error that `select` raises."""
        return ToySession(model, select(self.layers(model), layers))

    def survey(self, model: Toy, batch: Batch) -> list[Surveyed]:
        """Run the model once and say what every step gave."""
        there = [Choice(layer) for layer in self.layers(model)]
        session = ToySession(model, there)
        _, found = session.tapped(batch.inputs, batch.kwargs)
        return [
            surveyed(choice.layer, [v for tap, v in found.items() if tap.layer == choice.layer.name], session)
            for choice in there
        ]


class ToySession(ReturnedSession):
    """One model; what its chosen steps give is heard while it runs, and stored when it has ended."""

    def __init__(self, model: Toy, choices: list[Choice]) -> None:
        super().__init__(choices)
        self._model = model
        self._chosen = {choice.layer.name for choice in choices}

    def plain(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model without taps."""
        return self._model(*inputs, **kwargs)

    def tapped(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Returned]:
        """Run the model, and keep a copy of what is chosen: a later step may work in place."""
        found: dict[TapName, Any] = {}

        def watch(name: str, values: Any) -> None:
            if name in self._chosen:
                call = 1 + sum(tap.layer == name for tap in found)
                found[TapName(name, call)] = values.copy()

        self._model.watchers.append(watch)
        try:
            return self._model(*inputs, **kwargs), found
        finally:
            self._model.watchers.remove(watch)
