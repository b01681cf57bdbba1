"""PELA: which layers are factored, at which rank, and the distillation that follows."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .compression import Compressed as Compressed
    from .compression import compress as compress
    from .layer_selection import factored_layers as factored_layers
    from .layer_selection import plan_layers as plan_layers
    from .layer_selection import plans_of as plans_of
    from .report import build_report as build_report
    from .report import write_report as write_report
    from .trainer import DistillationTrainer as DistillationTrainer
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".compression": ("Compressed", "compress"),
            ".layer_selection": ("factored_layers", "plans_of", "plan_layers"),
            ".report": ("build_report", "write_report"),
            ".trainer": ("DistillationTrainer",),
        },
    )
