"""From a backbone to a bundle: what `regrow_export` needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from regrow_export import ExportSource, export_bundle, kinds_for
from regrow_export.targets import check_adapter
from regrow_runtime.adapter import Adapter, Target
from regrow_runtime.errors import UsageError
from regrow_runtime.manifest import Manifest

from .backbone import Backbone
from .targets import find_targets

__all__ = ["export_backbone"]


def export_backbone(
    backbone: Backbone,
    out: str | Path,
    *,
    mode: str = "swappable",
    targets: Sequence[str] = (),
    methods: Sequence[str] = (),
    adapter: Adapter | None = None,
    inputs: Mapping[str, NDArray[Any]] | None = None,
    force: bool = False,
) -> Manifest:
    """Write the bundle `out`; see `regrow_export.export_bundle` for modes and errors.

    Args:
        targets: names or patterns of the layers that get slots; those of `adapter`, or what each
            method changes by default if none.
        methods: whose adapters a swappable bundle takes, and that of `adapter`; those with low-rank
            slots (nola, lora, vera) if neither is given.
        inputs: by argument name of the model's forward, samples first: what the model is traced
            and checked with; needed for a plain module, made up for others.
    """
    source = ExportSource(
        model=backbone.model,
        task=backbone.task,
        backbone_id=backbone.backbone_id,
        head=backbone.head,
        labels=backbone.labels,
        files=backbone.files,
    )
    if adapter is not None:
        check_adapter(source, adapter)
    if mode != "swappable":
        if methods:
            raise UsageError(f"methods must be left out for mode {mode}: the adapter has its own")
        return export_bundle(
            source, Path(out), mode=mode, targets=list(targets), adapter=adapter, inputs=inputs,
            force=force,
        )  # fmt: skip
    if adapter is not None and adapter.extra:
        raise UsageError(
            f"adapter must have no saved modules ({min(adapter.extra)}) to be swapped, since there "
            "is no slot for them: export it with mode merged"
        )
    methods = [*methods, adapter.method] if adapter is not None else list(methods) or ["nola"]
    names = _names(backbone, targets, methods, adapter)
    kinds = dict.fromkeys(kind for method in methods for kind in kinds_for(method))
    return export_bundle(
        source, Path(out), targets=names, kinds=list(kinds), inputs=inputs, force=force
    )


def _names(
    backbone: Backbone, patterns: Sequence[str], methods: Sequence[str], adapter: Adapter | None
) -> list[str]:
    """Module paths of the targets."""
    if adapter is not None and not patterns:
        return [target.name for target in adapter.targets]
    found: list[Target] = []
    slots = {method: kinds_for(method) for method in methods}
    if any(kinds and kinds != ("bias",) for kinds in slots.values()):
        found += find_targets(backbone.model, patterns)
    if "bitfit" in slots:
        found += find_targets(backbone.model, patterns, method="bitfit")
    if patterns and not any(slots.values()):
        raise UsageError(f"method head changes no layers, got targets {', '.join(patterns)}")
    return sorted({target.name for target in found}, key=str.encode)
