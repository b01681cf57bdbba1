"""NOLA in training (arXiv 2310.02556); the definition stands in `regrow_format.methods.nola`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regrow_format.adapter import Target
from regrow_format.basis import Role, sign_bits
from regrow_format.methods.nola import Nola as OnDevice

from .base import Changes, TrainableAdapter, parse_settings
from .low_rank_factors import check_rank
from .sign_products import combine_signs, ready_signs

__all__ = ["Nola", "NolaSettings"]


@dataclass(frozen=True)
class NolaSettings:
    """k and l basis vectors of A and B; rank; scale c; one basis for all layers or one each."""

    k: int = 64
    l: int = 64  # noqa: E741 - the paper's name
    rank: int = 8
    c: float = 8.0
    shared: bool = True


class Nola:
    """See `TrainableMethod`."""

    name = "nola"
    default_lr = 3e-2
    settings = NolaSettings

    def init(
        self,
        targets: Sequence[Target],
        settings: Mapping[str, Any],
        seed: int,
        users: int = 1,
        *,
        model: nn.Module | None = None,
    ) -> TrainableAdapter:
        """alpha ~ N(0, 1), beta = 0: delta W is 0, and beta's gradient is not."""
        config = parse_settings(NolaSettings, settings, self.name)
        check_rank(config["rank"], targets)
        OnDevice().check_sizes(config, targets)  # before training, not after it
        shape = (len(targets), config["k"])
        draw = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
        start = {
            "alpha": torch.from_numpy(draw.astype(np.float32)),
            "beta": torch.zeros(len(targets), config["l"]),
        }
        return _TrainedNola(self.name, config, targets, start, users, seed)


class _TrainedNola(TrainableAdapter):
    def __init__(self, *arguments: Any) -> None:
        *rest, self.seed = arguments
        super().__init__(*rest)
        self._bits: dict[tuple[Role, int], Tensor] = {}

    def changes(self) -> Changes:
        rank = self.config["rank"]
        wide = [t.in_features * rank for t in self.targets]
        high = [t.out_features * rank for t in self.targets]
        a = self._combine(self.rows("alpha"), Role.NOLA_A, wide)
        b = self._combine(self.rows("beta"), Role.NOLA_B, high)
        shape = (self.users, -1, rank), (self.users, rank, -1)
        return {
            target.name: {"low_rank": {"A": a[i].reshape(shape[0]), "B": b[i].reshape(shape[1])}}
            for i, target in enumerate(self.targets)
        }

    def _combine(self, rows: Tensor, role: Role, sizes: list[int]) -> dict[int, Tensor]:
        """By target's index, [users, size]; targets of one size go through one product."""
        found: dict[int, Tensor] = {}
        for group in self._groups(sizes):
            size = sizes[group[0]]
            bits = self._basis(role, rows.shape[-1], max(sizes), group[0], rows.device)
            parts = combine_signs(rows[:, group], bits, size).unbind(1)
            found.update(zip(group, parts, strict=True))
        return found

    def _groups(self, sizes: list[int]) -> list[list[int]]:
        if not self.config["shared"]:
            return [[index] for index in range(len(sizes))]
        return [[i for i, s in enumerate(sizes) if s == size] for size in sorted(set(sizes))]

    def _basis(
        self, role: Role, vectors: int, entries: int, index: int, device: torch.device
    ) -> Tensor:
        layer = 0 if self.config["shared"] else 1 + index
        if (role, layer) not in self._bits:
            bits = torch.from_numpy(sign_bits(self.seed, role, vectors, entries, layer=layer))
            self._bits[role, layer] = ready_signs(bits, entries).to(device)
        return self._bits[role, layer]
