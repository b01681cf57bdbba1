"""Regression: squared error, scored by its root (RMSE)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_format.errors import RegrowError
from regrow_toolchain.models import logits_of

from .base import Inputs, Task

__all__ = ["Regression"]


@dataclass(frozen=True)
class Regression(Task):
    """Labels are float32 values [n] or [n, outputs]. See `Task`."""

    name = "regression"
    metric = "rmse"
    higher_is_better = False

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
        return _squares(outputs, labels)

    def measure(self, outputs: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """[N, 1]: a sample's mean squared error."""
        return _squares(outputs, labels).unsqueeze(-1).cpu().numpy()

    def score(self, measured: NDArray[np.float32], labels: NDArray[Any]) -> float:
        return float(np.sqrt(measured.mean())) if len(labels) else math.nan

    def sample_losses(
        self, measured: NDArray[np.float32], labels: NDArray[Any], folds: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        return measured[:, 0].astype(np.float64)

    def constants(
        self, train: NDArray[Any], labels: NDArray[Any]
    ) -> dict[str, NDArray[np.float32]]:
        """Squared distance to the mean of `train`."""
        squares = np.square(labels - train.mean(axis=0)).reshape(len(labels), -1)
        return {"mean of the labels": squares.mean(axis=1, keepdims=True).astype(np.float32)}


def _squares(outputs: Tensor, labels: Tensor) -> Tensor:
    values = labels if labels.dim() == outputs.dim() else labels.unsqueeze(-1)
    if values.shape != outputs.shape:
        raise RegrowError(
            f"labels must have as many values as the model gives, {outputs.shape[-1]} per sample, "
            f"got {values.shape[-1]}"
        )
    return (outputs.float() - values.float()).square().mean(-1)
