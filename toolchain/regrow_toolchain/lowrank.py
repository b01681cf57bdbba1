"""PELA's factorisation (arXiv 2310.10700, section 3.1): one linear layer becomes two.

W ≈ V Uᵀ by truncated SVD with the square root of the singular values on each side; the rank is
floor(in out / (ratio (in + out))), so that parameters and multiplications fall by the ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from regrow_runtime.errors import RegrowError, UsageError

from .structure import block_lists, replace_module

__all__ = [
    "LowRankLinear",
    "Plan",
    "apply_plan",
    "dense_weight",
    "factorize",
    "plan_layers",
    "rank_for",
]

# Layers with fewer outputs hold too little to be worth two products (as in the paper's code).
_LEAST_OUTPUTS = 10
# Swin's patch merging stays dense in the paper's code: its input is a concatenation of patches.
_LEFT_DENSE = ("reduction",)


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


def plan_layers(model: nn.Module, ratio: float) -> tuple[Plan, ...]:
    """Every linear layer inside the model's stacks of blocks, with its rank.

    Embeddings, norms, the pooler and the head lie outside of the blocks and stay dense.

    Raises:
        UsageError: `ratio` is below 1, or so large that a rank is 0.
        RegrowError: there is no linear layer to compress.
    """
    if not (math.isfinite(ratio) and ratio >= 1):
        raise UsageError(f"ratio must be at least 1, got {ratio}")
    plans = []
    for prefix, stack in block_lists(model):
        for name, module in stack.named_modules(prefix=prefix):
            if isinstance(module, nn.Linear | Conv1D) and _worth(name, module):
                wide, high = _widths(module)
                rank = rank_for(wide, high, ratio)
                if rank < 1:
                    raise UsageError(
                        f"ratio must leave every layer a rank of 1 or more, got {ratio}, "
                        f"which leaves {name} ({wide} -> {high}) none"
                    )
                plans.append(Plan(name, wide, high, rank, module.bias is not None))
    if not plans:
        raise RegrowError("model must have linear layers in a stack of blocks, got none")
    return tuple(plans)


def _widths(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    high, wide = dense_weight(module).shape
    return wide, high


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in], detached; transformers' Conv1D has it turned."""
    weight = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _worth(name: str, module: nn.Module) -> bool:
    return _widths(module)[1] >= _LEAST_OUTPUTS and name.rsplit(".", 1)[-1] not in _LEFT_DENSE


def factorize(module: nn.Module, rank: int, name: str = "layer") -> LowRankLinear:
    """The pair closest to a linear layer: truncated SVD, square roots on both sides.

    Raises:
        RegrowError: the weight is not finite.
    """
    wide, high = _widths(module)
    weight = dense_weight(module).float()  # (out, in)
    if not torch.isfinite(weight).all():
        raise RegrowError(f"{name}.weight must be finite, got NaN or infinity")
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    pair = LowRankLinear(wide, high, rank, bias=module.bias is not None)
    with torch.no_grad():
        pair.down.weight.copy_(root[:, None] * right[:rank])
        pair.up.weight.copy_(left[:, :rank] * root)
        if module.bias is not None:
            pair.up.bias.copy_(module.get_parameter("bias"))
    return pair


def apply_plan(model: nn.Module, plans: tuple[Plan, ...], *, empty: bool = False) -> None:
    """Replace the planned layers in place: by their factors, or by `empty` pairs on "meta"."""
    for plan in plans:
        if empty:
            pair = LowRankLinear(
                plan.in_features, plan.out_features, plan.rank, bias=plan.bias, device="meta"
            )
        else:
            pair = factorize(model.get_submodule(plan.name), plan.rank, plan.name)
        replace_module(model, plan.name, pair)
