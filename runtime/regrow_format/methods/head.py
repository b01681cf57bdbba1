"""Head only, a baseline: a head of its own on a backbone that stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import FormatError
from ..fields import Fields
from .base import Expansion, Layout, Method

if TYPE_CHECKING:
    from ..adapter_contents import AdapterContents
    from ..basis import BasisCache
    from ..target_rows import Target

__all__ = ["HeadOnly"]


class HeadOnly(Method):
    """No config, no targets, no coefficients."""

    name = "head"
    kinds = ()

    def read_config(self, fields: Fields) -> dict[str, Any]:
        """Nothing."""
        return {}

    def layout(self, config: Mapping[str, Any], targets: Sequence[Target]) -> Layout:
        """Nothing."""
        return {}

    def check(self, adapter: AdapterContents, where: str) -> None:
        """A head there must be, and targets there must not."""
        if adapter.head is None or adapter.targets:
            raise FormatError(f"{where}: an adapter of method head must have a head and no targets")

    def expand(self, adapter: AdapterContents, basis: BasisCache) -> Expansion:
        """Nothing: the head's numbers are stored as they are."""
        return {}
