"""FourierFT as PEFT saves it.

delta W = scaling Re(ifft2(F)) with n coefficients in F [out, in], at the first n places of
`torch.randperm(out * in)` seeded by `random_loc_seed` (`peft.tuners.fourierft.layer`);
`n_frequency_pattern` gives layers their own n. Fewer are padded with zeros to the most: the places
of layers of one shape begin alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from regrow_format.adapter import Target
from regrow_format.basis import BasisSpec
from regrow_format.fields import Fields
from regrow_format.mt19937 import LONG, permutation_head

from .base_model import Base, Widths
from .config import Patterns, flag, patterns
from .method import Basis, Parts, PeftKind, Row
from .tensors import read_float32

__all__ = ["PeftFourierft"]

_MAX_COUNT = 1 << 16
_MOST_PLACES = 1 << 30
# Unlike LoRA's patterns, these fit a path only behind a dot, or whole as plain text.
_BEHIND_A_DOT = r".*\.{}$"


@dataclass(frozen=True)
class PeftFourierft(PeftKind):
    """How many coefficients a layer has, and what they are multiplied by.

    `transposed` is `fan_in_fan_out`, which PEFT sets by the layers that it finds.
    """

    peft_type = "FOURIERFT"
    title = "FourierFT"
    method = "fourierft"
    parts = ("fourierft_spectrum",)
    neutral = frozenset({"init_weights"})

    saved: tuple[str, ...]
    count: int
    alpha: float
    seed: int
    counts: Patterns[int]
    transposed: bool

    @classmethod
    def read(cls, fields: Fields, saved: tuple[str, ...]) -> Self:
        """n_frequency, scaling, random_loc_seed, n_frequency_pattern, fan_in_fan_out."""
        return cls(
            saved,
            count=fields.number("n_frequency", 1, _MAX_COUNT, 1000),
            alpha=fields.take("scaling", float, 150.0),
            seed=fields.number("random_loc_seed", -(2**63), 2**64 - 1, 777) % 2**64,
            counts=patterns(
                fields, "n_frequency_pattern", lambda p, n: p.number(n, 1, _MAX_COUNT),
                _BEHIND_A_DOT,
            ),
            transposed=flag(fields, "fan_in_fan_out"),
        )  # fmt: skip

    def count_of(self, layer: str) -> int:
        """How many coefficients a layer has, by its module path."""
        whole = _BEHIND_A_DOT.format(layer)
        fits = (n for pattern, n in self.counts if pattern.match(layer))
        exact = (n for pattern, n in self.counts if pattern.pattern == whole)
        return next(fits, next(exact, self.count))

    def widths(self, layer: str, parts: Parts, base: Base) -> Widths | str:
        """The backbone's: nothing saved tells them."""
        if (missing := base.missing(layer)) is not None:
            return missing
        wide, high = base.layers[layer]
        found, count = parts["fourierft_spectrum"].shape, self.count_of(layer)
        if found != (count,):
            return (
                f"{layer} must have fourierft_spectrum [{count}], as its config says, "
                f"got {list(found)}"
            )
        if layer in base.transposed and self.transposed:
            wide, high = high, wide
        return wide, high

    def findings(self, shared: Parts, targets: Sequence[Target]) -> list[str]:
        """Every layer has as many places as the layer with the most coefficients uses."""
        count = self._most(targets)
        return [
            f"{t.name} must have from {count} to {_MOST_PLACES} weights, for the most coefficients "
            f"of a layer, got {t.in_features} x {t.out_features}"
            for t in targets
            if not count <= t.in_features * t.out_features <= _MOST_PLACES
        ]

    def _most(self, targets: Sequence[Target]) -> int:
        return max((self.count_of(target.name) for target in targets), default=1)

    def settings(self, targets: Sequence[Target]) -> dict[str, Any]:
        """The largest n, and PEFT's scaling."""
        return {"n": self._most(targets), "alpha": self.alpha}

    def rows(self, target: Target, parts: Parts, settings: Mapping[str, Any]) -> Iterator[Row]:
        """c [1, n]; PEFT's inverse transform divides by the number of weights."""
        values = read_float32(parts["fourierft_spectrum"])
        scale = self.alpha / (target.in_features * target.out_features)
        yield "c", np.pad(values, (0, settings["n"] - len(values)))[None], scale

    def basis(self, shared: Parts, targets: Sequence[Target], base_dtype: str) -> Basis:
        """Places from the seed; stored for large layers, where drawing takes seconds."""
        grids = {(t.out_features, t.in_features) for t in targets}
        if all(high * wide < LONG for high, wide in grids):
            return self.seed, BasisSpec("peft-mt19937"), {}
        count = self._most(targets)
        indices = {
            f"places.{high}x{wide}": permutation_head(self.seed, count, high * wide)
            for high, wide in grids
        }
        tensors = {name: found.astype(np.uint32) for name, found in indices.items()}
        return self.seed, BasisSpec("stored"), tensors
