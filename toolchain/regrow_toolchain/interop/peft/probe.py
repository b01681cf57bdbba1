"""The probe of an imported adapter: the backbone's outputs with it."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from regrow_format.adapter import Adapter
from regrow_format.errors import RegrowError
from regrow_format.manifest import MANIFEST
from regrow_toolchain.adapters import probe_of

from .base_model import Base

__all__ = ["with_probe"]


def with_probe(adapter: Adapter, path: Path, base: Base) -> Adapter:
    """`adapter` with a probe, if its backbone can be run here exactly.

    That is a bundle in fp32, or where torch is a backbone that no function must make. Nothing else
    is refused for want of a probe.
    """
    try:
        if (path / MANIFEST).is_file():
            return _by_bundle(adapter, path)
        return _by_torch(adapter, base)
    except (RegrowError, OSError):  # as of a bundle that is not whole, or has no such slots
        return adapter


def _by_bundle(adapter: Adapter, path: Path) -> Adapter:
    from regrow_runtime import Bundle
    from regrow_runtime.checks import Prober

    bundle = Bundle.open(path, profile="memory")
    checks = bundle.manifest.checks
    if checks is None or not checks.probe or checks.spread:
        return adapter
    bundle.load(adapter, name="imported")
    inputs = Prober(bundle.folder, bundle.manifest).inputs()
    output = bundle.run(inputs, ["imported"])[bundle.graph.outputs[0].name]
    return replace(adapter, probe=probe_of(output, checks.probe))


def _by_torch(adapter: Adapter, base: Base) -> Adapter:
    if find_spec("torch") is None or find_spec("transformers") is None:
        return adapter
    from regrow_toolchain.adapters import Prober, applied

    model = base.backbone.model
    prober = Prober(model)
    with applied(model, adapter):
        return replace(adapter, probe=prober.probe())
