"""A model as it is deployed: weights rounded as a bundle of some precision has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regrow_export.layers import BlockWeight, block_weights
from regrow_format.errors import RegrowError

from .schemes import check_precision, round_weight

__all__ = ["rounded_weights"]


@contextmanager
def rounded_weights(model: nn.Module, precision: str) -> Iterator[nn.Module]:
    """Within the block the linear layers of the model's blocks have the weights of the device.

    Both factors of a compressed layer are rounded, each for itself. Embeddings, norms, biases,
    convolutions and the head stay as they are, and so do activations. The weights come back,
    bit for bit, whatever happens within.

    Args:
        precision: fp32 (nothing changes), fp16, int8 or int4; `schemes.py` says how.

    Raises:
        UsageError: `precision` is unknown.
        RegrowError: there are no linear layers in blocks, or a weight cannot be rounded.
    """
    check_precision(precision)
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        if precision != "fp32":
            for weight in block_weights(model):
                kept.append((weight.parameter, weight.parameter.data))
                weight.parameter.data = _rounded(weight, precision)
        yield model
    finally:
        for parameter, original in kept:
            parameter.data = original.to(parameter.device)


def _rounded(weight: BlockWeight, precision: str) -> Tensor:
    try:
        rounded = torch.from_numpy(round_weight(weight.values(), precision))
    except RegrowError as error:
        raise RegrowError(f"{weight.path}: {error}") from None
    transposed = (rounded.T if weight.transposed else rounded).contiguous()
    return transposed.to(weight.parameter.data)
