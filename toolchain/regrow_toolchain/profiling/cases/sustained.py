"""Runs without a pause, for as long as asked: does the time of a run stay what it was?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from regrow_toolchain.measurement import Times, read_clock

from ..worker import Reporter
from .common import Case, feeds_of, open_bundle, timed, warm_up

__all__ = ["run"]

_WINDOWS = 60
_SHORTEST = 1.0  # seconds of a window
_ZONES = Path("/sys/class/thermal")  # psutil tells of disks and radios instead, where it can


def run(case: Case, report: Reporter) -> dict[str, Any]:
    """`windows`: at most 60, each with percentiles, clock and temperature where told."""
    report.stage = "open"
    bundle = open_bundle(case)
    feeds = feeds_of(case, bundle.manifest)
    if case["adapters"]:
        bundle.swap(case["adapters"][0][1])
    report.stage = "runs"
    warm_up(lambda: bundle.run(feeds))
    total = case["sustained"]
    width, start = max(_SHORTEST, total / _WINDOWS), time.perf_counter()
    windows: list[dict[str, Any]] = []
    times: list[float] = []
    edge = width
    while (now := time.perf_counter() - start) < total:
        times.append(timed(lambda: bundle.run(feeds)))
        if now + times[-1] / 1e3 >= edge:
            windows.append(_window(now, times))
            report.send("progress", seconds=now, of=total)
            times, edge = [], now + times[-1] / 1e3 + width
    if times:
        windows.append(_window(time.perf_counter() - start, times))
    return {"seconds": time.perf_counter() - start, "windows": windows}


def _window(end: float, times: list[float]) -> dict[str, Any]:
    found = Times.of(times)
    return {
        "end_s": end,
        "n": found.n,
        "p50": found.p50,
        "p99": found.p99,
        "max": found.max,
        "mhz": read_clock(),
        "celsius": _hottest(),
    }


def _hottest() -> float | None:
    zones = [_celsius(path) for path in _ZONES.glob("thermal_zone*/temp")]
    return max((zone for zone in zones if zone is not None), default=None)


def _celsius(path: Path) -> float | None:
    """Of a file such as "47500": thousandths of a degree."""
    try:
        return int(path.read_text()) / 1e3
    except (OSError, ValueError):
        return None
