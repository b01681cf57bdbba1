"""What an adapter's method expands to, for tests that write a network out by hand."""

from __future__ import annotations

from typing import Any

from regrow_format.basis import BasisCache
from regrow_format.methods import get_method

__all__ = ["expanded", "flat"]


def flat(expansion: Any) -> dict[str, dict[str, Any]]:
    """By target and part: no two kinds of slot have a part of one name, in methods so far."""
    return {
        target: {part: array for parts in changes.values() for part, array in parts.items()}
        for target, changes in expansion.items()
    }


def expanded(adapter: Any, basis: BasisCache | None = None) -> dict[str, dict[str, Any]]:
    """By target and part, float32."""
    cache = BasisCache() if basis is None else basis
    return flat(get_method(adapter.method).expand(adapter, cache))
