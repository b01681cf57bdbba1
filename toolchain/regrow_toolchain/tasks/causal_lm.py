"""Causal language modelling: the next token, scored in nats per token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regrow_format.errors import UsageError
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone

from .base import Fitted, Task

__all__ = ["CausalLm"]

_IGNORED = -100  # as in transformers: no loss for this token


@dataclass(frozen=True)
class CausalLm(Task):
    """Labels are int64 tokens [n, length], the inputs' own; -100 has no loss. See `Task`."""

    name = "causal-lm"
    label_words, label_kind = "tokens", "tokens"
    metric = "nats per token"
    higher_is_better = False

    def fit(
        self,
        data: Dataset,
        eval_data: Dataset | None,
        backbone: Backbone,
        head: str = "keep",
        way_out: str = "",
    ) -> Fitted:
        for part in (data, *([] if eval_data is None else [eval_data])):
            tokens = part.inputs.get("input_ids", part.labels)
            if tokens.shape != part.labels.shape:
                raise UsageError(
                    "labels of tokens must have the shape of input_ids, "
                    f"{list(tokens.shape)}, got {list(part.labels.shape)}"
                )
        return Fitted(data, eval_data)

    def losses(
        self,
        outputs: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """A sample's mean over its tokens."""
        nats, counts = _nats(outputs, labels)
        return nats / counts.clamp(min=1)

    def measure(self, outputs: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """[N, 2]: a sample's nats and its number of tokens."""
        return torch.stack(_nats(outputs, labels), dim=-1).cpu().numpy()

    def score(self, measured: NDArray[np.float32], labels: NDArray[Any]) -> float:
        nats, tokens = measured.astype(np.float64).sum(axis=0) if len(measured) else (0.0, 0.0)
        return float(nats / tokens) if tokens else math.nan

    def sample_losses(
        self, measured: NDArray[np.float32], labels: NDArray[Any], folds: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """A sample's nats per token."""
        nats, tokens = measured.astype(np.float64).T
        found: NDArray[np.float64] = nats / np.maximum(tokens, 1)
        return found


def _nats(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over tokens [...] from logits [..., tokens, vocabulary] and labels [..., tokens]."""
    following = labels[..., 1:]
    counted = following != _IGNORED
    logits = outputs[..., :-1, :].float()
    picked = logits.gather(-1, following.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    nats = (torch.logsumexp(logits, dim=-1) - picked) * counted
    return nats.sum(-1), counted.sum(-1).float()
