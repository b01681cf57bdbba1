"""What an export measures on samples: the score of the task that the labels and the model mean."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from regrow_export import Measure
from regrow_format.errors import UsageError
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone
from regrow_toolchain.tasks import choose_task, self_distillation
from regrow_toolchain.training import evaluate, teacher_labelled

__all__ = ["export_evaluation"]


def export_evaluation(backbone: Backbone, data: Dataset, labels: tuple[str, ...]) -> Measure:
    """The score that `regrow adapt` would give, or how near to the model in fp32 it stays.

    Labels are classes, values, a teacher's features, or a text's tokens; without any, the answers
    of the model in fp32 stand in their place.

    Args:
        labels: names of the outputs of what is exported; its head may be an adapter's.

    Raises:
        UsageError: the labels do not fit, or there are no samples.
    """
    if not len(data):
        raise UsageError("data must have samples to measure on, got none")
    backbone = replace(backbone, labels=labels)
    if data.unlabelled:
        task = self_distillation(backbone)
    else:
        task = choose_task(AdaptConfig(), data, backbone.task)
        data = task.fit(data, None, backbone, way_out="give other data, or none").data

    def scores(exact: nn.Module, bundle: nn.Module) -> tuple[float, float]:
        known = teacher_labelled(task, exact, data) if data.unlabelled else data
        first, second = (
            task.score(evaluate(model, task, known, batch=1), known.labels)
            for model in (exact, bundle)
        )
        return first, second

    metric = f"{task.metric} with fp32" if data.unlabelled else task.metric
    return Measure(metric, task.higher_is_better, len(data), scores)
