"""DoRA as PEFT saves it: a LoRA with `use_dora`, and a magnitude for every output of a layer.

PEFT computes bias + m / ||W + s B A|| (W x + s B (A x)) with the norm of each row, the layer's own
bias left as it is (`peft.tuners.lora.dora.DoraLinearLayer`). The norms need the base's weights; the
adapter has s and b of `regrow_format.methods.dora` in the place of m. Norms are those of A and B as
the file stores them, and b is that of s as stored, so what rounding takes from a row's direction
leaves its length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from regrow_format.adapter import Coefficients, Target
from regrow_format.errors import UsageError
from regrow_format.fields import Fields

from .base_model import Base, Widths
from .lora import FACTORS, PeftLora
from .method import Parts, Row
from .tensors import read_float32

__all__ = ["PeftDora"]

_MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class PeftDora(PeftLora):
    """What the config says about a layer's rank and scale, and the base that norms are of."""

    title = "DoRA"
    method = "dora"
    parts: ClassVar[tuple[str, ...]] = (*FACTORS, _MAGNITUDE)
    bare = (_MAGNITUDE,)

    base: Base | None = None
    storage: str = "fp32"

    @classmethod
    def claims(cls, peft_type: str, fields: Fields) -> bool:
        """A LoRA with `use_dora`."""
        return super().claims(peft_type, fields) and fields.rest().get("use_dora") is True

    def for_base(self, base: Base, storage: str) -> Self:
        """See `PeftKind`; a bundle does not give its weights back."""
        if base.is_bundle:
            raise UsageError(
                "--backbone must be a backbone for DoRA, which needs the norms of its weights, "
                f"got a bundle, {base.where}: give the folder that it was exported from"
            )
        return replace(self, base=base, storage=storage)

    def widths(self, layer: str, parts: Parts, base: Base) -> Widths | str:
        """LoRA's; every output has a magnitude."""
        found, size = super().widths(layer, parts, base), parts[_MAGNITUDE].shape
        if isinstance(found, str) or size == (found[1],):
            return found
        return f"{layer} must have {_MAGNITUDE} [{found[1]}], got {list(size)}"

    def settings(self, targets: Sequence[Target]) -> dict[str, Any]:
        """LoRA's, and whether a layer has a bias."""
        biases = (self._layer(target)[1] for target in targets)
        return {**super().settings(targets), "bias": any(bias is not None for bias in biases)}

    def rows(self, target: Target, parts: Parts, settings: Mapping[str, Any]) -> Iterator[Row]:
        """A, B, s [1, out] and, where there are biases, b [1, out]."""
        factors = list(super().rows(target, parts, settings))
        yield from factors
        weight, bias = self._layer(target)
        a, b = (self._stored(values, scale) for _, values, scale in factors)
        norms = np.linalg.norm(weight + b.T @ a, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):  # not finite: refused by name
            s = (read_float32(parts[_MAGNITUDE]) / norms - 1).astype(np.float32)[None]
        yield f"s.{target.out_features}", s, 1.0
        if settings["bias"]:
            gone = np.zeros_like(s) if bias is None else -self._stored(s, 1.0) * bias
            yield f"b.{target.out_features}", gone.astype(np.float32), 1.0

    def _layer(self, target: Target) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Weight [out, in] and bias [out], None if it has none."""
        assert self.base is not None  # see `for_base`
        return self.base.weight_and_bias(target.name)

    def _stored(self, rows: NDArray[np.float32], scale: float) -> NDArray[np.float64]:
        """What the file will give for rows, float64."""
        constant = np.full(len(rows), scale, dtype=np.float32)
        return Coefficients.store(rows, constant, self.storage).dense().astype(np.float64)
