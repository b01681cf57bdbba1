"""Expanders beside a swappable graph: an adapter's numbers in, what its slots take out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from regrow_export.methods import (
    adapter_inputs,
    build_expander,
    check_graph,
    graph_storage,
    input_types,
)
from regrow_format.adapter import Adapter
from regrow_format.basis import BasisCache
from regrow_format.errors import RegrowError, UsageError
from regrow_format.manifest import ExpanderSpec, Manifest, Slot, TensorSpec
from regrow_format.methods import get_method
from regrow_runtime.slot_feeds import slot_feeds

__all__ = ["check_expanders", "write_expanders"]

# Of the largest entry, where sums or cosines are rounded: FourierFT, and NOLA's float coefficients.
_TOLERANCE = 1e-6


def check_expanders(adapters: Sequence[Adapter], slots: Sequence[Slot]) -> None:
    """Raise `UsageError` if an expander cannot be built, or its outputs are no slots' inputs."""
    by_target = {(slot.target, slot.kind): slot for slot in slots}
    for adapter in adapters:
        check_graph(adapter)
        method, rank = get_method(adapter.method), adapter.config.get("rank", 0)
        if not method.kinds:
            raise UsageError(f"expander must be of a method with targets, got {adapter.method}")
        for target, kind in _filled(adapter):
            slot = by_target.get((target, kind))
            if slot is None:
                raise UsageError(
                    f"expander of {adapter.method} must have {kind} slots to feed, got none for "
                    f"{target}: export its layers, and with --slots {kind} (beside other "
                    f"--slots) or --for {adapter.method}"
                )
            if slot.rank is not None and rank > slot.rank:
                raise UsageError(
                    f"expander of {adapter.method} must have rank {slot.rank} or less, as the "
                    f"slots have, got {rank}"
                )


def _filled(adapter: Adapter) -> list[tuple[str, str]]:
    """Target and kind of every slot that the adapter fills."""
    fills = get_method(adapter.method).fills
    return [(t.name, kind) for t in adapter.targets for kind in fills(adapter.config, t)]


def write_expanders(
    folder: Path, adapters: Sequence[Adapter], manifest: Manifest
) -> tuple[ExpanderSpec, ...]:
    """`expand-<method>.onnx` for each kind of adapter, checked with that adapter's numbers.

    Adapters of one method, config, dtype and targets share one; where a method has several, the
    second is `expand-<method>-2.onnx`.

    Raises:
        RegrowError: a graph does not give what the runtime feeds.
    """
    found: list[ExpanderSpec] = []
    for adapter in adapters:
        spec = _spec(adapter, manifest.slots)
        if any(spec == replace(other, file="") for other in found):
            continue
        before = [other.method for other in found].count(adapter.method)
        file = f"expand-{adapter.method}{f'-{before + 1}' if before else ''}.onnx"
        found.append(replace(spec, file=file))
        _write(folder / file, adapter, manifest)
    return tuple(found)


def _spec(adapter: Adapter, slots: Sequence[Slot]) -> ExpanderSpec:
    """All but the name of the file."""
    types = input_types(adapter.method, adapter.config, adapter.targets, adapter.storage)
    inputs = {(slot.target, slot.kind): slot.inputs for slot in slots}
    return ExpanderSpec(
        method=adapter.method,
        config=dict(adapter.config),
        storage=graph_storage(adapter.storage),
        targets=tuple(target.name for target in adapter.targets),
        file="",
        inputs=tuple(TensorSpec(name, dtype, shape) for name, (dtype, shape) in types.items()),
        outputs=tuple(name for place in _filled(adapter) for name in inputs[place].values()),
    )


def _write(path: Path, adapter: Adapter, manifest: Manifest) -> None:
    """Save the graph, and run it beside the runtime."""
    import onnx
    import onnxruntime as ort

    kinds = get_method(adapter.method).kinds
    ranks = {slot.rank for slot in manifest.slots if slot.kind in kinds} - {None}
    model = build_expander(
        adapter.config, adapter.targets, adapter.storage, adapter.method,
        rank=ranks.pop() if ranks else None,
    )  # fmt: skip
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, adapter_inputs(adapter)), strict=True))
    wanted = slot_feeds(adapter, manifest, BasisCache(), path.parent)
    exact = graph_storage(adapter.storage) == "int8" and adapter.method != "fourierft"
    for name, value in wanted.items():
        limit = 0.0 if exact else _TOLERANCE * float(np.abs(value).max(initial=0.0))
        worst = float(np.abs(found[name] - value).max(initial=0.0))
        if found[name].shape != value.shape or not worst <= limit:
            raise RegrowError(
                f"{path.name}: {name} must be the runtime's within {limit:.3g}, got a difference "
                f"of {worst:.3g}"
            )
