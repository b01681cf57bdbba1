"""VeRA inside a graph; `regrow_format.methods.vera` has the definition and the same order of work.

A factor is a sign times (a code times its scale): one rounding, then a sign, so the same bits as
NumPy's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regrow_format.basis import Role

from .base import GraphExpansion
from .rows import scaled, scaled_rows
from .sign_basis import head_rows, round_keys, sign_bits

if TYPE_CHECKING:
    from regrow_export.graph import GraphBuilder
    from regrow_format.adapter import Target

__all__ = ["VeraGraph"]


class VeraGraph:
    """Config: as in the runtime, `rank`. Both matrices are made once, for the widest target."""

    name = "vera"

    def build(
        self,
        g: GraphBuilder,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        targets: Sequence[Target],
        *,
        integer: bool,
    ) -> GraphExpansion:
        """See `GraphMethod.build`; d is [targets, rank], b.<out> [targets of that width, out]."""
        rank = config["rank"]
        wide = max(target.in_features for target in targets)
        high = max(target.out_features for target in targets)
        keys = round_keys(g, inputs["seed"])
        # Entries, then vectors: A' [in, rank] has vectors 0 to rank, B' [rank, out] 0 to out.
        a_bits = sign_bits(g, keys, Role.VERA_A, [0], rank, wide)
        b_bits = sign_bits(g, keys, Role.VERA_B, [0], high, rank)
        inner = g.split(scaled(g, inputs, "d"), len(targets), axis=0)
        outer = scaled_rows(g, inputs, "b", [t.out_features for t in targets])
        return {
            target.name: {
                "low_rank": {
                    "A": _signed(g, head_rows(g, a_bits, wide, target.in_features), d),
                    "B": _signed(g, head_rows(g, b_bits, high, target.out_features, axis=2), b),
                }
            }
            for target, d, b in zip(targets, inner, outer, strict=True)
        }


def _signed(g: GraphBuilder, bits: str, values: str) -> str:
    """float32 [1, entries, vectors]: values [1, vectors], negative where a bit is 0."""
    return g.op("Where", g.cast(bits, "bool"), values, g.op("Neg", values))
