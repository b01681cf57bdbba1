"""What a compressed model learns: its labels, or what the dense model gives."""

from __future__ import annotations

from regrow_format.errors import UsageError
from regrow_toolchain.config import CompressConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone
from regrow_toolchain.tasks import (
    AUTO,
    FEATURES,
    Distillation,
    Task,
    choose_task,
    self_distillation,
)

__all__ = ["compression_task"]


def compression_task(config: CompressConfig, data: Dataset, backbone: Backbone) -> Task:
    """The task that `config` names, or the one that labels and model mean.

    Without labels, and for a model of embeddings, that is self-distillation.

    Raises:
        UsageError: the labels are not of the kind that the task takes.
    """
    learns_itself = config.task == AUTO and (data.unlabelled or backbone.task == FEATURES)
    if learns_itself or config.task == Distillation.name:
        return self_distillation(backbone)
    if data.unlabelled:
        raise UsageError(f"data must have labels for task {config.task}, got none")
    return choose_task(config, data, backbone.task)
