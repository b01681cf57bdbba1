"""What cases share: opening the bundle, warming up, timing in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from regrow_format.manifest import Manifest
from regrow_runtime import Bundle
from regrow_runtime.bundle import PROFILES, Profile

from ..feeds import Feeds, make_feeds

__all__ = ["calibrate", "feeds_of", "in_turns", "open_bundle", "timed", "warm_up"]

Case = Mapping[str, Any]

_WARM_RUNS, _WARM_SECONDS = 3, 0.2
_MOST_TIMES = 20_000  # of one subject in one process
_BLOCK_SECONDS = 0.02


def open_bundle(case: Case, profile: Profile | None = None) -> Bundle:
    """The case's bundle with its profile and threads."""
    chosen = profile or PROFILES[case["profile"]]
    return Bundle.open(case["bundle"], profile=chosen, threads=case["threads"])


def feeds_of(case: Case, manifest: Manifest) -> Feeds:
    """Inputs of the case's batch and length."""
    return make_feeds(Path(case["bundle"]), manifest, case["batch"], case["length"])


def timed(call: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def warm_up(call: Callable[[], object]) -> float:
    """Call until caches and clocks have settled; milliseconds of the quickest call."""
    best, start = timed(call), time.perf_counter()
    for count in range(1000):
        if count + 1 >= _WARM_RUNS and time.perf_counter() - start > _WARM_SECONDS:
            break
        best = min(best, timed(call))
    return best


def in_turns(
    subjects: Mapping[str, Callable[[], Callable[[], object]]],
    *,
    runs: int,
    seconds: float,
    around: Callable[[str], Callable[[], None]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Time subjects in turns, a block of calls at a time, so that noise meets all of them alike.

    Args:
        subjects: by name, what makes the subject ready and returns the call to time.
        runs, seconds: of each subject at least.
        around: called before a block with the subject's name, gives what to call after it.

    Returns:
        By subject `ms`, a time per call, and `cpu_ms`, the mean CPU time of all threads per call.
    """
    found = {name: {"ms": [], "cpu_ms": 0.0} for name in subjects}
    block = {name: _block(warm_up(ready())) for name, ready in subjects.items()}
    wall = dict.fromkeys(subjects, 0.0)
    while any(_wanting(len(_ms(found[n])), wall[n], runs, seconds) for n in subjects):
        for name, ready in subjects.items():
            call = ready()
            call()  # back to this subject's caches
            done = around(name) if around else None
            start, cpu = time.perf_counter(), time.process_time()
            times = [timed(call) for _ in range(block[name])]
            found[name]["cpu_ms"] += (time.process_time() - cpu) * 1e3  # type: ignore[operator]
            wall[name] += time.perf_counter() - start
            if done:
                done()
            _ms(found[name]).extend(times)
    for part in found.values():
        part["cpu_ms"] = part["cpu_ms"] / len(_ms(part))  # type: ignore[operator]
    return found


def _ms(part: Mapping[str, Any]) -> list[float]:
    times: list[float] = part["ms"]
    return times


def _block(milliseconds: float) -> int:
    return max(1, min(50, int(_BLOCK_SECONDS * 1e3 / max(milliseconds, 1e-3))))


def _wanting(count: int, wall: float, runs: int, seconds: float) -> bool:
    return count < _MOST_TIMES and (count < runs or wall < seconds)


def calibrate() -> float:
    """Milliseconds of a fixed piece of work with one thread: how fast the machine is just now.

    The lower quartile: what waits for other programs does not count.
    """
    draw = np.random.default_rng(0)
    left = draw.standard_normal((192, 192)).astype(np.float32)
    flat = draw.standard_normal(1 << 18).astype(np.float32)

    def work() -> None:
        for _ in range(2):
            np.einsum("ij,kj->ik", left, left)  # not BLAS: one thread, whatever is set
            np.sort(flat[: 1 << 14])
            flat.sum()

    work()
    return float(np.percentile([timed(work) for _ in range(16)], 25))
