"""Folding one adapter into the weights, on a copy of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from regrow_export.layers import is_conv1d, layer_kinds
from regrow_export.slots import shared_copy
from regrow_format.adapter import HeadLayer
from regrow_format.errors import UsageError
from regrow_format.methods.base import Expansion

__all__ = ["merged_model", "with_extra"]

# By part of an expansion: what it can be merged into.
_MERGEABLE = {
    "A": "Linear, Conv1D or have merged_with",
    "D": "Linear, Conv1D or a pair of Linear down and up",
    "b": "Linear, LayerNorm, a pair of Linear down and up, or have a bias",
}


def merged_model(
    model: nn.Module, expansion: Expansion, head: Sequence[HeadLayer] = ()
) -> nn.Module:
    """A copy of `model` that shares all weights but those of the targets and the head.

    Args:
        expansion: by target, A [in, r] and B [r, out] (the layer computes x W + (x A) B), or
            D [in, out] (x W + x D), or b [out].
        head: layers that replace the model's own; their class count may differ.

    Raises:
        UsageError: a target is no layer whose weights such a change fits into.
    """
    merged = shared_copy(model)
    for name, parts in expansion.items():
        layer = merged.get_submodule(name)
        merged.set_submodule(name, _merged(name, layer, parts))
    for part in head:
        merged.set_submodule(part.name, _linear(part))
    return merged.eval()


def with_extra(model: nn.Module, extra: Mapping[str, NDArray[np.floating]]) -> nn.Module:
    """A copy of `model`, weights shared but for the parameters that an adapter replaces whole."""
    changed = shared_copy(model)
    for name, value in extra.items():
        path, _, leaf = name.rpartition(".")
        fresh = nn.Parameter(_tensor(value), requires_grad=False)
        changed.get_submodule(path).register_parameter(leaf, fresh)
    return changed


def _merged(name: str, layer: nn.Module, parts: Mapping[str, NDArray[np.float32]]) -> nn.Module:
    tensors = {part: _tensor(value) for part, value in parts.items()}
    found: nn.Module | None = None
    if "b" in tensors:
        found = _with_bias(layer, tensors["b"])
    elif "D" in tensors:
        found = _with_delta(layer, tensors["D"].double())
    elif callable(method := getattr(layer, "merged_with", None)):
        found = method(tensors["A"], tensors["B"])
    else:  # rounded once, with the weight
        found = _with_delta(layer, tensors["A"].double() @ tensors["B"].double())
    if found is None:
        raise UsageError(
            f"target must be {_MERGEABLE[next(iter(parts))]} to be merged, "
            f"got {name}: {type(layer).__name__}; export it swappable"
        )
    return found


def _tensor(value: NDArray[np.floating]) -> torch.Tensor:
    return torch.from_numpy(np.array(value, dtype=np.float32))


def _with_delta(layer: nn.Module, delta: torch.Tensor) -> nn.Module | None:
    """`layer` with delta [in, out] in its weight, or None if it is of no known kind.

    A factored pair becomes one dense layer: up down + delta has no exact form of its rank.
    """
    if is_conv1d(layer):  # its weight is [in, out]
        return _with_weight(layer, delta)
    if isinstance(layer, nn.Linear):
        return _with_weight(layer, delta.T)
    if (pair := _pair(layer)) is None:
        return None
    down, up = pair
    dense = nn.Linear(down.in_features, up.out_features, bias=up.bias is not None)
    weight = up.weight.detach().double() @ down.weight.detach().double() + delta.T
    dense.weight = nn.Parameter(weight.float().contiguous(), requires_grad=False)
    if up.bias is not None:
        dense.bias = up.bias
    return dense


def _pair(layer: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    """The factors of a pair x -> up(down(x)), known by their names."""
    down, up = getattr(layer, "down", None), getattr(layer, "up", None)
    if isinstance(down, nn.Linear) and isinstance(up, nn.Linear) and down.bias is None:
        return down, up
    return None


def _with_bias(layer: nn.Module, change: torch.Tensor) -> nn.Module | None:
    """`layer` with a bias of its own, its old one (or none) plus `change`."""
    pair = _pair(layer)
    owner = layer if pair is None else pair[1]
    old = getattr(owner, "bias", None)
    if not isinstance(owner, nn.Linear | nn.LayerNorm) and (old is None or not layer_kinds(owner)):
        return None
    fresh = change if old is None else (old.detach().double() + change.double()).float()
    owner.register_parameter("bias", nn.Parameter(fresh, requires_grad=False))
    return layer


def _with_weight(layer: nn.Module, delta: torch.Tensor) -> nn.Module:
    """`layer`, which is of the copy, with a weight of its own; other layers may tie the old one."""
    weight = layer.get_parameter("weight")
    fresh = (weight.detach().double() + delta).float().contiguous()
    layer.register_parameter("weight", nn.Parameter(fresh, requires_grad=False))
    return layer


def _linear(part: HeadLayer) -> nn.Linear:
    classes, wide = part.weight.shape
    layer = nn.Linear(wide, classes)
    layer.load_state_dict(
        {
            name: torch.from_numpy(np.array(v))
            for name, v in (("weight", part.weight), ("bias", part.bias))
        }
    )
    return layer
