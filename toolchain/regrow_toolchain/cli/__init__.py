"""The command line. One file per command in `commands/`, and a line in `COMMANDS` of `app.py`."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .app import COMMANDS as COMMANDS
    from .app import main as main
    from .app import printable as printable
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".app": ("COMMANDS", "main", "printable"),
        },
    )
