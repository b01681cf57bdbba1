"""SSF (arXiv 2210.08823): a layer's outputs are scaled and shifted, y (1 + s) + b.

The paper's scale γ is 1 + s, its shift β is b.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..fields import Fields
from .base import Expansion, Layout, Method, check_bytes, stacked, unstacked

if TYPE_CHECKING:
    from ..adapter_contents import AdapterContents
    from ..basis import BasisCache
    from ..target_rows import Target

__all__ = ["Ssf"]


class Ssf(Method):
    """No config. `s.<out>` and `b.<out>` [targets with that out, out]: linear layers and norms."""

    name = "ssf"
    kinds = ("scale", "bias")
    targets = "any"

    def read_config(self, fields: Fields) -> dict[str, Any]:
        """Nothing."""
        return {}

    def layout(self, config: Mapping[str, Any], targets: Sequence[Target]) -> Layout:
        """Two tensors per width that occurs."""
        widths = [t.out_features for t in targets]
        return {**stacked("s", widths), **stacked("b", widths)}

    def expand(self, adapter: AdapterContents, basis: BasisCache) -> Expansion:
        """s and b [1, out] per target; the basis is not used."""
        widths = [t.out_features for t in adapter.targets]
        check_bytes("scales and shifts", 8 * sum(widths))
        s, b = unstacked(adapter, "s", widths), unstacked(adapter, "b", widths)
        return {
            target.name: {"scale": {"s": next(s)}, "bias": {"b": next(b)}}
            for target in adapter.targets
        }
