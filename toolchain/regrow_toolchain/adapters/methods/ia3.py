"""IA³ in training (arXiv 2205.05638); see `regrow_format.methods.ia3`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regrow_format.adapter import Target
from regrow_format.errors import UsageError
from regrow_format.methods import get_method
from regrow_format.methods.ia3 import is_feedforward, shortest_endings
from regrow_toolchain.models import role_of

from .base import Changes, TrainableAdapter, parse_settings

__all__ = ["Ia3", "Ia3Settings"]


@dataclass(frozen=True)
class Ia3Settings:
    """Endings of the targets whose inputs are multiplied, with commas between.

    auto: the layers that end an MLP, by their name and by in > out.
    """

    feedforward: str = "auto"


class Ia3:
    """See `TrainableMethod`."""

    name = "ia3"
    default_lr = 3e-2
    settings = Ia3Settings

    def start(
        self, targets: Sequence[Target], settings: Mapping[str, Any], seed: int, users: int = 1
    ) -> TrainableAdapter:
        """s = t = 0, the paper's l = 1: nothing changes, and the gradient is not 0."""
        said = parse_settings(Ia3Settings, settings, self.name, kept=())["feedforward"]
        method = get_method(self.name)
        config = method.check_config({"feedforward": _endings(said, targets)}, self.name)
        layout = method.layout(config, targets)
        start = {name: torch.zeros(shape) for name, shape in layout.items()}
        return _TrainedIa3(self.name, config, targets, start, users)


def _endings(said: str, targets: Sequence[Target]) -> list[str]:
    """Those of the config."""
    if said == "auto":
        chosen = {target.name for target in targets if _ends_mlp(target)}
        return shortest_endings(chosen, {target.name for target in targets} - chosen)
    endings = sorted({part.strip() for part in said.split(",") if part.strip()})
    for ending in endings:
        if not any(is_feedforward({"feedforward": [ending]}, target.name) for target in targets):
            near = ", ".join(sorted({target.name.rpartition(".")[2] for target in targets}))
            raise UsageError(
                f"ia3's feedforward must be auto or endings of targets, got {ending!r}, which ends "
                f"none: endings: {near}"
            )
    return endings


def _ends_mlp(target: Target) -> bool:
    # What lies above the stack of blocks says nothing of a layer.
    inside = re.sub(r"^.*?\.\d+\.", "", target.name)
    return role_of(inside) == "mlp" and target.in_features > target.out_features


class _TrainedIa3(TrainableAdapter):
    def changes(self) -> Changes:
        forward = {t.name for t in self.targets if is_feedforward(self.config, t.name)}
        t = self.unstacked("t", [t.in_features for t in self.targets if t.name in forward])
        s = self.unstacked("s", [t.out_features for t in self.targets if t.name not in forward])
        return {
            target.name: {"input_scale": {"t": next(t)}}
            if target.name in forward
            else {"scale": {"s": next(s)}}
            for target in self.targets
        }
