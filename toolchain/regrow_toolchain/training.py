"""The parts that compression and adaptation share: batches, augmentation, scores, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from regrow_runtime.errors import RegrowError

from .data import Dataset

__all__ = [
    "augment",
    "batches",
    "check_loss",
    "cosine",
    "deterministic",
    "frozen",
    "logits_of",
    "predict",
    "score",
]

_PREDICT_BATCH = 256


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Seed torch and refuse operations that differ between runs; the old state comes back."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng():
        torch.manual_seed(seed % 2**63)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the model's weights within the block; what was set comes back."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


def batches(
    data: Dataset, size: int, steps: int, seed: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """`steps` batches of `size` samples, or of all if there are fewer; a new order for every pass.

    A batch that the end of a pass leaves short is filled from the next pass.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    size = min(size, len(data))
    order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, generator.permutation(len(data))])
        part, order = data.take(order[:size]), order[size:]
        inputs = {name: torch.from_numpy(array) for name, array in part.inputs.items()}
        yield inputs, torch.from_numpy(part.labels)


def augment(inputs: Mapping[str, Tensor], shift: float, noise: float = 0.0) -> dict[str, Tensor]:
    """Move each picture [n, c, h, w] by up to `shift` pixels in both directions, and add noise.

    Shifts may be fractions of a pixel (bilinear); edges are repeated.
    """
    found = dict(inputs)
    for name, x in inputs.items():
        if x.dim() == 4 and shift:
            x = _shifted(x, shift)
        if x.is_floating_point() and noise:
            x = x + noise * torch.randn_like(x)
        found[name] = x
    return found


def _shifted(x: Tensor, shift: float) -> Tensor:
    count, _, height, width = x.shape
    pixels = (torch.rand(count, 2) * 2 - 1) * shift
    move = torch.eye(2, 3).repeat(count, 1, 1)
    move[:, :, 2] = pixels * 2 / torch.tensor([width, height])  # the grid runs from -1 to 1
    grid = functional.affine_grid(move, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a share of the steps, then a cosine to zero."""
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """[batch, classes] from a transformers model or from one that returns a tensor."""
    try:
        result = model(**inputs)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items())
        reason = str(error).strip().partition("\n")[0]
        raise RegrowError(f"model must take the data's inputs, got {shapes}: {reason}") from error
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if logits is None:
        raise RegrowError(
            f"model must return logits, got {type(result).__name__}: load it as a classifier"
        )
    return logits


def check_loss(loss: Tensor, step: int) -> None:
    """Raise `RegrowError` if the loss is not finite."""
    if not torch.isfinite(loss):
        raise RegrowError(f"loss must be finite, got {loss.item()} at step {step}: lower --lr")


@torch.no_grad()
def predict(
    model: nn.Module, data: Dataset, forward: Callable[..., Tensor] = logits_of
) -> NDArray[np.float32]:
    """float32 [samples, classes]: the model's logits in eval mode."""
    model.eval()
    parts = []
    for start in range(0, len(data), _PREDICT_BATCH):
        rows = np.arange(start, min(start + _PREDICT_BATCH, len(data)))
        inputs = {name: torch.from_numpy(a[rows]) for name, a in data.inputs.items()}
        parts.append(forward(model, inputs).float().numpy())
    return np.concatenate(parts)


def score(model: nn.Module, data: Dataset) -> float:
    """Accuracy from 0 to 1; NaN without samples."""
    if not len(data):
        return math.nan
    return float((predict(model, data).argmax(axis=1) == data.labels).mean())
