"""LoRA inside a graph: every number is stored, so there is a multiply and a reordering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .base import GraphExpansion
from .rows import scaled_rows

if TYPE_CHECKING:
    from regrow_export.graph import GraphBuilder
    from regrow_format.adapter import Target

__all__ = ["LoraGraph"]


class LoraGraph:
    """Config: as in the runtime; alpha stands in the scales. The seed is not read."""

    name = "lora"

    def build(
        self,
        g: GraphBuilder,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        targets: Sequence[Target],
        *,
        integer: bool,
    ) -> GraphExpansion:
        """See `GraphMethod.build`; A.<in> and B.<out> are [targets of that width * rank, width]."""
        rank = config["rank"]
        columns = scaled_rows(g, inputs, "A", [t.in_features for t in targets], rank)
        rows = scaled_rows(g, inputs, "B", [t.out_features for t in targets], rank)
        return {
            target.name: {
                "low_rank": {
                    "A": g.op("Unsqueeze", g.op("Transpose", a, perm=[1, 0]), g.integers(0)),
                    "B": g.op("Unsqueeze", b, g.integers(0)),
                }
            }
            for target, a, b in zip(targets, columns, rows, strict=True)
        }
