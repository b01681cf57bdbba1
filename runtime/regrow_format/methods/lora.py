"""LoRA (arXiv 2106.09685), the baseline: delta W = (alpha / r) B A, every number stored.

rsLoRA (arXiv 2312.03732) divides alpha by sqrt(r) instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..fields import Fields
from .base import MAX_RANK, Expansion, Layout, Method, check_factors, stacked, unstacked

if TYPE_CHECKING:
    from ..adapter_contents import AdapterContents
    from ..basis import BasisCache
    from ..target_rows import Target

__all__ = ["Lora"]


class Lora(Method):
    """Config: `rank`, `alpha` (the scale is alpha / rank), `rslora`.

    Coefficients are stacked over the targets that share a width: `A.<in>` [targets * rank, in]
    holds the columns of A, `B.<out>` [targets * rank, out] the rows of B; one scale per vector.
    """

    name = "lora"
    kinds: ClassVar[tuple[str, ...]] = ("low_rank",)
    also: ClassVar[tuple[str, ...]] = ("weight",)

    def read_config(self, fields: Fields) -> dict[str, Any]:
        """rank in 1..4096, finite alpha, rslora a bool."""
        return {
            "rank": fields.number("rank", 1, MAX_RANK),
            "alpha": fields.take("alpha", float),
            "rslora": fields.take("rslora", bool, False),
        }

    def layout(self, config: Mapping[str, Any], targets: Sequence[Target]) -> Layout:
        """A.<in> and B.<out>, one pair of dimensions per width that occurs."""
        return {
            **stacked("A", [t.in_features for t in targets], config["rank"]),
            **stacked("B", [t.out_features for t in targets], config["rank"]),
        }

    def constants(
        self, config: Mapping[str, Any], targets: Sequence[Target]
    ) -> dict[str, NDArray[np.float32]]:
        """1 for A, alpha / r for B (alpha / sqrt(r) with rsLoRA)."""
        rank = config["rank"]
        scaling = config["alpha"] / (math.sqrt(rank) if config["rslora"] else rank)
        return {
            name: np.full(rows, scaling if name.startswith("B.") else 1, dtype=np.float32)
            for name, (rows, _) in self.layout(config, targets).items()
        }

    def expand(self, adapter: AdapterContents, basis: BasisCache) -> Expansion:
        """A [in, rank] and B [rank, out] per target; the basis is not used."""
        rank, targets = adapter.config["rank"], adapter.targets
        check_factors(rank, targets)
        a = unstacked(adapter, "A", [t.in_features for t in targets], rank)
        b = unstacked(adapter, "B", [t.out_features for t in targets], rank)
        return {
            target.name: {"low_rank": {"A": np.ascontiguousarray(next(a).T), "B": next(b)}}
            for target in targets
        }
