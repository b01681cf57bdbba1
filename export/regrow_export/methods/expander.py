"""The expansion of an adapter as ONNX nodes: a model of its own, or spliced into a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.adapter import STORAGE, Adapter, Target
from regrow_format.basis import PHILOX_SIGN
from regrow_format.errors import UsageError
from regrow_format.methods import get_method
from regrow_format.philox import key_of
from regrow_format.slot_kinds import SLOT_KINDS

from .registry import get_builder

if TYPE_CHECKING:
    import onnx

    from regrow_export.graph import GraphBuilder

__all__ = [
    "adapter_inputs",
    "build_expander",
    "check_graph",
    "graph_storage",
    "input_types",
    "splice",
]

_PREFIX = "regrow"


def graph_storage(storage: str) -> str:
    """How a graph takes coefficients: codes of 2 to 8 bits as int8, others as fp32."""
    if storage not in STORAGE:
        raise UsageError(f"storage must be one of {', '.join(STORAGE)}, got {storage!r}")
    return "int8" if STORAGE[storage] <= 8 else "fp32"


def check_graph(adapter: Adapter) -> None:
    """Raise `UsageError` with the reason if a graph cannot expand an adapter."""
    get_builder(adapter.method)
    if adapter.extra:
        raise UsageError(
            f"adapter must have no saved modules ({min(adapter.extra)}) to be fed, since there is "
            "no slot for them: export it merged"
        )
    if adapter.basis.kind != PHILOX_SIGN.kind:
        raise UsageError(
            f"basis must be {PHILOX_SIGN.kind} for a graph to rebuild it from the seed, got "
            f"{adapter.basis.kind}, which only the runtime expands: export it merged or swappable"
        )
    if adapter.group is not None:
        raise UsageError(
            "coefficients must have one scale per vector in a graph, got one per group of "
            f"{adapter.group}: export it merged or swappable, or store it without groups"
        )


def input_types(
    method: str, config: Mapping[str, Any], targets: Sequence[Target], storage: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every input of an expansion, by name: seed, coefficients, their scales."""
    dtype = "int8" if graph_storage(storage) == "int8" else "float32"
    found: dict[str, tuple[str, tuple[int, ...]]] = {"seed": ("uint32", (2,))}
    for name, (rows, length) in get_method(method).layout(config, targets).items():
        found[name] = (dtype, (rows, length))
        found[f"{name}.scale"] = ("float32", (rows,))
    return found


def adapter_inputs(adapter: Adapter) -> dict[str, NDArray[Any]]:
    """An adapter's numbers as `input_types` lists them."""
    found: dict[str, NDArray[Any]] = {"seed": np.array(key_of(adapter.seed), dtype=np.uint32)}
    types = input_types(adapter.method, adapter.config, adapter.targets, adapter.storage)
    for name, part in adapter.coefficients.items():
        found[name] = part.values.astype(types[name][0])
        found[f"{name}.scale"] = part.scale.astype(np.float32)
    return found


def build_expander(
    config: Mapping[str, Any],
    targets: Sequence[Target],
    storage: str,
    method: str = "nola",
    *,
    rank: int | None = None,
) -> onnx.ModelProto:
    """A model that takes a seed and coefficients and gives the tensors of the slots.

    Args:
        config: of the method, checked.
        targets: sorted by the UTF-8 bytes of their names, as in an adapter.
        storage: as in an adapter; what it says about the inputs' dtype is all that matters.
        rank: of the slots, where it is fixed; smaller factors are filled up with zeros.

    Returns:
        A model with the inputs of `input_types`, and outputs by the names and of the shapes of the
        slots' inputs, float32, with n = 1. In standard operators. Its basis is philox-sign, its
        coefficients have one scale per vector.
    """
    from onnx import TensorProto, helper, shape_inference

    from regrow_export.graph import IR_VERSION, OPSET

    get_builder(method)
    types = input_types(method, config, targets, storage)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
        for name, (dtype, shape) in types.items()
    ]
    inner = {name: name for name in types}
    nodes, constants, names = _nodes(method, config, targets, storage, inner, rank)
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    graph = helper.make_graph(nodes, "expander", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="regrow"
    )
    model = shape_inference.infer_shapes(model, strict_mode=True)
    del model.graph.value_info[:]
    return model


