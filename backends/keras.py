"""Keras 3: on JAX a model is a function of its variables, on PyTorch its layers are modules.

What shaped it:

* Every call of a layer passes through `keras.Layer.__call__`. Under JAX it is marked there while the model is
  traced; under PyTorch a layer is a `torch.nn.Module`, and hooks see it.
* Keras counts the names that it gives by itself (`dense_7`) over the whole process. A layer is called by the
  attribute that holds it where a class was written for the model, and by its own name in a graph of layers.
* TensorFlow is not among the frameworks that are tapped here: `KERAS_BACKEND=jax` or `torch` runs the same
  model, from the same file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..capture.axes import channels_last_dims
from ..capture.backend import Backend, Json, Session, Surveyed
from ..capture.data import Batch
from ..capture.errors import PlanError
from ..capture.fingerprint import fingerprint
from ..capture.taps import OUTPUT, ROOT, Layer, Patterns
from .keras_framework import keras

#: Pixels of an input whose size a model leaves open.
_PIXELS = 224


class KerasBackend(Backend):
    """Keras models and layers: sequential, functional and subclassed."""

    name = "keras"

    @property
    def packages(self) -> tuple[str, ...]:  # type: ignore[override]
        """Keras and what runs it."""
        return ("keras", keras.backend.backend())

    def accepts(self, model: Any) -> bool:
        """Return whether `model` is one of Keras's."""
        return isinstance(model, keras.Layer)

    def layers(self, model: Any) -> list[Layer]:
        """Return the model and its layers in the order of the model; a shared layer once."""
        return layers_of(model)

    def session(self, model: Any, layers: Patterns) -> Session:
        """Choose `layers` of `model`."""
        return self._runs(model).session(self._run_as(model), layers)

    def describe(self, model: Any) -> Json:
        """Return type, number of parameters, and a checksum of the weights."""
        check_built(model)
        weights = weights_of(model)
        return {
            "type": type(model).__name__,
            "parameters": sum(int(np.prod(variable.shape)) for variable in weights.values()),
            "weights": fingerprint(
                (name, str(variable.dtype), tuple(variable.shape), to_numpy(variable))
                for name, variable in weights.items()
            ),
        }

    def place(self, model: Any, device: str | None) -> Any:
        """Return `model` on `device`, as the framework below moves it.

        Raises:
            PlanError: it cannot be there.
        """
        self._runs(model).place(self._run_as(model), device)
        return model

    def transfer_rates(self, model: Any) -> dict[str, float]:
        """Return the bytes a second from the model's device to the host."""
        return self._runs(model).transfer_rates(self._run_as(model))

    def survey(self, model: Any, batch: Batch) -> list[Surveyed]:
        """Run or trace `model` once."""
        return self._runs(model).survey(self._run_as(model), batch)

    def example(self, model: Any, n_rows: int) -> Batch | None:
        """Return noise of the model's input shape, where it has one input; any size that it leaves open."""
        shape = getattr(model, "input_shape", None)
        if not isinstance(shape, tuple) or not shape[1:]:
            return None
        sizes = [size or _PIXELS for size in shape[1:]]
        noise = keras.random.normal((n_rows, *sizes), seed=0)
        return Batch(range(n_rows), (keras.ops.convert_to_numpy(noise),), {})

    def batches(self, *args: Any) -> Any:
        """Yield batches as the framework below does."""
        return _of_framework().batches(*args)

    def source(self, data: Any) -> Any:
        """Return a source for `data`, of the kinds that the framework below has too."""
        return _of_framework().source(data)

    def _runs(self, model: Any) -> Backend:
        check_built(model)
        return _of_framework()

    def _run_as(self, model: Any) -> Any:
        if keras.backend.backend() == "jax":
            from .keras_jax import KerasJaxModel

            return KerasJaxModel(model)
        return model


def layers_of(model: Any) -> list[Layer]:
    """Return `model` and the layers inside it, each once, with its other names."""
    found: dict[int, Layer] = {}
    for name, layer in _named(model):
        if (known := found.get(id(layer))) is not None:
            found[id(layer)] = Layer(known.name, known.types, layer, (*known.aliases, name), known.kinds)
        else:
            own = (layer.name,) if name not in (ROOT, layer.name) else ()
            types = tuple(base.__name__ for base in type(layer).__mro__)
            found[id(layer)] = Layer(name, types, layer, own, ("input", OUTPUT))
    # A name that layers share names none of them.
    names = [alias for layer in found.values() for alias in (layer.name, *layer.aliases)]
    return [
        Layer(
            one.name,
            one.types,
            one.module,
            tuple(alias for alias in one.aliases if names.count(alias) == 1),
            one.kinds,
        )
        for one in found.values()
    ]


