"""From a backbone to a bundle: what `regrow_export` needs to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regrow_export import ExportSource, export_bundle
from regrow_export.targets import check_adapter
from regrow_runtime.adapter import Adapter
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
    adapter: Adapter | None = None,
    force: bool = False,
) -> Manifest:
    """Write the bundle `out`; see `regrow_export.export_bundle` for modes and errors.

    Args:
        targets: names or patterns of the layers that get slots; those of `adapter`, or every
            linear layer of the blocks if none.
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
    names = _slots(backbone, targets, adapter) if mode == "swappable" else list(targets)
    built_in = None if mode == "swappable" else adapter
    return export_bundle(source, Path(out), mode=mode, targets=names, adapter=built_in, force=force)


def _slots(backbone: Backbone, patterns: Sequence[str], adapter: Adapter | None) -> list[str]:
    if adapter is not None and not patterns:
        return [target.name for target in adapter.targets]
    return [target.name for target in find_targets(backbone.model, patterns)]
