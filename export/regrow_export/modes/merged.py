"""Merged: one adapter folded into the weights, or none; a plain graph without a slot."""

from __future__ import annotations

from functools import partial

from regrow_export.config import ExportRequest
from regrow_export.quantization import rounded_weights
from regrow_export.slots import (
    adapter_slots,
    expansion_feeds,
    head_feeds,
    head_slots,
    head_widths,
    shared_copy,
    with_slots,
)
from regrow_export.source import ExportSource
from regrow_export.tracing import run_torch
from regrow_export.validation import check_adapter, check_folded
from regrow_format.adapter import Adapter
from regrow_format.basis import BasisCache
from regrow_format.methods import get_method

from .common import Draft, Job, Mode, draft_of, measured, store, traced_model, write
from .merging import merged_model, with_extra

__all__ = ["MERGED"]


def _check(source: ExportSource, request: ExportRequest) -> None:
    head_widths(source, request.targets)


def _draft(job: Job) -> Draft:
    adapter = job.request.adapter
    return _plain(job) if adapter is None else _merged(job, adapter)


def _plain(job: Job) -> Draft:
    """The backbone as it is, compared to torch."""
    model = job.source.model
    traced = traced_model(job, model)
    store(job, model, traced)
    checker = write(job, traced)
    with rounded_weights(model, job.config.precision):
        parity = checker.base(partial(run_torch, shared_copy(model)))
    return draft_of(traced, parity, measured(job, checker, model))


def _merged(job: Job, adapter: Adapter) -> Draft:
    """The adapter folded into the weights, compared to the same in slots.

    Below fp32 the weights are rounded with the adapter in them, so torch's slots stand beside the
    folded model in fp32, and that model, rounded, beside the graph.
    """
    expansion = get_method(adapter.method).expand(adapter, BasisCache())
    layers = adapter.head.layers if adapter.head else ()
    changed = with_extra(job.source.model, adapter.extra)
    folded = merged_model(changed, expansion, layers)
    traced = traced_model(job, folded)
    store(job, folded, traced)
    checker = write(job, traced)
    widths = {layer.name: (layer.weight.shape[1], layer.weight.shape[0]) for layer in layers}
    slotted = with_slots(changed, [*adapter_slots(adapter), *head_slots(widths)])
    feeds = {**expansion_feeds(expansion), **head_feeds(layers)}
    base = shared_copy(job.source.model)
    if job.config.precision == "fp32":
        parity = check_adapter(checker, base, slotted, feeds)
    else:
        with rounded_weights(folded, job.config.precision):
            found = checker.against(partial(run_torch, folded), {}, "the adapter")
        effect = check_folded(checker.inputs, base, slotted, folded, feeds)
        parity = {"adapter_max_abs": found, **effect}
    return draft_of(traced, parity, measured(job, checker, folded))


MERGED = Mode(_check, _draft)
