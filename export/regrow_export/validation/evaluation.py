"""How good a model is on samples: what an export asks, whatever the task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Measure"]


@dataclass(frozen=True)
class Measure:
    """A score of two models on the same samples.

    Attributes:
        metric: what it is called, such as "accuracy" or "nats per token".
        higher_is_better: whether a larger score is the better one.
        samples: how many there are.
        scores: of the model in torch, and of the bundle, which is called like it (tensors by
            argument name, batch first) and gives a tensor, or an object with one by output name.
            To be run sample by sample, as on a device: int8 rounds inputs by the whole batch.
    """

    metric: str
    higher_is_better: bool
    samples: int
    scores: Callable[[nn.Module, nn.Module], tuple[float, float]]
