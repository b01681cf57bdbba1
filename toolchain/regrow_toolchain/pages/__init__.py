"""Pages for people: one style sheet, charts as inline SVG, numbers as words. Needs only Python."""

from __future__ import annotations

from importlib import resources

from .canvas import WIDTH, Canvas
from .words import count, duration, percent, ratio, size

__all__ = ["WIDTH", "Canvas", "count", "duration", "percent", "ratio", "size", "style"]


def style() -> str:
    """The style sheet: phone and desktop, light and dark, screen and paper."""
    return resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
