"""A traced graph in another precision: the weights of blocks in fp16, int8 or int4.

In standard operators alone. Weights are found by their numbers, since tracers rename, transpose
and share them; what only reads them otherwise keeps them as they are.

- fp16: Cast to float32.
- int8: what `quantize_dynamic(reduce_range=True)` writes. DynamicQuantizeLinear rounds the input,
  once for all layers that read it, MatMulInteger multiplies, and the scales of input and channel
  follow.
- int4: DequantizeLinear with a scale per block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from regrow_export.graph import INT4_OPSET, all_graphs, drop_initializers, drop_unread
from regrow_export.layers import BlockWeight
from regrow_format.errors import RegrowError

from .schemes import INT4_BLOCK, half, int4_blocks, int8_channels

__all__ = ["check_slot_inputs", "store_weights"]

# What these mean changed between opsets 18 and 21; other operators only took more types.
_CHANGED = {"DFT", "GridSample", "GroupNormalization"}

T = TypeVar("T")
Key = tuple[tuple[int, ...], bytes]


def store_weights(
    model: onnx.ModelProto,
    weights: Sequence[BlockWeight],
    precision: str,
    reached: Collection[str],
) -> None:
    """Store `weights` in `precision`; the model's other initializers and slots stay.

    Args:
        model: as the tracer made it.
        reached: module paths of layers whose weights must be in the graph.

    Raises:
        RegrowError: such a weight is not, or none is, or one cannot be rounded, or the model has an
            operator that is another one in the opset that int4 needs.
    """
    if precision == "int4":
        _raise_opset(model)
    by_path = {weight.path: weight for weight in weights}
    known = _matches(model.graph, weights)
    writer = _Writer(precision)
    for graph in reversed(list(all_graphs(model.graph))):  # inner ones first: they are copied
        _rewrite(graph, known, by_path, writer)
    lost = [w.path for w in weights if w.owner in reached and w.path not in writer.written]
    if lost or not writer.written:
        raise RegrowError(
            f"weights must stand in the traced graph as they are to be stored in {precision}, got "
            f"no trace of {', '.join(lost) or 'any'}; export fp32"
        )
    writer.finish(model.graph)
    del model.graph.value_info[:]
    drop_unread(model.graph)
    others = {tensor.name for tensor in model.graph.initializer}.difference(known)
    drop_initializers(model.graph, keep=others)


def _raise_opset(model: onnx.ModelProto) -> None:
    nodes = (node for graph in all_graphs(model.graph) for node in graph.node)
    if found := sorted({n.op_type for n in nodes if n.domain == ""} & _CHANGED):
        raise RegrowError(
            f"model must not use {', '.join(found)} for int4, which changed in opset "
            f"{INT4_OPSET}; export it in int8 or fp16"
        )
    for item in model.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = INT4_OPSET


def _key(values: NDArray[np.float32]) -> Key:
    return values.shape, hashlib.blake2b(values.tobytes(), digest_size=16).digest()


def _matches(
    graph: onnx.GraphProto, weights: Sequence[BlockWeight]
) -> dict[str, tuple[list[str], bool]]:
    """By initializer: the paths of the weights that it is, and if it is [out, in]."""
    wanted: dict[Key, tuple[list[str], bool]] = {}
    for transposed in (False, True):
        for weight in weights:
            values = weight.values()
            key = _key(np.ascontiguousarray(values.T) if transposed else values)
            paths, before = wanted.setdefault(key, ([], transposed))
            if before == transposed:
                paths.append(weight.path)
    shapes = {shape for shape, _ in wanted}
    found = {}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tuple(tensor.dims) in shapes:
            key = _key(numpy_helper.to_array(tensor))
            if key in wanted:
                found[tensor.name] = wanted[key]
    return found


def _rewrite(
    graph: onnx.GraphProto,
    known: Mapping[str, tuple[list[str], bool]],
    by_path: Mapping[str, BlockWeight],
    writer: _Writer,
) -> None:
    """Put other products in the place of those with a known weight."""
    known = dict(known)
    nodes: list[onnx.NodeProto] = []
    writer.rounded.clear()  # an inner graph's results are not seen outside
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in known:
            paths, transposed = known[node.input[0]]
            known[node.output[0]] = paths, not transposed
        found = known.get(node.input[1]) if len(node.input) > 1 else None
        if found is None or not _is_product(node, transposed=found[1]):
            nodes.append(node)
            continue
        writer.written.update(found[0])
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        output = f"{node.output[0]}/product" if bias else node.output[0]
        nodes += writer.product(node.input[0], by_path[found[0][0]], output)
        if bias:
            nodes.append(helper.make_node("Add", [output, bias], [node.output[0]]))
    del graph.node[:]
    graph.node.extend(nodes)


def _is_product(node: onnx.NodeProto, *, transposed: bool) -> bool:
    """Whether the node computes x W (+ b) from W [in, out], or from W [out, in] if `transposed`."""
    if node.op_type == "MatMul":
        return not transposed
    if node.op_type != "Gemm":
        return False
    given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | given
    return plain == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": int(transposed)}


class _Writer:
    """Makes products x W with W in one precision; each weight is stored once.

    Attributes:
        written: paths of the weights that are stored.
        rounded: by tensor, the names of its int8 codes, scale and zero point.
    """

    def __init__(self, precision: str) -> None:
        makers: dict[str, Callable[[str, BlockWeight, str], list[onnx.NodeProto]]] = {
            "fp16": self._half,
            "int8": self._int8,
            "int4": self._int4,
        }
        self.product = makers[precision]
        self.written: set[str] = set()
        self.rounded: dict[str, tuple[str, str, str]] = {}
        self._tensors: dict[str, TensorProto] = {}
        self._nodes: dict[str, onnx.NodeProto] = {}

    def finish(self, graph: onnx.GraphProto) -> None:
        """Add the weights, and what makes floats of them, to the outermost graph."""
        graph.initializer.extend(self._tensors.values())
        nodes = [*self._nodes.values(), *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)

    def _half(self, x: str, weight: BlockWeight, output: str) -> list[onnx.NodeProto]:
        values, stored = (f"{weight.path}.{part}" for part in ("float", "fp16"))
        if stored not in self._tensors:
            self._store(stored, self._of(weight, half))
            self._nodes[values] = helper.make_node("Cast", [stored], [values], to=TensorProto.FLOAT)
        return [helper.make_node("MatMul", [x, values], [output])]

    def _int4(self, x: str, weight: BlockWeight, output: str) -> list[onnx.NodeProto]:
        values, codes, scales = (f"{weight.path}.{part}" for part in ("float", "int4", "scale"))
        if codes not in self._tensors:
            packed, scale = self._of(weight, int4_blocks)
            self._tensors[codes] = _int4_tensor(codes, packed, len(weight.values()))
            self._store(scales, np.ascontiguousarray(scale.T))
            self._nodes[values] = helper.make_node(
                "DequantizeLinear", [codes, scales], [values], axis=0, block_size=INT4_BLOCK
            )
        return [helper.make_node("MatMul", [x, values], [output])]

    def _int8(self, x: str, weight: BlockWeight, output: str) -> list[onnx.NodeProto]:
        codes, scales, zeros = (f"{weight.path}.{part}" for part in ("int8", "scale", "zero"))
        if codes not in self._tensors:
            values, scale = self._of(weight, int8_channels)
            self._store(codes, values)
            self._store(scales, scale)
            self._store(zeros, np.zeros(len(scale), dtype=np.int8))
        nodes = []
        if x not in self.rounded:
            self.rounded[x] = (f"{x}/int8", f"{x}/step", f"{x}/zero")
            nodes.append(helper.make_node("DynamicQuantizeLinear", [x], self.rounded[x]))
        rounded, step, zero = self.rounded[x]
        sums, floats, both = (f"{output}/{part}" for part in ("sums", "floats", "scale"))
        return [
            *nodes,
            helper.make_node("MatMulInteger", [rounded, codes, zero, zeros], [sums]),
            helper.make_node("Cast", [sums], [floats], to=TensorProto.FLOAT),
            helper.make_node("Mul", [step, scales], [both]),
            helper.make_node("Mul", [floats, both], [output]),
        ]

    def _of(self, weight: BlockWeight, rounding: Callable[[NDArray[np.float32]], T]) -> T:
        try:
            return rounding(weight.values())
        except RegrowError as error:
            raise RegrowError(f"{weight.path}: {error}") from None

    def _store(self, name: str, values: NDArray[np.generic]) -> None:
        self._tensors[name] = numpy_helper.from_array(values, name)


def _int4_tensor(name: str, packed: NDArray[np.uint8], rows: int) -> TensorProto:
    """Codes as a tensor int4 [in, out] from what `int4_blocks` gives."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)[:, :rows]
    low = (codes.T.ravel() ^ 8).astype(np.uint8)  # code + 8 to two's complement
    low = np.append(low, np.zeros(len(low) % 2, dtype=np.uint8))
    raw = (low[0::2] | low[1::2] << 4).tobytes()
    return helper.make_tensor(name, TensorProto.INT4, (rows, len(packed)), raw, raw=True)


def check_slot_inputs(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Raise `RegrowError` unless each of `names` is a float32 input with a default that is read."""
    inputs = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    defaults = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    read = {n for part in all_graphs(model.graph) for node in part.node for n in node.input}
    for name in names:
        kinds = {inputs.get(name), defaults.get(name)}
        if kinds != {TensorProto.FLOAT} or name not in read:
            raise RegrowError(f"slot must stay a float32 input with a default, got {name} changed")
