"""What a type of layer must say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from .low_rank_pair import LowRankPair

__all__ = ["LayerType", "replace_parameter"]


class LayerType(ABC):
    """A type of layer. Instances hold no state; every method takes the module that it is about.

    Attributes:
        title: what messages call it.
        is_linear: it maps `in` features to `out` features; else it scales and shifts each of them,
            as norms do, and in = out.
        has_one_weight: its weight is one parameter, which a graph can take another tensor for.
        product: how that parameter stands in a product with the inputs, "out_in" or "in_out"; None
            where there is no such product. Below fp32, bundles round these.
    """

    title: ClassVar[str] = ""
    is_linear: ClassVar[bool] = True
    has_one_weight: ClassVar[bool] = False
    product: ClassVar[str | None] = None

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether the module is of this type."""

    @abstractmethod
    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """(in, out)."""

    def weight(self, module: nn.Module) -> Tensor | None:
        """[out, in], detached, a view where there is one weight; None where there is no matrix."""
        return None

    def bias(self, module: nn.Module) -> Tensor | None:
        """[out], None if it has none."""
        found = getattr(module, "bias", None)
        return found if isinstance(found, Tensor) else None

    # -- where its features lie -------------------------------------------------------------------

    def features_last(self, module: nn.Module, value: Tensor) -> Tensor:
        """A view of inputs or outputs with the features as the last dimension."""
        return value

    def features_back(self, module: nn.Module, value: Tensor) -> Tensor:
        """What `features_last` gives, with the features where the layer has them."""
        return value

    def by_rows(
        self, module: nn.Module, value: Tensor, change: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`change` on inputs or outputs, with the features as the last dimension."""
        return self.features_back(module, change(self.features_last(module, value)))

    def seen(self, module: nn.Module, x: Tensor) -> Tensor:
        """The inputs that outputs come from, place by place: a layer with a stride skips some."""
        return x

    def is_convolution(self, module: nn.Module) -> bool:
        """Whether what PEFT's "all-linear" matches, `nn.Linear` and Conv1D, leaves it out."""
        return False

    # -- a change folded in: each gives the changed layer, or None where it does not fit -----------

    def with_weight(self, module: nn.Module, weight: Tensor) -> nn.Module | None:
        """With `weight` [out, in], any float dtype, in the place of its own."""
        return None

    def with_bias(self, module: nn.Module, bias: Tensor) -> nn.Module | None:
        """With `bias` [out] in the place of its own, or where it has none."""
        if self.bias(module) is None:
            return None
        replace_parameter(module, "bias", bias)
        return module

    def with_low_rank(self, module: nn.Module, a: Tensor, b: Tensor) -> nn.Module | None:
        """Computing (x a) b too; a [in, r], b [r, out]. Rounded once, with the weight."""
        return self.with_delta(module, a.double() @ b.double())

    def with_delta(self, module: nn.Module, delta: Tensor) -> nn.Module | None:
        """Computing x delta too; float64 [in, out]."""
        weight = self.weight(module)
        return None if weight is None else self.with_weight(module, weight.double() + delta.T)

    def with_output_scale(self, module: nn.Module, factor: Tensor) -> nn.Module | None:
        """With every output multiplied, its bias's part too; float64 [out]."""
        weight, bias = self.weight(module), self.bias(module)
        if weight is None:
            return None
        found = self.with_weight(module, weight.double() * factor[:, None])
        if found is not None and bias is not None:
            replace_parameter(found, "bias", bias.double() * factor)
        return found

    def with_input_scale(self, module: nn.Module, factor: Tensor) -> nn.Module | None:
        """With every input multiplied; float64 [in]."""
        weight = self.weight(module)
        return None if weight is None else self.with_weight(module, weight.double() * factor)

    # -- PELA -------------------------------------------------------------------------------------

    def pair(self, module: nn.Module, rank: int, device: str = "cpu") -> LowRankPair | None:
        """A pair of factors without weights that computes what the layer does, None if none can."""
        return None

    def with_outputs(self, module: nn.Module, count: int, *, bias: bool) -> nn.Module | None:
        """A layer without weights that sees what the layer does and gives `count` features.

        None for a layer that cannot be a factor of a pair.
        """
        return None


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module a frozen float32 parameter of its own; other modules may tie the old one."""
    fresh = value.detach().float().contiguous()
    module.register_parameter(name, nn.Parameter(fresh, requires_grad=False))
