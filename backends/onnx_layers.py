"""Layers of an ONNX graph, and choosing among them by any of their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..capture.taps import (
    OUTPUT,
    ROOT,
    Choice,
    Layer,
    Path,
    Pattern,
    Patterns,
    TapName,
    as_list,
    key_of,
    select,
)
from .onnx_graph import Graph, Node


def layers_of(graph: Graph) -> list[Layer]:
    """Return the model, the nodes of its graph in their order, and those that lie in the bodies of nodes."""
    return [_layer(node) for node in graph.all.values()]


def chosen(graph: Graph, patterns: Patterns) -> list[Choice]:
    """Choose layers; each is called by the name that it was chosen by.

    Raises:
        SelectionError: a pattern matches nothing.
    """
    layers = [called for layer in layers_of(graph) for called in _called(layer)]
    parts = {
        tensor: f"{node.name}[{key}]"
        for node in graph.nodes
        for key, tensor in node.outputs
        if len(node.outputs) > 1
    }
    asked: list[Pattern] = [parts.get(p, p) if isinstance(p, str) else p for p in as_list(patterns)]
    same: dict[tuple[int, str], list[Choice]] = {}
    for choice in select(layers, asked):
        same.setdefault((id(choice.layer.module), choice.kind), []).append(choice)
    return [_as_one(choices) for choices in same.values()]


def tensors_of(graph: Graph, choice: Choice) -> dict[Path, str]:
    """Return the tensors that `choice` takes, by their paths."""
    node = graph.all[id(choice.layer.module)]
    found = node.outputs if choice.kind == OUTPUT else graph.given(node.proto)
    paths: list[tuple[Path, str]] = [
        ((key_of(key),) if len(found) > 1 else (), tensor) for key, tensor in found
    ]
    name, kind = choice.layer.name, choice.kind
    return {path: tensor for path, tensor in paths if choice.takes(TapName(name, 1, path, kind))}


def _layer(node: Node) -> Layer:
    kinds = (OUTPUT,) if node.inside or node.name == ROOT else ("input", OUTPUT)
    return Layer(node.name, node.types, node.proto, node.aliases, kinds)


def _called(layer: Layer) -> list[Layer]:
    """Return `layer` under each of its names."""
    names = (layer.name, *layer.aliases)
    return [replace(layer, name=name, aliases=tuple(n for n in names if n != name)) for name in names]


def _as_one(choices: Sequence[Choice]) -> Choice:
    """Return one choice for those of one layer, under the first name that was said, or else that matched."""
    said = [choice for choice in choices if choice.named is None or choice.named]
    layer = (said or choices)[0].layer

    def renamed(taps: frozenset[TapName] | None) -> frozenset[TapName]:
        return frozenset(replace(tap, layer=layer.name) for tap in taps or ())

    only = frozenset[TapName]().union(*(renamed(choice.only) for choice in choices))
    named = frozenset[TapName]().union(*(renamed(choice.named) for choice in choices))
    whole = any(not choice.only for choice in choices)
    insisted = any(choice.named is None for choice in choices)
    return Choice(layer, frozenset() if whole else only, choices[0].kind, None if insisted else named)
