"""Kinds of training. A further one is one file here and one line in `_make`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from regrow_format.errors import UsageError

from .base import Task
from .classification import Classification
from .custom import Custom
from .features import Distillation, Metric
from .language import CausalLm
from .regression import Regression

if TYPE_CHECKING:
    from regrow_toolchain.config import AdaptConfig
    from regrow_toolchain.data import Dataset

__all__ = ["Loss", "choose_task"]

Loss = Callable[[Tensor, Tensor], Tensor]

_LABELS = {
    "classification": "class labels",
    "metric": "class labels",
    "regression": "numbers",
    "distillation": "a teacher's features",
    "causal-lm": "tokens",
}


def choose_task(
    config: AdaptConfig, data: Dataset, model_task: str, loss: Loss | None = None
) -> Task:
    """The task that `config` names, or the one that model and labels mean.

    Args:
        model_task: the backbone's, such as "text-classification".
        loss: the user's own, which goes before everything.

    Raises:
        UsageError: the labels are not of the kind that the task takes.
    """
    if loss is not None:
        return Custom(loss)
    name = _meant(data, model_task) if config.task == "auto" else config.task
    if name not in _LABELS:
        raise UsageError(f"task must be one of auto, {', '.join(_LABELS)}, got {name!r}")
    if (found := _kind(data.labels)) != (wanted := _wanted(name)):
        raise UsageError(
            f"labels must be {_LABELS[name]} for task {name}, got {found}, not {wanted}"
        )
    return _make(name, config)


def _make(name: str, config: AdaptConfig) -> Task:
    tasks: dict[str, Task] = {
        "classification": Classification(config.label_smoothing),
        "regression": Regression(),
        "causal-lm": CausalLm(),
        "metric": Metric(),
        "distillation": Distillation(),
    }
    return tasks[name]


def _meant(data: Dataset, model_task: str) -> str:
    features = model_task == "feature-extraction"
    kind = _kind(data.labels)
    if kind == "token labels":
        return "causal-lm"
    if kind == "floating-point labels":
        return "distillation" if features and data.labels.ndim == 2 else "regression"
    return "metric" if features else "classification"


def _kind(labels: np.ndarray[Any, Any]) -> str:
    if labels.dtype.kind == "f":
        return "floating-point labels"
    return "token labels" if labels.ndim == 2 else "integer labels"


def _wanted(name: str) -> str:
    if name == "causal-lm":
        return "token labels"
    numbers = name in ("regression", "distillation")
    return "floating-point labels" if numbers else "integer labels"
