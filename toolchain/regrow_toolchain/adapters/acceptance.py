"""Whether an adapter improves on none: the rule that decides if it is written.

An adapter improves if, on samples that trained nothing and chose nothing,

- its score (balanced accuracy where labels are classes) is not lower than without it, and
- its losses are lower by more than chance: a one-sided paired sign-flip test, p <= `SIGNIFICANCE`.

Compared with is the baseline: the best, by mean loss on the same samples, of the base model and the
constant answers (class frequencies of the training part and even chances, or the mean of its
values); the score must not be lower than the baseline's either. Accuracy alone cannot decide: of
ten samples it moves in steps of ten points, and a model that learnt nothing but the frequencies of
unequal classes raises it.

Equal samples are no independent evidence, so a group of them counts once, by its mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regrow_toolchain.tasks import Task

__all__ = [
    "EXACT_BELOW",
    "FEWEST_GROUPS",
    "SIGNIFICANCE",
    "Evidence",
    "Verdict",
    "judge",
    "sign_flip_p_value",
]

SIGNIFICANCE = 0.02
FEWEST_GROUPS = math.ceil(-math.log2(SIGNIFICANCE))  # 6: of fewer, even all together reach no p
EXACT_BELOW = 20  # groups: 2**19 sign patterns are all tried, from here on some are drawn

_FLIPS = 20_000  # drawn: at p = 0.02 their standard error is 0.001
_CHUNK_BYTES = 1 << 25
_WORST = 1e6  # stands for a loss that is no finite number

_BASE = "base model"

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of the samples held back; `measured` as `Task.measure` gives it, [N, m].

    Attributes:
        labels: [N, ...] of the samples.
        groups: int64 [N], equal for equal samples.
        folds: int64 [N], which samples were held back together.
        adapted: measured with the adapter.
        base: measured without it; None if there is no such answer, as with an untrained head.
        constants: by name, measured of the answers that do not look.
    """

    labels: NDArray[np.generic]
    groups: NDArray[np.int64]
    folds: NDArray[np.int64]
    adapted: NDArray[np.float32]
    base: NDArray[np.float32] | None
    constants: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Verdict:
    """Whether an adapter improves, and by what.

    Attributes:
        improves: the rule of this module.
        p_value: of the test; 1 if nothing speaks for the adapter.
        groups: different samples that were compared.
        baseline: what was compared with, such as "base model" or "class frequencies".
        metric: what `before` and `after` are, such as "balanced accuracy".
        before: the score without the adapter; NaN if there is none.
        after: the score with it.
        loss_before: mean loss of the baseline; NaN if there is none.
        loss_after: mean loss with the adapter.
    """

    improves: bool
    p_value: float
    groups: int
    baseline: str
    metric: str
    before: float
    after: float
    loss_before: float
    loss_after: float


def judge(task: Task, evidence: Evidence) -> Verdict:
    """Compare an adapter with the best of the base model and the constant answers."""
    losses = _means(_losses(task, evidence, evidence.adapted), evidence.groups)
    baseline, reference, answer = _baseline(task, evidence)
    p_value = sign_flip_p_value(reference - losses)
    before, level, after = (
        _score(task, evidence, found) for found in (evidence.base, answer, evidence.adapted)
    )
    sign = 1 if task.higher_is_better else -1
    not_lower = all(math.isnan(s) or sign * after >= sign * s for s in (before, level))
    return Verdict(
        improves=math.isfinite(after) and not_lower and p_value <= SIGNIFICANCE,
        p_value=p_value,
        groups=len(losses),
        baseline=baseline,
        metric=task.gate_metric,
        before=before,
        after=after,
        loss_before=float(reference.mean()),
        loss_after=float(losses.mean()),
    )


def sign_flip_p_value(differences: Floats) -> float:
    """One-sided p of the mean of `differences` [groups] being above 0, by flipping their signs.

    Under the null hypothesis each difference is as likely to be negative. All 2**n patterns are
    tried below `EXACT_BELOW` groups; from there on 20,000 are drawn, always the same, and the
    pattern observed counts as one of them (Phipson and Smyth 2010, doi 10.2202/1544-6115.1585).
    """
    values = np.asarray(differences, dtype=np.float64)
    if not len(values) or not values.any():
        return 1.0
    # Sums of the same numbers in another order differ in their last bits.
    observed = values.sum() - 1e-12 * np.abs(values).sum()
    if len(values) < EXACT_BELOW:
        return float((_all_sums(values) >= observed).mean())
    return (1 + _drawn_sums_above(values, float(observed))) / (1 + _FLIPS)


def _all_sums(values: Floats) -> Floats:
    """[2**n]: the sum under every pattern of signs."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _drawn_sums_above(values: Floats, least: float) -> int:
    draw = np.random.Generator(np.random.PCG64(0))
    rows = max(1, _CHUNK_BYTES // (8 * len(values)))
    above = 0
    for start in range(0, _FLIPS, rows):
        shape = (min(rows, _FLIPS - start), len(values))
        signs = draw.integers(0, 2, shape, dtype=np.int8) * np.int8(2) - np.int8(1)
        above += int((signs @ values >= least).sum())
    return above


def _baseline(task: Task, evidence: Evidence) -> tuple[str, Floats, NDArray[np.float32] | None]:
    """Name, losses [groups] and measured of what is to be beaten; of equal means the first."""
    candidates = {**evidence.constants}
    if evidence.base is not None:
        candidates = {_BASE: evidence.base, **candidates}
    if not candidates:  # nothing answers without the adapter: any finite loss is lower
        return _BASE, np.full(len(np.unique(evidence.groups)), _WORST), None
    found = [
        (name, _means(_losses(task, evidence, measured), evidence.groups), measured)
        for name, measured in candidates.items()
    ]
    return min(found, key=lambda one: float(one[1].mean()))


def _losses(task: Task, evidence: Evidence, measured: NDArray[np.float32]) -> Floats:
    losses = task.sample_losses(measured, evidence.labels, evidence.folds)
    return np.minimum(np.nan_to_num(losses, nan=_WORST, posinf=_WORST), _WORST)


def _score(task: Task, evidence: Evidence, measured: NDArray[np.float32] | None) -> float:
    if measured is None:
        return math.nan
    return task.gate_score(measured, evidence.labels, evidence.folds)


def _means(values: Floats, groups: NDArray[np.int64]) -> Floats:
    """The mean of each group of equal samples."""
    _, index = np.unique(groups, return_inverse=True)
    found: Floats = np.bincount(index, weights=values) / np.bincount(index)
    return found
