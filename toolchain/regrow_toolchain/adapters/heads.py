"""Task heads in training, one for each of several users; and heads as adapter files have them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from regrow_format.adapter import Head, HeadLayer
from regrow_format.errors import RegrowError
from regrow_toolchain.models import Backbone

__all__ = ["Heads"]


class Heads(nn.Module):
    """A head of one or more linear layers per user, in the place of the backbone's.

    Args:
        classes: how many outputs each user's head has; fewer than the most are padded.
        fresh: draw the last layer anew, from `seed`; otherwise start with a copy of the
            backbone's. Layers before it always start as copies.
    """

    def __init__(
        self, backbone: Backbone, classes: Sequence[int], *, fresh: bool, seed: int
    ) -> None:
        super().__init__()
        self.paths, self.classes = backbone.head, tuple(classes)
        for index, path in enumerate(self.paths):
            base = backbone.model.get_submodule(path)
            if not isinstance(base, nn.Linear):
                raise RegrowError(f"head {path} must be a linear layer, got {type(base).__name__}")
            last = path == self.paths[-1]
            pairs = [
                _fresh(base.in_features, count, seed) if last and fresh else _copied(base)
                for count in self.classes
            ]
            width = max(self.classes) if last else base.out_features
            self.register_parameter(f"weight_{index}", nn.Parameter(_padded(pairs, 0, width)))
            self.register_parameter(f"bias_{index}", nn.Parameter(_padded(pairs, 1, width)))

    def layer(self, index: int, x: Tensor) -> Tensor:
        """x [users, rows, in] to [users, rows, out]."""
        weight = self.get_parameter(f"weight_{index}").to(x.dtype)
        bias = self.get_parameter(f"bias_{index}").to(x.dtype)
        return torch.baddbmm(bias, x, weight)

    def mask(self) -> Tensor | None:
        """bool [users, 1, classes]: the outputs that a user has; None if all have all."""
        if len(set(self.classes)) < 2:
            return None
        device = self.get_parameter("bias_0").device
        counts = torch.tensor(self.classes, device=device)[:, None]
        return (torch.arange(max(self.classes), device=device)[None] < counts)[:, None]

    def stored(self, user: int, labels: Sequence[str]) -> Head:
        """One user's head as the file holds it, in fp16, so that scores are those of the file."""
        layers = []
        for index, path in enumerate(self.paths):
            weight = self.get_parameter(f"weight_{index}")[user].detach().cpu().numpy().T
            bias = self.get_parameter(f"bias_{index}")[user, 0].detach().cpu().numpy()
            count = self.classes[user] if path == self.paths[-1] else len(bias)
            layers.append(HeadLayer(path, _half(weight[:count]), _half(bias[:count])))
        return Head(tuple(layers), tuple(labels))


def _half(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.astype(np.float16).astype(np.float32))


def _fresh(wide: int, high: int, seed: int) -> tuple[Tensor, Tensor]:
    """weight [in, out] and bias [1, out] as torch draws a linear layer, from a seed of its own."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    bound = 1 / math.sqrt(wide)
    weight = (torch.rand(high, wide, generator=generator) * 2 - 1) * bound
    bias = (torch.rand(1, high, generator=generator) * 2 - 1) * bound
    return weight.T, bias


def _copied(base: nn.Linear) -> tuple[Tensor, Tensor]:
    bias = torch.zeros(base.out_features) if base.bias is None else base.bias
    return base.weight.detach().float().T, bias.detach().float()[None]


def _padded(pairs: Sequence[tuple[Tensor, Tensor]], part: int, width: int) -> Tensor:
    """[users, rows, width]; what is not a user's is 0 and stays so: nothing reads it."""
    rows = [nn.functional.pad(pair[part], (0, width - pair[part].shape[1])) for pair in pairs]
    return torch.stack(rows).contiguous()
