"""NOLA inside a graph; `regrow_format.methods.nola` has the definition and the same order of work.

With integer codes a factor is 2 (bits x codes) - sum(codes), in exact integers, converted once and
multiplied once by its scale: the same bits as NumPy's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from regrow_format.basis import Role

from .base import GraphExpansion
from .sign_basis import head_rows, round_keys, sign_bits

if TYPE_CHECKING:
    from regrow_export.graph import GraphBuilder
    from regrow_format.adapter import Target

__all__ = ["NolaGraph"]

# On CPUs with AMX, ONNX Runtime 1.21 to 1.24 leaves rows of integer products as they were in memory
# where columns fill no whole tile (its issue 26324).
_TILE = 16


class NolaGraph:
    """Config: as in the runtime, `k`, `l`, `rank`, `c` (inside the scales), `shared`."""

    name = "nola"

    def build(
        self,
        g: GraphBuilder,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        targets: Sequence[Target],
        *,
        integer: bool,
    ) -> GraphExpansion:
        """See `GraphMethod.build`; coefficients are alpha [targets, k] and beta [targets, l]."""
        rank, shared = config["rank"], config["shared"]
        keys = round_keys(g, inputs["seed"])
        found: GraphExpansion = {target.name: {"low_rank": {}} for target in targets}
        for part, tensor, role, count, shapes in (
            ("A", "alpha", Role.NOLA_A, config["k"], [(t.in_features, rank) for t in targets]),
            ("B", "beta", Role.NOLA_B, config["l"], [(rank, t.out_features) for t in targets]),
        ):
            basis = _Basis(g, keys, role, count, shared)
            numbers = _Numbers(g, inputs[tensor], inputs[f"{tensor}.scale"], shared, integer)
            rows = _factors(basis, numbers, [high * wide for high, wide in shapes])
            for target, shape, row in zip(targets, shapes, rows, strict=True):
                value = g.op("Reshape", row, g.integers(1, *shape))
                found[target.name]["low_rank"][part] = value
        return found


def _factors(basis: _Basis, numbers: _Numbers, sizes: Sequence[int]) -> list[str]:
    """By target, the name of its factor, flat: float32 [1, size]; one product per size."""
    groups: dict[int, list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    rows = [""] * len(sizes)
    for size, group in groups.items():
        combined = numbers.combine(basis.bits(group, size, max(sizes)), group, size)
        for index, row in zip(group, basis.g.split(combined, len(group), axis=0), strict=True):
            rows[index] = row
    return rows


@dataclass
class _Basis:
    """The signs of one role: one basis for all targets if `shared`, else one per target."""

    g: GraphBuilder
    keys: Sequence[tuple[str, str]]
    role: Role
    vectors: int
    shared: bool
    _common: str = ""

    def bits(self, group: Sequence[int], size: int, longest: int) -> str:
        """uint8 [1, size, vectors] if shared, else [targets of the group, size, vectors]."""
        if not self.shared:
            return self._signs([1 + index for index in group], size)
        # Generated once, for the longest; shorter factors use its beginning.
        self._common = self._common or self._signs([0], longest)
        return head_rows(self.g, self._common, longest, size)

    def _signs(self, layers: Sequence[int], entries: int) -> str:
        return sign_bits(self.g, self.keys, self.role, layers, self.vectors, entries)


@dataclass(frozen=True)
class _Numbers:
    """Coefficients [targets, vectors] and their scales [targets]."""

    g: GraphBuilder
    codes: str
    scale: str
    shared: bool
    integer: bool

    def combine(self, bits: str, group: Sequence[int], size: int) -> str:
        """float32 [targets of the group, size]: the sums of signed vectors, times their scales."""
        g = self.g
        codes = g.op("Gather", self.codes, g.integers(*group), axis=0)
        scale = g.op("Gather", self.scale, g.integers(*group), axis=0)
        sums = g.op("Reshape", self._twice(bits, codes, group), g.integers(len(group), size))
        exact = g.cast(codes, "int32") if self.integer else codes
        signed = g.op("Sub", sums, g.op("ReduceSum", exact, g.integers(1), keepdims=1))
        if self.integer:
            signed = g.cast(signed, "float32")
        return g.op("Mul", signed, g.op("Unsqueeze", scale, g.integers(1)))

    def _twice(self, bits: str, codes: str, group: Sequence[int]) -> str:
        """Twice the sums of the coefficients whose bit is set, targets first."""
        g = self.g
        if not self.shared:  # [targets, size, k] x [targets, k, 1]
            return self._product(bits, g.op("Unsqueeze", codes, g.integers(2)))
        missing = -len(group) % _TILE if self.integer else 0
        if missing:
            filled = [*group, *[group[0]] * missing]
            codes = g.op("Gather", self.codes, g.integers(*filled), axis=0)
        columns = g.op("Unsqueeze", g.op("Transpose", codes, perm=[1, 0]), g.integers(0))
        # [1, size, k] x [1, k, targets]
        rows = g.op("Transpose", self._product(bits, columns), perm=[0, 2, 1])
        return head_rows(g, rows, len(group) + missing, len(group))

    def _product(self, bits: str, columns: str) -> str:
        g = self.g
        if self.integer:
            product = g.op("MatMulInteger", bits, columns)
            return g.op("Mul", product, g.constant(np.array([2], dtype=np.int32)))
        twice = g.op("Mul", columns, g.constant(np.array([2], dtype=np.float32)))
        return g.op("MatMul", g.cast(bits, "float32"), twice)
