"""See `regrow_format.slot_kinds.bias`."""

from __future__ import annotations

from torch import Tensor, nn

from regrow_export.layers import LINEAR_TITLES, LayerType

from .base import Tensors, TorchKind

__all__ = ["BiasSlot"]


class BiasSlot(TorchKind):
    """y + b."""

    name = "bias"
    steps = ("on_output",)
    fits = f"{LINEAR_TITLES}, LayerNorm, a pair of down and up, or have a bias"

    def takes(self, layer: LayerType) -> bool:
        """Norms too."""
        return True

    def on_output(self, y: Tensor, tensors: Tensors) -> Tensor:
        """Of y, not of what is added: an exporter would fold that into a constant."""
        return y + tensors["b"]

    def merged(self, layer: LayerType, module: nn.Module, tensors: Tensors) -> nn.Module | None:
        """A bias of its own, the old one (or none) plus the change."""
        old, change = layer.bias(module), tensors["b"].reshape(-1)
        fresh = change if old is None else old.detach().double() + change.double()
        return layer.with_bias(module, fresh)
