"""What an export measures on samples: the score of the task that the labels and the model mean."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from regrow_export import Measure
from regrow_format.errors import UsageError

from .backbone import Backbone
from .config import AdaptConfig
from .data import Dataset
from .imitating import imitated, imitation
from .labels import fit_labels
from .tasks import choose_task
from .training import measured

__all__ = ["measure_of"]


def measure_of(backbone: Backbone, data: Dataset, labels: tuple[str, ...]) -> Measure:
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
    task = imitation(backbone) if data.unlabelled else None
    task = task or choose_task(AdaptConfig(), data, backbone.task)
    if task.name == "classification":
        data, _ = fit_labels(data, labels, "keep", way_out="give other data, or none")

    def scores(exact: nn.Module, bundle: nn.Module) -> tuple[float, float]:
        known = imitated(task, replace(backbone, model=exact), data) if data.unlabelled else data
        first, second = (
            task.score(measured(model, task, known, batch=1), known.labels)
            for model in (exact, bundle)
        )
        return first, second

    metric = f"{task.metric} with fp32" if data.unlabelled else task.metric
    return Measure(metric, task.higher_is_better, len(data), scores)
