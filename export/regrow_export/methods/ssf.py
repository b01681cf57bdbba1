"""SSF inside a graph: codes times their scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .base import GraphExpansion
from .rows import scaled_rows

if TYPE_CHECKING:
    from regrow_export.graph import GraphBuilder
    from regrow_format.adapter import Target

__all__ = ["SsfGraph"]


class SsfGraph:
    """No config. The seed is not read."""

    name = "ssf"

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
        found: GraphExpansion = {target.name: {} for target in targets}
        for kind, part in (("scale", "s"), ("bias", "b")):
            rows = scaled_rows(g, inputs, part, [t.out_features for t in targets])
            for target, row in zip(targets, rows, strict=True):
                found[target.name][kind] = {part: g.op("Unsqueeze", row, g.integers(0))}
        return found
