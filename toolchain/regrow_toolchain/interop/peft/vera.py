"""VeRA as PEFT saves it.

PEFT computes W x + lambda_b * (B (lambda_d * (A x))); A [r, widest in] and B [widest out, r] are
shared, each layer takes their first columns and rows (`peft.tuners.vera`). They are drawn from
`projection_prng_key`, and saved along or not. What was saved and is what is drawn need not be
stored: `regrow_format.mt19937` draws it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from regrow_format.adapter import Target
from regrow_format.basis import BasisSpec
from regrow_format.errors import FormatError
from regrow_format.fields import Fields
from regrow_format.mt19937 import DTYPES, uniform_kaiming

from .base_model import Base, Widths
from .config import flag
from .method import Basis, Parts, PeftKind, Row
from .tensors import read_float32

__all__ = ["PeftVera"]

_MAX_RANK = 1 << 12


@dataclass(frozen=True)
class PeftVera(PeftKind):
    """The rank, and where A and B come from."""

    peft_type = "VERA"
    title = "VeRA"
    method = "vera"
    parts = ("vera_lambda_d", "vera_lambda_b")
    shared = ("vera_A", "vera_B")
    neutral = frozenset({"d_initial", "init_weights", "vera_dropout"})

    saved: tuple[str, ...]
    rank: int
    seed: int
    projected: bool  # whether A and B are saved along

    @classmethod
    def read(cls, fields: Fields, saved: tuple[str, ...]) -> Self:
        """r, projection_prng_key, save_projection."""
        return cls(
            saved,
            rank=fields.number("r", 1, _MAX_RANK, 256),
            seed=fields.number("projection_prng_key", -(2**63), 2**64 - 1, 0) % 2**64,
            projected=flag(fields, "save_projection", True),
        )

    def widths(self, layer: str, parts: Parts, base: Base) -> Widths | str:
        """The backbone's, where lambda_b fits them: nothing saved tells a layer's input."""
        if (missing := base.missing(layer)) is not None:
            return missing
        wide, high = base.layers[layer]
        d, b = (parts[part].shape for part in self.parts)
        if layer in base.transposed and b == (wide,) != (high,):
            wide, high = high, wide
        if (d, b) != ((self.rank,), (high,)):
            return (
                f"{layer} must have vera_lambda_d [{self.rank}] and vera_lambda_b [{high}], "
                f"got {list(d)} and {list(b)}"
            )
        return wide, high

    def findings(self, shared: Parts, targets: Sequence[Target]) -> list[str]:
        """A and B are there, or not, as the config says, and as wide as the widest layer."""
        wide, high = _widest(targets)
        if not shared and not self.projected:
            return []
        if lost := [name for name in self.shared if name not in shared]:
            return [
                f"{' and '.join(lost)} must be there, as save_projection says, got none: save it "
                "again, or set save_projection to false to have them drawn"
            ]
        a, b = (shared[name].shape for name in self.shared)
        flat = len(a) == len(b) == 2
        if flat and a[0] == b[1] == self.rank and a[1] >= wide and b[0] >= high:
            return []
        return [
            f"vera_A must be [{self.rank}, {wide} or more] and vera_B [{high} or more, "
            f"{self.rank}], got {list(a)} and {list(b)}"
        ]

    def settings(self, targets: Sequence[Target]) -> dict[str, Any]:
        """The rank."""
        return {"rank": self.rank}

    def rows(self, target: Target, parts: Parts, settings: Mapping[str, Any]) -> Iterator[Row]:
        """lambda_d [1, rank] and lambda_b [1, out]: PEFT has no constants besides."""
        d, b = (read_float32(parts[part]) for part in self.parts)
        yield "d", d[None], 1.0
        yield f"b.{target.out_features}", b[None], 1.0

    def basis(self, shared: Parts, targets: Sequence[Target], base_dtype: str) -> Basis:
        """Drawn from the seed if that gives what was saved, or if nothing was; else stored."""
        wide, high = _widest(targets)
        if not shared:
            return self.seed, _drawn(wide, high, base_dtype), {}
        saved = tuple(read_float32(shared[name]) for name in self.shared)
        wider, higher = saved[0].shape[1], saved[1].shape[0]
        for dtype in DTYPES:
            drawn = uniform_kaiming(self.seed, self.rank, wider, higher, dtype)
            if all(map(_same, drawn, saved)):
                return self.seed, _drawn(wider, higher, dtype), {}
        if not self.projected:
            raise FormatError(
                f"{shared['vera_A'].path} must have the vera_A and vera_B that "
                "projection_prng_key draws, as PEFT uses these where save_projection is false, "
                "got others: set it to true"
            )
        a, b = saved[0][:, :wide], saved[1][:high]
        tensors = {"basis.A": np.ascontiguousarray(a), "basis.B": np.ascontiguousarray(b)}
        return self.seed, BasisSpec("stored"), tensors


def _widest(targets: Sequence[Target]) -> Widths:
    """Of the layers that are adapted, as PEFT does (`VeraModel._find_dim`)."""
    return max(t.in_features for t in targets), max(t.out_features for t in targets)


def _drawn(wide: int, high: int, dtype: str) -> BasisSpec:
    return BasisSpec("peft-mt19937", fields={"in": wide, "out": high, "dtype": dtype})


def _same(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return np.array_equal(one.view(np.uint32), other.view(np.uint32))
