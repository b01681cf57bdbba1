"""PELA's factorisation (arXiv 2310.10700, section 3.1): one linear layer becomes two.

W ≈ V Uᵀ by truncated SVD with the square root of the singular values on each side; the rank is
floor(in out / (ratio (in + out))), so that parameters and multiplications fall by the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow_export.layers import is_conv1d
from regrow_format.errors import RegrowError

from .structure import replace_module

__all__ = [
    "LowRankLinear",
    "Plan",
    "apply_plan",
    "dense_weight",
    "factorize",
    "finite_weight",
    "pair_of",
    "rank_for",
]


class LowRankLinear(nn.Module):
    """`up(down(x))`, in_features -> rank -> out_features; the bias is on `up`.

    Both parts are ordinary linear layers: an adapter may target one of them, or the pair.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool, device: str = "cpu"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        result: Tensor = self.up(self.down(x))
        return result

    def dense_weight(self) -> Tensor:
        """V Uᵀ [out_features, in_features], the weight that the pair stands for."""
        return self.up.weight @ self.down.weight

    @property
    def weight(self) -> Tensor:
        """`dense_weight`, for models that read it of a layer (T5 asks for its dtype)."""
        return self.dense_weight()

    def merged_with(self, a: Tensor, b: Tensor) -> LowRankLinear:
        """The pair of rank + r that also computes (x a) b, exactly; a [in, r], b [r, out]."""
        rank = self.rank + a.shape[1]
        pair = LowRankLinear(
            self.in_features, self.out_features, rank, bias=self.up.bias is not None
        )
        with torch.no_grad():
            pair.down.weight.copy_(torch.cat([self.down.weight, a.T]))
            pair.up.weight.copy_(torch.cat([self.up.weight, b.T], dim=1))
            if self.up.bias is not None:
                pair.up.bias.copy_(self.up.bias)
        return pair


def rank_for(in_features: int, out_features: int, ratio: float) -> int:
    """floor(in out / (ratio (in + out))), the paper's rank."""
    return math.floor(in_features * out_features / (ratio * (in_features + out_features)))


@dataclass(frozen=True)
class Plan:
    """One layer to factor."""

    name: str
    in_features: int
    out_features: int
    rank: int
    bias: bool


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in], detached; transformers' Conv1D has it turned."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_conv1d(module) else weight


def factorize(module: nn.Module, rank: int, name: str = "layer") -> LowRankLinear:
    """The pair closest to a linear layer: truncated SVD, square roots on both sides.

    Raises:
        RegrowError: the weight is not finite.
    """
    weight = finite_weight(module, name).float()  # (out, in)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    return pair_of(module, root[:, None] * right[:rank], left[:, :rank] * root)


def finite_weight(module: nn.Module, name: str) -> Tensor:
    """`dense_weight`, or `RegrowError` if a number in it is not finite."""
    weight = dense_weight(module)
    if not torch.isfinite(weight).all():
        raise RegrowError(f"{name}.weight must be finite, got NaN or infinity")
    return weight


def pair_of(module: nn.Module, down: Tensor, up: Tensor) -> LowRankLinear:
    """The pair of `down` [rank, in] and `up` [out, rank], with the bias of the linear layer."""
    biased = module.bias is not None
    pair = LowRankLinear(down.shape[1], up.shape[0], down.shape[0], bias=biased)
    with torch.no_grad():
        pair.down.weight.copy_(down)
        pair.up.weight.copy_(up)
        if biased:
            pair.up.bias.copy_(module.get_parameter("bias"))
    return pair


def apply_plan(
    model: nn.Module,
    plans: tuple[Plan, ...],
    *,
    empty: bool = False,
    pairs: Mapping[str, LowRankLinear] | None = None,
) -> None:
    """Replace the planned layers in place.

    Args:
        empty: by pairs without weights, on "meta".
        pairs: by these, by layer name; by the factors of `factorize` if not given.
    """
    for plan in plans:
        if empty:
            pair = LowRankLinear(
                plan.in_features, plan.out_features, plan.rank, bias=plan.bias, device="meta"
            )
        elif pairs is not None:
            pair = pairs[plan.name]
        else:
            pair = factorize(model.get_submodule(plan.name), plan.rank, plan.name)
        owner = model.get_submodule(plan.name.rpartition(".")[0])
        if isinstance(owner, nn.TransformerEncoderLayer):
            owner.activation_relu_or_gelu = 0  # else torch's fast path reads linear1.weight
        replace_module(model, plan.name, pair)
