"""A rank per layer from one budget for all: where it is least missed.

Every layer has candidates: ranks, and staying dense. A price on the budget's unit makes each layer
choose on its own what its error and cost add up to least; the price is raised until the sum of the
costs fits (Everett's method, which also takes costs that are no straight lines, such as measured
times). What then is left over goes where it helps most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import UsageError

from .decomposition import Spectrum
from .layer_selection import LayerPlan

__all__ = ["Cost", "allocate", "candidates"]

Cost = Callable[[LayerPlan, int], float]  # of a layer at a rank; rank 0 means dense

_LEAST_SHARE = 0.25  # of the paper's rank: what samples showed is not all there is


@dataclass(frozen=True, eq=False)
class _Choices:
    """A layer's candidates by rising cost; rank 0 is dense."""

    ranks: NDArray[np.int64]
    costs: NDArray[np.float64]
    errors: NDArray[np.float64]

    def best(self, price: float) -> int:
        """The candidate of least error + price * cost."""
        return int(np.argmin(self.errors + price * self.costs))


def allocate(
    layers: Sequence[LayerPlan],
    spectra: Mapping[str, Spectrum],
    cost: Cost,
    budget: float,
    *,
    multiple: int = 1,
) -> dict[str, int]:
    """A rank for each layer of `spectra`, 0 where it stays dense; their costs are within `budget`.

    Args:
        layers: with the paper's ranks; every rank is at least a quarter of those.
        multiple: ranks are multiples of it, where a layer is wide enough.

    Raises:
        UsageError: not even the least ranks fit.
    """
    known = [layer for layer in layers if layer.name in spectra]
    table = [_choices(layer, spectra[layer.name], cost, multiple) for layer in known]
    least = sum(float(choices.costs[0]) for choices in table)
    if least > budget * (1 + 1e-9):
        raise UsageError(
            f"budget must allow ranks of {multiple} or more in every layer, got {budget:.4g}, "
            f"and they take {least:.4g}: lower --ratio or --multiple"
        )
    chosen = _within(table, budget)
    _spend(table, chosen, budget)
    return {
        layer.name: int(choices.ranks[index])
        for layer, choices, index in zip(known, table, chosen, strict=True)
    }


def candidates(layer: LayerPlan, multiple: int) -> list[int]:
    """The ranks that a layer may get, rising: multiples, up to where nothing is saved."""
    top = layer.in_features * layer.out_features // (layer.in_features + layer.out_features)
    step = multiple if multiple <= layer.rank else 1
    low = max(step, int(_LEAST_SHARE * layer.rank) // step * step)
    return list(range(low, max(top, low) + 1, step))


def _choices(layer: LayerPlan, spectrum: Spectrum, cost: Cost, multiple: int) -> _Choices:
    ranks = np.array([*candidates(layer, multiple), 0])
    lost = np.append(np.cumsum(spectrum.energies.numpy()[::-1])[::-1], 0.0)
    errors = np.where(ranks > 0, lost[np.minimum(ranks, len(lost) - 1)], 0.0)
    costs = np.array([cost(layer, int(rank)) for rank in ranks])
    cheaper = (costs < costs[-1]) | (ranks == 0)  # what costs as much as dense may stay dense
    order = np.argsort(costs[cheaper], kind="stable")
    return _Choices(ranks[cheaper][order], costs[cheaper][order], errors[cheaper][order])


def _within(table: Sequence[_Choices], budget: float) -> list[int]:
    """The least price at which the choices fit, by bisection on its logarithm."""

    def at(price: float) -> list[int]:
        return [choices.best(price) for choices in table]

    def total(chosen: Sequence[int]) -> float:
        return sum(float(c.costs[i]) for c, i in zip(table, chosen, strict=True))

    if total(free := at(0.0)) <= budget:
        return free
    low, high = -80.0, 80.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if total(at(np.exp(middle))) <= budget else (middle, high)
    found = at(np.exp(high))
    return found if total(found) <= budget else [0] * len(table)


def _spend(table: Sequence[_Choices], chosen: list[int], budget: float) -> None:
    """Raise ranks one step at a time where it takes most error off per cost, while it fits."""
    left = budget - sum(float(c.costs[i]) for c, i in zip(table, chosen, strict=True))
    while True:
        best, where = 0.0, -1
        for index, (choices, now) in enumerate(zip(table, chosen, strict=True)):
            if now + 1 == len(choices.costs):
                continue
            more = float(choices.costs[now + 1] - choices.costs[now])
            gain = float(choices.errors[now] - choices.errors[now + 1]) / max(more, 1e-12)
            if more <= left and gain > best:
                best, where = gain, index
        if where < 0:
            return
        choices = table[where]
        left -= float(choices.costs[chosen[where] + 1] - choices.costs[chosen[where]])
        chosen[where] += 1
