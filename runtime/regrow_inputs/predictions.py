"""From a graph's outputs to what a person reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regrow_format.errors import RegrowError, UsageError
from regrow_runtime import Bundle

__all__ = ["answer", "mean_embeddings", "softmax", "top_answers", "top_labels"]

Answer = tuple[str, float]
_CONFIG = "config.json"
_MAX_CONFIG = 64 << 20


def answer(bundle: Bundle, feeds: Mapping[str, ArrayLike]) -> list[Answer]:
    """The best label and its probability for each sample; see `top_answers`."""
    return [best[0] for best in top_answers(bundle, feeds, top=1)]


def top_answers(
    bundle: Bundle, feeds: Mapping[str, ArrayLike], *, top: int = 5
) -> list[list[Answer]]:
    """The `top` best labels with their probabilities for each sample, by the active adapter.

    Labels are those of the adapter's own head if it has one. A model of one output gives its value,
    and one whose labels exclude nothing (`problem_type` of its config) a sigmoid for each.

    Raises:
        UsageError: the model is no classifier, or has no labels; inputs are not what it takes.
        RegrowError: it gives NaN or infinity.
    """
    while True:
        active, names = bundle.active, bundle.labels()
        outputs = bundle.run_all(feeds)
        if bundle.active == active:  # else another thread swapped, and labels may be another's
            return labelled(bundle, outputs, names, top)


def labelled(
    bundle: Bundle, outputs: Mapping[str, NDArray[Any]], names: Sequence[str], top: int
) -> list[list[Answer]]:
    """Answers of outputs that are there already."""
    logits = class_logits(outputs)
    if logits is None or not names:
        found = {name: list(array.shape) for name, array in outputs.items()}
        raise UsageError(
            f"model must be a classifier with labels, got outputs {found} and {len(names)} labels"
        )
    if len(names) == 1:
        return [[(names[0], float(row[0]))] for row in logits]
    apart = tuple(names) == bundle.manifest.labels and _independent(bundle)
    return top_labels(logits, names, top, independent=apart)


def class_logits(outputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | None:
    """[samples, classes]: the output `logits`, or the only one; None if that has another form."""
    only = next(iter(outputs.values())) if len(outputs) == 1 else None
    logits = outputs.get("logits", only)
    return logits if logits is not None and logits.ndim == 2 else None


def _independent(bundle: Bundle) -> bool:
    path = bundle.folder / _CONFIG
    if not path.is_file() or path.stat().st_size > _MAX_CONFIG:
        return False
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(config, dict) and config.get("problem_type") == "multi_label_classification"


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities along the last axis; a logit of -inf gets 0."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: NDArray[np.float32] = shifted / shifted.sum(axis=-1, keepdims=True)
    return probabilities


def top_labels(
    logits: NDArray[np.float32], labels: Sequence[str], top: int = 1, *, independent: bool = False
) -> list[list[Answer]]:
    """The best labels and their probabilities for each row of logits [samples, classes].

    Args:
        independent: each label has a sigmoid of its own, no softmax over all.

    Logits of -inf may follow those of the labels: of classes that an adapter does not have.

    Raises:
        UsageError: there is not one label per class.
        RegrowError: the logits of a sample are NaN or infinite, as those of broken pixels are.
    """
    count = len(labels)
    if logits.ndim != 2 or logits.shape[1] < count or (logits[:, count:] > -np.inf).any():
        raise UsageError(f"logits must be [samples, {count}], got {list(logits.shape)}")
    logits = logits[:, :count]
    broken = np.isnan(logits).any(axis=1) | ~np.isfinite(logits.max(axis=1, initial=-np.inf))
    if broken.any():
        raise RegrowError(
            f"logits must be finite, got NaN or infinity for sample {broken.argmax()}"
        )
    values = 1 / (1 + np.exp(-logits.astype(np.float64))) if independent else softmax(logits)
    best = np.argsort(-values, axis=1, kind="stable")[:, :top]
    return [
        [(labels[place], float(row[place])) for place in places]
        for places, row in zip(best, values, strict=True)
    ]


def mean_embeddings(
    states: NDArray[np.float32], mask: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """[samples, width], of length 1: the mean over the tokens that have attention.

    Args:
        states: a model's last hidden states [samples, tokens, width].
        mask: its attention_mask [samples, tokens]; all tokens if None.
    """
    weights = np.ones(states.shape[:2]) if mask is None else mask
    sums = (states * weights[..., None]).sum(axis=1) / np.maximum(weights.sum(axis=1), 1)[:, None]
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    found: NDArray[np.float32] = (sums / np.maximum(lengths, 1e-12)).astype(np.float32)
    return found
