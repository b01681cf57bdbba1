"""Distillation: towards what a teacher gives, which are embeddings, logits or values.

The teacher of an adapter is whoever made the features in its data. The teacher of a compressed
model is the dense one: self-distillation, without labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone, features_of

from .base import FEATURES, Fitted, Inputs, Task
from .classification import Classification
from .regression import Regression

__all__ = ["Distillation", "LogitDistillation", "ValueDistillation", "self_distillation"]


@dataclass(frozen=True)
class Distillation(Task):
    """Labels are a teacher's features [n, d]. Measured is the cosine to them, of which the
    score is the mean.

    See `Task`.
    """

    name = "distillation"
    label_words, label_kind = "a teacher's features", "values"
    metric = "cosine"
    higher_is_better = True
    learns_from_teacher = True

    @classmethod
    def suits(cls, data: Dataset, model_task: str) -> bool:
        return cls.takes(data) and model_task == FEATURES and data.labels.ndim == 2

    def outputs(self, model: nn.Module, inputs: Inputs) -> Tensor:
        return features_of(model, inputs)

    def losses(
        self,
        outputs: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """1 - cosine."""
        return 1 - _cosine(outputs, labels)

    def measure(self, outputs: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """[N, 1]: the cosine."""
        return _cosine(outputs, labels).unsqueeze(-1).cpu().numpy()

    def sample_losses(
        self, measured: NDArray[np.float32], labels: NDArray[Any], folds: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """1 - cosine."""
        return 1 - measured[:, 0].astype(np.float64)

    def constants(
        self, train: NDArray[Any], labels: NDArray[Any]
    ) -> dict[str, NDArray[np.float32]]:
        """The cosine to the mean of `train`."""
        mean = torch.from_numpy(train.mean(axis=0, keepdims=True)).expand(labels.shape)
        return {"mean of the labels": self.measure(mean, torch.from_numpy(labels))}


class _FromTeacher(Task):
    """A task whose labels in training are the dense model's outputs."""

    name = Distillation.name
    learns_from_teacher = True

    def fit(
        self,
        data: Dataset,
        eval_data: Dataset | None,
        backbone: Backbone,
        head: str = "keep",
        way_out: str = "",
    ) -> Fitted:
        """What labels there are is not looked at."""
        return Fitted(data, eval_data)


@dataclass(frozen=True)
class LogitDistillation(_FromTeacher, Classification):
    """In training, labels are the dense model's logits [..., classes]; scored by equal answers."""

    metric = "agreement"

    def losses(
        self,
        outputs: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """Kullback-Leibler divergence from the dense model's answer."""
        found, wanted = (torch.log_softmax(x.float(), dim=-1) for x in (outputs, labels))
        return functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True)
class ValueDistillation(_FromTeacher, Regression):
    """In training, labels are the dense model's values [..., outputs]."""


def self_distillation(backbone: Backbone) -> Task:
    """To give what the model itself gives: its classes, values or embeddings."""
    if backbone.task == "text-generation":
        raise UsageError(f"task must be causal-lm for a language model, got {Distillation.name}")
    if backbone.task == FEATURES or not backbone.labels:
        return Distillation()
    return ValueDistillation() if len(backbone.labels) == 1 else LogitDistillation()


def _cosine(outputs: Tensor, labels: Tensor) -> Tensor:
    if labels.shape != outputs.shape:
        raise RegrowError(
            f"labels must be features as wide as the model's, {outputs.shape[-1]}, "
            f"got {'one number' if labels.dim() < outputs.dim() else labels.shape[-1]} per sample"
        )
    return functional.cosine_similarity(outputs.float(), labels.float(), dim=-1)
