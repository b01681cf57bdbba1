"""PELA's two training terms (arXiv 2310.10700, section 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow_runtime.errors import UsageError

from .lowrank import LowRankLinear
from .structure import block_lists

__all__ = ["BlockFeatures", "feature_loss", "perturbation_loss"]


class BlockFeatures:
    """Keeps the output of every block of a model's last forward pass; `close` removes the hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: list[Tensor] = []
        blocks = [block for _, stack in block_lists(model) for block in stack]
        self._handles = [block.register_forward_hook(self._keep) for block in blocks]

    def _keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.outputs.append(output if isinstance(output, Tensor) else output[0])

    def take(self) -> list[Tensor]:
        """The features since the last call, one [batch, tokens, dim] per block."""
        found, self.outputs = self.outputs, []
        return found

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """L_fd: mean squared error between the tokens of each block, averaged over the blocks (eq. 4).

    The factor N/2 that eq. 4 prints before the sum is left to the weight alpha.
    """
    losses = [nn.functional.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(losses).mean()


def perturbation_loss(
    model: nn.Module, dense: Mapping[str, Tensor], epsilon: float, form: str
) -> Tensor:
    """L_rwp: how far factored weights left the dense ones, beyond the radius epsilon (eq. 6).

    Args:
        dense: by layer name, the original weight [out, in].
        form: "paper", the sum over layers of ||V Uᵀ - W||∞ - epsilon, as printed; "hinge", the
            same without credit inside the radius; "squared", the mean square, as in the code.

    Raises:
        UsageError: there is no such form.
    """
    distances = []
    for name, weight in dense.items():
        pair = model.get_submodule(name)
        if isinstance(pair, LowRankLinear):
            distances.append((pair.dense_weight() - weight).abs().max() - epsilon)
    distance = torch.stack(distances)
    if form == "hinge":
        return distance.clamp_min(0).sum()
    if form == "paper":
        return distance.sum()
    if form == "squared":
        return distance.square().mean()
    raise UsageError(f"perturbation must be hinge, paper or squared, got {form!r}")
