"""Does the bundle open and run, and which adapters fit? Every reason, before anything is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regrow_runtime import Adapter, Bundle, RegrowError

from ..feeds import Feeds, has_length, probe_length
from ..worker import Reporter
from .common import Case, feeds_of, open_bundle

__all__ = ["run"]


def run(case: Case, report: Reporter) -> dict[str, Any]:
    """The manifest's facts, and `adapters`: for each its figures, or `reason`."""
    report.stage = "open"
    bundle = open_bundle(case)
    manifest = bundle.manifest
    report.stage = "first run"
    feeds: Feeds = {}
    for cell in case["cells"]:
        feeds = feeds_of({**case, **cell}, manifest)
        bundle.run(feeds)
    return {
        "bundle": {
            "mode": manifest.mode,
            "variant": manifest.variant,
            "task": manifest.task,
            "backbone_id": manifest.backbone_id,
            "bytes": sum(entry.size for entry in manifest.files.values()),
            "targets": len({s.target for s in manifest.slots if s not in manifest.head_slots}),
            "inputs": {spec.name: list(spec.shape) for spec in manifest.graphs[0].inputs},
        },
        "length": probe_length(Path(case["bundle"]), manifest),
        "has_length": has_length(manifest),
        "adapters": [_adapter(bundle, name, Path(path), feeds) for name, path in case["adapters"]],
    }


def _adapter(bundle: Bundle, name: str, path: Path, feeds: Feeds) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "file": str(path), "reason": None}
    try:
        adapter = Adapter.load(path)
        cost = bundle.swap(path, name=name)
        bundle.run(feeds)
        bundle.swap(None)
        bundle.unload(name)
    except RegrowError as error:
        return {**found, "reason": " ".join(str(error).split())}
    return {
        **found,
        "method": adapter.method,
        "storage": adapter.storage,
        "bytes": path.stat().st_size,
        "resident_bytes": cost.resident_bytes,
    }
