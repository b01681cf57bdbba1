"""y + b with b [n, 1, out]: linear layers and norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from .base import Dims, Feed, Parts, SlotKind, weighted_sum

if TYPE_CHECKING:
    from ..slot import Slot

__all__ = ["BIAS"]


class Bias(SlotKind):
    """What is added to every row of a layer's output."""

    name = "bias"
    dims: ClassVar[Dims] = {"b": (1, "out")}
    may_cancel = True

    def blend(self, slot: Slot, feeds: Sequence[Feed]) -> Parts:
        """Biases add up."""
        return {"b": weighted_sum("b", feeds)}


BIAS = Bias()
