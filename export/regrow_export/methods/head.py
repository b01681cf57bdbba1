"""Head only: nothing to rebuild; the head is a slot of every graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .base import GraphExpansion

if TYPE_CHECKING:
    from regrow_export.graph import GraphBuilder
    from regrow_format.adapter import Target

__all__ = ["HeadGraph"]


class HeadGraph:
    """No config, no targets, no coefficients. The seed is not read."""

    name = "head"

    def build(
        self,
        g: GraphBuilder,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        targets: Sequence[Target],
        *,
        integer: bool,
    ) -> GraphExpansion:
        """Nothing."""
        return {}
