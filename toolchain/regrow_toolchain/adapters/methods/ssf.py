"""SSF in training (arXiv 2210.08823): every layer's outputs, scaled and shifted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regrow_format.adapter import Target
from regrow_format.methods import get_method

from .base import Changes, TrainableAdapter, parse_settings

__all__ = ["Ssf", "SsfSettings"]


@dataclass(frozen=True)
class SsfSettings:
    """It has none."""


class Ssf:
    """See `TrainableMethod`. Targets are linear layers and norms."""

    name = "ssf"
    default_lr = 1e-2
    settings = SsfSettings

    def start(
        self, targets: Sequence[Target], settings: Mapping[str, Any], seed: int, users: int = 1
    ) -> TrainableAdapter:
        """s = b = 0: nothing changes. The paper's code draws both with a deviation of 0.02."""
        config = parse_settings(SsfSettings, settings, self.name)
        layout = get_method(self.name).layout(config, targets)
        start = {name: torch.zeros(shape) for name, shape in layout.items()}
        return _TrainedSsf(self.name, config, targets, start, users)


class _TrainedSsf(TrainableAdapter):
    def changes(self) -> Changes:
        widths = [t.out_features for t in self.targets]
        s, b = self.unstacked("s", widths), self.unstacked("b", widths)
        return {
            target.name: {"scale": {"s": next(s)}, "bias": {"b": next(b)}}
            for target in self.targets
        }
