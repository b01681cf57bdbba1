"""Time of one run at one point of the grid, without an adapter and with each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from regrow_toolchain.measurement import EnergyMeter

from ..worker import Reporter
from .common import Case, calibrate, feeds_of, in_turns, open_bundle

__all__ = ["run"]


def run(case: Case, report: Reporter) -> dict[str, Any]:
    """`subjects`: by adapter's name ("" for none) times, CPU time and energy of a run."""
    before = calibrate()
    report.stage = "open"
    bundle = open_bundle(case)
    feeds = feeds_of(case, bundle.manifest)
    names: dict[str, str | None] = {"": None}
    for name, path in case["adapters"]:
        bundle.load(path, name=name)
        names[name] = name
    report.stage = "runs"
    meter, joules = EnergyMeter(), dict.fromkeys(names, 0.0)

    def ready(name: str) -> Callable[[], object]:
        bundle.swap(names[name])
        return lambda: bundle.run(feeds)

    def around(name: str) -> Callable[[], None]:
        start = meter.read()

        def done() -> None:
            joules[name] += meter.joules(start, meter.read()) or 0.0

        return done

    found = in_turns(
        {name: partial(ready, name) for name in names},
        runs=case["runs"], seconds=case["seconds"], around=around,
    )  # fmt: skip
    for name, part in found.items():
        told = meter.reason is None
        part["energy_mj"] = 1e3 * joules[name] / len(part["ms"]) if told else None
    return {
        "subjects": found,
        "energy_reason": meter.reason,
        "calibration_ms": min(before, calibrate()),
    }
