"""What a method must be able to do on the device, and what several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import RegrowError
from ..fields import Fields
from ..slot_kinds import Changes

if TYPE_CHECKING:
    from ..adapter_contents import AdapterContents
    from ..basis import BasisCache
    from ..target_rows import Target

__all__ = [
    "MAX_RANK",
    "Expansion",
    "Layout",
    "Method",
    "check_basis",
    "check_bytes",
    "check_factors",
    "stacked",
    "unstacked",
]

# By target and kind of slot: the slot's tensors by part, such as {"A": [in, r], "B": [r, out]}.
Expansion = dict[str, Changes]
# Name and shape [rows, length] of every coefficient tensor that the file holds.
Layout = dict[str, tuple[int, int]]

MAX_RANK = 1 << 12
# What a basis may take in RAM. The largest of a paper (NOLA, LLaMA-2 70B, k = 512, rank 16) takes
# 29 MB; without a bound, a file of kilobytes could ask for 25 GB. All tensors of one part may take
# 1 GiB when they are expanded; that example's take less than half of it.
_MAX_BASIS_BYTES = 1 << 28


class Method(ABC):
    """An adapter method. Instances hold no state.

    Attributes:
        name: as it stands in adapter files and on the command line.
        kinds: the kinds of slot that its expansions fill; none without targets.
        also: further kinds, each of which takes its adapters alone where a bundle has no such
            slots: one that takes any dense change, or that `expand_for` knows.
        targets: the layers that it can change: "linear" ones (and factored pairs), those that are
            "biased" (norms too), "any" linear layer or norm.
        bases: the kinds of basis that it takes.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    also: ClassVar[tuple[str, ...]] = ()
    targets: ClassVar[str] = "linear"
    bases: ClassVar[tuple[str, ...]] = ("philox-sign",)

    def check_config(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The config with every field checked and bounded; `FormatError` names `where`."""
        fields = Fields(config, f"{where}: config")
        checked = self.read_config(fields)
        fields.done()
        return checked

    @abstractmethod
    def read_config(self, fields: Fields) -> dict[str, Any]:
        """Take every field of a config, checked and bounded."""

    @abstractmethod
    def layout(self, config: Mapping[str, Any], targets: Sequence[Target]) -> Layout:
        """Name and shape [rows, length] of every coefficient tensor that the file holds."""

    def constants(
        self, config: Mapping[str, Any], targets: Sequence[Target]
    ) -> dict[str, NDArray[np.float32]]:
        """By tensor name, float32 [rows]: the constant that a row's scale includes; 1 if none."""
        layout = self.layout(config, targets)
        return {name: np.ones(rows, dtype=np.float32) for name, (rows, _) in layout.items()}

    def read_basis(self, kind: str, fields: Fields) -> dict[str, Any]:
        """Take every further field that a basis of this kind has, checked and bounded."""
        return {}

    def stored_basis(
        self, config: Mapping[str, Any], targets: Sequence[Target]
    ) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Dtypes (any of them) and shape of every tensor that a basis of kind "stored" has."""
        return {}

    def check(self, adapter: AdapterContents, where: str) -> None:  # noqa: B027 - most have none
        """Raise `FormatError` for what dtypes and shapes alone do not tell."""

    @abstractmethod
    def expand(self, adapter: AdapterContents, basis: BasisCache) -> Expansion:
        """The slot tensors of every target by kind, float32.

        Peak memory is bounded by the result plus 32 MB, and what `basis` may keep.

        Raises:
            RegrowError: the basis or the result would take more than a device may be asked for.
        """

    def fills(self, config: Mapping[str, Any], target: Target) -> tuple[str, ...]:
        """The kinds of slot that the expansion of one target fills."""
        return self.kinds

    def expand_for(self, kind: str, adapter: AdapterContents, basis: BasisCache) -> Expansion:
        """The expansion in the terms of one of `also`, if the method has such a one."""
        return self.expand(adapter, basis)


def check_bytes(what: str, size: int, limit: int = 1 << 30) -> None:
    """Raise `RegrowError` if `size` bytes are more than a device may be asked for."""
    if size > limit:
        raise RegrowError(
            f"{what} must be at most {limit} bytes when expanded, got {size}: train with a "
            "smaller rank, fewer vectors or fewer targets"
        )


def check_basis(vectors: int, entry_bits: int) -> None:
    """The same for a basis of so many vectors, each of so many bits."""
    check_bytes("basis", vectors * entry_bits // 8, _MAX_BASIS_BYTES)


def check_factors(rank: int, targets: Sequence[Target]) -> None:
    """The same for all A and for all B."""
    check_bytes("factors", 4 * rank * sum(t.in_features for t in targets))
    check_bytes("factors", 4 * rank * sum(t.out_features for t in targets))


def stacked(part: str, widths: Sequence[int], each: int = 1) -> Layout:
    """`<part>.<width>` [rows, width] for every width: `each` rows per target, in their order."""
    return {f"{part}.{w}": (each * count, w) for w, count in Counter(widths).items()}


def unstacked(
    adapter: AdapterContents, part: str, widths: Sequence[int], each: int = 1
) -> Iterator[NDArray[np.float32]]:
    """The inverse: float32 [each, width] of every target, in their order, times its scale."""
    dense = {w: adapter.coefficients[f"{part}.{w}"].dense() for w in Counter(widths)}
    used = dict.fromkeys(dense, 0)
    for width in widths:
        yield dense[width][used[width] : used[width] + each]
        used[width] += each
