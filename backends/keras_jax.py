"""A Keras model on JAX: a function of its variables, whose layers mark what they get and give."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import jax
from keras.src.backend import get_keras_mask, set_keras_mask

from ..capture.taps import Layer
from .jax_marks import marked, marked_arguments
from .jax_models import JaxModel
from .keras import channels_last, layers_of
from .keras_framework import keras


class KerasJaxModel(JaxModel):
    """One model."""

    keeps_aliases = False  # Keras counts over the whole process

    def __init__(self, model: Any) -> None:
        self._model = model
        self._names = {id(layer.module): layer.name for layer in layers_of(model)}

    def layers(self) -> list[Layer]:
        """Return the model and its layers."""
        return layers_of(self._model)

    def dims(self, shape: tuple[int, ...], types: Sequence[str]) -> tuple[str, ...]:
        """Return the axes of a map."""
        return channels_last(shape, types)

    def state(self) -> tuple[list[Any], Hashable]:
        """Return the values of the variables; layers that are frozen run otherwise."""
        frozen = tuple(layer.trainable for layer in self._model._flatten_layers())
        return [variable.value for variable in self._model.variables], (id(self._model), frozen)

    def call(
        self,
        form: Any,
        arrays: Sequence[Any],
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        evaluating: bool,
    ) -> tuple[Any, Sequence[Any]]:
        """Call the model on its variables' values; Keras does not train unless asked to."""
        variables = self._model.variables
        with (
            keras.StatelessScope(state_mapping=list(zip(variables, arrays, strict=True))) as scope,
            _marking(self._names),
        ):
            output = self._model(*inputs, **kwargs)
        after = [scope.get_current_value(variable) for variable in variables]
        return output, [old if new is None else new for old, new in zip(arrays, after, strict=True)]

    def keep(self, form: Any, arrays: Sequence[Any]) -> None:
        """Keep what the run changed."""
        for variable, value in zip(self._model.variables, arrays, strict=True):
            variable.assign(value)


def _hand_on_masks(old: Any, new: Any) -> None:
    """Let marked arrays have the masks that Keras keeps beside those that they were."""
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if before is not after and (mask := get_keras_mask(before)) is not None:
            set_keras_mask(after, mask)


@contextmanager
def _marking(names: Mapping[int, str]) -> Iterator[None]:
    """Let the layers of a model mark what they get and give, for a while."""
    call = keras.Layer.__call__

    @wraps(call)
    def marked_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = names.get(id(self))
        if name is None:
            return call(self, *args, **kwargs)
        of = type(self).__name__
        given = marked_arguments(name, args, kwargs, of)
        _hand_on_masks((args, kwargs), given)
        output = call(self, *given[0], **given[1])
        passed = marked(name, output, of=of)
        _hand_on_masks(output, passed)
        return passed

    keras.Layer.__call__ = marked_call
    try:
        yield
    finally:
        keras.Layer.__call__ = call
