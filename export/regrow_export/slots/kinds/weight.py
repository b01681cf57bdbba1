"""See `regrow_format.slot_kinds.weight`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from regrow_export.layers import LayerType
from regrow_format.errors import UsageError
from regrow_format.manifest import Slot

from .base import Tensors, TorchKind

if TYPE_CHECKING:
    pass

__all__ = ["WeightSlot"]


class WeightSlot(TorchKind):
    """x W in the place of the layer's own product."""

    name = "weight"
    steps = ("added",)
    replaces_weight = True
    keeps_default = True

    def takes(self, layer: LayerType) -> bool:
        """Layers of one weight: a pair has two."""
        return layer.has_one_weight

    def refuse(self, target: str, module: nn.Module) -> UsageError:
        """See `TorchKind.refuse`."""
        return UsageError(
            f"target must have one float weight for a weight slot, got {target}, "
            f"{type(module).__name__}: use slots of another kind"
        )

    def added(self, x: Tensor, tensors: Tensors) -> Tensor:
        """All but the bias."""
        change: Tensor = x @ tensors["W"]
        return change

    def traced(self, slot: Slot, layer: LayerType, module: nn.Module) -> dict[str, Tensor]:
        """The layer's own, sharing its memory."""
        weight = layer.weight(module)
        if weight is None:  # checked before, by `slot_targets`
            raise TypeError(f"{type(module).__name__} must have one weight")
        return {"W": weight.T[None]}
