"""Distributions of times: warm-up, repetition, percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Times", "measure_in_turns"]


@dataclass(frozen=True)
class Times:
    """Milliseconds over `n` repetitions; `spread` is (p90 - p10) / p50."""

    n: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    min: float
    max: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Times:
        """From single times in milliseconds, at least one; percentiles by nearest rank."""
        ordered = sorted(values)
        mean = sum(ordered) / len(ordered)
        p10, p50, p90, p95, p99 = (_rank(ordered, percent) for percent in (10, 50, 90, 95, 99))
        spread = (p90 - p10) / p50 if p50 > 0 else 0.0
        return cls(len(ordered), mean, p50, p90, p95, p99, ordered[0], ordered[-1], spread)


def _rank(ordered: Sequence[float], percent: int) -> float:
    """The least value that at least `percent` of all do not exceed."""
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


def measure_in_turns(
    calls: Mapping[str, Callable[[], object]], *, repeat: int, warmup: int = 20
) -> dict[str, Times]:
    """Time each call `repeat` times, one after the other in turns, after `warmup` rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeat):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            elapsed = (time.perf_counter() - start) * 1e3
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: Times.of(values) for name, values in times.items()}
