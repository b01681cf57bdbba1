"""Which task is learnt: the one that a config names, or what labels and model mean."""

from __future__ import annotations

from regrow_format.errors import UsageError
from regrow_toolchain.data import Dataset

from .base import Task, TaskSettings
from .custom import Custom, Loss
from .registry import AUTO, TASK_CHOICES, TASKS

__all__ = ["choose_task"]


def choose_task(
    settings: TaskSettings, data: Dataset, model_task: str, loss: Loss | None = None
) -> Task:
    """The task that `settings` name, or the first in the registry that labels and model suit.

    Args:
        model_task: the backbone's, such as "text-classification".
        loss: the user's own, which goes before everything.

    Raises:
        UsageError: the labels are not of the kind that the task takes.
    """
    if loss is not None:
        return Custom(loss)
    found = _suiting(data, model_task) if settings.task == AUTO else _named(settings.task)
    if not found.takes(data):
        raise UsageError(
            f"labels must be {found.label_words} for task {found.name}, got {_described(data)}"
        )
    return found.from_settings(settings)


def _named(name: str) -> type[Task]:
    if name not in TASKS:
        raise UsageError(f"task must be one of {', '.join(TASK_CHOICES)}, got {name!r}")
    return TASKS[name].load()


def _suiting(data: Dataset, model_task: str) -> type[Task]:
    for entry in TASKS.values():
        if (task := entry.load()).suits(data, model_task):
            return task
    raise UsageError(f"labels must be what some task learns from, got {_described(data)}: name one")


def _described(data: Dataset) -> str:
    """Kind and shape of labels, such as "float32 labels of shape [4, 2]"."""
    return f"{data.labels.dtype} labels of shape {list(data.labels.shape)}"
