"""What the low-rank methods share."""

from __future__ import annotations

from collections.abc import Sequence

from regrow_format.adapter import Target
from regrow_format.errors import UsageError

__all__ = ["check_rank"]


def check_rank(rank: int, targets: Sequence[Target]) -> None:
    """Raise `UsageError` if a layer is narrower than the rank."""
    for target in targets:
        if rank > (least := min(target.in_features, target.out_features)):
            raise UsageError(
                f"rank must be at most {least}, the width of {target.name}, got {rank}: lower it, "
                "or leave that layer out of the targets"
            )
