"""Regression: squared error, scored by its root (RMSE)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_format.errors import RegrowError
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone, logits_of

from .base import FEATURES, Fitted, Inputs, Task

__all__ = ["Regression", "numbered"]


@dataclass(frozen=True)
class Regression(Task):
    """Labels are float32 values [n] or [n, outputs]. Measured is a sample's mean squared error.

    See `Task`.
    """

    name = "regression"
    label_words, label_kind = "numbers", "values"
    metric = "rmse"
    higher_is_better = False
    heads = ("new", "tune")

    @classmethod
    def suits(cls, data: Dataset, model_task: str) -> bool:
        return cls.takes(data) and not (model_task == FEATURES and data.labels.ndim == 2)

    def fit(
        self,
        data: Dataset,
        eval_data: Dataset | None,
        backbone: Backbone,
        head: str = "keep",
        way_out: str = "",
    ) -> Fitted:
        """An output for each value: the backbone's if it has as many."""
        count = 1 if data.labels.ndim == 1 else data.labels.shape[1]
        known = 0 < len(backbone.labels) == count
        return Fitted(data, eval_data, backbone.labels if known else numbered(count), known)

    def outputs(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """[N, m]; a model that gives one number per sample may leave the last dimension out."""
        found = logits_of(model, inputs)
        return found.unsqueeze(-1) if found.dim() == 1 else found

    def losses(
        self,
        outputs: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error over a sample's outputs."""
        values = labels if labels.dim() == outputs.dim() else labels.unsqueeze(-1)
        if values.shape != outputs.shape:
            raise RegrowError(
                "labels must have as many values as the model gives, "
                f"{outputs.shape[-1]} per sample, got {values.shape[-1]}"
            )
        return (outputs.float() - values.float()).square().mean(-1)

    def score(self, measured: NDArray[np.float32], labels: NDArray[Any]) -> float:
        return float(np.sqrt(measured.mean())) if len(labels) else math.nan

    def constants(
        self, train: NDArray[Any], labels: NDArray[Any]
    ) -> dict[str, NDArray[np.float32]]:
        """Squared distance to the mean of `train`."""
        squares = np.square(labels - train.mean(axis=0)).reshape(len(labels), -1)
        return {"mean of the labels": squares.mean(axis=1, keepdims=True).astype(np.float32)}


def numbered(count: int) -> tuple[str, ...]:
    """Names of outputs that have none."""
    return tuple(f"value_{index}" for index in range(count))
