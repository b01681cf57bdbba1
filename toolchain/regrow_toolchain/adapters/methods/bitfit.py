"""BitFit in training (arXiv 2106.10199): the layers' biases and nothing else, a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regrow_format.adapter import Target
from regrow_format.methods import get_method

from .base import Changes, TrainableAdapter, parse_settings

__all__ = ["Bitfit", "BitfitSettings"]


@dataclass(frozen=True)
class BitfitSettings:
    """It has none."""


class Bitfit:
    """See `TrainableMethod`. Targets are modules with a bias: linear layers and norms."""

    name = "bitfit"
    default_lr = 5e-3
    settings = BitfitSettings

    def start(
        self, targets: Sequence[Target], settings: Mapping[str, Any], seed: int, users: int = 1
    ) -> TrainableAdapter:
        """Changes of 0."""
        config = parse_settings(BitfitSettings, settings, self.name)
        layout = get_method(self.name).layout(config, targets)
        start = {name: torch.zeros(shape) for name, shape in layout.items()}
        return _TrainedBitfit(self.name, config, targets, start, users)


class _TrainedBitfit(TrainableAdapter):
    def changes(self) -> Changes:
        rows = self.unstacked("b", [t.out_features for t in self.targets])
        return {t.name: {"bias": {"b": b}} for t, b in zip(self.targets, rows, strict=True)}
