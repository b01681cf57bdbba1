"""The same seed, the same training: torch's state within a block, and weights that stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["deterministic", "frozen"]


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Seed torch and refuse operations that differ between runs; the old state comes back."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    with torch.random.fork_rng():
        torch.manual_seed(seed % 2**63)
        torch.use_deterministic_algorithms(True)
        # It fills memory before it is written, which finds faulty operators and takes time.
        memory.fill_uninitialized_memory = False
        try:
            yield
        finally:
            memory.fill_uninitialized_memory = filled
            torch.use_deterministic_algorithms(before, warn_only=warned)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the model's weights within the block; what was set comes back."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
