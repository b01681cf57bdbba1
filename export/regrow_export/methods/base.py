"""What a method must be able to do to be rebuilt inside a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from regrow_export.graph import GraphBuilder
    from regrow_format.adapter import Target

__all__ = ["GraphMethod"]


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
    ) -> dict[str, dict[str, str]]:
        """Add the nodes.

        Args:
            inputs: value names of "seed" (uint32 [2], low word first), of every coefficient tensor
                of the runtime's `layout` (int8 if `integer`, else float32) and of its
                "<tensor>.scale" (float32 [rows]).

        Returns:
            By target and part, the names of float32 values A [1, in, r] and B [1, r, out], or
            D [1, in, out], or b [1, 1, out].
        """
        ...
