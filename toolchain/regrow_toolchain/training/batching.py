"""Batches and augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from regrow_toolchain.data import Dataset

__all__ = ["augment", "batches", "shifted", "trimmed"]


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
    """Move each image [n, c, h, w] by up to `shift` pixels in both directions, and add noise.

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
    """Images [n, c, h, w], each moved by its own `pixels` [n, 2], bilinear, edges repeated."""
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
