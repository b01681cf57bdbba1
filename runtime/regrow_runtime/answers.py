"""From logits to what a person reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import RegrowError, UsageError

__all__ = ["softmax", "top_labels"]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities along the last axis; a logit of -inf gets 0."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: NDArray[np.float32] = shifted / shifted.sum(axis=-1, keepdims=True)
    return probabilities


def top_labels(logits: NDArray[np.float32], labels: Sequence[str]) -> list[tuple[str, float]]:
    """The best label and its probability for each row of logits [samples, classes].

    Raises:
        UsageError: there is not one label per class.
        RegrowError: the logits of a sample are NaN or infinite, as those of broken pixels are.
    """
    if logits.ndim != 2 or logits.shape[1] != len(labels):
        raise UsageError(f"logits must be [samples, {len(labels)}], got {list(logits.shape)}")
    broken = np.isnan(logits).any(axis=1) | ~np.isfinite(logits.max(axis=1, initial=-np.inf))
    if broken.any():
        raise RegrowError(
            f"logits must be finite, got NaN or infinity for sample {broken.argmax()}"
        )
    probabilities = softmax(logits)
    best = probabilities.argmax(axis=1)
    return [(labels[b], float(row[b])) for b, row in zip(best, probabilities, strict=True)]
