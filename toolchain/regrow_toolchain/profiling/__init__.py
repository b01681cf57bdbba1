"""`regrow profile`: what a bundle costs on this machine. Works in the base install.

Whatever is measured runs in a fresh process of its own (`worker.py`, `cases/`); this side plans
(`settings.py`), starts them (`processes.py`, `limits.py`), puts the record together (`record.py`)
and writes it (`text.py`, `page.py`). `comparison.py` holds two records side by side.
"""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .comparison import compare as compare
    from .comparison import read_profile as read_profile
    from .environment import read_environment as read_environment
    from .outputs import write_comparison as write_comparison
    from .outputs import write_profile as write_profile
    from .record import measure_bundle as measure_bundle
    from .settings import Settings as Settings
    from .settings import parse_settings as parse_settings
    from .text import comparison_lines as comparison_lines
    from .text import record_lines as record_lines
    from .wording import failed as failed
    from .wording import left_out as left_out
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".comparison": ("compare", "read_profile"),
            ".environment": ("read_environment",),
            ".outputs": ("write_comparison", "write_profile"),
            ".record": ("measure_bundle",),
            ".settings": ("Settings", "parse_settings"),
            ".text": ("comparison_lines", "record_lines"),
            ".wording": ("failed", "left_out"),
        },
    )
