"""Folding one adapter into the weights, on a copy of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from regrow_runtime.adapter import HeadLayer
from regrow_runtime.errors import UsageError
from regrow_runtime.methods.base import Expansion

from .slots import shared_copy

__all__ = ["merged_model"]


def merged_model(
    model: nn.Module, expansion: Expansion, head: Sequence[HeadLayer] = ()
) -> nn.Module:
    """A copy of `model` that shares all weights but those of the targets and the head.

    Args:
        expansion: by target, A [in, r] and B [r, out]; the layer computes x W + (x A) B.
        head: layers that replace the model's own; their class count may differ.

    Raises:
        UsageError: a target is no Linear or Conv1D and has no `merged_with`.
    """
    merged = shared_copy(model)
    for name, parts in expansion.items():
        layer = merged.get_submodule(name)
        merged.set_submodule(name, _merged(name, layer, parts["A"], parts["B"]))
    for part in head:
        merged.set_submodule(part.name, _linear(part))
    return merged.eval()


def _merged(
    name: str, layer: nn.Module, a: NDArray[np.float32], b: NDArray[np.float32]
) -> nn.Module:
    a_tensor, b_tensor = (torch.from_numpy(np.array(part, dtype=np.float32)) for part in (a, b))
    if callable(method := getattr(layer, "merged_with", None)):
        result: nn.Module = method(a_tensor, b_tensor)
        return result
    delta = a_tensor.double() @ b_tensor.double()  # [in, out], rounded once with the weight
    if type(layer).__name__ == "Conv1D":  # its weight is [in, out]
        return _with_weight(layer, delta)
    if isinstance(layer, nn.Linear):
        return _with_weight(layer, delta.T)
    raise UsageError(
        f"target must be Linear, Conv1D or have merged_with to be merged, got {name}: "
        f"{type(layer).__name__}; export it swappable"
    )


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