def weights_of(model: Any) -> dict[str, Any]:
    """Return the variables of the layers of `model`, by names that Keras has not counted."""
    return {
        f"{layer.name}.{i}.{variable.name}": variable
        for layer in layers_of(model)
        for i, variable in enumerate(
            (*layer.module._trainable_variables, *layer.module._non_trainable_variables)
        )
    }


def to_numpy(variable: Any) -> NDArray[Any]:
    """Return the values of a variable on the host."""
    value = variable.value
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    values: NDArray[Any] = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    return values


def check_built(model: Any) -> None:
    """Refuse a model whose weights are not made yet.

    Raises:
        PlanError: with the remedy.
    """
    if not model.built:
        raise PlanError(
            f"the {type(model).__name__} {model.name!r} has no weights yet: call it once on a batch, or its "
            "build() with the shape of one"
        )


def channels_last(shape: Sequence[int], types: Sequence[str]) -> tuple[str, ...]:
    """Return the axes of a map, by Keras's setting of where channels are; empty where it is no map.

    Args:
        shape: of a row.
        types: of the layer, and of those that it lies in.
    """
    return channels_last_dims(shape, types) if keras.config.image_data_format() == "channels_last" else ()


def _named(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield layers by their dotted names, the whole first."""
    within: set[int] = set()

    def walk(layer: Any, path: str) -> Iterator[tuple[str, Any]]:
        if id(layer) in within or isinstance(layer, keras.layers.InputLayer):
            return
        within.add(id(layer))
        yield path or ROOT, layer
        for name, part in _parts(layer):
            yield from walk(part, f"{path}.{name}" if path else name)
        within.discard(id(layer))

    yield from walk(model, "")


def _parts(layer: Any) -> list[tuple[str, Any]]:
    """Return the layers right inside `layer` by their names, each of which is another.

    A name is that of the public attribute that holds the layer; else its own; else, where Keras made that up,
    that of a private attribute, or what Keras would have made up in a process that builds nothing else.
    """
    parts = list(layer._flatten_layers(include_self=False, recursive=False))
    # On PyTorch, a layer that an attribute holds is where that keeps modules.
    attributes = {} if _is_graph(layer) else {**vars(layer), **vars(layer).get("_modules", {})}
    held = dict(_held({name: value for name, value in attributes.items() if not name.startswith("_")}))
    private = dict(_held({name: value for name, value in attributes.items() if name.startswith("_")}))
    counted: Counter[str] = Counter()
    named = []
    for part in parts:
        name = held.get(id(part))
        if name is None and not _is_counted(part):
            name = part.name
        if name is None and (name := private.get(id(part))) is None:
            kind = re.sub(r"_\d+$", "", part.name)
            name = f"{kind}_{counted[kind]}" if counted[kind] else kind
            counted[kind] += 1
        named.append((name, part))
    names = [name for name, _ in named]
    return [
        (name if names.count(name) == 1 else f"{name}_{names[:i].count(name)}", part)
        for i, (name, part) in enumerate(named)
    ]


def _is_graph(layer: Any) -> bool:
    return (
        isinstance(layer, keras.Sequential) or hasattr(layer, "_functional") or hasattr(layer, "_operations")
    )


def _is_counted(layer: Any) -> bool:
    """Return whether Keras made up a layer's name: that of its class, and how many there were before."""
    return re.sub(r"_\d+$", "", layer.name).replace("_", "") == type(layer).__name__.replace("_", "").lower()


#: Where Keras and PyTorch keep layers beside the attributes that hold them.
_KEPT_BY_FRAMEWORKS = ("_layers", "_modules", "_functional", "_operations", "_operations_by_depth", "_nodes")


def _held(attributes: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Yield the layers that attributes hold, alone or in lists and dicts, with their names."""
    for attribute, value in attributes.items():
        name = attribute.lstrip("_")
        if attribute in _KEPT_BY_FRAMEWORKS:
            continue
        if isinstance(value, keras.Layer):
            yield id(value), name
        elif isinstance(value, list | tuple | dict):
            for key, one in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(one, keras.Layer):
                    yield id(one), f"{name}.{key}"


def _of_framework() -> Backend:
    """Return the backend of what runs Keras.

    Raises:
        PlanError: it is not one of those that are tapped.
    """
    name = keras.backend.backend()
    if name == "jax":
        from .jax import JaxBackend

        return JaxBackend()
    if name == "torch":
        from .keras_torch import KerasTorchBackend

        return KerasTorchBackend()
    raise PlanError(
        f"Keras runs on {name} here, whose layers cannot be tapped: set KERAS_BACKEND=jax or "
        "KERAS_BACKEND=torch before Keras is imported; models and .keras files are the same"
    )
