"""The graph of an ONNX model: what its nodes are called, and a copy of it that gives more.

A node has many names here: its own, those of its tensors, and, where a PyTorch exporter wrote the graph, the
path of the module whose output it makes (`layer1.0.conv1`). The dynamo exporter leaves that path in the
metadata of nodes, the older one in their names (`/layer1/layer1.0/conv1/Conv`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"


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
    def outputs(self) -> list[tuple[int, str]]:
        """Places and names of the tensors that it makes."""
        return [(i, name) for i, name in enumerate(self.proto.output) if name]


@dataclass
class _Scopes:
    """The modules that a node was traced in, from the outermost."""

    paths: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


class Graph:
    """The nodes of a model's graph, and the bodies that they hold."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        #: Tensors that are part of the model: the same in each run.
        self.constants = {tensor.name for tensor in graph.initializer}
        self.constants |= {tensor.values.name for tensor in graph.sparse_initializer}
        self.constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
        self.inputs = [value for value in graph.input if value.name not in self.constants]
        self.outputs = [value.name for value in graph.output]
        self.nodes = _named(graph, model.producer_name == "pytorch")
        #: Nodes that lie in the bodies of others (If, Loop, Scan).
        self.bodies = self._bodies()
        #: All of them by the identity of their protobufs.
        self.named = {id(node.proto): node for node in (*self.nodes, *self.bodies)}

    def given(self, node: NodeProto) -> list[tuple[int, str]]:
        """Return places and names of the tensors that a node gets and that differ from run to run."""
        return [(i, name) for i, name in enumerate(node.input) if name and name not in self.constants]

    def _bodies(self) -> list[Node]:
        taken = {name for node in self.nodes for name in (node.name, *node.aliases)}
        found = []
        for node in self.nodes:
            for i, (where, inner) in enumerate(_inner(node.proto)):
                name = f"{node.name}.{where}.{inner.name or f'{inner.op_type}_{i}'}"
                aliases = tuple({inner.name: 0, **dict.fromkeys(inner.output)})
                aliases = tuple(alias for alias in aliases if alias and alias not in taken)
                taken |= {name, *aliases}
                found.append(Node(name, inner, (inner.op_type,), aliases, node.name))
        return found


def with_outputs(model: ModelProto, tensors: Iterable[str]) -> ModelProto:
    """Return a copy of `model` whose graph gives `tensors` too; the weights in it are shared where they lie apart."""
    copy = ModelProto()
    copy.CopyFrom(model)
    there = {value.name for value in copy.graph.output}
    # A name is enough: the runtime knows shape and type.
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in there)
    return copy


def _named(graph: GraphProto, by_pytorch: bool) -> list[Node]:
    """Return the nodes that compute something, with unique names."""
    protos = [(i, node) for i, node in enumerate(graph.node) if node.op_type != "Constant"]
    own, taken = dict[int, str](), set[str]()
    for i, node in protos:
        name = node.name or f"{node.op_type}_{i}"
        own[i] = name if name not in taken else f"{name}_{i}"
        taken.add(own[i])
    modules = _modules(graph, protos, by_pytorch)
    nodes = []
    for i, node in protos:
        paths = {path: kind for path, kind in modules.get(i, {}).items() if path not in taken}
        names = list(dict.fromkeys([*paths, own[i], *(name for name in node.output if name)]))
        types = tuple(dict.fromkeys([node.op_type, *filter(None, paths.values())]))
        nodes.append(Node(names[0], node, types, tuple(names[1:])))
    return _without_doubles(nodes)


def _without_doubles(nodes: Sequence[Node]) -> list[Node]:
    """Return `nodes` without aliases that name another node too."""
    seen = dict.fromkeys(node.name for node in nodes)
    clean = []
    for node in nodes:
        aliases = tuple(alias for alias in node.aliases if alias not in seen)
        seen |= dict.fromkeys(aliases)
        clean.append(Node(node.name, node.proto, node.types, aliases))
    return clean


