"""Swappable, merged, seeded: what is traced, what changes in the graph, what it is compared to."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .common import Draft as Draft
    from .common import Job as Job
    from .expander_files import write_expanders as write_expanders
    from .merging import merged_model as merged_model
    from .registry import MODES as MODES
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".merging": ("merged_model",),
            ".common": ("Draft", "Job"),
            ".expander_files": ("write_expanders",),
            ".registry": ("MODES",),
        },
    )
