"""Verifies file integrity, and reproduces the outputs of export and training, without torch."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .bundle_checks import verify as verify
    from .finding import Finding as Finding
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".bundle_checks": ("verify",),
            ".finding": ("Finding",),
        },
    )
