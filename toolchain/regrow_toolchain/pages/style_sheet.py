"""The pages' style sheet."""

from __future__ import annotations

from importlib import resources

__all__ = ["style"]


def style() -> str:
    """The style sheet: phone and desktop, light and dark, screen and paper."""
    return resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
