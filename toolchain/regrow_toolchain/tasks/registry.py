"""Kinds of training by name. A further one is one file beside this one and one line in `TASKS`.

This half is light: configs and the command line take names from here, and torch is loaded when a
task is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Task

__all__ = ["AUTO", "TASKS", "TASK_CHOICES", "TaskEntry", "in_percent"]

AUTO = "auto"


@dataclass(frozen=True)
class TaskEntry:
    """Where a task is, and what is known of it without loading it.

    Attributes:
        where: "package.module:Class", or ".module:Class" of this package.
        percent: its metrics that are shares from 0 to 1, for people in percent.
    """

    where: str
    percent: tuple[str, ...] = ()

    def load(self) -> type[Task]:
        """The class."""
        module, _, name = self.where.partition(":")
        found: type[Task] = getattr(import_module(module, __package__), name)
        return found


# Where nobody says what is learnt, it is the first that suits labels and model.
TASKS = {
    "classification": TaskEntry(
        ".classification:Classification", percent=("accuracy", "balanced accuracy")
    ),
    "metric": TaskEntry(".metric_learning:MetricLearning", percent=("1-NN accuracy",)),
    "regression": TaskEntry(".regression:Regression"),
    "distillation": TaskEntry(".distillation:Distillation", percent=("agreement",)),
    "causal-lm": TaskEntry(".causal_lm:CausalLm"),
}


class _Choices(Collection[str]):
    """What a config's `task` may be: also tasks that an application registers later."""

    def __contains__(self, name: object) -> bool:
        return name == AUTO or name in TASKS

    def __iter__(self) -> Iterator[str]:
        return iter((AUTO, *TASKS))

    def __len__(self) -> int:
        return 1 + len(TASKS)


TASK_CHOICES = _Choices()


def in_percent(metric: str) -> bool:
    """Whether scores of a metric are shares, for people in percent."""
    return any(metric in entry.percent for entry in TASKS.values())
