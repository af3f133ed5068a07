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
    choose,
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
    parts = {
        tensor: f"{node.name}[{key}]"
        for node in graph.nodes
        for key, tensor in node.outputs
        if len(node.outputs) > 1
    }
    asked: list[Pattern] = [parts.get(p, p) if isinstance(p, str) else p for p in as_list(patterns)]
    return [_called(choice, asked) for choice in select(layers_of(graph), asked)]


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


def _called(choice: Choice, patterns: Sequence[Pattern]) -> Choice:
    """Return `choice` with its layer called by the name that was said, or else by the first that matched."""
    layer = choice.layer
    names = (layer.name, *layer.aliases)
    called = [replace(layer, name=name, aliases=()) for name in names]
    matches = [
        match
        for pattern in patterns
        if not (isinstance(pattern, str) and pattern.startswith("!"))
        for match in choose(called, pattern)[0]
        if match.kind == choice.kind
    ]
    said = [match for match in matches if match.named is None or match.named]
    name = (said or matches)[0].layer.name

    def renamed(taps: frozenset[TapName]) -> frozenset[TapName]:
        return frozenset(replace(tap, layer=name) for tap in taps)

    layer = replace(layer, name=name, aliases=tuple(other for other in names if other != name))
    named = None if choice.named is None else renamed(choice.named)
    return Choice(layer, renamed(choice.only), choice.kind, named)
