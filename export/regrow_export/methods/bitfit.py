"""BitFit inside a graph: codes times their scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .base import GraphExpansion
from .rows import scaled_rows

if TYPE_CHECKING:
    from regrow_export.graph import GraphBuilder
    from regrow_format.adapter import Target

__all__ = ["BitfitGraph"]


class BitfitGraph:
    """No config. The seed is not read."""

    name = "bitfit"

    def build(
        self,
        g: GraphBuilder,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        targets: Sequence[Target],
        *,
        integer: bool,
    ) -> GraphExpansion:
        """See `GraphMethod.build`; b.<out> is [targets of that width, out]."""
        rows = scaled_rows(g, inputs, "b", [t.out_features for t in targets])
        return {
            target.name: {"bias": {"b": g.op("Unsqueeze", row, g.integers(0))}}
            for target, row in zip(targets, rows, strict=True)
        }
