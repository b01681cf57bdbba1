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

from regrow_export.graph import (
    GRAPH_FILE,
    describe,
    keep_gelu,
    opset_of,
    place_of,
    promote_to_inputs,
    save_graph,
    specs,
)
from regrow_export.layers import block_weights
from regrow_export.methods import adapter_inputs, graph_storage, splice
from regrow_export.quantization import check_slot_inputs, rounded_weights, store_weights
from regrow_export.slots import (
    KINDS,
    Feeds,
    SlotPlan,
    adapter_slots,
    constant_feeds,
    expansion_feeds,
    head_feeds,
    head_slots,
    head_tensors,
    head_widths,
    model_head,
    rewrite_slots,
    set_slots,
    shared_copy,
    target_tensors,
    with_slots,
)
from regrow_export.source import ExportSource
from regrow_export.tracing import Traced, cache_names, called_modules, run_torch, trace
from regrow_export.validation import (
    Checker,
    Measure,
    check_adapter,
    check_folded,
    check_slots,
    scored,
)
from regrow_format.adapter import Adapter, Coefficients
from regrow_format.basis import BasisCache
from regrow_format.errors import UsageError
from regrow_format.kv_cache import CacheSpec
from regrow_format.manifest import Score, SeededSpec, Slot, StoredWeight, TensorSpec
from regrow_format.methods import get_method

from .expander_files import check_expanders
from .merging import merged_model, with_extra

__all__ = ["Draft", "merged", "plain", "seeded", "swappable"]

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
    score: Score | None = None
    cache: CacheSpec | None = None


def swappable(
    source: ExportSource,
    folder: Path,
    targets: Sequence[str],
    plan: SlotPlan,
    inputs: Arrays | None,
    precision: str = "fp32",
    measure: Measure | None = None,
) -> Draft:
    """Slots around every target and every layer of the head; nothing fed is the base."""
    own, heads = plan.target_slots(source, targets), plan.head_slots(source, targets)
    slots = (*own, *heads)
    if not slots:
        raise UsageError("targets must name at least one layer for mode swappable, got none")
    check_expanders(plan.expanders, slots)
    slotted, traced = _trace_slotted(source, folder, slots, inputs)
    _store(source.model, traced, precision, source.head)
    rewrite_slots(traced.graph, own, whole=plan.fixed_rank is not None)
    set_slots(slotted, constant_feeds(own))
    defaults = head_feeds(model_head(source.model, source.head))
    promote_to_inputs(traced.graph, [*target_tensors(own), *head_tensors(heads, defaults)])
    checker = _write(source, folder, "swappable", traced, slots, precision)
    slots = _located(slots, traced)
    with rounded_weights(source.model, precision):
        base = partial(run_torch, shared_copy(source.model))
        parity = checker.base(base)
        parity |= check_slots(checker, slotted, slots)
    return _draft(traced, slots, parity, _score(checker, source.model, measure))


def merged(
    source: ExportSource,
    folder: Path,
    adapter: Adapter,
    inputs: Arrays | None,
    precision: str = "fp32",
    measure: Measure | None = None,
) -> Draft:
    """The adapter folded into the weights: a plain graph, compared to the same in slots.

    Below fp32 the weights are rounded with the adapter in them, so torch's slots stand beside the
    folded model in fp32, and that model, rounded, beside the graph.
    """
    expansion = get_method(adapter.method).expand(adapter, BasisCache())
    layers = adapter.head.layers if adapter.head else ()
    changed = with_extra(source.model, adapter.extra)
    folded = merged_model(changed, expansion, layers)
    traced = _trace(folded, source, folder, inputs)
    _store(folded, traced, precision)
    checker = _write(source, folder, "merged", traced, (), precision)
    widths = {layer.name: (layer.weight.shape[1], layer.weight.shape[0]) for layer in layers}
    slotted = with_slots(changed, [*adapter_slots(adapter), *head_slots(widths)])
    feeds = {**expansion_feeds(expansion), **head_feeds(layers)}
    base = shared_copy(source.model)
    if precision == "fp32":
        parity = check_adapter(checker, base, slotted, feeds)
    else:
        with rounded_weights(folded, precision):
            found = checker.against(partial(run_torch, folded), {}, "the adapter")
        effect = check_folded(checker.inputs, base, slotted, folded, feeds)
        parity = {"adapter_max_abs": found, **effect}
    return _draft(traced, (), parity, _score(checker, folded, measure))


def plain(
    source: ExportSource,
    folder: Path,
    inputs: Arrays | None,
    precision: str = "fp32",
    measure: Measure | None = None,
) -> Draft:
    """The backbone as it is: a plain graph without a slot, compared to torch."""
    traced = _trace(source.model, source, folder, inputs)
    _store(source.model, traced, precision)
    checker = _write(source, folder, "merged", traced, (), precision)
    with rounded_weights(source.model, precision):
        parity = checker.base(partial(run_torch, shared_copy(source.model)))
    return _draft(traced, (), parity, _score(checker, source.model, measure))


