"""`nn.Linear`: x Wᵀ + b."""

from __future__ import annotations

from torch import Tensor, nn

from .base import LayerType, replace_parameter
from .low_rank_pair import LowRankLinear

__all__ = ["LINEAR"]


class LinearType(LayerType):
    """And what inherits from it."""

    title = "Linear"
    has_one_weight = True
    product = "out_in"

    def matches(self, module: nn.Module) -> bool:
        """By class."""
        return isinstance(module, nn.Linear)

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """(in_features, out_features)."""
        return _linear(module).in_features, _linear(module).out_features

    def weight(self, module: nn.Module) -> Tensor:
        """The parameter itself."""
        return _linear(module).weight.detach()

    def with_weight(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """See `LayerType`."""
        replace_parameter(module, "weight", weight)
        return module

    def with_bias(self, module: nn.Module, bias: Tensor) -> nn.Module:
        """Also where it has none."""
        replace_parameter(module, "bias", bias)
        return module

    def pair(self, module: nn.Module, rank: int, device: str = "cpu") -> LowRankLinear:
        """Two linear layers."""
        wide, high = self.sizes(module)
        biased = self.bias(module) is not None
        return LowRankLinear(wide, high, rank, bias=biased, device=device)

    def with_outputs(self, module: nn.Module, count: int, *, bias: bool) -> nn.Module:
        """`nn.Linear`."""
        return nn.Linear(self.sizes(module)[0], count, bias=bias)


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise TypeError(f"layer must be nn.Linear, got {type(module).__name__}")
    return module


LINEAR = LinearType()
