"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One check: of what, how it ended ("ok", "failed" or "skipped"), and what was found."""

    check: str
    result: str
    detail: str
