"""GPT-2's `Conv1D` of transformers: a linear layer whose weight is [in, out]."""

from __future__ import annotations

from torch import Tensor, nn

from .base import LayerType, replace_parameter
from .low_rank_pair import LowRankLinear

__all__ = ["CONV1D"]


class Conv1DType(LayerType):
    """Known by its name and its width `nf`: transformers takes a second to import."""

    title = "Conv1D"
    has_one_weight = True
    product = "in_out"

    def matches(self, module: nn.Module) -> bool:
        """See the class."""
        return type(module).__name__ == "Conv1D" and hasattr(module, "nf")

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """Its widths are called `nx` and `nf`; some versions of transformers keep no `nx`."""
        wide, high = module.get_parameter("weight").shape
        return wide, high

    def weight(self, module: nn.Module) -> Tensor:
        """The parameter, transposed."""
        return module.get_parameter("weight").detach().T

    def with_weight(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """See `LayerType`."""
        replace_parameter(module, "weight", weight.T)
        return module

    def pair(self, module: nn.Module, rank: int, device: str = "cpu") -> LowRankLinear:
        """Two `nn.Linear`."""
        wide, high = self.sizes(module)
        biased = self.bias(module) is not None
        return LowRankLinear(wide, high, rank, bias=biased, device=device)

    def with_outputs(self, module: nn.Module, count: int, *, bias: bool) -> nn.Module:
        """`nn.Linear`."""
        return nn.Linear(self.sizes(module)[0], count, bias=bias)


CONV1D = Conv1DType()
