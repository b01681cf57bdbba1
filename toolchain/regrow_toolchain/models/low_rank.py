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

from regrow_export.layers import LowRankPair, layer_type
from regrow_format.errors import MismatchError, RegrowError

from .structure import replace_module

__all__ = [
    "LowRankPair",
    "Plan",
    "apply_plan",
    "empty_pair",
    "factorize",
    "finite_weight",
    "pair_of",
    "rank_for",
    "weight_of",
]


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


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer that can be factored, or of a pair, as [out, in], detached."""
    layer = layer_type(module)
    weight = layer.weight(module) if layer else None
    if weight is None:
        raise TypeError(f"layer must have a weight, got {type(module).__name__}")
    return weight


def factorize(module: nn.Module, rank: int, name: str = "layer") -> LowRankPair:
    """The pair closest to a linear layer: truncated SVD, square roots on both sides.

    Raises:
        RegrowError: the weight is not finite.
    """
    weight = finite_weight(module, name).float()  # (out, in)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    return pair_of(module, root[:, None] * right[:rank], left[:, :rank] * root)


def finite_weight(module: nn.Module, name: str) -> Tensor:
    """`weight_of`, or `RegrowError` if a number in it is not finite."""
    weight = weight_of(module)
    if not torch.isfinite(weight).all():
        raise RegrowError(f"{name}.weight must be finite, got NaN or infinity")
    return weight


def pair_of(module: nn.Module, down: Tensor, up: Tensor) -> LowRankPair:
    """The pair of `down` [rank, in] and `up` [out, rank], with the bias of the layer."""
    pair = empty_pair(module, len(down))
    with torch.no_grad():
        for name, values in (("down", down), ("up", up)):
            weight = pair.get_parameter(f"{name}.weight")
            weight.copy_(values.reshape(weight.shape))
        if pair.up.bias is not None:
            pair.get_parameter("up.bias").copy_(module.get_parameter("bias"))
    return pair


def _planned_pair(module: nn.Module, plan: Plan) -> LowRankPair:
    """Without weights; `MismatchError` unless the layer is the one that was factored."""
    layer = layer_type(module)
    want = (plan.in_features, plan.out_features, plan.bias)
    if layer is None or (*layer.sizes(module), layer.bias(module) is not None) != want:
        raise MismatchError(
            f"{plan.name} does not fit the model: it must be {plan.in_features} -> "
            f"{plan.out_features} {'with' if plan.bias else 'without'} a bias, as the layer that "
            f"was factored, got {module}: give the model that was compressed"
        )
    return empty_pair(module, plan.rank, "meta")


def empty_pair(module: nn.Module, rank: int, device: str = "cpu") -> LowRankPair:
    """The pair that can take the place of a layer; its weights hold no useful numbers."""
    layer = layer_type(module)
    pair = layer.pair(module, rank, device) if layer else None
    if pair is None:
        raise TypeError(f"layer must be one that can be factored, got {type(module).__name__}")
    return pair


def apply_plan(
    model: nn.Module,
    plans: tuple[Plan, ...],
    *,
    empty: bool = False,
    pairs: Mapping[str, LowRankPair] | None = None,
) -> None:
    """Replace the planned layers in place.

    Args:
        empty: by pairs without weights, on "meta".
        pairs: by these, by layer name; by the factors of `factorize` if not given.
    """
    for plan in plans:
        if empty:
            pair = _planned_pair(model.get_submodule(plan.name), plan)
        elif pairs is not None:
            pair = pairs[plan.name]
        else:
            pair = factorize(model.get_submodule(plan.name), plan.rank, plan.name)
        owner = model.get_submodule(plan.name.rpartition(".")[0])
        if isinstance(owner, nn.TransformerEncoderLayer):
            owner.activation_relu_or_gelu = 0  # else torch's fast path reads linear1.weight
        replace_module(model, plan.name, pair)
