"""See `regrow_format.slot_kinds.input_scale`."""

from __future__ import annotations

from torch import Tensor, nn

from regrow_export.layers import LayerType

from .base import Tensors, TorchKind

__all__ = ["InputScaleSlot"]


class InputScaleSlot(TorchKind):
    """x + x t."""

    name = "input_scale"
    steps = ("on_input",)

    def on_input(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Not x (1 + t): an exporter would fold the sum into a constant."""
        return x + x * tensors["t"]

    def merged(self, layer: LayerType, module: nn.Module, tensors: Tensors) -> nn.Module | None:
        """The weight's columns, multiplied."""
        return layer.with_input_scale(module, 1 + tensors["t"].double().reshape(-1))
