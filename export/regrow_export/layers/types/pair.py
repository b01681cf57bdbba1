"""A factored pair, up(down(x)): PELA's, or one that a model's author made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import LayerType
from .low_rank_pair import LowRankPair

__all__ = ["PairType"]


class PairType(LayerType):
    """Known by its class, or by its factors' names, `down` (without a bias) and `up`, two
    `nn.Linear`, and its widths. Its factors say where its features lie.
    """

    def __init__(self, types: Sequence[LayerType]) -> None:
        """`types` are those that factors may have."""
        self._types = tuple(types)

    def matches(self, module: nn.Module) -> bool:
        """See the class."""
        down, up = getattr(module, "down", None), getattr(module, "up", None)
        if isinstance(module, LowRankPair):
            return self._type_of(down) is not None and self._type_of(up) is not None
        factors = isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
        sized = isinstance(getattr(module, "in_features", None), int)
        return factors and sized and getattr(down, "bias", None) is None

    def _type_of(self, factor: object) -> LayerType | None:
        known = (t for t in self._types if isinstance(factor, nn.Module) and t.matches(factor))
        return next(known, None)

    def _factor(self, module: nn.Module, name: str) -> tuple[nn.Module, LayerType]:
        factor = module.get_submodule(name)
        kind = self._type_of(factor)
        if kind is None:
            raise TypeError(f"{name} must be a linear layer, got {type(factor).__name__}")
        return factor, kind

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """The first factor's in, the second one's out."""
        (down, first), (up, second) = (self._factor(module, name) for name in ("down", "up"))
        return first.sizes(down)[0], second.sizes(up)[1]

    def weight(self, module: nn.Module) -> Tensor:
        """The product, float64."""
        down, up = (self._matrix(module, name) for name in ("down", "up"))
        return up @ down

    def _matrix(self, module: nn.Module, name: str) -> Tensor:
        factor, kind = self._factor(module, name)
        weight = kind.weight(factor)
        if weight is None:
            raise TypeError(f"{name} must have one weight, got {type(factor).__name__}")
        return weight.double()

    def bias(self, module: nn.Module) -> Tensor | None:
        """The second factor's."""
        up, kind = self._factor(module, "up")
        return kind.bias(up)

    def features_last(self, module: nn.Module, value: Tensor) -> Tensor:
        """As the first factor."""
        down, kind = self._factor(module, "down")
        return kind.features_last(down, value)

    def features_back(self, module: nn.Module, value: Tensor) -> Tensor:
        """As the first factor."""
        down, kind = self._factor(module, "down")
        return kind.features_back(down, value)

    def seen(self, module: nn.Module, x: Tensor) -> Tensor:
        """As the first factor: the second one skips nothing."""
        down, kind = self._factor(module, "down")
        return kind.seen(down, x)

    def is_convolution(self, module: nn.Module) -> bool:
        """As the first factor."""
        down, kind = self._factor(module, "down")
        return kind.is_convolution(down)

    def with_weight(self, module: nn.Module, weight: Tensor) -> nn.Module | None:
        """One dense layer: a weight of any rank has no exact form as a pair."""
        dense, kind = self._dense(module)
        found = kind.with_weight(dense, weight)
        bias = self.bias(module)
        return found if found is None or bias is None else kind.with_bias(found, bias)

    def _dense(self, module: nn.Module) -> tuple[nn.Module, LayerType]:
        """A layer without weights that the pair could stand for."""
        down, kind = self._factor(module, "down")
        biased = self.bias(module) is not None
        dense = kind.with_outputs(down, self.sizes(module)[1], bias=biased)
        found = self._type_of(dense)
        if dense is None or found is None:
            raise TypeError(f"down must be a layer that can be a factor, got {type(down).__name__}")
        return dense, found

    def with_bias(self, module: nn.Module, bias: Tensor) -> nn.Module:
        """Of the second factor."""
        up, kind = self._factor(module, "up")
        kind.with_bias(up, bias)
        return module

    def with_output_scale(self, module: nn.Module, factor: Tensor) -> nn.Module:
        """In the second factor."""
        up, kind = self._factor(module, "up")
        kind.with_output_scale(up, factor)
        return module

    def with_input_scale(self, module: nn.Module, factor: Tensor) -> nn.Module:
        """In the first factor."""
        down, kind = self._factor(module, "down")
        kind.with_input_scale(down, factor)
        return module

    def with_low_rank(self, module: nn.Module, a: Tensor, b: Tensor) -> nn.Module:
        """The pair of rank + r, exactly."""
        dense, kind = self._dense(module)
        down = torch.cat([self._matrix(module, "down"), a.T])
        up = torch.cat([self._matrix(module, "up"), b.T], dim=1)
        pair = kind.pair(dense, len(down))
        if pair is None:
            raise TypeError(f"layer must be one that can be a pair, got {type(dense).__name__}")
        for name, weight in (("down", down), ("up", up)):
            factor, own = self._factor(pair, name)
            own.with_weight(factor, weight)
        bias = self.bias(module)
        return pair if bias is None else self.with_bias(pair, bias)
