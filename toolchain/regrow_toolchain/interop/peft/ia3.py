"""IA³ as PEFT saves it.

PEFT computes y ∘ l, or base(x ∘ l) in the modules that `feedforward_modules` names; `ia3_l` is
[out, 1] or [1, in] (`peft.tuners.ia3.layer`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from regrow_format.adapter import Target
from regrow_format.fields import Fields
from regrow_format.methods.ia3 import is_feedforward, shortest_endings

from .base_model import Base, Widths
from .config import pattern
from .method import Parts, PeftKind, Row
from .tensors import read_float32

__all__ = ["PeftIa3"]


@dataclass(frozen=True)
class PeftIa3(PeftKind):
    """Which layers are feed-forward ones: those of some ending, or that a pattern fits whole.

    Endings are PEFT's: `dense` is that of `my_dense` too.
    """

    peft_type = "IA3"
    title = "IA3"
    method = "ia3"
    parts = ("ia3_l",)
    neutral = frozenset({"init_ia3_weights"})

    saved: tuple[str, ...]
    feedforward: tuple[str, ...] | re.Pattern[str]

    @classmethod
    def read(cls, fields: Fields, saved: tuple[str, ...]) -> Self:
        """feedforward_modules, a list or an expression."""
        name = "feedforward_modules"
        if fields.holds(name, str):
            return cls(saved, pattern(fields.take(name, str), fields.where))
        return cls(saved, fields.strings(name) if fields.has(name) else ())

    def is_forward(self, layer: str) -> bool:
        """Whether a layer's inputs are multiplied, by its module path."""
        if isinstance(self.feedforward, tuple):
            return layer.endswith(self.feedforward)
        return self.feedforward.fullmatch(layer) is not None

    def widths(self, layer: str, parts: Parts, base: Base) -> Widths | str:
        """The backbone's, where l fits them: it tells one of them alone."""
        if (missing := base.missing(layer)) is not None:
            return missing
        wide, high = base.layers[layer]
        forward, found = self.is_forward(layer), parts["ia3_l"].shape
        if layer in base.turned and found == _shape(high, wide, forward=forward):
            wide, high = high, wide
        if found != (wanted := _shape(wide, high, forward=forward)):
            kind = "a feed-forward layer" if forward else "no feed-forward layer"
            return f"{layer} must have ia3_l {list(wanted)}, as {kind}, got {list(found)}"
        return wide, high

    def settings(self, targets: Sequence[Target]) -> dict[str, Any]:
        """The shortest endings that say which layers are feed-forward ones."""
        chosen = {target.name for target in targets if self.is_forward(target.name)}
        others = {target.name for target in targets} - chosen
        return {"feedforward": shortest_endings(chosen, others)}

    def rows(self, target: Target, parts: Parts, settings: Mapping[str, Any]) -> Iterator[Row]:
        """l - 1, as one row."""
        forward = is_feedforward(settings, target.name)
        name = f"t.{target.in_features}" if forward else f"s.{target.out_features}"
        yield name, read_float32(parts["ia3_l"]).reshape(1, -1) - 1, 1.0


def _shape(wide: int, high: int, *, forward: bool) -> tuple[int, int]:
    return (1, wide) if forward else (high, 1)
