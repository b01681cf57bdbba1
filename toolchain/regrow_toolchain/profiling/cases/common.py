"""What cases share: opening the bundle, warming up, timing in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np

from regrow_format.manifest import Manifest
from regrow_runtime import Bundle
from regrow_runtime.sessions import PROFILES, Profile
from regrow_toolchain.measurement import CoreWait, Reading, own_ms

from ..feeds import Feeds, make_feeds

__all__ = ["Stopwatch", "calibrate", "feeds_of", "in_turns", "open_bundle", "timed", "warm_up"]

T = TypeVar("T")
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


class Stopwatch:
    """Milliseconds of calls.

    Attributes:
        ms: by the wall clock.
        own: the same less what this thread waited for a core that others had (`CoreWait`).
    """

    def __init__(self) -> None:
        self.ms: list[float] = []
        self.own: list[float] = []
        self._wait = CoreWait()

    def time(self, call: Callable[[], T], tell: Callable[[T], float] | None = None) -> T:
        """Call; `tell` gives the milliseconds where the call measures itself."""
        before, start = self._wait.read(), time.perf_counter()
        value = call()
        ms = (time.perf_counter() - start) * 1e3
        self._add(tell(value) if tell else ms, before, self._wait.read())
        return value

    def laps(self, call: Callable[[Callable[[object], None]], object]) -> None:
        """Times from the start of a call to the first time it tells, and from each to the next."""
        moments = [(self._wait.read(), time.perf_counter())]
        call(lambda _: moments.append((self._wait.read(), time.perf_counter())))
        for (before, start), (after, end) in pairwise(moments):
            self._add((end - start) * 1e3, before, after)

    def add(self, other: Stopwatch, which: slice) -> None:
        """Times of another one."""
        self.ms += other.ms[which]
        self.own += other.own[which]

    def _add(self, ms: float, before: Reading, after: Reading) -> None:
        self.ms.append(ms)
        self.own.append(own_ms(ms, before, after))

    def found(self) -> dict[str, Any]:
        """`ms`, and the median of `own` as `own_ms`."""
        return {"ms": self.ms, "own_ms": median(self.own)}


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
        By subject `ms`, a time per call, `own_ms`, their median less waiting for a core, and
        `cpu_ms`, the mean CPU time of all threads per call.
    """
    watches, spent = {name: Stopwatch() for name in subjects}, dict.fromkeys(subjects, 0.0)
    block = {name: _block(warm_up(ready())) for name, ready in subjects.items()}
    wall = dict.fromkeys(subjects, 0.0)
    while any(_wanting(len(watches[n].ms), wall[n], runs, seconds) for n in subjects):
        for name, ready in subjects.items():
            call = ready()
            call()  # back to this subject's caches
            done = around(name) if around else None
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(block[name]):
                watches[name].time(call)
            spent[name] += (time.process_time() - cpu) * 1e3
            wall[name] += time.perf_counter() - start
            if done:
                done()
    return {
        name: {**watch.found(), "cpu_ms": spent[name] / len(watch.ms)}
        for name, watch in watches.items()
    }


def _block(milliseconds: float) -> int:
    return max(1, min(50, int(_BLOCK_SECONDS * 1e3 / max(milliseconds, 1e-3))))


def _wanting(count: int, wall: float, runs: int, seconds: float) -> bool:
    return count < _MOST_TIMES and (count < runs or wall < seconds)


def calibrate() -> float:
    """Milliseconds of a fixed piece of work with one thread: how fast the machine is just now.

    The lower quartile of times without waiting: other programs do not count.
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
    watch = Stopwatch()
    for _ in range(16):
        watch.time(work)
    return float(np.percentile(watch.own, 25))
