"""A bundle beside the torch model that it was made of: what an export checks, once more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from regrow_export.quantization import rounded_weights
from regrow_export.tracing import run_torch
from regrow_export.validation import INT8_SHARE, compare
from regrow_format.adapter import Adapter
from regrow_format.errors import RegrowError
from regrow_runtime import Bundle
from regrow_runtime.checks import PROBE_FILE, load_tensors
from regrow_toolchain.adapters import applied
from regrow_toolchain.models import Backbone, load_backbone

from .finding import Finding

__all__ = ["compared"]

Arrays = Mapping[str, NDArray[Any]]


def compared(bundle: Bundle, path: Path, adapters: Sequence[Path]) -> Iterator[Finding]:
    """The backbone's identity, then the base and every adapter on the bundle's probe."""
    backbone, manifest = load_backbone(path), bundle.manifest
    if backbone.backbone_id != manifest.backbone_id:
        yield Finding("backbone", "failed", f"{path} is another one: {backbone.backbone_id[:19]}…")
        return
    yield Finding("backbone", "ok", f"{path} is what the bundle was made of")
    if PROBE_FILE not in manifest.files:
        yield Finding("torch", "skipped", "the bundle has no probe: export again")
        return
    if manifest.mode == "swappable":
        yield _beside(bundle, backbone, None, None)
    for file in adapters:
        adapter = Adapter.load(file)
        if manifest.mode == "swappable" or adapter.digest() == manifest.adapter:
            yield _beside(bundle, backbone, adapter, file)
    if manifest.mode != "swappable" and not adapters:
        detail = f"a {manifest.mode} bundle has an adapter built in: give it with --adapter"
        yield Finding("torch", "skipped", detail)


def _beside(
    bundle: Bundle, backbone: Backbone, adapter: Adapter | None, file: Path | None
) -> Finding:
    check = f"torch, {file.name if file else 'base'}"
    try:
        worst = _worst(bundle, backbone, adapter)
    except RegrowError as error:
        return Finding(check, "failed", str(error))
    return Finding(check, "ok", f"largest difference {worst:.1e}")


def _worst(bundle: Bundle, backbone: Backbone, adapter: Adapter | None) -> float:
    """Largest difference over the probe's samples, one at a time, as a device runs them."""
    manifest, model, worst = bundle.manifest, backbone.model, 0.0
    exact = manifest.variant in ("fp32", "fp16") and not (
        manifest.variant == "fp16" and manifest.mode == "merged"
    )
    name = None
    if adapter is not None and manifest.mode == "swappable":
        name = "verify --against"
        bundle.load(adapter, name=name)
    with ExitStack() as stack:
        stack.enter_context(rounded_weights(model, manifest.variant))
        if adapter is not None:
            stack.enter_context(applied(model, adapter))
        for inputs in _samples(bundle):
            want = run_torch(model, inputs)
            got = bundle.run(inputs, [name] if name else None)
            shared = [output for output in got if output in want]
            for output in shared:
                share = None if exact else INT8_SHARE
                worst = max(worst, compare(got[output], want[output], f"output {output}", share))
            if not shared:
                raise RegrowError(f"torch must give {', '.join(got)}, got {', '.join(want)}")
    return worst


def _samples(bundle: Bundle) -> Iterator[Arrays]:
    stored = load_tensors(bundle.folder / PROBE_FILE)
    arrays = {spec.name: stored[spec.name] for spec in bundle.graph.inputs}
    for row in range(min(len(array) for array in arrays.values())):
        yield {name: array[row : row + 1] for name, array in arrays.items()}
