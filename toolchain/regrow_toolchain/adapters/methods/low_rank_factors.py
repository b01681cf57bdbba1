"""What the low-rank methods share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from regrow_format.adapter import Target
from regrow_format.errors import UsageError

__all__ = ["check_rank", "low_rank"]


def check_rank(rank: int, targets: Sequence[Target]) -> None:
    """Raise `UsageError` if a layer is narrower than the rank."""
    for target in targets:
        if rank > (least := min(target.in_features, target.out_features)):
            raise UsageError(
                f"rank must be at most {least}, the width of {target.name}, got {rank}"
            )


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(x A) B by user, in x's dtype; a [users, in, r], b [users, r, out]."""
    return (x @ a.to(x.dtype)) @ b.to(x.dtype)
