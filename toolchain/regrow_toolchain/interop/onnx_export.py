"""From a backbone to a bundle: what `regrow_export` needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from regrow_export import (
    ExportConfig,
    ExportRequest,
    ExportSource,
    Measure,
    export_bundle,
    kinds_for,
    slot_targets,
)
from regrow_export.slots import check_adapter
from regrow_format.adapter import Adapter, Target
from regrow_format.errors import SettingError
from regrow_format.manifest import Manifest
from regrow_format.methods import get_method
from regrow_toolchain.data import Dataset, dummy_inputs, for_device
from regrow_toolchain.models import Backbone, find_targets

from .export_score import export_evaluation

__all__ = ["export_backbone"]


def export_backbone(
    backbone: Backbone,
    out: str | Path,
    config: ExportConfig | None = None,
    *,
    adapter: Adapter | None = None,
    expanders: Sequence[Adapter] = (),
    inputs: Mapping[str, NDArray[Any]] | None = None,
    data: Dataset | None = None,
    force: bool = False,
) -> Manifest:
    """Write the bundle `out`, and check it against torch before it is kept.

    Args:
        config: what the bundle is, and how adapters enter it. Targets are names or patterns of
            layers; without any they are those of `adapter`, or what each method changes by default.
        adapter, expanders, inputs: see `ExportRequest`.
        data: samples to measure what the precision costs, in the score of their task; classes are
            those of the model, or of the head that is built in.
        force: replace `out` if it is a bundle.

    Raises:
        UsageError: what was asked for makes no sense, alone or for this backbone.
        MismatchError: an adapter belongs to another model.
        RegrowError: tracing failed, or the bundle and torch disagree.
    """
    backbone = for_device(backbone)
    source = _source(backbone)
    inputs = dummy_inputs(backbone) if inputs is None else inputs
    request = ExportRequest(config or ExportConfig(), adapter, expanders, inputs)
    if adapter is not None:
        check_adapter(source, adapter)
    request = replace(request, measure=_measure(backbone, data, request))
    if request.config.mode == "swappable":
        names = _target_names(backbone, request)
        _check_rank(request, source, names)
        request = replace(request, config=replace(request.config, targets=names))
    return export_bundle(source, out, request, force=force)


def _source(backbone: Backbone) -> ExportSource:
    return ExportSource(
        model=backbone.model,
        task=backbone.task,
        backbone_id=backbone.backbone_id,
        head=backbone.head,
        labels=backbone.labels,
        files=backbone.files,
    )


def _measure(backbone: Backbone, data: Dataset | None, request: ExportRequest) -> Measure | None:
    """How good the model is on `data`, by the labels of the head that the bundle will have."""
    if data is None:
        return None
    built_in = request.config.mode != "swappable" and request.adapter
    head = built_in.head if built_in else None
    return export_evaluation(backbone, data, head.labels if head else backbone.labels)


def _check_rank(request: ExportRequest, source: ExportSource, names: Sequence[str]) -> None:
    """Raise `SettingError` if a fixed rank is above the narrowest layer's width."""
    rank = request.config.fixed_rank
    if rank is None or "vera" in request.methods or request.config.slots:
        return
    targets = slot_targets(source.model, names, kinds_for("lora"))
    narrow = min(targets, key=_width, default=None)
    if narrow is not None and rank > _width(narrow):
        raise SettingError(
            "{fixed_rank} must be at most {0}, the width of {1}, got {2}: lower it, or leave that "
            "layer out of the {targets} (VeRA's may be larger: {methods} vera)",
            _width(narrow),
            narrow.name,
            rank,
        )


def _width(target: Target) -> int:
    return min(target.in_features, target.out_features)


def _target_names(backbone: Backbone, request: ExportRequest) -> tuple[str, ...]:
    """Module paths of the targets."""
    patterns = request.config.targets
    if request.adapter is not None and not patterns:
        return request.targets
    # One method of each sort of targets will do.
    sorts = {get_method(name).targets: name for name in request.methods if kinds_for(name)}
    found = [find_targets(backbone.model, patterns, method=name) for name in sorts.values()]
    return tuple(sorted({t.name for targets in found for t in targets}, key=str.encode))
