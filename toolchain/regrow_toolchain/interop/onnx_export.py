"""From a backbone to a bundle: what `regrow_export` needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from regrow_export import ExportSource, export_bundle, kinds_for, slot_targets
from regrow_export.slots import check_adapter
from regrow_format.adapter import Adapter, Target
from regrow_format.errors import UsageError
from regrow_format.manifest import Manifest
from regrow_format.methods import get_method
from regrow_toolchain.data import Dataset, for_device
from regrow_toolchain.models import Backbone, find_targets

from .export_score import export_evaluation

__all__ = ["export_backbone"]


def export_backbone(
    backbone: Backbone,
    out: str | Path,
    *,
    mode: str = "swappable",
    targets: Sequence[str] = (),
    methods: Sequence[str] = (),
    slots: Sequence[str] = (),
    fixed_rank: int | None = None,
    expanders: Sequence[Adapter] = (),
    adapter: Adapter | None = None,
    constants: bool = False,
    precision: str = "fp32",
    inputs: Mapping[str, NDArray[Any]] | None = None,
    data: Dataset | None = None,
    cache: bool = True,
    force: bool = False,
) -> Manifest:
    """Write the bundle `out`; see `regrow_export.export_bundle` for modes and errors.

    Args:
        targets: names or patterns of the layers that get slots; those of `adapter`, or what each
            method changes by default if none.
        methods: whose adapters a swappable bundle takes, and that of `adapter`; those with low-rank
            slots (nola, lora, vera) if neither is given.
        slots: kinds of slot, instead of those that `methods` take; "vector" needs a VeRA `adapter`.
        fixed_rank: slots of fixed shapes, low_rank ones of this rank; for a swappable bundle.
        expanders: adapters for whose like a swappable bundle gets a graph that expands them.
        constants: of a seeded bundle, whether the adapter's numbers are constants.
        inputs: by argument name of the model's forward, samples first: what the model is traced
            and checked with; needed for a plain module, made up for others.
        precision: fp32, fp16, int8 or int4, of the weights of linear layers in blocks.
        data: samples to measure what `precision` costs, in the score of their task; classes are
            those of the model, or of the head that is built in.
        cache: give a causal language model a key-value cache.
    """
    backbone = for_device(backbone)
    source = ExportSource(
        model=backbone.model,
        task=backbone.task,
        backbone_id=backbone.backbone_id,
        head=backbone.head,
        labels=backbone.labels,
        files=backbone.files,
        cache=cache,
    )
    if adapter is not None:
        check_adapter(source, adapter)
    built_in = adapter.head if adapter is not None and mode != "swappable" else None
    labels = built_in.labels if built_in else backbone.labels
    measure = None if data is None else export_evaluation(backbone, data, labels)
    if mode != "swappable":
        if methods:
            raise UsageError(f"methods must be left out for mode {mode}, which has no slots")
        return export_bundle(
            source, Path(out), mode=mode, targets=list(targets), adapter=adapter,
            precision=precision, inputs=inputs, measure=measure, force=force,
            fixed_rank=fixed_rank, expanders=expanders, constants=constants,
        )  # fmt: skip
    if adapter is not None and adapter.extra:
        raise UsageError(
            f"adapter must have no saved modules ({min(adapter.extra)}) to be swapped, since there "
            "is no slot for them: export it with mode merged"
        )
    given = [one.method for one in (adapter, *expanders) if one is not None]
    methods = [*methods, *given] or ["nola"]
    names = _names(backbone, targets, methods, adapter)
    if fixed_rank is not None and "vera" not in methods and not slots:
        _check_rank(fixed_rank, slot_targets(source.model, names, kinds_for("lora")))
    kinds = slots or dict.fromkeys(kind for method in methods for kind in kinds_for(method))
    return export_bundle(
        source, Path(out), targets=names, kinds=list(kinds), precision=precision, inputs=inputs,
        measure=measure, force=force, fixed_rank=fixed_rank, expanders=expanders,
        vera=adapter if "vector" in kinds else None, constants=constants,
    )  # fmt: skip


def _check_rank(rank: int, targets: Sequence[Target]) -> None:
    """Raise `UsageError` if a fixed rank is above the narrowest layer's width."""
    narrow = min(targets, key=lambda t: min(t.in_features, t.out_features), default=None)
    if narrow is not None and rank > (least := min(narrow.in_features, narrow.out_features)):
        raise UsageError(
            f"fixed rank must be at most {least}, the width of {narrow.name}, got {rank}: lower "
            "it, or leave that layer out of the targets (VeRA's may be larger: --for vera)"
        )


def _names(
    backbone: Backbone, patterns: Sequence[str], methods: Sequence[str], adapter: Adapter | None
) -> list[str]:
    """Module paths of the targets."""
    if adapter is not None and not patterns:
        return [target.name for target in adapter.targets]
    # One method of each sort of targets will do.
    sorts = {get_method(name).targets: name for name in methods if kinds_for(name)}
    if patterns and not sorts:
        raise UsageError(f"method head changes no layers, got targets {', '.join(patterns)}")
    found = [find_targets(backbone.model, patterns, method=name) for name in sorts.values()]
    return sorted({target.name for targets in found for target in targets}, key=str.encode)
