"""VeRA (arXiv 2310.11454): one pair of frozen random matrices, two vectors of scales per target.

y += lambda_b * (B (lambda_d * (A x))) with A [r, in] and B [out, r] of signs, shared by all layers:
row i of A is sign vector i of role 2, row o of B is sign vector o of role 3. The scales of `d` and
`b` include sqrt(2 / in) and sqrt(2 / r), the Kaiming deviations of the paper's entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..basis import Role, plus_minus
from ..errors import FormatError
from ..fields import Fields
from ..target_rows import MAX_FEATURES
from .base import (
    MAX_RANK,
    Expansion,
    Layout,
    Method,
    check_basis,
    check_factors,
    stacked,
    unstacked,
)

if TYPE_CHECKING:
    from ..adapter_contents import AdapterContents
    from ..basis import BasisCache
    from ..target_rows import Target

__all__ = ["Vera"]

# Matrices of floats are transposed a block at a time, 4 MiB.
FLOATS_AT_ONCE = 1 << 20


class Vera(Method):
    """Config: `rank`. Coefficients: `d` [targets, rank], `b.<out>` [targets with that out, out]."""

    name = "vera"
    kinds = ("low_rank",)
    also = ("vector", "weight")
    bases = ("philox-sign", "peft-mt19937", "stored")

    def read_config(self, fields: Fields) -> dict[str, Any]:
        """rank in 1..4096."""
        return {"rank": fields.number("rank", 1, MAX_RANK)}

    def layout(self, config: Mapping[str, Any], targets: Sequence[Target]) -> Layout:
        """d, and b.<out> for every width that occurs."""
        d = {"d": (len(targets), config["rank"])}
        return {**d, **stacked("b", [t.out_features for t in targets])}

    def constants(
        self, config: Mapping[str, Any], targets: Sequence[Target]
    ) -> dict[str, NDArray[np.float32]]:
        """sqrt(2 / in) for d, sqrt(2 / rank) for b."""
        b = math.sqrt(2 / config["rank"])
        ones = super().constants(config, targets)
        d = np.array([math.sqrt(2 / t.in_features) for t in targets], dtype=np.float32)
        return {name: d if name == "d" else rows * np.float32(b) for name, rows in ones.items()}

    def stored_basis(
        self, config: Mapping[str, Any], targets: Sequence[Target]
    ) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """basis.A [rank, widest in] and basis.B [widest out, rank]."""
        wide, high = _widest(targets)
        shapes = {"basis.A": (config["rank"], wide), "basis.B": (high, config["rank"])}
        return {name: (("F32", "F16"), shape) for name, shape in shapes.items()}

    def read_basis(self, kind: str, fields: Fields) -> dict[str, Any]:
        """Of PEFT's: the widest in and out that it was made for, and the dtype it has there."""
        if kind != "peft-mt19937":
            return {}
        from ..mt19937 import DTYPES  # for adapters of PEFT alone

        return {
            "in": fields.number("in", 1, MAX_FEATURES),
            "out": fields.number("out", 1, MAX_FEATURES),
            "dtype": fields.choice("dtype", DTYPES),
        }

    def check(self, adapter: AdapterContents, where: str) -> None:
        """PEFT's matrices are as wide as the widest target, or wider."""
        fields, (wide, high) = adapter.basis.fields, _widest(adapter.targets)
        if fields and (fields["in"] < wide or fields["out"] < high):
            raise FormatError(
                f"{where}: basis: in and out must be at least the widest targets' {wide} and "
                f"{high}, got {fields['in']} and {fields['out']}"
            )

    def expand(self, adapter: AdapterContents, basis: BasisCache) -> Expansion:
        """A [in, rank] and B [rank, out] per target: one multiply by the scale, then the sign."""
        rank, targets = adapter.config["rank"], adapter.targets
        check_factors(rank, targets)
        matrix_a, matrix_b = _matrices(adapter, basis)
        rows = unstacked(adapter, "b", [t.out_features for t in targets])
        a = _scaled(matrix_a, [t.in_features for t in targets], adapter.coefficients["d"].dense())
        b = _scaled(matrix_b, [rank] * len(targets), (row[0] for row in rows))
        return {t.name: {"low_rank": {"A": a[i], "B": b[i]}} for i, t in enumerate(targets)}

    def expand_for(self, kind: str, adapter: AdapterContents, basis: BasisCache) -> Expansion:
        """For vector slots: d [1, rank] and b [1, out] per target, times their scales."""
        if kind != "vector":
            return self.expand(adapter, basis)
        targets, d = adapter.targets, adapter.coefficients["d"].dense()
        rows = unstacked(adapter, "b", [t.out_features for t in targets])
        return {
            t.name: {"vector": {"d": d[i : i + 1], "b": b}}
            for i, (t, b) in enumerate(zip(targets, rows, strict=True))
        }


def _widest(targets: Sequence[Target]) -> tuple[int, int]:
    wide = max((t.in_features for t in targets), default=1)
    return wide, max((t.out_features for t in targets), default=1)


def _matrices(adapter: AdapterContents, basis: BasisCache) -> tuple[Iterable[NDArray[Any]], ...]:
    """A [in or more, rank] and B [rank, out or more], blocks of rows: floats, or bits in uint8."""
    kind, seed, rank = adapter.basis.kind, adapter.seed, adapter.config["rank"]
    wide, high = _widest(adapter.targets)
    if kind == "philox-sign":
        a = basis.rows(seed, Role.VERA_A, rank, wide)
        return a, basis.rows(seed, Role.VERA_B, high, rank)
    if kind == "stored":
        stored = adapter.stored_basis
        return _rows(stored["basis.A"]), _rows(stored["basis.B"])
    wide, dtype = adapter.basis.fields["in"], adapter.basis.fields["dtype"]
    check_basis(rank, 32 * max(wide, high))
    # B is drawn row by row, after A: the rows that no target reads need not be.
    key = (kind, "vera", seed, rank, wide, high, dtype)
    from ..mt19937 import uniform_kaiming

    a_b = basis.keep(key, lambda: uniform_kaiming(seed, rank, wide, high, dtype))
    return tuple(map(_rows, a_b))


def _rows(matrix: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    """The rows of the transposed matrix, a block at a time."""
    step = max(1, FLOATS_AT_ONCE // len(matrix))
    for start in range(0, matrix.shape[1], step):
        yield np.ascontiguousarray(matrix[:, start : start + step].T, dtype=np.float32)


def _scaled(
    blocks: Iterable[NDArray[Any]],
    entries: Sequence[int],
    values: Iterable[NDArray[np.float32]],
) -> list[NDArray[np.float32]]:
    """By target, float32 [entries, len(values)]: the matrix, column i times value i."""
    values = list(values)
    found = [np.empty((n, len(v)), dtype=np.float32) for n, v in zip(entries, values, strict=True)]
    start = 0
    for block in blocks:
        rows = plus_minus(block) if block.dtype == np.uint8 else block
        for part, value in zip(found, values, strict=True):
            here = part[start : start + len(rows)]
            np.multiply(rows[: len(here), : len(value)], value, out=here)
        start += len(rows)
    return found
