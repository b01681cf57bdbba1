"""The three export modes: what is traced, what is changed in the graph, what it is compared to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from regrow_runtime.adapter import Adapter, Coefficients, Target
from regrow_runtime.basis import BasisCache
from regrow_runtime.errors import UsageError
from regrow_runtime.manifest import SeededSpec, Slot, TensorSpec
from regrow_runtime.methods import get_method

from .expander import adapter_inputs, graph_storage, splice
from .feeds import (
    Feeds,
    expansion_feeds,
    head_feeds,
    head_slots,
    low_rank_slots,
    model_head,
)
from .graph import SlotTensor, describe, open_slots, specs
from .merge import merged_model
from .parity import Checker, check_adapter, check_slots
from .slots import set_slots, shared_copy, with_slots
from .source import ExportSource
from .store import GRAPH_FILE, save_graph
from .targets import head_widths, slot_targets
from .trace import Traced, run_torch, trace

__all__ = ["Draft", "merged", "seeded", "swappable"]

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Draft:
    """A graph that was written and checked, and what the manifest says about it."""

    file: str
    opset: int
    ir_version: int
    input_specs: tuple[TensorSpec, ...]
    output_specs: tuple[TensorSpec, ...]
    inputs: dict[str, NDArray[Any]]
    slots: tuple[Slot, ...] = ()
    seeded: SeededSpec | None = None
    parity: Mapping[str, float] = field(default_factory=dict)


def swappable(
    source: ExportSource, folder: Path, targets: Sequence[str], inputs: Arrays | None
) -> Draft:
    """A slot around every target and every layer of the head; nothing fed is the base."""
    layers = slot_targets(source.model, targets)
    low_rank, heads = low_rank_slots(layers), head_slots(head_widths(source, targets))
    slots = (*low_rank, *heads)
    if not slots:
        raise UsageError("targets must name at least one layer for mode swappable, got none")
    slotted, traced = _trace_slotted(source, folder, layers, inputs)
    defaults = head_feeds(model_head(source.model, source.head))
    open_slots(traced.graph, [*_empty(low_rank), *_filled(heads, defaults)])
    checker = _write(source, folder, "swappable", traced, slots)
    parity = {
        "base_max_abs": checker.against(partial(run_torch, shared_copy(source.model)), {}, "base")
    }
    parity |= check_slots(checker, slotted, slots)
    return _draft(traced, slots, parity)


def merged(source: ExportSource, folder: Path, adapter: Adapter, inputs: Arrays | None) -> Draft:
    """The adapter folded into the weights: a plain graph, compared to the same in slots."""
    expansion = get_method(adapter.method).expand(adapter, BasisCache())
    layers = adapter.head.layers if adapter.head else ()
    model = merged_model(source.model, expansion, layers)
    traced = _trace(model, source, folder, inputs)
    checker = _write(source, folder, "merged", traced, ())
    slotted = with_slots(source.model, adapter.targets, [layer.name for layer in layers])
    feeds = {**expansion_feeds(expansion), **head_feeds(layers)}
    parity = check_adapter(checker, shared_copy(source.model), slotted, feeds)
    return _draft(traced, (), parity)


def seeded(source: ExportSource, folder: Path, adapter: Adapter, inputs: Arrays | None) -> Draft:
    """The basis rebuilt inside the graph; nothing fed is the adapter, another may be fed."""
    slotted, traced = _trace_slotted(source, folder, adapter.targets, inputs)
    heads = head_slots(head_widths(source, []))
    own = adapter.head.layers if adapter.head else model_head(source.model, source.head)
    splice(traced.graph, adapter)
    open_slots(traced.graph, _filled(heads, head_feeds(own)))
    fed = tuple(adapter_inputs(adapter))
    checker = _write(source, folder, "seeded", traced, heads, fed)
    parity = check_adapter(checker, shared_copy(source.model), slotted, _tensors(adapter, own))
    other = _another(adapter)
    set_slots(slotted, _tensors(other, own))
    parity["fed_max_abs"] = checker.against(
        partial(run_torch, slotted), adapter_inputs(other), "another adapter, fed"
    )
    spec = SeededSpec(
        method=adapter.method,
        config=dict(adapter.config),
        storage=graph_storage(adapter.storage),
        targets=tuple(target.name for target in adapter.targets),
        inputs={name: name for name in fed},
    )
    return _draft(traced, heads, parity, spec, fed)


def _trace(model: nn.Module, source: ExportSource, folder: Path, inputs: Arrays | None) -> Traced:
    with TemporaryDirectory(dir=folder) as scratch:
        return trace(model, source.task, inputs, Path(scratch))


def _trace_slotted(
    source: ExportSource, folder: Path, targets: Sequence[Target], inputs: Arrays | None
) -> tuple[nn.Module, Traced]:
    slotted = with_slots(source.model, targets, source.head)
    return slotted, _trace(slotted, source, folder, inputs)


def _empty(slots: Sequence[Slot]) -> list[SlotTensor]:
    """Defaults of rank 0. Dimensions have names per slot: each may have a rank of its own."""
    found = []
    for slot in slots:
        n, rank, (a, b) = f"{slot.target}.n", f"{slot.target}.rank", slot.inputs.values()
        wide, high = slot.in_features, slot.out_features
        found.append(SlotTensor(a, np.zeros((1, wide, 0), np.float32), (n, wide, rank)))
        found.append(SlotTensor(b, np.zeros((1, 0, high), np.float32), (n, rank, high)))
    return found


def _filled(slots: Sequence[Slot], defaults: Feeds) -> list[SlotTensor]:
    """Head slots with their defaults; the number of classes is dynamic."""
    found = []
    for slot in slots:
        n, classes = f"{slot.target}.n", f"{slot.target}.classes"
        shapes = {"weight": (n, slot.in_features, classes), "bias": (n, 1, classes)}
        for part, name in slot.inputs.items():
            found.append(SlotTensor(name, defaults[name], shapes[part]))
    return found


def _write(
    source: ExportSource,
    folder: Path,
    mode: str,
    traced: Traced,
    slots: Sequence[Slot],
    fed: Sequence[str] = (),
) -> Checker:
    """Save the graph, its metadata in it, and open it in ONNX Runtime."""
    describe(traced.graph, {"backbone_id": source.backbone_id, "mode": mode, "task": source.task})
    save_graph(traced.graph, folder, inline={*_input_names(slots), *fed})
    return Checker(folder / GRAPH_FILE, traced.inputs, traced.outputs)


def _input_names(slots: Sequence[Slot]) -> list[str]:
    return [name for slot in slots for name in slot.inputs.values()]


def _tensors(adapter: Adapter, head: Sequence[Any]) -> Feeds:
    """What the adapter puts into the slots, by input name."""
    expansion = get_method(adapter.method).expand(adapter, BasisCache(max_bytes=0))
    return {**expansion_feeds(expansion), **head_feeds(head)}


def _another(adapter: Adapter) -> Adapter:
    """A made adapter of the same config: another seed, the coefficients in reverse order."""
    coefficients = {
        name: Coefficients(np.ascontiguousarray(part.values[:, ::-1]), part.scale)
        for name, part in adapter.coefficients.items()
    }
    return replace(adapter, seed=adapter.seed ^ (2**63 + 1), coefficients=coefficients)


def _with_sizes(spec: TensorSpec, sizes: Sequence[int]) -> TensorSpec:
    """`spec` with the dimensions after the batch that may not vary as numbers."""
    kept = spec.shape[1 + len(sizes) :]
    return replace(spec, shape=(*spec.shape[:1], *sizes, *kept)) if sizes else spec


def _draft(
    traced: Traced,
    slots: tuple[Slot, ...],
    parity: Mapping[str, float],
    spec: SeededSpec | None = None,
    fed: Sequence[str] = (),
) -> Draft:
    graph = traced.graph
    return Draft(
        file=GRAPH_FILE,
        opset=next(item.version for item in graph.opset_import if item.domain in ("", "ai.onnx")),
        ir_version=graph.ir_version,
        input_specs=tuple(
            _with_sizes(spec, traced.fixed.get(spec.name, ()))
            for spec in specs(graph.graph.input, [*_input_names(slots), *fed])
        ),
        output_specs=specs(graph.graph.output),
        inputs=traced.inputs,
        slots=slots,
        seeded=spec,
        parity=parity,
    )
