"""Passes over the traced graph: slots become inputs with a default, shapes and metadata follow."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from regrow_format.errors import RegrowError
from regrow_format.manifest import TensorSpec

__all__ = [
    "INT4_OPSET",
    "IR_VERSION",
    "OPSET",
    "SlotTensor",
    "add_input",
    "all_graphs",
    "describe",
    "drop_initializers",
    "drop_unread",
    "make_rank_dynamic",
    "opset_of",
    "promote_to_inputs",
    "read_names",
    "remove_initializers",
    "share_constants",
    "specs",
]

_SMALL = 256  # entries: shapes and indices, whose values inference follows
OPSET = 18  # the lowest with bitwise operators, which the seeded mode needs
IR_VERSION = 9  # ONNX Runtime 1.20 reads up to 10
INT4_OPSET = 21  # the lowest with int4 tensors, and with a scale per block
_INT4_IR = 10


@dataclass(frozen=True, eq=False)
class SlotTensor:
    """A graph input with a default: its name, the default, and its shape with dynamic names.

    A default of None is what the tracer wrote, float32.
    """

    name: str
    default: NDArray[Any] | None
    shape: tuple[int | str, ...]


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, then those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_graphs(attribute.g)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    return (node for part in all_graphs(graph) for node in part.node)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators."""
    versions = {item.domain: int(item.version) for item in model.opset_import}
    return versions.get("") or versions["ai.onnx"]


def remove_initializers(
    model: onnx.ModelProto, names: Sequence[str], keep: Collection[str] = ()
) -> None:
    """Remove slot initializers by name but those of `keep`, leaving the nodes that read them.

    Raises:
        RegrowError: the tracer lost one, or no node reads it: the slot would have no effect.
    """
    graph = model.graph
    read = {name for node in _all_nodes(graph) for name in node.input}
    there = {initializer.name for initializer in graph.initializer}
    lost = [name for name in names if name not in read or name not in there]
    if lost:
        targets = sorted({name.rpartition(".")[0] for name in lost})
        raise RegrowError(
            "targets must be reached by the model's forward pass, got no trace of "
            f"{', '.join(targets)}; drop them from the targets, or name the head that is used"
        )
    gone = set(names).difference(keep)
    for index in reversed(range(len(graph.initializer))):  # in place: a new list copies weights
        if graph.initializer[index].name in gone:
            del graph.initializer[index]


def share_constants(
    model: onnx.ModelProto, names: Mapping[str, str], values: Mapping[str, NDArray[np.int8]]
) -> None:
    """Let nodes read int8 constants, as float32, in the place of traced initializers.

    Args:
        names: by initializer, which of `values` takes its place.

    Raises:
        RegrowError: the tracer lost an initializer.
    """
    remove_initializers(model, list(names))
    for node in _all_nodes(model.graph):
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    casts = []
    for name, value in values.items():
        stored = numpy_helper.from_array(value, f"{name}.signs")
        model.graph.initializer.append(stored)
        casts.append(helper.make_node("Cast", [stored.name], [name], to=onnx.TensorProto.FLOAT))
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *rest])


def add_input(model: onnx.ModelProto, slot: SlotTensor) -> None:
    """Add an overridable input: a graph input that is also an initializer."""
    dtype = np.dtype(np.float32) if slot.default is None else slot.default.dtype
    kind, shape = helper.np_dtype_to_tensor_dtype(dtype), list(slot.shape)
    model.graph.input.append(helper.make_tensor_value_info(slot.name, kind, shape))
    if slot.default is not None:
        value = np.ascontiguousarray(slot.default)
        model.graph.initializer.append(numpy_helper.from_array(value, slot.name))


def make_rank_dynamic(model: onnx.ModelProto, names: Sequence[str], *, cut: bool) -> None:
    """Let products with a delta [n, r, out] read as many columns of x as it has rows.

    The tracer wrote x[..., :2] D with a constant 2, the length that it saw.

    Args:
        names: of the deltas.
        cut: read x[..., :r], with r from the delta's shape; else all of x.

    Raises:
        RegrowError: a delta is read by something else than such a product.
    """
    deltas = set(names)
    for graph in reversed(list(all_graphs(model.graph))):  # inner ones first: they are copied
        made = {output: node for node in graph.node for output in node.output}
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            for name in deltas.intersection(node.input):
                nodes += _free_delta(node, made, name, cut=cut)
            nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)
    if deltas:
        drop_unread(model.graph)


