"""x (1 + t) with t [n, 1, in], before a linear layer (IA³'s feed-forward layers)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from .base import Dims, Feed, Parts, SlotKind, weighted_sum

if TYPE_CHECKING:
    from ..slot import Slot

__all__ = ["INPUT_SCALE"]


class InputScale(SlotKind):
    """What every feature of a layer's input is multiplied by, less 1."""

    name = "input_scale"
    dims: ClassVar[Dims] = {"t": (1, "in")}
    multiplies = True
    may_cancel = True

    def deviation(self, part: str, slot: Slot, rank: int) -> float:
        """Half of the input."""
        return 0.5

    def blend(self, slot: Slot, feeds: Sequence[Feed]) -> Parts:
        """The change is (x t) W, so they add up."""
        return {"t": weighted_sum("t", feeds)}


INPUT_SCALE = InputScale()
