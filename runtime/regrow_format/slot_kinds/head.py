"""x W + b in the place of a layer of the head: weight [n, in, classes], bias [n, 1, classes]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..errors import UsageError
from .base import Dims, Feed, Parts, SlotKind, weighted_sum

if TYPE_CHECKING:
    from ..slot import Slot

__all__ = ["HEAD"]


class HeadKind(SlotKind):
    """Its defaults are the backbone's own head. A class that a sample lacks has a bias of -inf."""

    name = "head"
    dims: ClassVar[Dims] = {"weight": ("in", "classes"), "bias": (1, "classes")}
    stem = ""
    is_head = True

    def padding(self, part: str) -> float:
        """A class that is not there cannot win."""
        return -np.inf if part == "bias" else 0.0

    def feed(self, slot: Slot, parts: Parts, folder: Path) -> Parts:
        """From weight [classes, in] and bias [classes], as files have them."""
        missing = slot.out_features - len(parts["bias"]) if slot.fixed else 0
        weight = np.pad(parts["weight"], ((0, missing), (0, 0)))
        bias = np.pad(parts["bias"], (0, missing), constant_values=self.padding("bias"))
        return {"weight": np.ascontiguousarray(weight.T), "bias": bias[None]}

    def blend(self, slot: Slot, feeds: Sequence[Feed]) -> Parts:
        """A head is no change but a replacement: the mean, with the weights over their sum."""
        if len(feeds) == 1:
            return dict(feeds[0][0])
        total = sum(weight for _, weight in feeds)
        if not total > 0:
            raise UsageError(
                f"weights of adapters with heads must add up to more than 0, got {total}"
            )
        shares = [(parts, weight / total) for parts, weight in feeds]
        return {part: weighted_sum(part, shares) for part in self.dims}


HEAD = HeadKind()
