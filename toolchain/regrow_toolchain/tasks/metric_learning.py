"""Metric learning: embeddings of one class come closer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from regrow_toolchain.data import Dataset
from regrow_toolchain.models import features_of

from .base import FEATURES, Inputs, Task

__all__ = ["MetricLearning"]


@dataclass(frozen=True)
class MetricLearning(Task):
    """Labels are int64 classes; embeddings of one class come closer (supervised contrastive loss,
    arXiv 2004.11362, the variant with the sum outside). Scored by the nearest other sample.

    See `Task`.
    """

    temperature: float = 0.1
    name = "metric"
    label_words, label_kind = "class labels", "classes"
    metric = "1-NN accuracy"
    higher_is_better = True

    @classmethod
    def suits(cls, data: Dataset, model_task: str) -> bool:
        return cls.takes(data) and model_task == FEATURES

    def outputs(self, model: nn.Module, inputs: Inputs) -> Tensor:
        return functional.normalize(features_of(model, inputs).float(), dim=-1)

    def losses(
        self,
        outputs: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """0 for a sample without another of its class in the batch."""
        apart = torch.eye(outputs.shape[1], dtype=torch.bool, device=outputs.device)
        if used is not None:  # what only fills up is nobody's neighbour
            apart = apart | ~used.unsqueeze(-2)
        near = outputs @ outputs.mT / self.temperature
        # Not -inf: a sample alone in its batch would have gradients that are not numbers.
        near = near.masked_fill(apart, torch.finfo(near.dtype).min)
        scores = torch.log_softmax(near, dim=-1).masked_fill(apart, 0.0)
        same = (labels.unsqueeze(-1) == labels.unsqueeze(-2)) & ~apart
        return -(scores * same).sum(-1) / same.sum(-1).clamp(min=1)

    def measure(self, outputs: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """[N, d]: the embeddings."""
        return outputs.cpu().numpy()

    def score(self, measured: NDArray[np.float32], labels: NDArray[Any]) -> float:
        """Share of samples whose nearest other one, by cosine, is of their class."""
        if len(labels) < 2 or not np.isfinite(measured).all():
            return math.nan
        near = measured @ measured.T
        np.fill_diagonal(near, -np.inf)
        return float((labels[near.argmax(axis=1)] == labels).mean())

    def gate_score(
        self, measured: NDArray[np.float32], labels: NDArray[Any], folds: NDArray[np.int64]
    ) -> float:
        """The mean over samples; neighbours are those of the same fold: others have embeddings of
        another adapter.
        """
        parts = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
        scores = [(self.score(measured[rows], labels[rows]), len(rows)) for rows in parts]
        known = [(score, count) for score, count in scores if not math.isnan(score)]
        if not known:
            return math.nan
        return sum(score * count for score, count in known) / sum(count for _, count in known)

    def sample_losses(
        self, measured: NDArray[np.float32], labels: NDArray[Any], folds: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """As in training, beside the samples of the same fold."""
        found = np.empty(len(labels))
        for fold in np.unique(folds):
            rows = folds == fold
            points, classes = torch.from_numpy(measured[rows]), torch.from_numpy(labels[rows])
            found[rows] = self.losses(points[None], classes[None])[0].numpy()
        return found
