"""Distributions of times: warm-up, repetition, percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Times", "measure"]


@dataclass(frozen=True)
class Times:
    """Milliseconds over `n` repetitions."""

    n: int
    mean: float
    p50: float
    p90: float
    p99: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Times:
        """From single times in milliseconds, at least one; percentiles by nearest rank."""
        ordered = sorted(values)

        def rank(share: float) -> float:
            return ordered[max(0, -(-int(share * 100) * len(ordered) // 100) - 1)]

        mean = sum(ordered) / len(ordered)
        return cls(len(ordered), mean, rank(0.5), rank(0.9), rank(0.99), ordered[0], ordered[-1])


def measure(call: Callable[[], object], *, repeat: int, warmup: int = 3) -> Times:
    """Time `call` `repeat` times after `warmup` calls that do not count."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return Times.of(times)
