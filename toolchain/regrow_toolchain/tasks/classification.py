"""Classification: cross-entropy with label smoothing, scored by accuracy, gated by balanced one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_format.errors import RegrowError
from regrow_toolchain.data import Dataset, fit_both
from regrow_toolchain.models import Backbone, logits_of

from .base import FEATURES, Fitted, Inputs, Task, TaskSettings

__all__ = ["Classification"]

# Of a class that the training part lacks: as if half a sample of it had been there.
_UNSEEN = 0.5


@dataclass(frozen=True)
class Classification(Task):
    """Labels are int64 class indices. See `Task`."""

    label_smoothing: float = 0.0
    name = "classification"
    label_words, label_kind = "class labels", "classes"
    metric, gate_metric = "accuracy", "balanced accuracy"
    higher_is_better = True
    heads = ("new", "tune")

    @classmethod
    def from_settings(cls, settings: TaskSettings) -> Self:
        return cls(settings.label_smoothing)

    @classmethod
    def suits(cls, data: Dataset, model_task: str) -> bool:
        return cls.takes(data) and model_task != FEATURES

    def fit(
        self,
        data: Dataset,
        eval_data: Dataset | None,
        backbone: Backbone,
        head: str = "keep",
        way_out: str = "",
    ) -> Fitted:
        """Class names, or numbers, become outputs: the backbone's, or those of a new head."""
        data, eval_data, fresh = fit_both(data, eval_data, backbone.labels, head, way_out=way_out)
        return Fitted(data, eval_data, data.names, known=not fresh)

    def teacher_labels(self, outputs: Tensor) -> NDArray[Any]:
        """int64 [N]: the teacher's classes."""
        return _classes(outputs).cpu().numpy()

    def outputs(self, model: nn.Module, inputs: Inputs) -> Tensor:
        found = logits_of(model, inputs)
        if found.dim() != 2:
            raise RegrowError(
                f"model must return logits [batch, classes] to classify, got {list(found.shape)}"
            )
        return found

    def losses(
        self,
        outputs: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """As torch's cross-entropy, smoothing spread over the classes that the user has."""
        if classes is None:
            classes = torch.ones_like(outputs[:, :1], dtype=torch.bool)
        scores = torch.log_softmax(outputs.float().masked_fill(~classes, -math.inf), dim=-1)
        truth = -scores.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        even = -scores.masked_fill(~classes, 0.0).sum(-1) / classes.sum(-1)
        return (1 - self.label_smoothing) * truth + self.label_smoothing * even

    def measure(self, outputs: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """[N, 2]: the class that each sample got, -1 where the model gave no number; and the nats
        of its label, infinite for a class that the model does not know.
        """
        known = labels >= 0
        truth = labels.clamp(min=0).unsqueeze(-1)
        nats = -torch.log_softmax(outputs.float(), dim=-1).gather(-1, truth).squeeze(-1)
        nats = nats.masked_fill(~known, math.inf)
        return torch.stack([_classes(outputs).float(), nats], dim=-1).cpu().numpy()

    def score(self, measured: NDArray[np.float32], labels: NDArray[Any]) -> float:
        return float((measured[:, 0] == labels).mean()) if len(labels) else math.nan

    def gate_score(
        self, measured: NDArray[np.float32], labels: NDArray[Any], folds: NDArray[np.int64]
    ) -> float:
        """The mean over classes of the share that is right."""
        if not len(labels):
            return math.nan
        _, index = np.unique(labels, return_inverse=True)
        right = np.bincount(index, weights=measured[:, 0] == labels)
        return float((right / np.bincount(index)).mean())

    def sample_losses(
        self, measured: NDArray[np.float32], labels: NDArray[Any], folds: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Cross-entropy in nats."""
        return measured[:, 1].astype(np.float64)

    def constants(
        self, train: NDArray[Any], labels: NDArray[Any]
    ) -> dict[str, NDArray[np.float32]]:
        """The most frequent class of `train`, with the nats of its class frequencies, and of even
        chances for the classes there are.

        Of few samples frequencies are no good estimate, and whatever stays nearer to even chances
        is better: that alone must not count as something learnt.
        """
        counts = np.bincount(train, minlength=int(labels.max(initial=0)) + 1)
        frequencies = -np.log(np.maximum(counts[labels], _UNSEEN) / len(train))
        even = np.full(len(labels), np.log(len(np.union1d(train, labels))))
        found = np.full(len(labels), counts.argmax())
        return {
            name: np.stack([found, nats], axis=-1).astype(np.float32)
            for name, nats in (("class frequencies", frequencies), ("even chances", even))
        }

    def measure_base(
        self,
        eval_data: Dataset,
        names: tuple[str, ...],
        backbone: Backbone,
        measure: Callable[[Dataset], NDArray[np.float32]],
    ) -> NDArray[np.float32] | None:
        """By class names: labels that the backbone does not know are missed."""
        known = {name: index for index, name in enumerate(backbone.labels)}
        theirs = np.array([known.get(name, -1) for name in names])
        found = measure(replace(eval_data, labels=theirs[eval_data.labels], names=()))
        mine = {int(index): own for own, index in enumerate(theirs) if index >= 0}
        found[:, 0] = [mine.get(int(answer), -1) for answer in found[:, 0]]
        return found


def _classes(outputs: Tensor) -> Tensor:
    """int64 [N]: the class of the largest output, -1 where the model gave no number."""
    return outputs.argmax(dim=-1).masked_fill(outputs.isnan().any(dim=-1), -1)
