"""Seeded: the basis rebuilt inside the graph; nothing fed is the adapter, another may be fed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from torch import nn

from regrow_export.config import ExportRequest
from regrow_export.graph import promote_to_inputs
from regrow_export.methods import adapter_inputs, check_graph, graph_storage, splice
from regrow_export.quantization import rounded_weights
from regrow_export.slots import (
    Feeds,
    adapter_slots,
    expansion_feeds,
    head_feeds,
    head_slots,
    head_tensors,
    head_widths,
    model_head,
    set_slots,
    shared_copy,
    with_slots,
)
from regrow_export.source import ExportSource
from regrow_export.tracing import run_torch
from regrow_export.validation import Checker, check_adapter
from regrow_format.adapter import Adapter, Coefficients, HeadLayer
from regrow_format.basis import BasisCache
from regrow_format.manifest import SeededSpec, Slot
from regrow_format.methods import get_method

from .common import Draft, Job, Mode, draft_of, measured, store, traced_model, write
from .merging import merged_model

__all__ = ["SEEDED"]

Head = Sequence[HeadLayer]


def _check(source: ExportSource, request: ExportRequest) -> None:
    check_graph(_built_in(request))
    head_widths(source, request.targets)


def _draft(job: Job) -> Draft:
    """With `constants` the adapter's numbers and its head are built in: nothing can be fed."""
    source, constants = job.source, job.config.constants
    adapter = _built_in(job.request)
    own = adapter.head.layers if adapter.head else model_head(source.model, source.head)
    model, heads = _model(source, own, constants=constants)
    slotted = with_slots(model, [*adapter_slots(adapter), *heads])
    traced = traced_model(job, slotted)
    store(job, model, traced, source.head)
    splice(traced.graph, adapter, constants=constants)
    promote_to_inputs(traced.graph, head_tensors(heads, head_feeds(own)))
    fed = () if constants else tuple(adapter_inputs(adapter))
    checker = write(job, traced, heads, fed)
    head = () if constants else own
    feeds = _tensors(adapter, head)
    with rounded_weights(model, job.config.precision):
        parity = check_adapter(checker, shared_copy(source.model), slotted, feeds)
        if fed:
            parity["fed_max_abs"] = _check_another(checker, slotted, adapter, head)
    set_slots(slotted, feeds)
    score = measured(job, checker, slotted)
    return draft_of(traced, parity, score, heads, _spec(adapter, fed))


def _built_in(request: ExportRequest) -> Adapter:
    assert request.adapter is not None  # see regrow_export.config
    return request.adapter


def _model(
    source: ExportSource, own: Head, *, constants: bool
) -> tuple[nn.Module, tuple[Slot, ...]]:
    """What is traced, and the slots of its head."""
    if constants:
        return merged_model(source.model, {}, own), ()
    return source.model, head_slots(head_widths(source, []))


def _check_another(checker: Checker, slotted: nn.Module, adapter: Adapter, head: Head) -> float:
    """Feed another adapter of the same config; the largest difference to torch."""
    other = _another(adapter)
    set_slots(slotted, _tensors(other, head))
    return checker.against(
        partial(run_torch, slotted), adapter_inputs(other), "another adapter, fed"
    )


def _another(adapter: Adapter) -> Adapter:
    """A made adapter of the same config: another seed, the coefficients in reverse order."""
    coefficients = {
        name: Coefficients(np.ascontiguousarray(part.values[:, ::-1]), part.scale)
        for name, part in adapter.coefficients.items()
    }
    return replace(adapter, seed=adapter.seed ^ (2**63 + 1), coefficients=coefficients)


def _tensors(adapter: Adapter, head: Head) -> Feeds:
    """What the adapter puts into the slots, by input name."""
    expansion = get_method(adapter.method).expand(adapter, BasisCache(max_bytes=0))
    return {**expansion_feeds(expansion), **head_feeds(head)}


def _spec(adapter: Adapter, fed: Sequence[str]) -> SeededSpec:
    return SeededSpec(
        method=adapter.method,
        config=dict(adapter.config),
        storage=graph_storage(adapter.storage),
        targets=tuple(target.name for target in adapter.targets),
        inputs={name: name for name in fed},
    )


SEEDED = Mode(_check, _draft)
