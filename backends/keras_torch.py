"""A Keras model on PyTorch: its layers are modules, under Keras's names."""

from __future__ import annotations

from typing import Any

from ..capture.axes import types_above
from ..capture.backend import Session
from ..capture.taps import KINDS, Layer, Patterns, TapName
from .keras import channels_last, layers_of
from .torch import TorchBackend, TorchSession


class KerasTorchBackend(TorchBackend):
    """Keras models whose framework is PyTorch."""

    def layers(self, model: Any) -> list[Layer]:
        """Return the model and its layers, which can be tapped for all that modules can."""
        return [Layer(one.name, one.types, one.module, one.aliases, KINDS) for one in layers_of(model)]

    def session(self, model: Any, layers: Patterns) -> Session:
        """Choose `layers` of `model`."""
        session = super().session(model, layers)
        assert isinstance(session, TorchSession)
        types = {one.name: one.type for one in layers_of(model)}

        def dims(tap: TapName, shape: tuple[int, ...]) -> tuple[str, ...]:
            return channels_last(shape, types_above(tap.layer, types))

        session.tell_dims, session.lists_are_rows = dims, False
        session.keeps_aliases = False  # Keras counts names over the whole process
        return session
