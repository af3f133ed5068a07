"""Which axis of a map is its channel, where the operators of the graph tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onnx import NodeProto

#: Axes of a map after its rows: as ONNX's operators for pictures have them, and as many models of TensorFlow.
FIRST, LAST = ("channel", "y", "x"), ("y", "x", "feature")


def _operators(names: str) -> frozenset[str]:
    return frozenset(names.split())


#: What they give has its channels first, always.
_MAPS = _operators(
    """Conv ConvInteger ConvTranspose DeformConv QLinearConv AveragePool MaxPool LpPool GlobalAveragePool
    GlobalMaxPool GlobalLpPool QLinearAveragePool QLinearGlobalAveragePool MaxUnpool BatchNormalization
    InstanceNormalization GroupNormalization LRN DepthToSpace SpaceToDepth MaxRoiPool RoiAlign"""
)
#: What they give lies as what they get.
_ALIKE = _operators(
    """Abs Add And Cast CastLike Ceil Celu Clip Concat DequantizeLinear Div Dropout Elu Equal Erf Exp Floor
    Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max
    Mean Min Mish Mod Mul Neg Not Or PRelu Pad Pow QLinearAdd QLinearConcat QLinearLeakyRelu QLinearMul
    QLinearSigmoid QuantizeLinear Reciprocal Relu Resize Round Selu Shrink Sigmoid Sign Slice Softmax Softplus
    Softsign Split Sqrt Sub Sum Swish Tanh ThresholdedRelu Upsample Where Xor"""
)
#: What they give lies as what they get first, if its channels are last.
_OF_LAST = frozenset(("LayerNormalization", "MatMul", "RMSNormalization", "SimplifiedLayerNormalization"))
_TURNED: dict[tuple[tuple[str, ...], tuple[int, ...]], tuple[str, ...]] = {
    (FIRST, (0, 2, 3, 1)): LAST,
    (LAST, (0, 3, 1, 2)): FIRST,
}


def dims_of_maps(nodes: Iterable[NodeProto]) -> Mapping[str, tuple[str, ...]]:
    """Return the axes of a row of each tensor that is a map if it has three of them.

    Args:
        nodes: of a graph, in its order.
    """
    known: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        dims = _dims(node, known)
        if dims:
            known |= dict.fromkeys(filter(None, node.output), dims)
    return known


def _dims(node: NodeProto, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    if node.op_type in _MAPS:
        return FIRST
    got = [known[name] for name in node.input if name in known]
    if node.op_type in _ALIKE:
        return got[0] if got and len(set(got)) == 1 else ()
    if node.op_type in _OF_LAST:
        return LAST if known.get(node.input[0]) == LAST else ()
    if node.op_type == "Transpose" and got:
        perm = next((tuple(a.ints) for a in node.attribute if a.name == "perm"), ())
        return _TURNED.get((got[0], perm), ())
    return ()
