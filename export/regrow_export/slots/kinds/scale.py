"""See `regrow_format.slot_kinds.scale`."""

from __future__ import annotations

from torch import Tensor, nn

from regrow_export.layers import LINEAR_TITLES, LayerType

from .base import Tensors, TorchKind

__all__ = ["ScaleSlot"]


class ScaleSlot(TorchKind):
    """y + y s."""

    name = "scale"
    steps = ("on_output",)
    fits = f"{LINEAR_TITLES}, a norm with a weight, or a pair of down and up"

    def takes(self, layer: LayerType) -> bool:
        """Norms too."""
        return True

    def on_output(self, y: Tensor, tensors: Tensors) -> Tensor:
        """Not y (1 + s): an exporter would fold the sum into a constant."""
        return y + y * tensors["s"]

    def merged(self, layer: LayerType, module: nn.Module, tensors: Tensors) -> nn.Module | None:
        """The weight's rows and the bias, multiplied."""
        return layer.with_output_scale(module, 1 + tensors["s"].double().reshape(-1))
