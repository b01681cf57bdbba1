"""Is a difference larger than the noise? The rule, and nothing but the rule.

Each figure was measured in several fresh processes ("rounds"). Two figures differ if

1. the rank interval of their ratio does not hold 1: the median of all ratios of a round of B to a
   round of A, with the interval that the Wilcoxon-Mann-Whitney test gives (Hodges and Lehmann
   1963). At least 97 % of such intervals hold the true ratio; and
2. the difference is larger than the floor: 5 %; for times also as much as the machine itself had
   become slower or quicker, by a fixed piece of work that is timed in every round; and where other
   programs kept more than 0.15 cores busy, what that can do (`crowd_floor`).

Figures that noise does not reach, such as sizes of files, differ if they are not equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from statistics import median

__all__ = ["FLOOR", "LEVEL", "LOUD", "Difference", "crowd_floor", "judge"]

FLOOR = 0.05
LOUD = 0.15  # cores that other programs keep busy: from here on a machine is not quiet
LEVEL = 0.97


@dataclass(frozen=True)
class Difference:
    """`ratio` of B to A with its interval, None where rounds are too few; `real`: larger than the
    noise, None if that cannot be told.
    """

    ratio: float
    low: float | None
    high: float | None
    real: bool | None


def crowd_floor(share: float, threads: int) -> float:
    """What other programs can do to a time when they have a share of the cores.

    With one thread, waiting for a core is measured and taken off; what is left, such as caches that
    others fill, was mostly below half of the share (docs/profile.md). With more threads, one that
    waits keeps the others waiting, unmeasured: a time may be 1 / (1 - share) times as long.
    """
    return share / 2 if threads == 1 else 1 / (1 - min(share, 0.99)) - 1


def judge(
    a: Sequence[float], b: Sequence[float], *, floor: float = FLOOR, exact: bool = False
) -> Difference | None:
    """Hold the rounds of A and B side by side; None if there are no ratios."""
    if not a or not b or min(*a, *b) <= 0:
        return None
    ratio = median(b) / median(a)
    if exact:
        return Difference(ratio, ratio, ratio, list(a) != list(b))
    skip = _skipped(len(a), len(b))
    if skip is None:
        return Difference(ratio, None, None, None)
    ratios = sorted(y / x for x in a for y in b)
    low, high = ratios[skip], ratios[-1 - skip]
    real = (low > 1 or high < 1) and max(ratio, 1 / ratio) - 1 > floor
    return Difference(ratio, low, high, real)


def _skipped(m: int, n: int) -> int | None:
    """How many of the m·n ratios lie outside of the interval at each end; None: not even one set
    of all of them is sure enough.
    """
    total, below, skipped = comb(m + n, m), 0, None
    for u in range(m * n // 2):
        below += _ways(u, m, n)
        if 2 * below > (1 - LEVEL) * total:
            break
        skipped = u
    return skipped


@cache
def _ways(u: int, m: int, n: int) -> int:
    """Orders of m and n values for which the Mann-Whitney statistic is u (its recurrence)."""
    if u < 0:
        return 0
    if m == 0 or n == 0:
        return int(u == 0)
    return _ways(u - n, m - 1, n) + _ways(u, m, n - 1)
