"""A layer of a model's own that says `in_features` and `out_features`, as `nn.Linear` does."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .base import LayerType

__all__ = ["CUSTOM"]


class CustomType(LayerType):
    """What it computes is not known, but that it maps the last dimension.

    With a method `merged_with(a, b)` it can take low-rank changes into itself: a [in, r],
    b [r, out].
    """

    def matches(self, module: nn.Module) -> bool:
        """By the two widths."""
        return all(isinstance(size, int) for size in self.sizes(module))

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """(in_features, out_features)."""
        names = ("in_features", "out_features")
        return cast(tuple[int, int], tuple(getattr(module, name, None) for name in names))

    def with_low_rank(self, module: nn.Module, a: Tensor, b: Tensor) -> nn.Module | None:
        """By its own method."""
        method = getattr(module, "merged_with", None)
        return method(a, b) if callable(method) else None


CUSTOM = CustomType()
