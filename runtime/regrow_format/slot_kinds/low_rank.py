"""y + (x A) B with A [n, in, r] and B [n, r, out]; r is 0 where nothing is fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import MismatchError
from .base import Dims, Feed, Parts, SlotKind

if TYPE_CHECKING:
    from ..adapter_contents import AdapterContents
    from ..slot import Slot

__all__ = ["LOW_RANK"]


class LowRank(SlotKind):
    """Ranks of adapters may differ, unless the slot's is fixed: then zeros fill them up."""

    name = "low_rank"
    adds_to_weight = True
    dims: ClassVar[Dims] = {"A": ("in", "rank"), "B": ("rank", "out")}

    def feed(self, slot: Slot, parts: Parts, folder: Path) -> Parts:
        """With columns and rows of zeros up to a fixed rank."""
        missing = 0 if slot.rank is None else slot.rank - len(parts["B"])
        if missing == 0:
            return parts
        return {
            "A": np.pad(parts["A"], ((0, 0), (0, missing))),
            "B": np.pad(parts["B"], ((0, missing), (0, 0))),
        }

    def dense(self, parts: Parts) -> NDArray[np.float32]:
        """A B."""
        return parts["A"] @ parts["B"]

    def is_change(self, parts: Mapping[str, NDArray[np.float32]]) -> bool:
        """Not where B is 0, as at the start of training."""
        return bool(parts["B"].any())

    def blend(self, slot: Slot, feeds: Sequence[Feed]) -> Parts:
        """[A_1 A_2 ...] and [w_1 B_1; w_2 B_2; ...]: nothing is approximated."""
        a = np.concatenate([parts["A"] for parts, _ in feeds], axis=2)
        b = np.concatenate([weight * parts["B"] for parts, weight in feeds], axis=1)
        return {"A": a, "B": b} if slot.rank is None else _fitted(slot, slot.rank, a, b)

    def misfit(self, slot: Slot, adapter: AdapterContents) -> str | None:
        """A rank above the slot's fixed one."""
        rank = adapter.config.get("rank", 0)
        if slot.rank is None or rank <= slot.rank:
            return None
        return (
            f"adapter must have rank {slot.rank} or less, as the bundle's slots have, got "
            f"{rank}: export the bundle with --fixed-rank {rank}"
        )


def _fitted(slot: Slot, rank: int, a: NDArray[np.float32], b: NDArray[np.float32]) -> Parts:
    """A [1, in, rank] and B [1, rank, out] without what earlier fillings left in between."""
    used = np.flatnonzero(a.any(axis=(0, 1)) & b.any(axis=(0, 2)))
    missing = rank - used.size
    if missing < 0:
        raise MismatchError(
            f"{slot.target}: ranks of a blend must add up to {rank} or less, as the slot "
            f"has, got {used.size}: blend fewer, or export with --fixed-rank {used.size}"
        )
    a = np.pad(a[:, :, used], ((0, 0), (0, 0), (0, missing)))
    return {"A": a, "B": np.pad(b[:, used], ((0, 0), (0, missing), (0, 0)))}


LOW_RANK = LowRank()
