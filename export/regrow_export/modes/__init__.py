"""Swappable, merged, seeded: what is traced, what changes in the graph, what it is compared to."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .drafts import Draft as Draft
    from .drafts import merged as merged
    from .drafts import plain as plain
    from .drafts import seeded as seeded
    from .drafts import swappable as swappable
    from .expander_files import write_expanders as write_expanders
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".drafts": ("Draft", "merged", "plain", "seeded", "swappable"),
            ".expander_files": ("write_expanders",),
        },
    )
