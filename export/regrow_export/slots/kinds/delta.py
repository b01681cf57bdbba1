"""See `regrow_format.slot_kinds.delta`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regrow_export.graph import make_rank_dynamic
from regrow_export.layers import LayerType
from regrow_format.manifest import Slot

from .base import TRACE_RANK, Tensors, TorchKind

if TYPE_CHECKING:
    import onnx

__all__ = ["DeltaSlot"]


class DeltaSlot(TorchKind):
    """x[..., :r] D."""

    name = "delta"
    steps = ("added",)

    def added(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Exporters take the length for a constant; `rewrite` sets that right."""
        change: Tensor = x[..., : tensors["D"].shape[1]] @ tensors["D"]
        return change

    def merged(self, layer: LayerType, module: nn.Module, tensors: Tensors) -> nn.Module | None:
        """A pair becomes one dense layer."""
        return layer.with_delta(module, tensors["D"].double())

    def traced(self, slot: Slot, layer: LayerType, module: nn.Module) -> dict[str, Tensor]:
        """Few rows: a delta of all would double the weights that the tracer holds."""
        return {"D": torch.randn(1, min(slot.in_features, TRACE_RANK), slot.out_features)}

    def rewrite(self, model: onnx.ModelProto, slots: Sequence[Slot], *, whole: bool) -> None:
        """Read as many columns of x as a delta has rows."""
        make_rank_dynamic(model, [slot.inputs["D"] for slot in slots], cut=not whole)
