"""Time of a swap: cold, with a cached basis, to a resident adapter, with N of them installed."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from regrow_runtime import Bundle
from regrow_runtime.bundle import SwapStats
from regrow_runtime.sessions import PROFILES, Profile

from ..worker import Reporter
from .common import Case, Stopwatch, calibrate, feeds_of, open_bundle

__all__ = ["install", "roomy", "run"]

_RESIDENT_SWAPS = 200
_RAM_SHARE = 0.4  # of what is free, that residents may take in a profile


def run(case: Case, report: Reporter) -> dict[str, Any]:
    """`counts`: for each N times of the three kinds, and what residents take.

    The N adapters are copies of the case's under other names. Before a cold swap the cached basis
    is dropped, so that each is as after another user's seed.
    """
    calibration = calibrate()
    files = install(Path(case["adapters"][0][1]), Path(case["room"]), max(case["residents"]))
    found = [_count(case, report, files[:count]) for count in case["residents"]]
    return {"counts": found, "calibration_ms": calibration}


def install(path: Path, scratch: Path, count: int) -> list[Path]:
    """Copies under names of their own, as a device with so many users has them."""
    files = [scratch / f"user-{number:06}.safetensors" for number in range(count)]
    for file in files:
        shutil.copyfile(path, file)
    return files


def _count(case: Case, report: Reporter, files: Sequence[Path]) -> dict[str, Any]:
    report.stage = f"{len(files)} adapters"
    bundle = open_bundle(case, roomy(case, case["each"] * len(files)))
    feeds = feeds_of(case, bundle.manifest)
    bundle.run(feeds)
    draw = random.Random(0)
    cold = _from_disk(bundle, files, draw, case["runs"], clear=True)
    bundle.swap(files[0])  # the second use of a large basis makes it ready for all further ones
    cached = _from_disk(bundle, files, draw, case["runs"], clear=False)
    bundle.swap(None)
    for file in files:
        bundle.load(file)
    resident = _resident(bundle, files, draw, feeds)
    return {"installed": len(files), "cold": cold, "cached": cached, **resident}


def roomy(case: Case, wanted: int) -> Profile:
    """The case's profile, with room for `wanted` bytes of residents if the machine has it."""
    profile = PROFILES[case["profile"]]
    scratch = max(profile.resident_bytes, min(2 * wanted, int(_RAM_SHARE * case["available"])))
    return replace(profile, resident_bytes=scratch)


def _from_disk(
    bundle: Bundle, files: Sequence[Path], draw: random.Random, runs: int, *, clear: bool
) -> dict[str, Any]:
    """Swaps to adapters drawn at random, none of them resident."""
    watch, cpu, parts = Stopwatch(), 0.0, []
    for turn in range(runs + 2):
        file = draw.choice(files)
        bundle.swap(None)
        for name in bundle.residents:
            bundle.unload(name)
        if clear:
            bundle.basis.clear()
        if turn < 2:  # warm up
            bundle.swap(file)
            continue
        start = time.process_time()
        cost = watch.time(partial(bundle.swap, file), _total)
        cpu += time.process_time() - start
        parts.append((cost.read_ms, cost.check_ms, cost.expand_ms))
    means = [sum(column) / len(parts) for column in zip(*parts, strict=True)]
    return {**watch.found(), "cpu_ms": 1e3 * cpu / runs, "read_check_expand_ms": means}


def _total(cost: SwapStats) -> float:
    return cost.total_ms


def _resident(
    bundle: Bundle, files: Sequence[Path], draw: random.Random, feeds: dict[str, Any]
) -> dict[str, Any]:
    names = list(bundle.residents)
    swaps, first = Stopwatch(), Stopwatch()
    for _ in range(_RESIDENT_SWAPS):
        bundle.swap(None)
        swaps.time(partial(bundle.swap, draw.choice(names)), _total)
    drawn = [draw.choice(names) for _ in range(_RESIDENT_SWAPS)]
    start = time.process_time()  # a watch takes longer than such a swap
    for name in drawn:
        bundle.swap(None)
        bundle.swap(name)
    cpu = time.process_time() - start
    for _ in range(min(20, _RESIDENT_SWAPS)):
        bundle.swap(draw.choice(names))
        first.time(partial(bundle.run, feeds))
    return {
        "resident": {**swaps.found(), "cpu_ms": 1e3 * cpu / (2 * _RESIDENT_SWAPS)},
        "first_run": first.found(),
        "held": len(names),
        "held_bytes": sum(bundle.residents.values()),
    }