def _nodes(
    method: str,
    config: Mapping[str, Any],
    targets: Sequence[Target],
    storage: str,
    inputs: Mapping[str, str],
    rank: int | None = None,
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[str]]:
    """Nodes and constants of an expansion, and the slot tensors that they end in.

    Args:
        inputs: by the names of `input_types`, where the values come from.
    """
    from regrow_export.graph import GraphBuilder

    if not targets:
        return [], [], []
    g = GraphBuilder(_PREFIX)
    integer = graph_storage(storage) == "int8"
    found = get_builder(method).build(g, inputs, config, targets, integer=integer)
    missing = 0 if rank is None else rank - config["rank"]
    names = []
    for target, changes in found.items():
        for kind, parts in changes.items():
            inputs_of = SLOT_KINDS[kind].inputs(target)
            for part, value in parts.items():
                after = [missing * (dim == "rank") for dim in SLOT_KINDS[kind].dims[part]]
                names.append(_end(g, value, after, inputs_of[part]))
    return g.nodes, g.constants, names


def _end(g: GraphBuilder, value: str, after: Sequence[int], name: str) -> str:
    """Call a value as its slot's input, with rows and columns of zeros after it."""
    if not any(after):
        return g.op("Identity", value, to=name)
    return g.op("Pad", value, g.integers(0, 0, 0, 0, *after), to=name)


def splice(model: onnx.ModelProto, adapter: Adapter, *, constants: bool = False) -> None:
    """Put an adapter's expansion before a traced backbone, its numbers as overridable inputs.

    Args:
        constants: let them be constants instead; see `_tied_seed`.

    Raises:
        RegrowError: the tracer lost a target.
        UsageError: an input of the model has the name of one of the expansion's.
    """
    from onnx import numpy_helper

    from regrow_export.graph import (
        SlotTensor,
        add_input,
        remove_initializers,
    )
    from regrow_export.slots import adapter_slots, rewrite_slots

    values = adapter_inputs(adapter)
    sources, before = {name: name for name in values}, []
    if constants:
        sources = {name: f"{_PREFIX}.{name}" for name in values}
        before = _tied_seed(model, sources)
    nodes, tensors, names = _nodes(
        adapter.method, adapter.config, adapter.targets, adapter.storage, sources
    )
    clash = [value.name for value in model.graph.input if value.name in sources.values()]
    if clash:
        raise UsageError(f"model inputs must not be called {', '.join(values)}, got {clash}")
    rewrite_slots(model, adapter_slots(adapter), whole=True)
    remove_initializers(model, names)
    for name, value in values.items():
        if constants:
            tensors.append(numpy_helper.from_array(value, f"{_PREFIX}.{name}"))
        else:
            add_input(model, SlotTensor(name, value, value.shape))
    model.graph.initializer.extend(tensors)
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*before, *nodes, *rest])


def _tied_seed(model: onnx.ModelProto, sources: dict[str, str]) -> list[onnx.NodeProto]:
    """Nodes that add 0 to a constant seed, which `sources` then names instead.

    What depends on constants alone, runtimes compute once, when they load the graph: the whole
    basis would stay in RAM. This 0 is the batch size and no bits of it, which they do not know.
    """
    from regrow_export.graph import GraphBuilder

    g = GraphBuilder(f"{_PREFIX}.tied")
    batch = g.op("Shape", model.graph.input[0].name, start=0, end=1)
    nothing = g.op("BitwiseAnd", batch, g.integers(0))
    words = g.cast(sources["seed"], "int64")
    sources["seed"] = g.op("Add", words, nothing)
    model.graph.initializer.extend(g.constants)
    return g.nodes
