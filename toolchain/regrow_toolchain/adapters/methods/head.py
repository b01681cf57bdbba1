"""Head-only: nothing but a head is trained, the bracket below every adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from regrow_format.adapter import Target

from .base import Changes, TrainableAdapter, parse_settings

__all__ = ["HeadOnly", "HeadSettings"]


@dataclass(frozen=True)
class HeadSettings:
    """It has none."""


class HeadOnly:
    """See `TrainableMethod`."""

    name = "head"
    default_lr = 1e-2
    settings = HeadSettings

    def init(
        self,
        targets: Sequence[Target],
        settings: Mapping[str, Any],
        seed: int,
        users: int = 1,
        *,
        model: nn.Module | None = None,
    ) -> TrainableAdapter:
        """No coefficients at all."""
        config = parse_settings(HeadSettings, settings, self.name)
        return _TrainedNothing(self.name, config, (), {}, users)


class _TrainedNothing(TrainableAdapter):
    def changes(self) -> Changes:
        return {}
