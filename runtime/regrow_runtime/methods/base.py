"""What a method must be able to do on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..adapter import Adapter, Target
    from ..basis import BasisCache

__all__ = ["Expansion", "Method"]

# By target: the tensors of its slot by part, such as {"A": [in, r], "B": [r, out]}.
Expansion = dict[str, dict[str, NDArray[np.float32]]]


class Method(Protocol):
    """An adapter method. Instances hold no state."""

    @property
    def name(self) -> str:
        """As it stands in adapter files and on the command line."""
        ...

    @property
    def slot(self) -> str:
        """The kind of slot that its expansions fit, such as "low_rank"."""
        ...

    def check_config(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The config with every field checked and bounded; `FormatError` names `where`."""
        ...

    def layout(
        self, config: Mapping[str, Any], targets: Sequence[Target]
    ) -> dict[str, tuple[int, int]]:
        """Name and shape [rows, length] of every coefficient tensor that the file holds."""
        ...

    def constants(
        self, config: Mapping[str, Any], targets: Sequence[Target]
    ) -> dict[str, NDArray[np.float32]]:
        """By tensor name, float32 [rows]: the constant that a row's scale includes."""
        ...

    def expand(self, adapter: Adapter, basis: BasisCache) -> Expansion:
        """The slot tensors of every target. Peak memory is bounded by the result plus 16 MB."""
        ...
