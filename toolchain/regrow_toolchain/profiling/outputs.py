"""Writing profiles and comparisons: JSON, Markdown and a page, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow_format.fields import dump_json
from regrow_format.files import new_folder

from .page import comparison_page, profile_page
from .text import comparison_markdown, record_markdown

__all__ = ["write_comparison", "write_profile"]


def write_profile(record: Mapping[str, Any], out: Path, *, force: bool) -> None:
    """profile.json, profile.md, profile.html in a new folder."""
    with new_folder(out, marker="profile.json", force=force) as folder:
        _write(folder / "profile.json", dump_json(record, indent=1) + "\n")
        _write(folder / "profile.md", record_markdown(record))
        _write(folder / "profile.html", profile_page(record))


def write_comparison(found: Mapping[str, Any], out: Path, *, force: bool) -> None:
    """compare.json, compare.md, compare.html in a new folder."""
    with new_folder(out, marker="compare.json", force=force) as folder:
        _write(folder / "compare.json", dump_json(found, indent=1) + "\n")
        _write(folder / "compare.md", comparison_markdown(found))
        _write(folder / "compare.html", comparison_page(found))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
