"""y + x[..., :r] D with D [n, r, out]; r is `in` where it is fed, and 0 where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from .base import Dims, Feed, Parts, SlotKind, weighted_sum

if TYPE_CHECKING:
    from ..slot import Slot

__all__ = ["DELTA"]


class Delta(SlotKind):
    """The whole change of a weight, in the order of a MatMul."""

    name = "delta"
    adds_to_weight = True
    dims: ClassVar[Dims] = {"D": ("rows", "out")}

    def dense(self, parts: Parts) -> NDArray[np.float32]:
        """D itself."""
        return parts["D"]

    def blend(self, slot: Slot, feeds: Sequence[Feed]) -> Parts:
        """Deltas add up."""
        return {"D": weighted_sum("D", feeds)}


DELTA = Delta()
