"""Classification: cross-entropy with label smoothing, scored by accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_format.errors import RegrowError

from ..training import logits_of
from .base import Inputs

__all__ = ["Classification"]


@dataclass(frozen=True)
class Classification:
    """Labels are int64 class indices. See `Task`."""

    label_smoothing: float = 0.0
    name = "classification"
    metric = "accuracy"
    higher_is_better = True

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
        """[N, 1]: the class that each sample got; -1 where the model gave no number."""
        found = outputs.argmax(dim=-1, keepdim=True)
        found = found.masked_fill(outputs.isnan().any(dim=-1, keepdim=True), -1)
        return found.float().cpu().numpy()

    def score(self, measured: NDArray[np.float32], labels: NDArray[Any]) -> float:
        return float((measured[:, 0] == labels).mean()) if len(labels) else math.nan
