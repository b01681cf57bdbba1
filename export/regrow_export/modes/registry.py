"""The export modes by name: a further one is a file, and a line here."""

from .common import Mode
from .merged import MERGED
from .seeded import SEEDED
from .swappable import SWAPPABLE

__all__ = ["MODES"]

MODES: dict[str, Mode] = {"swappable": SWAPPABLE, "merged": MERGED, "seeded": SEEDED}
