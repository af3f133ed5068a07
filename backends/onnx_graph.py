"""The graph of an ONNX model: what its nodes are called, and a copy of it that gives more.

A node has many names here: its own, those of its tensors, and, where a PyTorch exporter wrote the graph, the
path of the module whose output it makes (`layer1.0.conv1`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

from ..capture.taps import ROOT
from .onnx_dims import dims_of_maps
from .onnx_modules import modules_of

_Tensors = list[tuple[int | str, str]]


@dataclass(frozen=True)
class Node:
    """A node with what it is called."""

    name: str
    """The first of its names."""
    proto: NodeProto
    """The node itself."""
    types: tuple[str, ...] = ()
    """Its operator, and the classes of the PyTorch modules whose output it makes."""
    aliases: tuple[str, ...] = ()
    """Its other names: of modules, its own, and of its tensors."""
    inside: str = ""
    """The node whose body it is part of; empty for those of the graph itself."""

    @property
    def outputs(self) -> _Tensors:
        """Keys and names of the tensors that it makes: by place, and those of the model by name."""
        return [(name if self.name == ROOT else i, name) for i, name in enumerate(self.proto.output) if name]


class Graph:
    """The nodes of a model's graph, and the bodies that they hold."""

    def __init__(self, model: ModelProto) -> None:
        self._graph = graph = model.graph
        #: Tensors that are part of the model: the same in each run.
        self.constants = {tensor.name for tensor in graph.initializer}
        self.constants |= {tensor.values.name for tensor in graph.sparse_initializer}
        self.constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
        self.outputs = [value.name for value in graph.output]
        #: The model itself, as a node, so that whoever looks at all nodes may look at it too.
        self.root = Node(ROOT, NodeProto(name=ROOT, op_type="Graph", output=self.outputs), ("Graph",))
        self.nodes = _named(graph, model.producer_name == "pytorch")

    @cached_property
    def bodies(self) -> list[Node]:
        """Nodes that lie in the bodies of others (If, Loop, Scan)."""
        taken = {name for node in self.nodes for name in (node.name, *node.aliases)}
        found = []
        for node in self.nodes:
            for i, (where, inner) in enumerate(_inner(node.proto)):
                name = f"{node.name}.{where}.{inner.name or f'{inner.op_type}_{i}'}"
                aliases = dict.fromkeys(filter(None, (inner.name, *inner.output)))
                found.append(
                    Node(
                        name, inner, (inner.op_type,), tuple(a for a in aliases if a not in taken), node.name
                    )
                )
                taken |= {name, *aliases}
        return found

    @cached_property
    def all(self) -> dict[int, Node]:
        """The model, the nodes in their order, and those in bodies, by the identity of their protobufs."""
        return {id(node.proto): node for node in (self.root, *self.nodes, *self.bodies)}

    @cached_property
    def dims(self) -> dict[str, tuple[str, ...]]:
        """The axes of a row of those tensors that are maps if it has three of them."""
        return dict(dims_of_maps(self._graph.node))

    def given(self, node: NodeProto) -> _Tensors:
        """Return places and names of the tensors that a node gets and that differ from run to run."""
        return [(i, name) for i, name in enumerate(node.input) if name and name not in self.constants]


def with_outputs(model: ModelProto, tensors: Iterable[str]) -> ModelProto:
    """Return a copy of `model` whose graph gives `tensors` too."""
    copy = ModelProto()
    copy.CopyFrom(model)
    there = {value.name for value in copy.graph.output}
    # A name is enough: the runtime knows shape and type.
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in there)
    return copy


def _named(graph: GraphProto, by_pytorch: bool) -> list[Node]:
    """Return the nodes that compute something, with names that are one node's alone."""
    own = _own_names(graph)
    taken = set(own.values())
    modules = modules_of(graph, _users(graph), by_pytorch)
    nodes = []
    for i, name in own.items():
        proto, paths = graph.node[i], {p: kind for p, kind in modules.get(i, {}).items() if p not in taken}
        names = list(dict.fromkeys([*paths, name, *filter(None, proto.output)]))
        types = tuple(dict.fromkeys([proto.op_type, *filter(None, paths.values())]))
        nodes.append(Node(names[0], proto, types, tuple(names[1:])))
    return _without_doubles(nodes)


def _own_names(graph: GraphProto) -> dict[int, str]:
    """Return the names of the nodes that are no constants, made up from operator and place where need be."""
    names: dict[int, str] = {}
    taken = set[str]()
    for i, node in enumerate(graph.node):
        if node.op_type != "Constant":
            name = node.name or f"{node.op_type}_{i}"
            names[i] = name if name not in taken else f"{name}_{i}"
            taken.add(names[i])
    return names


def _users(graph: GraphProto) -> dict[str, list[int]]:
    """Return the places of the nodes that get each tensor, those included that have bodies which use it."""
    users: dict[str, list[int]] = {}
    for i, node in enumerate(graph.node):
        inside = (name for _, inner in _inner(node) for name in inner.input)
        for name in dict.fromkeys([*node.input, *inside]):
            users.setdefault(name, []).append(i)
    return users


def _without_doubles(nodes: Sequence[Node]) -> list[Node]:
    """Return `nodes` without aliases that name another node too."""
    seen = {node.name for node in nodes}
    clean = []
    for node in nodes:
        aliases = tuple(alias for alias in node.aliases if alias not in seen)
        seen.update(aliases)
        clean.append(replace(node, aliases=aliases))
    return clean


def _inner(node: NodeProto) -> Iterator[tuple[str, NodeProto]]:
    """Yield the nodes in the bodies of `node`, also in those inside, with the body that they lie in."""
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
        for inner in (inner for graph in graphs for inner in graph.node):
            if inner.op_type != "Constant":
                yield attribute.name, inner
            for deeper, one in _inner(inner):
                yield f"{attribute.name}.{deeper}", one
