"""LoRA in training (arXiv 2106.09685), the baseline; rsLoRA's scale (arXiv 2312.03732)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regrow_format.adapter import Target
from regrow_format.methods import get_method

from .base import Changes, TrainableAdapter, parse_settings
from .low_rank_factors import check_rank

__all__ = ["Lora", "LoraSettings"]


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

    def start(
        self, targets: Sequence[Target], settings: Mapping[str, Any], seed: int, users: int = 1
    ) -> TrainableAdapter:
        """A Kaiming-uniform with a = sqrt(5), B = 0, as in the paper's code."""
        config = parse_settings(LoraSettings, settings, self.name)
        check_rank(config["rank"], targets)
        generator = torch.Generator().manual_seed(seed % 2**63)
        start = {}
        for name, shape in get_method(self.name).layout(config, targets).items():
            start[name] = torch.zeros(shape)
            if name.startswith("A."):
                bound = 1 / math.sqrt(shape[1])
                start[name].uniform_(-bound, bound, generator=generator)
        return _TrainedLora(self.name, config, targets, start, users)


class _TrainedLora(TrainableAdapter):
    def changes(self) -> Changes:
        rank = self.config["rank"]
        a = self.unstacked("A", [t.in_features for t in self.targets], rank)
        b = self.unstacked("B", [t.out_features for t in self.targets], rank)
        return {t.name: {"low_rank": {"A": next(a).mT, "B": next(b)}} for t in self.targets}
