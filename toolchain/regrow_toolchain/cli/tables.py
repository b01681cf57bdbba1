"""Numbers for people, in a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from regrow_toolchain.tasks import in_percent

__all__ = ["cost", "counted", "giga", "percent", "score", "size"]


def size(count: float) -> str:
    """Bytes for people: 512 B, 3.1 KB, 2.0 MB (powers of 1000)."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def counted(count: int, thing: str) -> str:
    """1 adapter, 2 adapters."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def percent(share: float) -> str:
    """0.983 as 98.3 %."""
    return f"{100 * share:.1f} %"


def score(value: float | None, metric: str) -> str:
    """A score as people read it: shares in percent (see `TASKS`), others with four digits."""
    if value is None or math.isnan(value):
        return "no score"
    return percent(value) if in_percent(metric) else f"{value:.4g}"


def giga(count: int | None) -> str:
    """Multiply-adds in units of 10⁹, with four digits."""
    return "not known" if count is None else f"{count / 1e9:.4g}"


def cost(found: Mapping[str, Any]) -> str:
    """What a bundle's precision costs (`score` of its manifest), in words."""
    better = "higher" if found["higher_is_better"] else "lower"
    return (
        f"{found['metric']} ({better} is better): {found['variant']:.6g} of the bundle, "
        f"{found['fp32']:.6g} of torch in fp32, on {found['samples']} samples"
    )
