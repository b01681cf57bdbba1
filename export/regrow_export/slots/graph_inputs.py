"""The graph inputs that slots are: their defaults and shapes."""

from __future__ import annotations

from collections.abc import Sequence

from regrow_export.graph import SlotTensor
from regrow_format.manifest import Slot

from .feeds import Feeds
from .kinds import KINDS, zeros

__all__ = ["head_tensors", "target_tensors"]


def target_tensors(slots: Sequence[Slot]) -> list[SlotTensor]:
    """Defaults that change nothing. Dimensions have names per slot: each may have its own."""
    found = []
    for slot in slots:
        kind = KINDS[slot.kind]
        for part, name in slot.inputs.items():
            shape = kind.graph_shape(part, slot)
            found.append(SlotTensor(name, None if kind.keeps_default else zeros(shape), shape))
    return found


def head_tensors(slots: Sequence[Slot], defaults: Feeds) -> list[SlotTensor]:
    """Head slots with their defaults; the number of classes is dynamic, or fixed."""
    found = []
    for slot in slots:
        n: int | str = 1 if slot.fixed else f"{slot.target}.n"
        classes: int | str = slot.out_features if slot.fixed else f"{slot.target}.classes"
        shapes = {"weight": (n, slot.in_features, classes), "bias": (n, 1, classes)}
        for part, name in slot.inputs.items():
            found.append(SlotTensor(name, defaults[name], shapes[part]))
    return found
