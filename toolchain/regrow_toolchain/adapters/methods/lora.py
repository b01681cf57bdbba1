"""LoRA in training (arXiv 2106.09685), the baseline; rsLoRA's scale (arXiv 2312.03732)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow_format.adapter import Target
from regrow_format.methods import get_method

from .base import Changes, TrainableAdapter, parse_settings
from .low_rank_factors import check_rank

__all__ = ["Lora", "LoraSettings", "TrainedLora", "initial_factors"]


@dataclass(frozen=True)
class LoraSettings:
    """rank; alpha, the scale is alpha / rank, or alpha / sqrt(rank) with rslora."""

    rank: int = 4
    alpha: float = 4.0
    rslora: bool = False


class Lora:
    """See `TrainableMethod`."""

    name = "lora"
    default_lr = 5e-3
    settings = LoraSettings

    def init(
        self,
        targets: Sequence[Target],
        settings: Mapping[str, Any],
        seed: int,
        users: int = 1,
        *,
        model: nn.Module | None = None,
    ) -> TrainableAdapter:
        """A Kaiming-uniform with a = sqrt(5), B = 0, as in the paper's code."""
        config = parse_settings(LoraSettings, settings, self.name)
        start = initial_factors(config, targets, seed)
        return TrainedLora(self.name, config, targets, start, users)


def initial_factors(
    config: Mapping[str, Any], targets: Sequence[Target], seed: int
) -> dict[str, Tensor]:
    """By name, the rows of A, Kaiming-uniform with a = sqrt(5), and of B, 0.

    Raises:
        UsageError: a layer is narrower than the rank.
    """
    check_rank(config["rank"], targets)
    generator = torch.Generator().manual_seed(seed % 2**63)
    start = {}
    for name, shape in get_method("lora").layout(config, targets).items():
        start[name] = torch.zeros(shape)
        if name.startswith("A."):
            bound = 1 / math.sqrt(shape[1])
            start[name].uniform_(-bound, bound, generator=generator)
    return start


class TrainedLora(TrainableAdapter):
    """A and B."""

    def changes(self) -> Changes:
        """Low-rank factors."""
        rank = self.config["rank"]
        a = self.unstacked("A", [t.in_features for t in self.targets], rank)
        b = self.unstacked("B", [t.out_features for t in self.targets], rank)
        return {t.name: {"low_rank": {"A": next(a).mT, "B": next(b)}} for t in self.targets}
