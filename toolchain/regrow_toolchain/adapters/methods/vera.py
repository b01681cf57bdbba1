"""VeRA in training (arXiv 2310.11454); the definition stands in `regrow_format.methods.vera`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrow_format.adapter import Target
from regrow_format.basis import Role, sign_bits
from regrow_format.errors import UsageError
from regrow_format.methods import get_method

from .base import Changes, TrainableAdapter, parse_settings

__all__ = ["Vera", "VeraSettings"]


@dataclass(frozen=True)
class VeraSettings:
    """rank of the shared A and B; d_initial, what lambda_d starts at."""

    rank: int = 64
    d_initial: float = 0.1


class Vera:
    """See `TrainableMethod`."""

    name = "vera"
    default_lr = 3e-2
    settings = VeraSettings

    def start(
        self, targets: Sequence[Target], settings: Mapping[str, Any], seed: int, users: int = 1
    ) -> TrainableAdapter:
        """lambda_d = d_initial, lambda_b = 0: delta W is 0, and lambda_b's gradient is not."""
        parsed = parse_settings(VeraSettings, settings, self.name, kept=("rank",))
        config = {"rank": parsed["rank"]}
        if not math.isfinite(first := parsed["d_initial"]) or first == 0:
            raise UsageError(
                f"vera's d_initial must be a finite number other than 0, got {first:g}: with 0 "
                "nothing has a gradient"
            )
        start = {
            name: torch.full(shape, first if name == "d" else 0.0)
            for name, shape in get_method(self.name).layout(config, targets).items()
        }
        return _TrainedVera(self.name, config, targets, start, users, seed)


class _TrainedVera(TrainableAdapter):
    def __init__(self, *arguments: Any) -> None:
        *rest, seed = arguments
        super().__init__(*rest)
        rank = self.config["rank"]
        wide = max((t.in_features for t in self.targets), default=1)
        high = max((t.out_features for t in self.targets), default=1)
        # One pair for all layers; a layer takes the leading columns of A and rows of B.
        self.register_buffer("shared_a", _signs(seed, Role.VERA_A, rank, wide))
        self.register_buffer("shared_b", _signs(seed, Role.VERA_B, high, rank))

    def changes(self) -> Changes:
        d = self.rows("d")
        rows = self.unstacked("b", [t.out_features for t in self.targets])
        return {
            target.name: {
                "vector": {
                    "A": self.get_buffer("shared_a")[:, : target.in_features].mT,
                    "B": self.get_buffer("shared_b")[: target.out_features].mT,
                    "d": d[:, index, None],
                    "b": next(rows),
                }
            }
            for index, target in enumerate(self.targets)
        }


def _signs(seed: int, role: Role, vectors: int, entries: int) -> Tensor:
    """float32 [vectors, entries] of +1 and -1."""
    bits = np.unpackbits(sign_bits(seed, role, vectors, entries), axis=1, bitorder="little")
    return torch.from_numpy(bits[:, :entries].astype(np.float32) * 2 - 1)
