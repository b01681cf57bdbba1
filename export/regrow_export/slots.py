"""Torch modules through which adapters enter; the tracer keeps their parameters' names.

A slot is an ordinary parameter of a wrapper module, so its initializer in the traced graph has the
module path, and a pass over the graph (`graph.py`) can turn it into an input.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_runtime.adapter import Target

__all__ = ["HeadSlot", "LinearSlot", "learn_folds", "set_slots", "shared_copy", "with_slots"]

# While tracing, slots hold unlike random numbers: the exporter merges equal initializers, and a
# rank of 0 would let it fold the products away.
_TRACE_RANK = 2


def _apply(x: Tensor, change: Callable[[Tensor], Tensor], fold: int) -> Tensor:
    """`change` on [batch, tokens, width], whatever the middle dimensions of `x` are."""
    if fold > 1:  # [batch * fold, ..., width]: rows of one sample lie together
        rows = x.reshape(-1, fold * math.prod(x.shape[1:-1]), x.shape[-1])
        return change(rows).reshape(*x.shape[:-1], -1)
    if x.dim() == 2:  # pooled features
        return torch.flatten(change(x.unsqueeze(1)), 1)
    if x.dim() == 3:
        return change(x)
    return change(x.flatten(1, -2)).reshape(*x.shape[:-1], -1)


class LinearSlot(nn.Module):
    """y = base(x) + (x A) B with A [n, in, r] and B [n, r, out]; n is 1 or the batch size.

    `fold` is how many windows of a sample stand in the batch dimension (Swin), usually 1.
    """

    fold = 1

    def __init__(self, base: nn.Module, target: Target) -> None:
        super().__init__()
        self.base = base
        self.adapter_A = nn.Parameter(torch.randn(1, target.in_features, _TRACE_RANK))
        self.adapter_B = nn.Parameter(torch.randn(1, _TRACE_RANK, target.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, ..., in] to [batch, ..., out]."""
        y: Tensor = self.base(x)
        return y + _apply(x, lambda rows: (rows @ self.adapter_A) @ self.adapter_B, self.fold)

    def __getattr__(self, name: str) -> Any:
        # Some models read `layer.weight.dtype` of the layer that is wrapped.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class HeadSlot(nn.Module):
    """y = x W + b with W [n, in, classes] and b [n, 1, classes]; n is 1 or the batch size."""

    fold = 1

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = nn.Parameter(torch.randn(1, base.in_features, base.out_features))
        self.bias = nn.Parameter(torch.randn(1, 1, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, ..., in] to [batch, ..., classes]."""
        return _apply(x, lambda rows: rows @ self.weight + self.bias, self.fold)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every parameter and buffer with the original.

    A Hugging Face model's copy gives its outputs by name, whatever the original's config says.
    """
    kept = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
    config: Any = getattr(copied, "config", None)
    if hasattr(config, "return_dict"):
        config.return_dict = True
    return copied


def with_slots(model: nn.Module, targets: Sequence[Target], head: Sequence[str]) -> nn.Module:
    """A copy of `model`, weights shared, with a slot around each target and each head layer."""
    slotted = shared_copy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for target in targets:
            slot = LinearSlot(slotted.get_submodule(target.name), target)
            slotted.set_submodule(target.name, slot)
        for path in head:
            base = slotted.get_submodule(path)
            if not isinstance(base, nn.Linear):  # checked before, by `head_widths`
                raise TypeError(f"{path} must be nn.Linear, got {type(base).__name__}")
            slotted.set_submodule(path, HeadSlot(base))
    return slotted.eval()


def set_slots(slotted: nn.Module, values: Mapping[str, NDArray[np.float32]]) -> None:
    """Give slots their tensors by input name, as ONNX Runtime takes them."""
    for name, value in values.items():
        path, _, part = name.rpartition(".")
        tensor = torch.from_numpy(np.array(value, dtype=np.float32))
        setattr(slotted.get_submodule(path), part, nn.Parameter(tensor, requires_grad=False))


def learn_folds(slotted: nn.Module, run: Callable[[], object], batch: int) -> None:
    """Find out which slots see windows folded into the batch, by running the model once.

    Args:
        run: runs `slotted` on `batch` samples.
    """
    slots = [m for m in slotted.modules() if isinstance(m, LinearSlot | HeadSlot)]
    seen: dict[nn.Module, set[int]] = {slot: set() for slot in slots}

    def note(slot: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows = arguments[0].shape[0]
        seen[slot].add(rows // batch if rows % batch == 0 else 1)

    handles = [slot.register_forward_pre_hook(note) for slot in slots]
    try:
        if slots:
            run()
    finally:
        for handle in handles:
            handle.remove()
    for slot in slots:
        # Called with several: it stays as it is, and the check of mixed batches decides.
        slot.fold = seen[slot].pop() if len(seen[slot]) == 1 else 1
