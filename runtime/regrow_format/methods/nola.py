"""NOLA (arXiv 2310.02556): low-rank factors as linear combinations of seeded random bases.

A = (1/sqrt(k in)) sum_i alpha_i A_i and B = (c/r) (1/sqrt(l r)) sum_j beta_j B_j with entries of
+1 and -1; delta W = (A B)^T. Stored are the seed and k + l numbers per target, whatever its shape.
The paper's basis entries are uniform; signs serve as well and need no rounding (`docs/basis.md`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..basis import Role, combine
from ..fields import Fields
from .base import MAX_RANK, Expansion, Layout, Method, check_basis, check_factors

if TYPE_CHECKING:
    from ..adapter_contents import AdapterContents
    from ..basis import BasisCache
    from ..integers import PackedSigns
    from ..target_rows import Target

__all__ = ["Nola"]

_MAX_BASIS = 1 << 16  # integer sums stay exact in float32 up to here


class Nola(Method):
    """Config: `k` and `l` (basis vectors of A and B), `rank`, `c` (scale), `shared` (one basis)."""

    name = "nola"
    kinds = ("low_rank",)
    also = ("weight",)

    def read_config(self, fields: Fields) -> dict[str, Any]:
        """k, l in 1..65536, rank in 1..4096, finite c, shared a bool."""
        return {
            "k": fields.number("k", 1, _MAX_BASIS),
            "l": fields.number("l", 1, _MAX_BASIS),
            "rank": fields.number("rank", 1, MAX_RANK),
            "c": fields.take("c", float),
            "shared": fields.take("shared", bool),
        }

    def check_sizes(self, config: Mapping[str, Any], targets: Sequence[Target]) -> None:
        """Raise `RegrowError` if expanding would take more RAM than a device may be asked for."""
        rank = config["rank"]
        check_basis(config["k"], rank * max((t.in_features for t in targets), default=0))
        check_basis(config["l"], rank * max((t.out_features for t in targets), default=0))
        check_factors(rank, targets)

    def layout(self, config: Mapping[str, Any], targets: Sequence[Target]) -> Layout:
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

    def expand(self, adapter: AdapterContents, basis: BasisCache) -> Expansion:
        """A [in, rank] and B [rank, out] per target, float32."""
        self.check_sizes(adapter.config, adapter.targets)
        rank, targets = adapter.config["rank"], adapter.targets
        a = _factors(adapter, "alpha", Role.NOLA_A, [t.in_features * rank for t in targets], basis)
        b = _factors(adapter, "beta", Role.NOLA_B, [t.out_features * rank for t in targets], basis)
        return {
            t.name: {"low_rank": {"A": a[i].reshape(-1, rank), "B": b[i].reshape(rank, -1)}}
            for i, t in enumerate(targets)
        }


def _factors(
    adapter: AdapterContents, tensor: str, role: Role, entries: Sequence[int], basis: BasisCache
) -> dict[int, NDArray[np.float32]]:
    """By target's index, float32 [entries]: its combination of basis vectors, times its scale."""
    part, shared = adapter.coefficients[tensor], adapter.config["shared"]
    # With one scale per vector, codes are summed first, exactly, and one multiply rounds once.
    values = part.dense() if part.group else part.values
    # Targets of one size go through one product; without sharing each has a basis of its own.
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(entries):
        groups.setdefault((size, 0 if shared else 1 + index), []).append(index)
    found: dict[int, NDArray[np.float32]] = {}
    longest, packed = max(entries, default=0), None
    if shared and values.dtype == np.int8:
        packed = basis.packed(adapter.seed, role, values.shape[1], longest)
    for (size, layer), group in groups.items():
        scale = None if part.group else part.scale[group]
        signs: PackedSigns | Iterator[NDArray[np.uint8]]
        if packed is not None and 2 * size >= longest:  # it multiplies all entries or none
            signs = packed
        else:
            most = longest if shared else size
            signs = basis.rows(adapter.seed, role, values.shape[1], most, layer=layer)
        found.update(zip(group, combine(values[group], signs, size, scale), strict=True))
    return found
