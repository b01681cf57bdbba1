"""Memory with N adapters resident, in one process that loads more and more of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..worker import Reporter
from .common import Case, feeds_of, open_bundle
from .swaps import install, roomy

__all__ = ["run"]


def run(case: Case, report: Reporter) -> dict[str, Any]:
    """A stage per N, with `held`, how many stayed resident; nothing else."""
    most = max(case["residents"])
    files = install(Path(case["adapters"][0][1]), Path(case["room"]), most)
    report.stage = "open"
    bundle = open_bundle(case, roomy(case, most * case["each"]))
    bundle.run(feeds_of(case, bundle.manifest))
    report.begin("first run")
    report.reached(held=0)
    for count in case["residents"]:
        report.begin(f"{count} resident")
        for file in files[len(bundle.residents) : count]:
            bundle.load(file)
        report.reached(held=len(bundle.residents), count=count)
    return {}