def _free_delta(
    product: onnx.NodeProto, made: Mapping[str, onnx.NodeProto], delta: str, *, cut: bool
) -> list[onnx.NodeProto]:
    """Change what a product reads beside the delta; returns nodes that go before it."""
    traced = made.get(product.input[0])
    if product.op_type != "MatMul" or traced is None or traced.op_type != "Slice":
        raise RegrowError(
            f"{delta} must be traced as a slice and a product, got {product.op_type}: the exporter "
            "rewrote it; export with slots of another kind"
        )
    product.input[0] = traced.input[0]
    if not cut:
        return []
    # By the product's name, since a layer that is called twice has two.
    rows, axis, zero, part = (f"{product.output[0]}/{what}" for what in ("r", "axis", "0", "x"))
    product.input[0], whole = part, product.input[0]
    return [
        helper.make_node("Shape", [delta], [rows], start=1, end=2),
        helper.make_node("Constant", [], [zero], value_ints=[0]),
        helper.make_node("Constant", [], [axis], value_ints=[-1]),
        helper.make_node("Slice", [whole, zero, rows, axis], [part]),
    ]


def drop_unread(graph: onnx.GraphProto) -> None:
    """Drop nodes whose outputs nothing reads any more."""
    outputs = {output.name for output in graph.output}
    while True:
        read = outputs | {name for node in _all_nodes(graph) for name in node.input}
        kept = [node for node in graph.node if read.intersection(node.output)]
        if len(kept) == len(graph.node):
            return
        del graph.node[:]
        graph.node.extend(kept)


def read_names(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that nodes read, in inner graphs too, and those of outputs; once for each reader."""
    for part in all_graphs(graph):
        for node in part.node:
            yield from node.input
        yield from (output.name for output in part.output)


def drop_initializers(graph: onnx.GraphProto, *, keep: Collection[str]) -> None:
    """Drop those that nothing reads but `keep`, in place: a new list would copy the weights."""
    read = set(read_names(graph)).union(keep)
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in read:
            del graph.initializer[index]


def promote_to_inputs(model: onnx.ModelProto, slots: Sequence[SlotTensor]) -> None:
    """Turn traced initializers into overridable inputs with the slots' defaults and shapes."""
    keep = [slot.name for slot in slots if slot.default is None]
    remove_initializers(model, [slot.name for slot in slots], keep)
    for slot in slots:
        add_input(model, slot)
    _free_outputs(model)


def _free_outputs(model: onnx.ModelProto) -> None:
    """Infer the outputs' shapes anew: a head with other classes must not contradict the graph."""
    outputs = {output.name: _dims(output) for output in model.graph.output}
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    found = {value.name: _dims(value) for value in _light_inference(model).graph.output}
    for output in model.graph.output:
        traced, inferred = outputs[output.name], found[output.name]
        if len(traced) != len(inferred):
            inferred = tuple(f"{output.name}_{axis}" for axis in range(len(traced)))
        dims = [
            _join(*pair, f"{output.name}_{i}")
            for i, pair in enumerate(zip(traced, inferred, strict=True))
        ]
        kind = output.type.tensor_type.elem_type
        output.CopyFrom(helper.make_tensor_value_info(output.name, kind, dims))


def _join(traced: int | str, inferred: int | str, name: str) -> int | str:
    """A name that the exporter gave stays; a number only where inference finds the same one."""
    if isinstance(traced, str) and traced:
        return traced
    made_up = isinstance(inferred, str) and (not inferred or inferred.startswith("unk__"))
    return name if made_up else inferred


def _light_inference(model: onnx.ModelProto) -> onnx.ModelProto:
    """Shape inference on a copy without the large weights, so that their size is no matter."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    for part in ("node", "input", "output"):
        getattr(light.graph, part).extend(getattr(model.graph, part))
    light.graph.name = model.graph.name
    inputs = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name in inputs:
            continue  # a default's shape is not the input's
        if math.prod(tensor.dims) <= _SMALL:
            light.graph.initializer.append(tensor)
        else:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            light.graph.input.append(value)
    return onnx.shape_inference.infer_shapes(light, data_prop=True)


def describe(model: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Pin the IR version, name the producer, and write `metadata_props`."""
    model.ir_version = _INT4_IR if opset_of(model) >= INT4_OPSET else IR_VERSION
    model.producer_name, model.producer_version = "regrow", ""
    model.graph.name = "backbone"
    helper.set_model_props(model, dict(metadata))


def _dims(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param
        for d in value.type.tensor_type.shape.dim
    )


def specs(
    values: Sequence[onnx.ValueInfoProto], without: Sequence[str] = ()
) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of graph inputs or outputs for the manifest."""
    found = []
    for value in values:
        if value.name not in without:
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            found.append(TensorSpec(value.name, str(dtype), _dims(value)))
    return tuple(found)
