"""What a kind of slot must say of itself without torch."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

if TYPE_CHECKING:
    from ..adapter_contents import AdapterContents
    from ..slot import Slot

__all__ = ["Changes", "Dims", "Feed", "Parts", "SlotKind", "weighted_sum"]

# By part, what its rows and columns are; see `SlotKind.dims`.
Dims = Mapping[str, tuple[int | str, int | str]]
# By part: the tensors of one slot as an expansion has them, such as {"A": [in, r], "B": [r, out]}.
Parts = dict[str, NDArray[np.float32]]
# By kind: what one adapter does to one target.
Changes = dict[str, Parts]
# What one adapter feeds to one slot, by part with n = 1, and its weight in a blend.
Feed = tuple[Parts, float]


class SlotKind(ABC):
    """A kind of slot. Instances hold no state.

    Attributes:
        name: as it stands in manifests.
        dims: by part, what its rows and columns are: 1, "in", "out", "rank" (0 where nothing is
            fed), "rows" ("in" where it is fed, else 0) or "classes".
        stem: what the names of graph inputs begin with, after the target's path.
        for_batch: one adapter serves a whole batch: n is always 1.
        is_head: it stands around a layer of the head and has the backbone's own numbers where an
            adapter has none; other kinds stand around targets.
        takes_dense: it takes what other kinds change as one matrix; see `dense`.
        only_fp32: it stands in for what bundles below fp32 round.
        multiplies: it multiplies what a layer computes, so that changes of it and of kinds that add
            to the weight are not linear together.
        adds_to_weight: its change is a sum with the layer's weight.
        may_cancel: a change may have no effect on the output, as a key's bias in a softmax.
    """

    name: ClassVar[str]
    dims: ClassVar[Dims]
    stem: ClassVar[str] = "adapter_"
    for_batch: ClassVar[bool] = False
    is_head: ClassVar[bool] = False
    takes_dense: ClassVar[bool] = False
    only_fp32: ClassVar[bool] = False
    multiplies: ClassVar[bool] = False
    adds_to_weight: ClassVar[bool] = False
    may_cancel: ClassVar[bool] = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return tuple(self.dims)

    def inputs(self, target: str) -> dict[str, str]:
        """By part, the name of the graph input."""
        return {part: f"{target}.{self.stem}{part}" for part in self.dims}

    def shape(self, part: str, slot: Slot, rank: int) -> tuple[int, int]:
        """[rows, columns] of what an adapter of some rank feeds."""
        sizes: dict[int | str, int] = {
            1: 1, "in": slot.in_features, "rows": slot.in_features, "rank": rank,
            "out": slot.out_features, "classes": slot.out_features,
        }  # fmt: skip
        rows, columns = self.dims[part]
        return sizes[rows], sizes[columns]

    def empty(self, part: str, slot: Slot) -> NDArray[np.float32]:
        """[rows, columns] that change nothing and take the least room: ranks and rows are 0."""
        sizes = self.shape(part, slot, slot.rank or 0)
        named = zip(self.dims[part], sizes, strict=True)
        return np.zeros([0 if dim == "rows" else size for dim, size in named], np.float32)

    def padding(self, part: str) -> float:
        """What fills a part up to a larger shape without a change."""
        return 0.0

    def feed(self, slot: Slot, parts: Parts, folder: Path) -> Parts:
        """[rows, columns] as the slot takes them, from an expansion; `folder` is the bundle's."""
        return {part: array.reshape(-1, array.shape[-1]) for part, array in parts.items()}

    def dense(self, parts: Parts) -> NDArray[np.float32] | None:
        """[in, out], a new array: the change as what is added to a weight, if it is one."""
        return None

    def is_change(self, parts: Mapping[str, NDArray[np.float32]]) -> bool:
        """Whether the tensors of a slot change anything at all."""
        return any(array.any() for array in parts.values())

    def deviation(self, part: str, slot: Slot, rank: int) -> float:
        """Of random entries in a test: a change about as large as the output."""
        return float(self.shape(part, slot, rank)[0] ** -0.5)

    def blend(self, slot: Slot, feeds: Sequence[Feed]) -> Parts:
        """The sum of weight times change.

        Raises:
            UsageError: changes of this kind do not add.
            MismatchError: the sum does not fit the slot.
        """
        raise UsageError(
            f"slots to blend or scale must be ones whose changes add, got {self.name} "
            f"({slot.target})"
        )

    def misfit(self, slot: Slot, adapter: AdapterContents) -> str | None:
        """Why an adapter that has the right layers does not fit the slot, None if it does."""
        return None

    def unlike(self, example: AdapterContents | None) -> str | None:
        """What the adapter that a bundle is made for must be or have, None if it may be any."""
        return None

    def flaw(self, slot: Slot) -> str | None:
        """What a manifest says wrong of such a slot, None if nothing."""
        return None if slot.weight is None else "weight must be left out but for weight slots"


def weighted_sum(part: str, feeds: Sequence[Feed]) -> NDArray[np.float32]:
    """Of one part, all of one shape."""
    return reduce(np.add, (np.multiply(parts[part], weight) for parts, weight in feeds))
