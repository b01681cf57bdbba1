"""DoRA inside a graph: LoRA's factors, and codes times their scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regrow_format.methods.dora import vector_parts

from .base import GraphExpansion
from .lora import LoraGraph
from .rows import scaled_rows

if TYPE_CHECKING:
    from regrow_export.graph import GraphBuilder
    from regrow_format.adapter import Target

__all__ = ["DoraGraph"]


class DoraGraph(LoraGraph):
    """Config: as in the runtime; alpha stands in the scales. The seed is not read."""

    name = "dora"

    def build(
        self,
        g: GraphBuilder,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        targets: Sequence[Target],
        *,
        integer: bool,
    ) -> GraphExpansion:
        """See `GraphMethod.build`; s.<out> and b.<out> are [targets of that width, out]."""
        found = super().build(g, inputs, config, targets, integer=integer)
        widths = [t.out_features for t in targets]
        for kind, part in vector_parts(config).items():
            rows = scaled_rows(g, inputs, part, widths)
            for target, row in zip(targets, rows, strict=True):
                found[target.name][kind] = {part: g.op("Unsqueeze", row, g.integers(0))}
        return found
