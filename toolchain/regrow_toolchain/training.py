"""The parts that compression and adaptation share: batches, augmentation, scores, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from regrow_format.errors import RegrowError

from .data import Dataset

if TYPE_CHECKING:
    from .tasks import Task

__all__ = [
    "augment",
    "batches",
    "check_loss",
    "cosine",
    "cosine_factor",
    "deterministic",
    "features_of",
    "frozen",
    "logits_of",
    "measured",
    "outputs_of",
    "predict",
    "score",
    "shifted",
    "trimmed",
]

_PREDICT_BATCH = 256


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Seed torch and refuse operations that differ between runs; the old state comes back."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    with torch.random.fork_rng():
        torch.manual_seed(seed % 2**63)
        torch.use_deterministic_algorithms(True)
        # It fills memory before it is written, which finds faulty operators and takes time.
        memory.fill_uninitialized_memory = False
        try:
            yield
        finally:
            memory.fill_uninitialized_memory = filled
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
            x = shifted(x, (torch.rand(len(x), 2) * 2 - 1) * shift)
        if x.is_floating_point() and noise:
            x = x + noise * torch.randn_like(x)
        found[name] = x
    return found


def shifted(x: Tensor, pixels: Tensor) -> Tensor:
    """Pictures [n, c, h, w], each moved by its own `pixels` [n, 2], bilinear, edges repeated."""
    _, _, height, width = x.shape
    move = torch.eye(2, 3, device=x.device, dtype=x.dtype).repeat(len(x), 1, 1)
    sizes = torch.tensor([width, height], device=x.device, dtype=x.dtype)
    move[:, :, 2] = pixels * 2 / sizes  # the grid runs from -1 to 1
    grid = functional.affine_grid(move, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def trimmed(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of texts without the columns that are padding in every sample.

    Padding is what `attention_mask` [n, tokens] has 0 for, on the right.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or not mask.numel():
        return dict(inputs)
    used = mask.bool().any(dim=0).nonzero()
    length = int(used.max()) + 1 if len(used) else 1
    return {name: x[:, :length] if x.shape[:2] == mask.shape else x for name, x in inputs.items()}


def cosine_factor(step: int, steps: int, warmup: float = 0.1) -> float:
    """Linear warm-up over a share of the steps, then a cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """`cosine_factor` as a schedule of torch."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_factor(step, steps, warmup)
    )


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """What the model gives, or `RegrowError` if it does not take the inputs."""
    try:
        return model(**inputs)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items())
        reason = str(error).strip().partition("\n")[0]
        raise RegrowError(f"model must take the data's inputs, got {shapes}: {reason}") from error


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """[batch, classes] from a transformers model or from one that returns a tensor."""
    result = outputs_of(model, inputs)
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if logits is None:
        raise RegrowError(
            f"model must return logits, got {type(result).__name__}: load it as a classifier"
        )
    return logits


def features_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """[batch, d] from a model that gives embeddings, or tokens, of which the mean is taken.

    Padding, as `attention_mask` has it, is left out of the mean (sentence-transformers' pooling).
    """
    result = outputs_of(model, inputs)
    for name in ("sentence_embedding", "image_embeds", "text_embeds", "last_hidden_state"):
        found = result if isinstance(result, Tensor) else getattr(result, name, None)
        if found is not None:
            break
    else:
        raise RegrowError(f"model must return embeddings, got {type(result).__name__}")
    if found.dim() == 2:
        return found
    tokens = found.flatten(1, -2)
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != tokens.shape[:2]:
        return tokens.mean(1)
    weight = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def check_loss(loss: Tensor, step: int) -> None:
    """Raise `RegrowError` if the loss is not finite."""
    if not torch.isfinite(loss):
        raise RegrowError(f"loss must be finite, got {loss.item()} at step {step}: lower --lr")


@torch.no_grad()
def measured(
    model: nn.Module, task: Task, data: Dataset, batch: int = _PREDICT_BATCH
) -> NDArray[np.float32]:
    """[samples, m]: what a task's score needs of each sample; on the model's device."""
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts = []
    for start in range(0, len(data), batch):
        rows = slice(start, start + batch)
        inputs = {name: torch.from_numpy(a[rows]).to(device) for name, a in data.inputs.items()}
        labels = torch.from_numpy(data.labels[rows]).to(device)
        parts.append(task.measure(task.outputs(model, inputs), labels))
    return np.concatenate(parts)


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
