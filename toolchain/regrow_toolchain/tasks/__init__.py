"""Kinds of training: labels, loss, metric and baseline; one file each, a line in `registry.py`."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .base import FEATURES as FEATURES
    from .base import Fitted as Fitted
    from .base import Task as Task
    from .base import TaskSettings as TaskSettings
    from .causal_lm import CausalLm as CausalLm
    from .choice import choose_task as choose_task
    from .classification import Classification as Classification
    from .custom import Loss as Loss
    from .distillation import Distillation as Distillation
    from .distillation import self_distillation as self_distillation
    from .metric_learning import MetricLearning as MetricLearning
    from .registry import AUTO as AUTO
    from .registry import TASK_CHOICES as TASK_CHOICES
    from .registry import TASKS as TASKS
    from .registry import TaskEntry as TaskEntry
    from .registry import in_percent as in_percent
    from .regression import Regression as Regression
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".metric_learning": ("MetricLearning",),
            ".causal_lm": ("CausalLm",),
            ".base": ("FEATURES", "Fitted", "Task", "TaskSettings"),
            ".choice": ("choose_task",),
            ".classification": ("Classification",),
            ".custom": ("Loss",),
            ".distillation": ("Distillation", "self_distillation"),
            ".registry": ("AUTO", "TASKS", "TASK_CHOICES", "TaskEntry", "in_percent"),
            ".regression": ("Regression",),
        },
    )
