"""What is learnt without labels: to give what the dense model gives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from regrow_format.errors import UsageError
from regrow_toolchain.config import AdaptConfig, CompressConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone
from regrow_toolchain.tasks import Classification, Distillation, Regression, Task, choose_task

from .evaluation import evaluate

__all__ = [
    "LogitDistillation",
    "compression_task",
    "is_self_distillation",
    "self_distillation_task",
    "teacher_labelled",
]

_FEATURES = "feature-extraction"


@dataclass(frozen=True)
class LogitDistillation(Classification):
    """In training, labels are the dense model's logits [..., classes]; scored by equal answers."""

    name = "imitation"
    metric = "agreement"

    def losses(
        self,
        outputs: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """Kullback-Leibler divergence from the dense model's answer."""
        found, wanted = (torch.log_softmax(x.float(), dim=-1) for x in (outputs, labels))
        return functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)


class ValueDistillation(Regression):
    """In training, labels are the dense model's values [..., outputs]."""

    name = "imitation"


def is_self_distillation(task: Task) -> bool:
    """Whether labels in training are the dense model's outputs."""
    return isinstance(task, LogitDistillation | Distillation | ValueDistillation)


def compression_task(config: CompressConfig, data: Dataset, backbone: Backbone) -> Task:
    """What the compressed model learns from `data`: its labels, or to imitate the dense model.

    Raises:
        UsageError: the labels are not of the kind that the task takes.
    """
    embeds = backbone.task == _FEATURES
    if config.task == "imitation" or (config.task == "auto" and (data.unlabelled or embeds)):
        return self_distillation_task(backbone)
    if data.unlabelled:
        raise UsageError(f"data must have labels for task {config.task}, got none")
    wanted = AdaptConfig(task=config.task, label_smoothing=config.label_smoothing)
    return choose_task(wanted, data, backbone.task)


def self_distillation_task(backbone: Backbone) -> Task:
    """To give what the model itself gives: its classes, values or embeddings."""
    if backbone.task == "text-generation":
        raise UsageError("task must be causal-lm for a language model, got imitation")
    if backbone.task == _FEATURES or not backbone.labels:
        return Distillation()
    return ValueDistillation() if len(backbone.labels) == 1 else LogitDistillation()


def teacher_labelled(task: Task, backbone: Backbone, held: Dataset) -> Dataset:
    """Samples to score on, with the dense model's own answers as labels where those are learnt."""
    if not is_self_distillation(task):
        return held
    if isinstance(task, LogitDistillation):
        answers = evaluate(backbone.model, task, held)[:, 0].astype(np.int64)
        return replace(held, labels=answers, names=())
    return replace(held, labels=evaluate(backbone.model, cast(Task, _Raw(task)), held), names=())


class _Raw:
    """A task whose measure is the outputs themselves."""

    def __init__(self, task: Task) -> None:
        self.outputs = task.outputs

    def measure(self, outputs: Tensor, labels: Tensor) -> np.ndarray[Any, Any]:
        return outputs.float().cpu().numpy()
