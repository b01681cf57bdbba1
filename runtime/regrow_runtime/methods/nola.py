"""NOLA (arXiv 2310.02556): low-rank factors as linear combinations of seeded random bases.

A = (1/sqrt(k in)) sum_i alpha_i A_i and B = (c/r) (1/sqrt(l r)) sum_j beta_j B_j with entries of
+1 and -1; delta W = (A B)^T. Stored are the seed and k + l numbers per target, whatever its shape.
The paper's basis entries are uniform; signs serve as well and need no rounding (`docs/basis.md`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..basis import Role, combine
from ..errors import RegrowError
from ..fields import Fields
from .base import Expansion

if TYPE_CHECKING:
    from ..adapter import Adapter, Target
    from ..basis import BasisCache

__all__ = ["Nola"]

_MAX_BASIS = 1 << 16  # integer sums stay exact in float32 up to here
_MAX_RANK = 1 << 12
# What a basis may take in RAM. The paper's largest (LLaMA-2 70B, k = 512, rank 16) takes 29 MB;
# without a bound, a file of kilobytes could ask for 25 GB.
_MAX_BASIS_BYTES = 1 << 28
# Of all A or all B; the same example takes less than half of it. A rank costs the file nothing.
_MAX_FACTOR_BYTES = 1 << 30


class Nola:
    """Config: `k` and `l` (basis vectors of A and B), `rank`, `c` (scale), `shared` (one basis)."""

    name = "nola"
    slot = "low_rank"

    def check_config(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """k, l in 1..65536, rank in 1..4096, finite c, shared a bool."""
        fields = Fields(config, f"{where}: config")
        checked = {
            "k": fields.number("k", 1, _MAX_BASIS),
            "l": fields.number("l", 1, _MAX_BASIS),
            "rank": fields.number("rank", 1, _MAX_RANK),
            "c": fields.take("c", float),
            "shared": fields.take("shared", bool),
        }
        fields.done()
        return checked

    def check_sizes(self, config: Mapping[str, Any], targets: Sequence[Target]) -> None:
        """Raise `RegrowError` if expanding would take more RAM than a device may be asked for."""
        for tensor, count, widths in (
            ("alpha", config["k"], [t.in_features for t in targets]),
            ("beta", config["l"], [t.out_features for t in targets]),
        ):
            entries = [width * config["rank"] for width in widths]
            _check_size(tensor, count, max(entries, default=0), sum(entries))

    def layout(
        self, config: Mapping[str, Any], targets: Sequence[Target]
    ) -> dict[str, tuple[int, int]]:
        """alpha [targets, k] and beta [targets, l]."""
        return {"alpha": (len(targets), config["k"]), "beta": (len(targets), config["l"])}

    def constants(
        self, config: Mapping[str, Any], targets: Sequence[Target]
    ) -> dict[str, NDArray[np.float32]]:
        """1/sqrt(k in) for alpha, (c/r)/sqrt(l r) for beta."""
        rank = config["rank"]
        beta = config["c"] / rank / math.sqrt(config["l"] * rank)
        return {
            "alpha": np.array(
                [1 / math.sqrt(config["k"] * t.in_features) for t in targets], dtype=np.float32
            ),
            "beta": np.full(len(targets), beta, dtype=np.float32),
        }

    def expand(self, adapter: Adapter, basis: BasisCache) -> Expansion:
        """A [in, rank] and B [rank, out] per target, float32."""
        self.check_sizes(adapter.config, adapter.targets)
        rank = adapter.config["rank"]
        wide = {t.name: t.in_features * rank for t in adapter.targets}
        high = {t.name: t.out_features * rank for t in adapter.targets}
        a = _factors(adapter, "alpha", Role.NOLA_A, wide, basis)
        b = _factors(adapter, "beta", Role.NOLA_B, high, basis)
        return {
            t.name: {
                "A": a[t.name].reshape(t.in_features, rank),
                "B": b[t.name].reshape(rank, t.out_features),
            }
            for t in adapter.targets
        }


def _factors(
    adapter: Adapter, tensor: str, role: Role, entries: Mapping[str, int], basis: BasisCache
) -> dict[str, NDArray[np.float32]]:
    """By target, float32 [entries]: the combination of basis vectors, times its scale."""
    part = adapter.coefficients[tensor]
    count = part.values.shape[1]
    shared = adapter.config["shared"]
    longest = max(entries.values(), default=0)
    found = {}
    # Targets of one size go through one product; without sharing each has a basis of its own.
    for group in _groups(adapter.targets, entries, shared):
        size = entries[adapter.targets[group[0]].name]
        layer = 0 if shared else 1 + group[0]
        bits = basis.bits(adapter.seed, role, count, longest if shared else size, layer=layer)
        sums = combine(part.values[group].astype(np.float32), bits, size)
        sums *= part.scale[group][:, None]
        found.update({adapter.targets[t].name: row for t, row in zip(group, sums, strict=True)})
    return found


def _check_size(tensor: str, vectors: int, longest: int, entries: int) -> None:
    if vectors * longest > 8 * _MAX_BASIS_BYTES:
        raise RegrowError(
            f"basis must be at most {_MAX_BASIS_BYTES} bytes, got {vectors} vectors of {longest} "
            f"signs for {tensor}: train with fewer vectors or a smaller rank"
        )
    if 4 * entries > _MAX_FACTOR_BYTES:
        raise RegrowError(
            f"factors must be at most {_MAX_FACTOR_BYTES} bytes, got {4 * entries} for {tensor}: "
            "train with a smaller rank or fewer targets"
        )


def _groups(targets: Sequence[Target], entries: Mapping[str, int], shared: bool) -> list[list[int]]:
    if not shared:
        return [[index] for index in range(len(targets))]
    by_size: dict[int, list[int]] = {}
    for index, target in enumerate(targets):
        by_size.setdefault(entries[target.name], []).append(index)
    return list(by_size.values())
