"""VeRA's y + ((x A) d) B b with d [n, 1, rank], b [n, 1, out] and A, B built into the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..basis import PHILOX_SIGN
from .base import Dims, SlotKind

if TYPE_CHECKING:
    from ..adapter_contents import AdapterContents
    from ..slot import Slot

__all__ = ["VECTOR"]


class Vector(SlotKind):
    """All adapters share the basis that the slot's `seed` and `rank` give."""

    name = "vector"
    dims: ClassVar[Dims] = {"d": (1, "rank"), "b": (1, "out")}
    stem = "lambda_"
    adds_to_weight = True

    def is_change(self, parts: Mapping[str, NDArray[np.float32]]) -> bool:
        """Not where b is 0, as at the start of training."""
        return bool(parts["b"].any())

    def deviation(self, part: str, slot: Slot, rank: int) -> float:
        """Each vector takes away what the sum before it brought in."""
        return float((slot.in_features if part == "d" else rank) ** -0.5)

    def misfit(self, slot: Slot, adapter: AdapterContents) -> str | None:
        """Another basis."""
        rank = adapter.config.get("rank", 0)
        wanted, got = (PHILOX_SIGN.kind, slot.seed), (adapter.basis.kind, str(adapter.seed))
        if (*wanted, slot.rank) == (*got, rank):
            return None
        return (
            f"adapter must have the basis of the bundle's vector slots, rank {slot.rank} and "
            f"{' of seed '.join(map(str, wanted))}, got rank {rank} and {' of seed '.join(got)}"
            f": export the bundle with --for {adapter.method}"
        )

    def unlike(self, example: AdapterContents | None) -> str | None:
        """VeRA's, of the basis that graphs can hold."""
        if example is None or example.method != "vera":
            got = "none" if example is None else f"one of {example.method}"
            return f"be of VeRA for vector slots, which take its seed and rank, got {got}"
        if example.basis.kind != PHILOX_SIGN.kind:
            return (
                f"have the basis {PHILOX_SIGN.kind} for vector slots, got {example.basis.kind}: "
                "use low_rank ones"
            )
        return None

    def flaw(self, slot: Slot) -> str | None:
        """It has a rank and a seed."""
        if slot.rank is None or slot.seed is None:
            return "a vector slot must have a rank and a seed"
        return super().flaw(slot)


VECTOR = Vector()
