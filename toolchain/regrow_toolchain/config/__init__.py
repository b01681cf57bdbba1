"""One config per command: the only home of its settings, their defaults, help and limits.

A config is checked when it is made, from the command line and from Python alike.
"""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .adapt import AdaptConfig as AdaptConfig
    from .compress import CompressConfig as CompressConfig
    from .export import ExportConfig as ExportConfig
    from .import_ import ImportConfig as ImportConfig
    from .profile import ProfileConfig as ProfileConfig
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".adapt": ("AdaptConfig",),
            ".compress": ("CompressConfig",),
            ".export": ("ExportConfig",),
            ".import_": ("ImportConfig",),
            ".profile": ("ProfileConfig",),
        },
    )
