"""A factored pair, up(down(x)): PELA's, or one that a model's author made."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .base import LayerType, replace_parameter
from .low_rank_linear import LowRankLinear

__all__ = ["PAIR", "LowRankLinear"]


class PairType(LayerType):
    """Known by its factors' names, `down` (without a bias) and `up`, and its widths."""

    def matches(self, module: nn.Module) -> bool:
        """See the class."""
        down, up = getattr(module, "down", None), getattr(module, "up", None)
        factors = isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
        sized = isinstance(getattr(module, "in_features", None), int)
        return factors and sized and cast(nn.Linear, down).bias is None

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """The first factor's in, the second one's out."""
        down, up = _factors(module)
        return down.in_features, up.out_features

    def weight(self, module: nn.Module) -> Tensor:
        """The product, float64."""
        down, up = _factors(module)
        return up.weight.detach().double() @ down.weight.detach().double()

    def bias(self, module: nn.Module) -> Tensor | None:
        """The second factor's."""
        return _factors(module)[1].bias

    def with_weight(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """One dense layer: a weight of any rank has no exact form as a pair."""
        _, up = _factors(module)
        dense = nn.Linear(*self.sizes(module), bias=up.bias is not None)
        replace_parameter(dense, "weight", weight)
        if up.bias is not None:
            dense.bias = up.bias
        return dense

    def with_bias(self, module: nn.Module, bias: Tensor) -> nn.Module:
        """Of the second factor."""
        replace_parameter(_factors(module)[1], "bias", bias)
        return module

    def with_output_scale(self, module: nn.Module, factor: Tensor) -> nn.Module:
        """In the second factor."""
        _, up = _factors(module)
        replace_parameter(up, "weight", up.weight.double() * factor[:, None])
        if up.bias is not None:
            replace_parameter(up, "bias", up.bias.double() * factor)
        return module

    def with_input_scale(self, module: nn.Module, factor: Tensor) -> nn.Module:
        """In the first factor."""
        down, _ = _factors(module)
        replace_parameter(down, "weight", down.weight.double() * factor)
        return module

    def with_low_rank(self, module: nn.Module, a: Tensor, b: Tensor) -> nn.Module:
        """The pair of rank + r, exactly."""
        down, up = _factors(module)
        wide, high = self.sizes(module)
        rank = down.out_features + a.shape[1]
        pair = LowRankLinear(wide, high, rank, bias=up.bias is not None)
        with torch.no_grad():
            pair.down.weight.copy_(torch.cat([down.weight, a.T]))
            pair.up.weight.copy_(torch.cat([up.weight, b.T], dim=1))
            if up.bias is not None:
                pair.up.bias.copy_(up.bias)
        return pair


def _factors(module: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    return cast(nn.Linear, module.down), cast(nn.Linear, module.up)


PAIR = PairType()
