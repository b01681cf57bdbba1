"""DoRA in training (arXiv 2402.09353); the definition stands in `regrow_format.methods.dora`.

Trained are LoRA's factors and the magnitudes m. The file has s and b instead, which follow from m
and the norms of the layers' changed weights, so the backbone's weights are read here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_export.layers import layer_type
from regrow_format.adapter import Target
from regrow_format.errors import UsageError
from regrow_format.methods.dora import vector_parts

from .base import Changes, TrainableAdapter, fake_quantize, parse_settings
from .lora import LoraSettings, TrainedLora, initial_factors

__all__ = ["Dora"]

# Weight [out, in] and bias [out], if there is one.
_Layer = tuple[Tensor, Tensor | None]


class Dora:
    """See `TrainableMethod`. Settings are LoRA's; `bias` of the config follows from the layers."""

    name = "dora"
    default_lr = 5e-3
    settings = LoraSettings

    def start(
        self,
        targets: Sequence[Target],
        settings: Mapping[str, Any],
        seed: int,
        users: int = 1,
        *,
        model: nn.Module | None = None,
    ) -> TrainableAdapter:
        """A Kaiming-uniform, B = 0, m = ||W||, as the paper has it.

        Raises:
            UsageError: there is no model, or a target's weight is no matrix.
        """
        given = parse_settings(LoraSettings, settings, self.name)
        if model is None:
            raise UsageError("dora must be given the model whose weights it measures, got none")
        layers = [_layer(model, target) for target in targets]
        config = {**given, "bias": any(bias is not None for _, bias in layers)}
        start = initial_factors(config, targets, seed)
        return _TrainedDora(self.name, config, targets, start, users, layers)


def _layer(model: nn.Module, target: Target) -> _Layer:
    module = model.get_submodule(target.name)
    layer = layer_type(module)
    weight = layer.weight(module) if layer else None
    fits = weight is not None and weight.shape == (target.out_features, target.in_features)
    if layer is None or weight is None or not fits or not weight.is_floating_point():
        raise UsageError(
            f"dora's targets must be layers whose weight is a matrix, or a pair of factors, got "
            f"{target.name}, {type(module).__name__}: leave it out of the targets, or train lora"
        )
    bias = layer.bias(module)
    return weight.float(), None if bias is None else bias.detach().float()


class _TrainedDora(TrainedLora):
    def __init__(self, *arguments: Any) -> None:
        *rest, layers = arguments
        super().__init__(*rest)
        magnitudes: dict[int, list[Tensor]] = {}
        for index, (weight, bias) in enumerate(layers):
            squares = weight.square().sum(1)
            self.register_buffer(f"weight_{index}", weight, persistent=False)
            self.register_buffer(f"squares_{index}", squares, persistent=False)
            self.register_buffer(f"bias_{index}", _or_zeros(bias, squares), persistent=False)
            magnitudes.setdefault(len(squares), []).append(_root(squares))
        for width, rows in magnitudes.items():
            start = torch.stack(rows).cpu().expand(self.users, -1, -1).clone()
            self.register_parameter(f"m_{width}", nn.Parameter(start))

    def changes(self) -> Changes:
        """LoRA's, and s and b as they are used, rounded if training sees them rounded."""
        found = super().changes()
        for target, vectors in zip(self.targets, self._vectors(found), strict=True):
            for kind, part in vector_parts(self.config).items():
                found[target.name][kind] = {part: self._as_used(vectors[part])}
        return found

    def values(self, user: int = 0) -> dict[str, NDArray[np.float32]]:
        """See `TrainableAdapter`: s and b in the place of m."""
        alone, found = self._alone(user), super().values(user)
        rows: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            vectors = list(alone._vectors(TrainedLora.changes(alone)))
        for part in vector_parts(self.config).values():
            for target, own in zip(self.targets, vectors, strict=True):
                rows.setdefault(f"{part}.{target.out_features}", []).append(own[part][0])
        return found | {name: torch.cat(own).cpu().numpy() for name, own in rows.items()}

    def _vectors(self, factors: Changes) -> Iterator[dict[str, Tensor]]:
        """By target s and b [users, 1, out], not rounded yet; b goes with s as it will be used."""
        used: dict[int, int] = {}
        for index, target in enumerate(self.targets):
            width = target.out_features
            row = used[width] = used.get(width, -1) + 1
            magnitude = self.get_parameter(f"m_{width}")[:, row, None]
            s = magnitude / self._norm(index, **factors[target.name]["low_rank"]) - 1
            yield {"s": s, "b": -self._as_used(s) * self.get_buffer(f"bias_{index}")}

    @torch.no_grad()
    def _norm(self, index: int, A: Tensor, B: Tensor) -> Tensor:
        """||W + (A B)^T|| [users, 1, out], a constant to the gradient (section 4.3 of the paper).

        Of a row, ||W_o||^2 + 2 W_o A B_o + B_o^T A^T A B_o: no user's changed weight is made.
        """
        weight = self.get_buffer(f"weight_{index}")
        product = torch.bmm(A.mT, weight.T.expand(len(A), -1, -1))  # [users, r, out]
        gained = ((2 * product + (A.mT @ A) @ B) * B).sum(1)
        return _root(self.get_buffer(f"squares_{index}") + gained)[:, None]

    def _as_used(self, values: Tensor) -> Tensor:
        return fake_quantize(values, self.storage, self.group) if self.rounded else values

    def _alone(self, user: int) -> _TrainedDora:
        """One user's adapter, rounded as the file will have it; it shares what is not trained."""
        alone = copy.copy(self)
        own = self.named_parameters()
        alone._parameters = {name: nn.Parameter(p[user : user + 1].detach()) for name, p in own}
        alone.users, alone.rounded = 1, True
        return alone


def _or_zeros(bias: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if bias is None else bias


def _root(squares: Tensor) -> Tensor:
    """Norms, above 0: a row of zeros has no direction that it could be divided by."""
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
