"""See `regrow_format.slot_kinds.low_rank`."""

from __future__ import annotations

from torch import Tensor, nn

from regrow_export.layers import LINEAR_TITLES, LayerType
from regrow_format.manifest import Slot

from .base import Tensors, TorchKind

__all__ = ["LowRankSlot"]


class LowRankSlot(TorchKind):
    """(x A) B."""

    name = "low_rank"
    steps = ("added",)
    fits = f"{LINEAR_TITLES} or have merged_with"

    def added(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Two small products."""
        change: Tensor = (x @ tensors["A"]) @ tensors["B"]
        return change

    def dim_prefix(self, slot: Slot) -> str:
        """The target's path alone."""
        return slot.target

    def merged(self, layer: LayerType, module: nn.Module, tensors: Tensors) -> nn.Module | None:
        """A pair grows by the rank; a weight takes the product."""
        return layer.with_low_rank(module, tensors["A"], tensors["B"])
