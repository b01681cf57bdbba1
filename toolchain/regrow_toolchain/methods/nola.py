"""NOLA in training (arXiv 2310.02556); the definition stands in `regrow_runtime.methods.nola`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_runtime.adapter import Target
from regrow_runtime.basis import Role, sign_bits
from regrow_runtime.errors import UsageError
from regrow_runtime.methods import get_method
from regrow_runtime.methods.nola import Nola as OnDevice

from .base import Factors, Trained, parse_settings
from .combine import combine_signs

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
    default_lr = 5e-2
    settings = NolaSettings

    def start(self, targets: Sequence[Target], settings: Mapping[str, Any], seed: int) -> Trained:
        """alpha ~ N(0, 1), beta = 0: delta W is 0, and beta's gradient is not."""
        config = parse_settings(NolaSettings, settings, self.name)
        _check_rank(config["rank"], targets)
        OnDevice().check_sizes(config, targets)  # before training, not after it
        return _TrainedNola(targets, config, seed)


def _check_rank(rank: int, targets: Sequence[Target]) -> None:
    for target in targets:
        if rank > (least := min(target.in_features, target.out_features)):
            raise UsageError(
                f"rank must be at most {least}, the width of {target.name}, got {rank}"
            )


class _TrainedNola(Trained):
    def __init__(self, targets: Sequence[Target], config: dict[str, Any], seed: int) -> None:
        super().__init__()
        self.config, self.seed, self.targets = config, seed, tuple(targets)
        count = len(self.targets)
        draw = np.random.Generator(np.random.PCG64(seed)).standard_normal((count, config["k"]))
        self.alpha = nn.Parameter(torch.from_numpy(draw.astype(np.float32)))
        self.beta = nn.Parameter(torch.zeros(count, config["l"]))
        constants = get_method("nola").constants(config, self.targets)
        for name, values in constants.items():
            self.register_buffer(f"{name}_constant", torch.from_numpy(values))
        rank = config["rank"]
        self._wide = [t.in_features * rank for t in self.targets]
        self._high = [t.out_features * rank for t in self.targets]
        self._bits: dict[tuple[Role, int], Tensor] = {}

    def factors(self) -> Factors:
        rank = self.config["rank"]
        a = self._combine(self.alpha, "alpha_constant", Role.NOLA_A, self._wide)
        b = self._combine(self.beta, "beta_constant", Role.NOLA_B, self._high)
        return {
            t.name: (a[i].view(t.in_features, rank), b[i].view(rank, t.out_features))
            for i, t in enumerate(self.targets)
        }

    def values(self) -> dict[str, NDArray[np.float32]]:
        return {
            "alpha": self.alpha.detach().cpu().numpy().copy(),
            "beta": self.beta.detach().cpu().numpy().copy(),
        }

    def _combine(self, rows: Tensor, constant: str, role: Role, sizes: list[int]) -> list[Tensor]:
        """Per target, [size]; targets of one size go through one product."""
        rows = self.stored(rows) * self.get_buffer(constant)[:, None]
        found: list[Tensor | None] = [None] * len(sizes)
        for group in self._groups(sizes):
            size = sizes[group[0]]
            bits = self._basis(role, rows.shape[1], max(sizes), group[0])
            combined = combine_signs(rows[group], bits, size)
            for position, index in enumerate(group):
                found[index] = combined[position]
        return [part for part in found if part is not None]

    def _groups(self, sizes: list[int]) -> list[list[int]]:
        if not self.config["shared"]:
            return [[index] for index in range(len(sizes))]
        return [[i for i, s in enumerate(sizes) if s == size] for size in sorted(set(sizes))]

    def _basis(self, role: Role, vectors: int, entries: int, index: int) -> Tensor:
        layer = 0 if self.config["shared"] else 1 + index
        if (role, layer) not in self._bits:
            bits = sign_bits(self.seed, role, vectors, entries, layer=layer)
            self._bits[role, layer] = torch.from_numpy(bits).to(self.alpha.device)
        return self._bits[role, layer]
