"""Training on the backbone as it will be deployed: weights rounded as export rounds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from regrow_export.precision import check_precision, round_weight
from regrow_runtime.errors import RegrowError

from .structure import block_lists

__all__ = ["rounded_weights"]

# nn.MultiheadAttention multiplies by parameters of its own; the graph has them as any other weight.
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@contextmanager
def rounded_weights(model: nn.Module, precision: str) -> Iterator[nn.Module]:
    """Within the block the linear layers of the model's blocks have the weights of the device.

    Both factors of a compressed layer are rounded, each for itself. Embeddings, norms, biases,
    convolutions and the head stay as they are, and so do activations. The weights come back,
    bit for bit, whatever happens within.

    Args:
        precision: fp32 (nothing changes), int8 or int4; `regrow_export.precision` says how.

    Raises:
        UsageError: `precision` is unknown.
        RegrowError: there are no linear layers in blocks, or a weight is not finite.
    """
    check_precision(precision)
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        if precision != "fp32":
            for name, weight, turned in _weights(model):
                kept.append((weight, weight.data))
                weight.data = _rounded(name, weight.data, precision, turned=turned)
        yield model
    finally:
        for weight, original in kept:
            weight.data = original.to(weight.device)


def _weights(model: nn.Module) -> list[tuple[str, nn.Parameter, bool]]:
    """Name and weight of each linear layer in blocks, tied ones once, and if it is [out, in]."""
    found: dict[int, tuple[str, nn.Parameter, bool]] = {}
    for prefix, stack in block_lists(model):
        for path, module in stack.named_modules(prefix=prefix):
            for name in _weight_names(module):
                weight = getattr(module, name)
                if weight is not None:
                    turned = not isinstance(module, Conv1D)
                    found.setdefault(id(weight), (f"{path}.{name}", weight, turned))
    if not found:
        raise RegrowError("model must have linear layers in a stack of blocks to round, got none")
    return list(found.values())


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION
    return ("weight",) if isinstance(module, nn.Linear | Conv1D) else ()


def _rounded(name: str, weight: Tensor, precision: str, *, turned: bool) -> Tensor:
    dense = weight.T if turned else weight  # [in, out]
    values = np.ascontiguousarray(dense.float().cpu().numpy())
    try:
        rounded = torch.from_numpy(round_weight(values, precision))
    except RegrowError as error:
        raise RegrowError(f"{name}: {error}") from None
    return (rounded.T if turned else rounded).contiguous().to(weight)
