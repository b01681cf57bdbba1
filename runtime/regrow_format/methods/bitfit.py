"""BitFit (arXiv 2106.10199), a baseline: what is added to biases and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..fields import Fields
from .base import Expansion, Layout, Method, check_bytes, stacked, unstacked

if TYPE_CHECKING:
    from ..adapter_contents import AdapterContents
    from ..basis import BasisCache
    from ..target_rows import Target

__all__ = ["Bitfit"]


class Bitfit(Method):
    """No config. `b.<out>` [targets with that out, out]: linear layers and norms (in = out)."""

    name = "bitfit"
    kinds = ("bias",)
    targets = "biased"

    def read_config(self, fields: Fields) -> dict[str, Any]:
        """Nothing."""
        return {}

    def layout(self, config: Mapping[str, Any], targets: Sequence[Target]) -> Layout:
        """One tensor per width that occurs."""
        return stacked("b", [t.out_features for t in targets])

    def expand(self, adapter: AdapterContents, basis: BasisCache) -> Expansion:
        """b [out] per target; the basis is not used."""
        widths = [t.out_features for t in adapter.targets]
        check_bytes("biases", 4 * sum(widths))
        rows = unstacked(adapter, "b", widths)
        pairs = zip(adapter.targets, rows, strict=True)
        return {target.name: {"bias": {"b": row[0]}} for target, row in pairs}
