"""y (1 + s) with s [n, 1, out]: linear layers, their bias included, and norms (IA³, SSF, DoRA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from .base import Dims, Feed, Parts, SlotKind, weighted_sum

if TYPE_CHECKING:
    from ..slot import Slot

__all__ = ["SCALE"]


class Scale(SlotKind):
    """What every feature of a layer's output is multiplied by, less 1."""

    name = "scale"
    dims: ClassVar[Dims] = {"s": (1, "out")}
    multiplies = True
    may_cancel = True

    def deviation(self, part: str, slot: Slot, rank: int) -> float:
        """Half of the output."""
        return 0.5

    def blend(self, slot: Slot, feeds: Sequence[Feed]) -> Parts:
        """The change is y s, so they add up."""
        return {"s": weighted_sum("s", feeds)}


SCALE = Scale()
