"""Time and memory from a process's start to its residents, stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..worker import Reporter
from .common import Case, feeds_of, open_bundle

__all__ = ["run"]

_MORE_RUNS = 10


def run(case: Case, report: Reporter) -> dict[str, Any]:
    """Everything is in the stages."""

    def stage(name: str, call: Callable[[], Any]) -> Any:
        report.begin(name)
        value = call()
        report.reached()
        return value

    bundle = stage("open", lambda: open_bundle(case))
    report.stage = "first run"
    feeds = feeds_of(case, bundle.manifest)
    stage("first run", lambda: bundle.run(feeds))
    stage(f"{_MORE_RUNS} more runs", lambda: [bundle.run(feeds) for _ in range(_MORE_RUNS)])
    if case["adapters"]:
        name, path = case["adapters"][0]
        stage("swap", lambda: bundle.swap(path, name=name))
        stage("run with adapter", lambda: bundle.run(feeds))
    return {}
