"""What ONNX Runtime fuses when it opens a graph, and should leave alone: a pass over the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import onnx
from onnx import TensorProto, helper

from .passes import all_graphs, drop_initializers, drop_unread, read_names

__all__ = ["keep_gelu"]


def keep_gelu(model: onnx.ModelProto) -> int:
    """Store biases that are added to a product before a GELU as [1, out] instead of [out].

    ONNX Runtime makes one operator, BiasGelu, of a bias of one dimension and the GELU behind it,
    and 1.31 has a faster kernel for the GELU alone: without the fusion ViT-Base takes 3 to 4 % less
    time (two threads of a Xeon); 1.20 and 1.23 take as long as before. The results are the same, to
    the bit.

    A bias after integer products is left as it is: there, ONNX Runtime fuses it into the product,
    which is worth more. So is one that may be fed.

    Returns:
        How many sums were changed.
    """
    fed = {value.name for value in model.graph.input}
    reads = Counter(read_names(model.graph))
    changed = 0
    for graph in all_graphs(model.graph):
        biases = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in fed}
        for node, place, name in _sums(graph, {n for n, t in biases.items() if _is_bias(t)}):
            if node.input[place] != name or reads[name] > 1:
                node.input[place] = _copied(graph, biases, name)
            else:
                biases[name].dims.insert(0, 1)
            changed += 1
    if changed:
        drop_unread(model.graph)
        drop_initializers(model.graph, keep=fed)
    return changed


def _is_bias(tensor: TensorProto) -> bool:
    return len(tensor.dims) == 1 and tensor.data_type == TensorProto.FLOAT


def _sums(
    graph: onnx.GraphProto, biases: Collection[str]
) -> Iterator[tuple[onnx.NodeProto, int, str]]:
    """Sums of a product and a bias before a GELU, the bias's place in them, and its name."""
    # Tracers write equal biases once, and the others as its Identity.
    origin = {name: name for name in biases}
    products: set[str] = set()
    gelus = _before_gelu(graph)
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        elif node.op_type == "MatMul":
            products.add(node.output[0])
        elif node.op_type == "Add" and node.output[0] in gelus:
            for place, other in ((0, 1), (1, 0)):
                if node.input[place] in origin and node.input[other] in products:
                    yield node, place, origin[node.input[place]]


def _before_gelu(graph: onnx.GraphProto) -> set[str]:
    """What a GELU reads: the operator's input, or x of x (1 + erf(x / √2)) / 2 in its parts."""
    erfs = {node.input[0] for node in graph.node if node.op_type == "Erf"}
    found: set[str] = set()
    for node in graph.node:
        given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "Gelu" and given.get("approximate", b"none") == b"none":
            found.add(node.input[0])
        elif node.op_type in ("Div", "Mul") and node.output[0] in erfs:
            found.update(node.input)
    return found


def _copied(graph: onnx.GraphProto, tensors: dict[str, TensorProto], name: str) -> str:
    """The name of a copy [1, out], made once; who else reads the bias finds it as it was."""
    copy = f"{name}/row"
    if copy not in tensors:
        row = graph.initializer.add()
        row.CopyFrom(tensors[name])
        row.name = copy
        row.dims.insert(0, 1)
        tensors[copy] = row
    return copy
