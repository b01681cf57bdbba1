"""DoRA (arXiv 2402.09353): LoRA's direction, and a magnitude of its own for every output.

y = m / ||W + (A B)^T|| (x W^T + x A B) + bias, with the norm of each row of the weight (eq. 5;
PEFT's `DoraLinearLayer`). Norms are taken when an adapter is made, so no device needs W: of the
layer's output y0, which includes its bias, this is (y0 + x A B)(1 + s) + b with
1 + s = m / ||W + (A B)^T|| and b = -s bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..fields import Fields
from .base import Expansion, Layout, check_bytes, stacked, unstacked
from .lora import Lora

if TYPE_CHECKING:
    from ..adapter_contents import AdapterContents
    from ..basis import BasisCache
    from ..target_rows import Target

__all__ = ["Dora", "vector_parts"]


def vector_parts(config: Mapping[str, Any]) -> dict[str, str]:
    """By kind of slot beside low_rank, its part, which the coefficients are called by too."""
    return {"scale": "s", "bias": "b"} if config["bias"] else {"scale": "s"}


class Dora(Lora):
    """Config: LoRA's, and `bias`: whether some target has a bias.

    Coefficients: LoRA's, and `s.<out>` and (with `bias`) `b.<out>` [targets with that out, out].
    """

    name = "dora"
    kinds = ("low_rank", "scale", "bias")
    also = ()

    def read_config(self, fields: Fields) -> dict[str, Any]:
        """LoRA's, and bias a bool."""
        return {**super().read_config(fields), "bias": fields.take("bias", bool, False)}

    def layout(self, config: Mapping[str, Any], targets: Sequence[Target]) -> Layout:
        """LoRA's, then s.<out>, then b.<out>."""
        found, widths = super().layout(config, targets), [t.out_features for t in targets]
        for part in vector_parts(config).values():
            found |= stacked(part, widths)
        return found

    def fills(self, config: Mapping[str, Any], target: Target) -> tuple[str, ...]:
        """No bias where no target has one."""
        return ("low_rank", *vector_parts(config))

    def expand(self, adapter: AdapterContents, basis: BasisCache) -> Expansion:
        """A [in, rank], B [rank, out], s [1, out] and b [1, out] per target, without the basis."""
        parts, widths = vector_parts(adapter.config), [t.out_features for t in adapter.targets]
        check_bytes("scales and biases", 4 * len(parts) * sum(widths))
        found = super().expand(adapter, basis)
        for kind, part in parts.items():
            rows = unstacked(adapter, part, widths)
            for target, row in zip(adapter.targets, rows, strict=True):
                found[target.name][kind] = {part: row}
        return found
