"""Kinds of slots in torch and in graphs. A further one is one file here and a line in `KINDS`."""

from __future__ import annotations

from regrow_format.slot_kinds import SLOT_KINDS

from .base import Tensors, TorchKind, zeros
from .bias import BiasSlot
from .delta import DeltaSlot
from .input_scale import InputScaleSlot
from .low_rank import LowRankSlot
from .scale import ScaleSlot
from .vector import VectorSlot
from .weight import WeightSlot

__all__ = ["KINDS", "TARGET_KINDS", "Tensors", "TorchKind", "zeros"]

_HALVES: dict[str, TorchKind] = {
    kind.name: kind
    for kind in (
        InputScaleSlot(),
        WeightSlot(),
        LowRankSlot(),
        DeltaSlot(),
        VectorSlot(),
        ScaleSlot(),
        BiasSlot(),
    )
}
# Kinds of slots around targets.
TARGET_KINDS = tuple(name for name, kind in SLOT_KINDS.items() if not kind.is_head)
# In the order in which a layer applies them; one that has no torch half is found here, at once.
KINDS: dict[str, TorchKind] = {name: _HALVES[name] for name in TARGET_KINDS}
