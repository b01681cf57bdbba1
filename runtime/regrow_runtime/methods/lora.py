"""LoRA (arXiv 2106.09685), the baseline: delta W = (alpha / r) B A, every number stored.

rsLoRA (arXiv 2312.03732) divides alpha by sqrt(r) instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..fields import Fields
from .base import Expansion

if TYPE_CHECKING:
    from ..adapter import Adapter, Target
    from ..basis import BasisCache

__all__ = ["Lora"]

_MAX_RANK = 1 << 12


class Lora:
    """Config: `rank`, `alpha` (the scale is alpha / rank), `rslora`.

    Coefficients are stacked over the targets that share a width: `A.<in>` [targets * rank, in]
    holds the columns of A, `B.<out>` [targets * rank, out] the rows of B; one scale per vector.
    """

    name = "lora"
    slot = "low_rank"

    def check_config(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """rank in 1..4096, finite alpha, rslora a bool."""
        fields = Fields(config, f"{where}: config")
        checked = {
            "rank": fields.number("rank", 1, _MAX_RANK),
            "alpha": fields.take("alpha", float),
            "rslora": fields.take("rslora", bool, False),
        }
        fields.done()
        return checked

    def layout(
        self, config: Mapping[str, Any], targets: Sequence[Target]
    ) -> dict[str, tuple[int, int]]:
        """A.<in> and B.<out>, one pair of dimensions per width that occurs."""
        shapes: dict[str, tuple[int, int]] = {}
        for target in targets:
            for name, width in (
                (f"A.{target.in_features}", target.in_features),
                (f"B.{target.out_features}", target.out_features),
            ):
                rows = shapes.get(name, (0, width))[0]
                shapes[name] = (rows + config["rank"], width)
        return shapes

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

    def expand(self, adapter: Adapter, basis: BasisCache) -> Expansion:
        """A [in, rank] and B [rank, out] per target, float32; the basis is not used."""
        rank = adapter.config["rank"]
        dense = {name: part.dense() for name, part in adapter.coefficients.items()}
        used = dict.fromkeys(dense, 0)
        found: Expansion = {}
        for target in adapter.targets:
            rows = {}
            for part, width in (("A", target.in_features), ("B", target.out_features)):
                name = f"{part}.{width}"
                rows[part] = dense[name][used[name] : used[name] + rank]
                used[name] += rank
            found[target.name] = {"A": np.ascontiguousarray(rows["A"].T), "B": rows["B"]}
        return found
