"""The learning rate over the steps, and a loss that must be finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regrow_format.errors import RegrowError

__all__ = ["check_loss", "cosine", "cosine_factor"]


def cosine_factor(step: int, steps: int, warmup: float = 0.1) -> float:
    """Linear warm-up over a share of the steps, then a cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """`cosine_factor` as a schedule of torch."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_factor(step, steps, warmup)
    )


def check_loss(loss: Tensor, step: int) -> None:
    """Raise `RegrowError` if the loss is not finite."""
    if not torch.isfinite(loss):
        raise RegrowError(f"loss must be finite, got {loss.item()} at step {step}: lower --lr")
