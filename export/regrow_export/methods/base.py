"""What a method must be able to do to be rebuilt inside a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from regrow_export.graph import GraphBuilder
    from regrow_format.adapter import Target

__all__ = ["GraphExpansion", "GraphMethod"]

# By target, kind of slot and part, the name of a value.
GraphExpansion = dict[str, dict[str, dict[str, str]]]


class GraphMethod(Protocol):
    """Writes a method's expansion in standard operators. Instances hold no state.

    The runtime's method of the same name says which coefficients there are; the nodes must give
    what its `expand` gives, to the bit where the coefficients are integers (FourierFT: to 1e-6 of
    the largest entry).
    """

    @property
    def name(self) -> str:
        """As in adapter files."""
        ...

    def build(
        self,
        g: GraphBuilder,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        targets: Sequence[Target],
        *,
        integer: bool,
    ) -> GraphExpansion:
        """Add the nodes.

        Args:
            inputs: value names of "seed" (uint32 [2], low word first), of every coefficient tensor
                of the runtime's `layout` (int8 if `integer`, else float32) and of its
                "<tensor>.scale" (float32 [rows]).

        Returns:
            By target, kind of slot and part, the names of float32 values [1, rows, columns] of the
            sizes that the kind says.
        """
        ...
