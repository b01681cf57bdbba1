"""What a model gives for all samples of a dataset, and how good that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_toolchain.data import Dataset

if TYPE_CHECKING:
    from regrow_toolchain.tasks import Task
from regrow_toolchain.models import logits_of

__all__ = ["accuracy", "evaluate", "predict", "teacher_labelled"]

PREDICT_BATCH = 256


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, data: Dataset, batch: int = PREDICT_BATCH
) -> NDArray[np.float32]:
    """[samples, m]: what a task's score needs of each sample; on the model's device."""
    return np.concatenate(
        [task.measure(out, labels) for out, labels in _outputs(model, task, data, batch)]
    )


@torch.no_grad()
def teacher_labelled(task: Task, teacher: nn.Module, data: Dataset) -> Dataset:
    """Samples to score by, with a teacher's outputs as labels where those are learnt."""
    if not task.learns_from_teacher:
        return data
    parts = [task.teacher_labels(out) for out, _ in _outputs(teacher, task, data, PREDICT_BATCH)]
    return replace(data, labels=np.concatenate(parts), names=())


def _outputs(
    model: nn.Module, task: Task, data: Dataset, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(outputs, labels) of some samples after others, in eval mode."""
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for start in range(0, len(data), batch):
        rows = slice(start, start + batch)
        inputs = {name: torch.from_numpy(a[rows]).to(device) for name, a in data.inputs.items()}
        yield task.outputs(model, inputs), torch.from_numpy(data.labels[rows]).to(device)


@torch.no_grad()
def predict(
    model: nn.Module, data: Dataset, forward: Callable[..., Tensor] = logits_of
) -> NDArray[np.float32]:
    """float32 [samples, classes]: the model's logits in eval mode."""
    model.eval()
    parts = []
    for start in range(0, len(data), PREDICT_BATCH):
        rows = np.arange(start, min(start + PREDICT_BATCH, len(data)))
        inputs = {name: torch.from_numpy(a[rows]) for name, a in data.inputs.items()}
        parts.append(forward(model, inputs).float().numpy())
    return np.concatenate(parts)


def accuracy(model: nn.Module, data: Dataset) -> float:
    """Accuracy from 0 to 1; NaN without samples."""
    if not len(data):
        return math.nan
    return float((predict(model, data).argmax(axis=1) == data.labels).mean())