def _modules(
    graph: GraphProto, protos: Sequence[tuple[int, NodeProto]], by_pytorch: bool
) -> dict[int, dict[str, str]]:
    """Return for each node the modules whose whole output it makes, from the innermost, with their classes.

    That is known where one tensor alone leaves a module.
    """
    scopes = {i: _scopes(node, by_pytorch) for i, node in protos}
    makers = {name: i for i, node in protos for name in node.output if name}
    users: dict[str, set[int]] = {}
    for i, node in protos:
        for name in {*node.input, *_free(node)}:
            users.setdefault(name, set()).add(i)
    ends = {value.name for value in graph.output}
    leaving: dict[str, set[str]] = {}
    for tensor, maker in makers.items():
        for path in scopes[maker].paths:
            outside = any(path not in scopes[user].paths for user in users.get(tensor, ()))
            if outside or tensor in ends:
                leaving.setdefault(path, set()).add(tensor)
    modules: dict[int, dict[str, str]] = {}
    for path, tensors in leaving.items():
        (tensor, *more), maker = tensors, makers[min(tensors)]
        if more or len([name for name in graph.node[maker].output if name]) > 1:
            continue
        if path == scopes[maker].paths[-1] and _is_folded(graph.node[maker]):
            continue
        at = scopes[maker].paths.index(path)
        kinds = scopes[maker].classes
        modules.setdefault(maker, {})[path] = kinds[at] if at < len(kinds) else ""
    return {i: dict(sorted(paths.items(), key=lambda one: -len(one[0]))) for i, paths in modules.items()}


def _is_folded(node: NodeProto) -> bool:
    """Return whether the older exporter merged a batch norm into a convolution, which keeps the latter's name.

    Then its weight is a new one, called `onnx::Conv_274`.
    """
    return node.op_type.startswith("Conv") and len(node.input) > 1 and node.input[1].startswith("onnx::")


def _scopes(node: NodeProto, by_pytorch: bool) -> _Scopes:
    """Return the modules that a PyTorch exporter says that `node` belongs to."""
    about = {entry.key: entry.value for entry in node.metadata_props}
    if _SCOPES in about:
        paths, kinds = _texts(about[_SCOPES]), _texts(about.get(_CLASSES, "[]"))
        pairs = [
            (path, kinds[i].rpartition(".")[2] if i < len(kinds) else "")
            for i, path in enumerate(paths[:-1])  # the last is the operation
            if path
        ]
        return _Scopes([path for path, _ in pairs], [kind for _, kind in pairs])
    if by_pytorch and node.name.startswith("/"):
        return _Scopes(list(_nested(node.name.split("/")[1:-1])))
    return _Scopes()


def _nested(segments: Sequence[str]) -> Iterator[str]:
    """Yield the paths that the segments of a name stand for: `layer1`, `layer1.0` are one inside the other."""
    path = before = ""
    for segment in segments:
        if before and segment.startswith(f"{before}."):
            path += segment[len(before) :]
        else:
            path = f"{path}.{segment}" if path else segment
        before = segment
        yield path


def _texts(written: str) -> list[str]:
    try:
        read = ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return []
    return [str(text) for text in read] if isinstance(read, list) else []


def _graphs(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        for i, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}[{i}]", graph


def _inner(node: NodeProto) -> Iterator[tuple[str, NodeProto]]:
    """Yield the nodes in the bodies of `node`, also in those inside, with the body that they lie in."""
    for where, graph in _graphs(node):
        for inner in graph.node:
            if inner.op_type != "Constant":
                yield where, inner
            for deeper, one in _inner(inner):
                yield f"{where}.{deeper}", one


def _free(node: NodeProto) -> set[str]:
    """Return the tensors that the bodies of `node` use; some of them come from outside."""
    return {name for _, inner in _inner(node) for name in inner.input}
