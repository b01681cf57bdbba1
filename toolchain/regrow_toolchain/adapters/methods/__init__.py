"""Trainable adapter methods. A further one is one file here and a line in `registry.py`."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .base import Changes as Changes
    from .base import TrainableAdapter as TrainableAdapter
    from .registry import get_trainable as get_trainable
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".base": ("Changes", "TrainableAdapter"),
            ".registry": ("get_trainable",),
        },
    )
