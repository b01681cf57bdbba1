"""IA³ inside a graph: codes times their scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regrow_format.methods.ia3 import is_feedforward

from .base import GraphExpansion
from .rows import scaled_rows

if TYPE_CHECKING:
    from regrow_export.graph import GraphBuilder
    from regrow_format.adapter import Target

__all__ = ["Ia3Graph"]


class Ia3Graph:
    """Config: as in the runtime, `feedforward`. The seed is not read."""

    name = "ia3"

    def build(
        self,
        g: GraphBuilder,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        targets: Sequence[Target],
        *,
        integer: bool,
    ) -> GraphExpansion:
        """See `GraphMethod.build`; s.<out> and t.<in> are [targets of that width, width]."""
        forward = [t for t in targets if is_feedforward(config, t.name)]
        others = [t for t in targets if not is_feedforward(config, t.name)]
        t = scaled_rows(g, inputs, "t", [target.in_features for target in forward])
        s = scaled_rows(g, inputs, "s", [target.out_features for target in others])
        found: GraphExpansion = {}
        for kind, part, group, rows in (
            ("input_scale", "t", forward, t),
            ("scale", "s", others, s),
        ):
            for target, row in zip(group, rows, strict=True):
                found[target.name] = {kind: {part: g.op("Unsqueeze", row, g.integers(0))}}
        return found
