"""PELA's two training terms (arXiv 2310.10700, section 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow_export.layers import block_lists
from regrow_format.errors import UsageError
from regrow_toolchain.models import LowRankPair, matching

__all__ = ["BlockFeatures", "feature_blocks", "feature_loss", "perturbation_loss"]


def feature_blocks(model: nn.Module, pattern: str = "") -> tuple[str, ...]:
    """Module paths of the blocks whose outputs are compared.

    Args:
        pattern: of lists of blocks, by ending (`encoder.layer`) or as a shell pattern over the
            whole path. Without it: the stacks that hold factored layers; where such a stack keeps
            all of them in stacks of its own, as Swin's stages keep them in blocks, those. A list
            in a list (SegFormer, Funnel) is no block: it is not called.

    Raises:
        UsageError: the pattern matches no list of modules.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
    }
    if pattern:
        chosen = sorted(matching(pattern, lists), key=list(lists).index)
        if not chosen:
            raise UsageError(
                f"blocks must match a list of modules, got {pattern!r} of {', '.join(lists)}"
            )
    else:
        chosen = [found for name, _ in block_lists(model) for found in _inner(model, name)]
    return tuple(f"{name}.{key}" for name in chosen for key, _ in lists[name].named_children())


def _inner(model: nn.Module, name: str) -> list[str]:
    """The stack itself, or the stacks in it where they have all of its factored layers."""
    stack = model.get_submodule(name)
    pairs = [n for n, m in stack.named_modules(prefix=name) if isinstance(m, LowRankPair)]
    if not pairs:
        return []
    deeper = [f"{name}.{key}{n}" for key, block in stack.named_children()
              for n in _stacks_in(block)]  # fmt: skip
    inside = tuple(f"{n}." for n in deeper)
    if not deeper or not all(pair.startswith(inside) for pair in pairs):
        return [name]
    return [found for n in deeper for found in _inner(model, n)]


def _stacks_in(block: nn.Module) -> list[str]:
    """Path endings of the stacks in a block, which may be a list of blocks itself."""
    if isinstance(block, nn.ModuleList):
        return [""]
    return [f".{name}" for name, _ in block_lists(block)]


class BlockFeatures:
    """Keeps the output of blocks of a model's last forward pass; `close` removes the hooks.

    While it is `paused`, nothing is kept.

    Args:
        blocks: module paths; the outermost stacks' blocks if not given.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str] | None = None) -> None:
        self.outputs: list[Tensor] = []
        self.paused = False
        if blocks is None:
            chosen = [block for _, stack in block_lists(model) for block in stack]
        else:
            chosen = [model.get_submodule(name) for name in blocks]
        self._handles = [block.register_forward_hook(self._keep) for block in chosen]

    def _keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self.paused:
            return
        self.outputs.append(output if isinstance(output, Tensor) else output[0])

    def take(self) -> list[Tensor]:
        """The features since the last call, one [batch, tokens, dim] per block."""
        found, self.outputs = self.outputs, []
        return found

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def feature_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    relative: bool = False,
) -> Tensor:
    """L_fd: mean squared error between the tokens of each block, averaged over the blocks (eq. 4).

    The factor N/2 that eq. 4 prints before the sum is left to the weight alpha.

    Args:
        mask: [batch, tokens], 0 for padding, which does not count; None if there is none.
        relative: divide each block's error by the mean square of the teacher's features, so that
            blocks, and models, with larger numbers do not weigh more.

    Raises:
        UsageError: there are no features.
    """
    if not teacher:
        raise UsageError(
            "blocks must be modules that the model calls, got none that it did: name their list "
            "(--blocks), or do without feature distillation (--alpha 0)"
        )
    losses = [
        _block_loss(s.float(), t.float(), mask, relative)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


def _block_loss(student: Tensor, teacher: Tensor, mask: Tensor | None, relative: bool) -> Tensor:
    if mask is not None and teacher.dim() == 3 and teacher.shape[:2] == mask.shape:
        kept = mask.bool()
        student, teacher = student[kept], teacher[kept]
    loss = nn.functional.mse_loss(student, teacher)
    return loss / teacher.square().mean().clamp_min(1e-12) if relative else loss


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
        if isinstance(pair, LowRankPair):
            distances.append((pair.weight - weight).abs().max() - epsilon)
    distance = torch.stack(distances)
    if form == "hinge":
        return distance.clamp_min(0).sum()
    if form == "paper":
        return distance.sum()
    if form == "squared":
        return distance.square().mean()
    raise UsageError(f"perturbation must be hinge, paper or squared, got {form!r}")