def seeded(
    source: ExportSource,
    folder: Path,
    adapter: Adapter,
    inputs: Arrays | None,
    precision: str = "fp32",
    measure: Measure | None = None,
    *,
    constants: bool = False,
) -> Draft:
    """The basis rebuilt inside the graph; nothing fed is the adapter, another may be fed.

    Args:
        constants: build the adapter's numbers and its head in, so that nothing can be fed.
    """
    own = adapter.head.layers if adapter.head else model_head(source.model, source.head)
    base, heads = source, head_slots(head_widths(source, []))
    if constants:
        base, heads = replace(source, model=merged_model(source.model, {}, own)), ()
    slotted, traced = _trace_slotted(base, folder, [*adapter_slots(adapter), *heads], inputs)
    _store(base.model, traced, precision, source.head)
    splice(traced.graph, adapter, constants=constants)
    promote_to_inputs(traced.graph, head_tensors(heads, head_feeds(own)))
    fed = () if constants else tuple(adapter_inputs(adapter))
    checker = _write(source, folder, "seeded", traced, heads, precision, fed)
    other, head = _another(adapter), () if constants else own
    with rounded_weights(base.model, precision):
        parity = check_adapter(checker, shared_copy(source.model), slotted, _tensors(adapter, head))
        if fed:
            set_slots(slotted, _tensors(other, head))
            parity["fed_max_abs"] = checker.against(
                partial(run_torch, slotted), adapter_inputs(other), "another adapter, fed"
            )
    set_slots(slotted, _tensors(adapter, head))
    score = _score(checker, slotted, measure)
    spec = SeededSpec(
        method=adapter.method,
        config=dict(adapter.config),
        storage=graph_storage(adapter.storage),
        targets=tuple(target.name for target in adapter.targets),
        inputs={name: name for name in fed},
    )
    return _draft(traced, heads, parity, score, spec, fed)


def _trace(model: nn.Module, source: ExportSource, folder: Path, inputs: Arrays | None) -> Traced:
    with TemporaryDirectory(dir=folder) as scratch:
        return trace(model, source.task, inputs, Path(scratch), cache=source.cache)


def _trace_slotted(
    source: ExportSource, folder: Path, slots: Sequence[Slot], inputs: Arrays | None
) -> tuple[nn.Module, Traced]:
    slotted = with_slots(source.model, slots)
    return slotted, _trace(slotted, source, folder, inputs)


def _store(model: nn.Module, traced: Traced, precision: str, outside: Sequence[str] = ()) -> None:
    """Store the weights of the model's blocks in `precision`; `outside` are layers with slots."""
    if precision == "fp32":
        return
    weights = [weight for weight in block_weights(model) if weight.owner not in outside]
    called = called_modules(model, traced.inputs)
    store_weights(traced.graph, weights, precision, called)


def _write(
    source: ExportSource,
    folder: Path,
    mode: str,
    traced: Traced,
    slots: Sequence[Slot],
    precision: str,
    fed: Sequence[str] = (),
) -> Checker:
    """Save the graph, its metadata in it, and open it in ONNX Runtime."""
    keep_gelu(traced.graph)
    check_slot_inputs(traced.graph, _input_names(slots))
    metadata = {"backbone_id": source.backbone_id, "mode": mode, "task": source.task}
    describe(traced.graph, metadata | {"variant": precision})
    outside = _input_names([slot for slot in slots if _keeps_default(slot)])
    inline = _input_names([slot for slot in slots if not slot.fixed])
    traced.graph = save_graph(traced.graph, folder, {*inline, *fed}, outside)
    return Checker(folder / GRAPH_FILE, traced.inputs, traced.outputs, precision, traced.cache)


def _located(slots: Sequence[Slot], traced: Traced) -> tuple[Slot, ...]:
    """The slots, those of weights with the place of their default in the bundle."""
    tensors = {tensor.name: tensor for tensor in traced.graph.graph.initializer}
    return tuple(
        replace(slot, weight=StoredWeight(*place_of(tensors[next(iter(slot.inputs.values()))])))
        if _keeps_default(slot)
        else slot
        for slot in slots
    )


def _keeps_default(slot: Slot) -> bool:
    """Whether what the tracer wrote stays: heads' defaults are written anew."""
    return slot.kind in KINDS and KINDS[slot.kind].keeps_default


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


def _score(checker: Checker, exact: nn.Module, measure: Measure | None) -> Score | None:
    """What the bundle loses on samples, beside `exact` in fp32."""
    exact = shared_copy(exact)
    return scored(checker.deployed, checker.outputs, checker.cache, exact, measure)


def _with_sizes(spec: TensorSpec, sizes: Sequence[int]) -> TensorSpec:
    """`spec` with the dimensions after the batch that may not vary as numbers."""
    kept = spec.shape[1 + len(sizes) :]
    return replace(spec, shape=(*spec.shape[:1], *sizes, *kept)) if sizes else spec


def _draft(
    traced: Traced,
    slots: tuple[Slot, ...],
    parity: Mapping[str, float],
    score: Score | None,
    spec: SeededSpec | None = None,
    fed: Sequence[str] = (),
) -> Draft:
    graph, cache = traced.graph, cache_names(traced.cache)
    return Draft(
        file=GRAPH_FILE,
        opset=opset_of(graph),
        ir_version=graph.ir_version,
        input_specs=tuple(
            _with_sizes(spec, traced.fixed.get(spec.name, ()))
            for spec in specs(graph.graph.input, [*_input_names(slots), *fed, *cache])
        ),
        output_specs=specs(graph.graph.output, list(cache)),
        inputs=traced.inputs,
        slots=slots,
        seeded=spec,
        parity=parity,
        score=score,
        cache=traced.cache,
    )
