"""LoRA in training (arXiv 2106.09685), the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from regrow_runtime.adapter import Target
from regrow_runtime.errors import UsageError

from .base import Factors, Trained, parse_settings

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
    default_lr = 3e-3
    settings = LoraSettings

    def start(self, targets: Sequence[Target], settings: Mapping[str, Any], seed: int) -> Trained:
        """A Kaiming-uniform with a = sqrt(5), B = 0, as in the paper's code."""
        config = parse_settings(LoraSettings, settings, self.name)
        least = min(min(t.in_features, t.out_features) for t in targets)
        if config["rank"] > least:
            raise UsageError(f"rank must be at most {least}, the least width, got {config['rank']}")
        return _TrainedLora(targets, config, seed)


class _TrainedLora(Trained):
    def __init__(self, targets: Sequence[Target], config: dict[str, Any], seed: int) -> None:
        super().__init__()
        self.config, self.targets = config, tuple(targets)
        rank = config["rank"]
        self.scaling = config["alpha"] / (math.sqrt(rank) if config["rslora"] else rank)
        generator = torch.Generator().manual_seed(seed % 2**63)
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for target in self.targets:
            bound = 1 / math.sqrt(target.in_features)
            start = torch.rand(rank, target.in_features, generator=generator) * 2 - 1
            self.a.append(nn.Parameter(start * bound))
            self.b.append(nn.Parameter(torch.zeros(rank, target.out_features)))

    def factors(self) -> Factors:
        return {
            target.name: (self.stored(a).T, self.stored(b) * self.scaling)
            for target, a, b in zip(self.targets, self.a, self.b, strict=True)
        }

    def values(self) -> dict[str, NDArray[np.float32]]:
        stacked: dict[str, list[NDArray[np.float32]]] = {}
        for target, a, b in zip(self.targets, self.a, self.b, strict=True):
            stacked.setdefault(f"A.{target.in_features}", []).append(a.detach().cpu().numpy())
            stacked.setdefault(f"B.{target.out_features}", []).append(b.detach().cpu().numpy())
        return {name: np.concatenate(rows) for name, rows in stacked.items()}
