"""Settings of `regrow export`, which `regrow_export` has."""

from __future__ import annotations

from regrow_export import ExportConfig

__all__ = ["ExportConfig"]
