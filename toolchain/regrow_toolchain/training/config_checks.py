"""Checking a config that did not come from the command line, which checks its own."""

from __future__ import annotations

import math
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from regrow_format.errors import UsageError

__all__ = ["check_settings"]


def check_settings(config: Any) -> None:
    """Raise `UsageError` for the first field of a config that has a value which makes no sense."""
    for item in fields(config):
        value, limits = getattr(config, item.name), item.metadata
        if choices := limits.get("choices"):
            if value not in choices:
                raise UsageError(f"{item.name} must be one of {', '.join(choices)}, got {value!r}")
        elif limits and not isinstance(item.default, str):
            whole = isinstance(item.default, int)
            _check_number(item.name, value, limits["low"], limits["high"], whole=whole)


def _check_number(name: str, value: Any, low: float, high: float | None, *, whole: bool) -> None:
    wanted = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
    if not isinstance(value, Integral if whole else Real) or not math.isfinite(value):
        raise UsageError(f"{name} must be a {'whole' if whole else 'finite'} number, got {value!r}")
    if float(value) < low or (high is not None and float(value) > high):
        raise UsageError(f"{name} must be {wanted}, got {value}")
