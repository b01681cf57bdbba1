"""Adapters that PEFT trained, made regrow's, in the base install: no torch and no PEFT."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .base_model import factored as factored
    from .importer import import_peft as import_peft
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".base_model": ("factored",),
            ".importer": ("import_peft",),
        },
    )
