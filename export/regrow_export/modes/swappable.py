"""Swappable: slots around every target and every layer of the head; nothing fed is the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from regrow_export.config import ExportRequest
from regrow_export.graph import place_of, promote_to_inputs
from regrow_export.quantization import rounded_weights
from regrow_export.slots import (
    SlotPlan,
    constant_feeds,
    head_feeds,
    head_tensors,
    model_head,
    rewrite_slots,
    set_slots,
    shared_copy,
    target_tensors,
    with_slots,
)
from regrow_export.source import ExportSource
from regrow_export.tracing import Traced, run_torch
from regrow_export.validation import check_slots
from regrow_format.errors import UsageError
from regrow_format.manifest import Slot, StoredWeight
from regrow_runtime.slots import HEAD_FILE

from .common import Draft, Job, Mode, draft_of, keeps_default, measured, store, traced_model, write
from .expander_files import check_expanders

__all__ = ["SWAPPABLE"]


def _plan(request: ExportRequest) -> SlotPlan:
    return SlotPlan(request.kinds, request.config.fixed_rank, request.adapter)


def _check(source: ExportSource, request: ExportRequest) -> None:
    plan = _plan(request)
    plan.target_slots(source, request.targets)
    plan.head_slots(source, request.targets)


def _draft(job: Job) -> Draft:
    source, request = job.source, job.request
    plan = _plan(request)
    own = plan.target_slots(source, request.targets)
    heads = plan.head_slots(source, request.targets)
    slots = (*own, *heads)
    if not slots:
        raise UsageError("targets must name at least one layer for mode swappable, got none")
    check_expanders(request.expanders, slots)
    slotted = with_slots(source.model, slots)
    traced = traced_model(job, slotted)
    store(job, source.model, traced, source.head)
    rewrite_slots(traced.graph, own, whole=plan.fixed_rank is not None)
    set_slots(slotted, constant_feeds(own))
    defaults = head_feeds(model_head(source.model, source.head))
    promote_to_inputs(traced.graph, [*target_tensors(own), *head_tensors(heads, defaults)])
    checker = write(job, traced, slots)
    slots = _located(slots, traced)
    with rounded_weights(source.model, job.config.precision):
        parity = checker.base(partial(run_torch, shared_copy(source.model)))
        parity |= check_slots(checker, slotted, slots)
    if source.head:
        _write_head(job.folder, source)
    return draft_of(traced, parity, measured(job, checker, source.model), slots)


def _located(slots: Sequence[Slot], traced: Traced) -> tuple[Slot, ...]:
    """The slots, those of weights with the place of their default in the bundle."""
    tensors = {tensor.name: tensor for tensor in traced.graph.graph.initializer}
    return tuple(
        replace(slot, weight=StoredWeight(*place_of(tensors[next(iter(slot.inputs.values()))])))
        if keeps_default(slot)
        else slot
        for slot in slots
    )


def _write_head(folder: Path, source: ExportSource) -> None:
    """The backbone's head apart: a batch may mix it with heads of adapters (see the runtime)."""
    from safetensors.numpy import save_file

    tensors = {}
    for layer in model_head(source.model, source.head):
        tensors[f"{layer.name}.weight"] = np.ascontiguousarray(layer.weight)
        tensors[f"{layer.name}.bias"] = layer.bias
    save_file(tensors, folder / HEAD_FILE)


SWAPPABLE = Mode(_check, _draft)
