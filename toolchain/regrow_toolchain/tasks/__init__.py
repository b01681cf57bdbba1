"""Kinds of training: a loss, a metric, a label type; one file each, and a line in `registry.py`."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .base import Task as Task
    from .classification import Classification as Classification
    from .features import Distillation as Distillation
    from .registry import Loss as Loss
    from .registry import choose_task as choose_task
    from .regression import Regression as Regression
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".base": ("Task",),
            ".classification": ("Classification",),
            ".features": ("Distillation",),
            ".registry": ("Loss", "choose_task"),
            ".regression": ("Regression",),
        },
    )
