"""See `regrow_format.slot_kinds.vector`.

y = base(x) + lambda_b * (((x A) * lambda_d) B): an adapter is its two vectors (arXiv 2310.11454,
eq. 2). A [in, rank] and B [rank, out] are the beginnings of one stream of signs each, int8, one
tensor per width, which all slots of a graph share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regrow_export.graph import share_constants
from regrow_format.basis import Role, sign_bits
from regrow_format.manifest import Slot

from .base import TRACE_RANK, Tensors, TorchKind

if TYPE_CHECKING:
    import onnx

    from regrow_format.adapter import Adapter, Target

__all__ = ["VectorSlot"]


class VectorSlot(TorchKind):
    """((x A) d) B b, with `A` and `B` among the tensors."""

    name = "vector"
    steps = ("added",)
    constant_names = ("A", "B")

    def slot(self, target: Target, rank: int | None = None, like: Adapter | None = None) -> Slot:
        """With the rank and the seed of `like`."""
        found = super().slot(target, rank)
        if like is None:
            return found
        return replace(found, rank=int(like.config["rank"]), seed=str(like.seed))

    def added(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Scales between and after the two products."""
        inner = (x @ tensors["A"]) * tensors["d"]
        change: Tensor = inner @ tensors["B"] * tensors["b"]
        return change

    def constants(self, slot: Slot) -> dict[str, NDArray[np.float32]]:
        """A [in, rank] and B [rank, out]."""
        return {part: _matrix(slot, part).astype(np.float32) for part in "AB"}

    def traced_constants(self, slot: Slot) -> dict[str, Tensor]:
        """Of a small rank."""
        wide, high = slot.in_features, slot.out_features
        return {"A": torch.randn(wide, TRACE_RANK), "B": torch.randn(TRACE_RANK, high)}

    def rewrite(self, model: onnx.ModelProto, slots: Sequence[Slot], *, whole: bool) -> None:
        """Let every slot read the same matrices, one for each width."""
        names: dict[str, str] = {}
        values: dict[str, tuple[Slot, str]] = {}
        for slot, part, width in _matrices(slots):
            names[f"{slot.target}.basis_{part}"] = shared = f"vera.{part}.{width}"
            values.setdefault(shared, (slot, part))
        made = {name: _matrix(*values[name]) for name in sorted(values, key=_by_width)}
        share_constants(model, names, made)


def _by_width(name: str) -> tuple[str, int]:
    part, width = name.split(".")[1:]
    return part, int(width)


def _matrices(slots: Sequence[Slot]) -> Iterator[tuple[Slot, str, int]]:
    """Slot, part and width of every matrix that is read."""
    for slot in slots:
        yield slot, "A", slot.in_features
        yield slot, "B", slot.out_features


def _matrix(slot: Slot, part: str) -> NDArray[np.int8]:
    """A [in, rank] or B [rank, out], of 1 and -1."""
    rank, seed = slot.rank or 0, int(slot.seed or 0)
    shape = (rank, slot.in_features) if part == "A" else (slot.out_features, rank)
    packed = sign_bits(seed, Role.VERA_A if part == "A" else Role.VERA_B, *shape)
    bits = np.unpackbits(packed, axis=-1, count=shape[1], bitorder="little")
    return np.ascontiguousarray(2 * bits.T.astype(np.int8) - 1)
