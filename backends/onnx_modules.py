"""Which module of a PyTorch model a tensor of the exported graph is the output of.

The dynamo exporter says in the metadata of nodes in which modules they were traced, the older one in their
names: `/layer1/layer1.0/conv1/Conv`. Where one tensor alone leaves a module, that is the module's output.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from onnx import GraphProto, NodeProto

_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
#: What the exporter calls the module of what it added itself.
_NO_MODULE = "_empty_nn_module_stack"

#: For a node, the modules whose output it makes, from the innermost, each with its class where that is known.
Modules = Mapping[str, str]


@dataclass(frozen=True)
class _Scopes:
    """The modules that a node was traced in, from the outermost."""

    paths: Sequence[str] = ()
    """Their paths."""
    classes: Sequence[str] = field(default=())
    """Their classes; empty where they are not known."""


def modules_of(graph: GraphProto, users: Mapping[str, Sequence[int]], by_pytorch: bool) -> dict[int, Modules]:
    """Return the modules whose output a node makes, by its place in the graph.

    Args:
        graph: what was exported.
        users: of each tensor, the places of the nodes that get it.
        by_pytorch: whether names may tell.
    """
    scopes = [_scopes(node, by_pytorch) for node in graph.node]
    ends = {value.name for value in graph.output}
    leaving: dict[str, list[int]] = {}
    for i, node in enumerate(graph.node):
        for tensor in filter(None, () if node.op_type == "Constant" else node.output):
            for path in scopes[i].paths:
                outside = any(path not in scopes[user].paths for user in users.get(tensor, ()))
                if outside or tensor in ends:
                    leaving.setdefault(path, []).append(i)
    repeated = _repeated(graph, users, scopes)
    modules: dict[int, dict[str, str]] = {}
    for path, (i, *more) in leaving.items():
        node, its = graph.node[i], scopes[i]
        several = more or len(list(filter(None, node.output))) > 1
        if several or path in repeated or (path == its.paths[-1] and _is_folded(node)):
            continue
        modules.setdefault(i, {})[path] = dict(zip(its.paths, its.classes, strict=False)).get(path, "")
    return {i: dict(sorted(paths.items(), key=lambda one: -len(one[0]))) for i, paths in modules.items()}


def _repeated(graph: GraphProto, users: Mapping[str, Sequence[int]], scopes: Sequence[_Scopes]) -> set[str]:
    """Return the modules that seem to be called more than once: each of their weights is used again.

    What leaves such a module may be its last call's, and its name means the first one's.
    """
    uses: dict[str, list[int]] = {}
    for tensor in graph.initializer:
        # Who looks at its shape alone computes nothing of it.
        of_values = (u for u in users.get(tensor.name, ()) if graph.node[u].op_type != "Shape")
        used = Counter(path for user in of_values for path in scopes[user].paths)
        for path, n in used.items():
            if tensor.name.startswith(f"{path}."):
                uses.setdefault(path, []).append(n)
    return {path for path, counts in uses.items() if min(counts) > 1}


def _is_folded(node: NodeProto) -> bool:
    """Return whether the older exporter merged a batch norm into a convolution, which keeps its name.

    Then its weight is a new one, called `onnx::Conv_274`.
    """
    return node.op_type.startswith("Conv") and len(node.input) > 1 and node.input[1].startswith("onnx::")


def _scopes(node: NodeProto, by_pytorch: bool) -> _Scopes:
    """Return the modules that a PyTorch exporter says that `node` belongs to."""
    about = {entry.key: entry.value for entry in node.metadata_props}
    if _SCOPES in about:
        paths, classes = _texts(about[_SCOPES])[:-1], _texts(about.get(_CLASSES, ""))  # the last is the call
        classes += [""] * len(paths)
        pairs = [
            (path, kind.rpartition(".")[2])
            for path, kind in zip(paths, classes, strict=False)
            if path and not path.startswith(_NO_MODULE)
        ]
        return _Scopes([path for path, _ in pairs], [kind for _, kind in pairs])
    if by_pytorch and node.name.startswith("/"):
        return _Scopes(list(_nested(node.name.split("/")[1:-1])))
    return _Scopes()


def _nested(segments: Sequence[str]) -> Iterator[str]:
    """Yield the paths that the segments of a name stand for: `layer1.0` lies inside `layer1`."""
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
