"""The graph inputs that slots are: their defaults and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from regrow_export.graph import SlotTensor
from regrow_format.manifest import Slot

from .feeds import Feeds

__all__ = ["head_tensors", "target_tensors"]


def target_tensors(slots: Sequence[Slot]) -> list[SlotTensor]:
    """Defaults that change nothing. Dimensions have names per slot: each may have its own."""
    return [
        SlotTensor(slot.inputs[part], None if slot.kind == "weight" else _zeros(shape), shape)
        for slot in slots
        for part, shape in _shapes(slot).items()
    ]


def _shapes(slot: Slot) -> Mapping[str, tuple[int | str, ...]]:
    """By part; a dimension that is not fixed has a name."""
    wide, high = slot.in_features, slot.out_features
    name = slot.target if slot.kind == "low_rank" else f"{slot.target}.{slot.kind}"
    n = 1 if slot.fixed else f"{name}.n"
    rank = slot.rank or f"{name}.rank"
    rows = wide if slot.fixed else rank
    shapes: dict[str, dict[str, tuple[int | str, ...]]] = {
        "low_rank": {"A": (n, wide, rank), "B": (n, rank, high)},
        "delta": {"D": (n, rows, high)},
        "bias": {"b": (n, 1, high)},
        "weight": {"W": (n, wide, high)},
        "vector": {"d": (n, 1, rank), "b": (n, 1, high)},
    }
    return shapes[slot.kind]


def _zeros(shape: Sequence[int | str]) -> NDArray[np.float32]:
    """n = 1; other dimensions that have a name are 0, the rank."""
    sizes = [size if isinstance(size, int) else int(size.endswith(".n")) for size in shape]
    return np.zeros(sizes, np.float32)


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
