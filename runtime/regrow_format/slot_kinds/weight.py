"""x W with W [1, in, out] in the place of a layer's own weight, one adapter a batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, UsageError
from .base import Dims, Parts, SlotKind

if TYPE_CHECKING:
    from ..slot import Slot

__all__ = ["WEIGHT"]


class Weight(SlotKind):
    """Its default is the weight itself, which stands in the bundle's file and is mapped."""

    name = "weight"
    adds_to_weight = True
    dims: ClassVar[Dims] = {"W": ("in", "out")}
    for_batch = True
    takes_dense = True
    only_fp32 = True

    def inputs(self, target: str) -> dict[str, str]:
        """The weight's own name."""
        return {"W": f"{target}.weight"}

    def feed(self, slot: Slot, parts: Parts, folder: Path) -> Parts:
        """The backbone's weight plus the change `W`, which is overwritten."""
        return {"W": np.add(parts["W"], _base_weight(slot, folder), out=parts["W"])}

    def flaw(self, slot: Slot) -> str | None:
        """It is fixed, and says where its default is."""
        if slot.weight is None or not slot.fixed:
            return "weight must say where a fixed weight slot's default is"
        return None


def _base_weight(slot: Slot, folder: Path) -> NDArray[np.float32]:
    """float32 [in, out]: the default of a weight slot, mapped from the bundle's file."""
    stored, shape = slot.weight, (slot.in_features, slot.out_features)
    if stored is None:
        raise UsageError(f"{slot.target} must have its weight in the bundle, got none")
    try:
        return np.memmap(folder / stored.file, "<f4", "r", stored.offset, shape)
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder / stored.file} must hold the weights: {error}") from None


WEIGHT = Weight()
