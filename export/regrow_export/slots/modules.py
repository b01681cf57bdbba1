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

from regrow_export.layers import dense_weight
from regrow_format.manifest import Slot

from .feeds import slot_shapes

__all__ = ["HeadSlot", "TargetSlot", "learn_folds", "set_slots", "shared_copy", "with_slots"]

# While tracing, slots hold unlike random numbers: the exporter merges equal initializers, and a
# rank of 0 would let it fold the products away.
_TRACE_RANK = 2


def _apply(x: Tensor, change: Callable[[Tensor], Tensor], fold: int) -> Tensor:
    """`change` on [batch, tokens, width], whatever the middle dimensions of `x` are.

    A fold of 0 is that of a slot whose n is 1: it need not see the samples apart.
    """
    if fold == 0 and x.dim() > 2:
        return change(x)
    if fold > 1:  # [batch * fold, ..., width]: rows of one sample lie together
        rows = x.reshape(-1, fold * math.prod(x.shape[1:-1]), x.shape[-1])
        return change(rows).reshape(*x.shape[:-1], -1)
    if x.dim() == 2:  # pooled features
        return torch.flatten(change(x.unsqueeze(1)), 1)
    if x.dim() == 3:
        return change(x)
    return change(x.flatten(1, -2)).reshape(*x.shape[:-1], -1)


class TargetSlot(nn.Module):
    """A layer and what adapters of some kinds add to its output; n is 1 or the batch size.

    low_rank: (x A) B with A [n, in, r] and B [n, r, out]. delta: x[..., :r] D with D [n, r, out],
    where r is in, or 0 for nothing. bias: b [n, 1, out]. vector: ((x A) d) B b with d [n, 1, r],
    b [n, 1, out] and shared A, B. weight: W [1, in, out] in the place of the layer's own.

    `fold` is how many windows of a sample stand in the batch dimension (Swin), usually 1.
    """

    fold = 1

    def __init__(self, base: nn.Module, slots: Sequence[Slot]) -> None:
        """`slots` are those of one target, each of another kind."""
        super().__init__()
        for slot in slots:
            for part, (high, wide) in slot_shapes(slot, _TRACE_RANK).items():
                # A delta of all rows would double the weights that the tracer holds.
                rows = min(high, _TRACE_RANK) if slot.kind == "delta" else high
                own = _weight_of(base) if slot.kind == "weight" else torch.randn(1, rows, wide)
                leaf = slot.inputs[part].rpartition(".")[2]
                self.register_parameter(leaf, nn.Parameter(own))
            if slot.kind == "vector":
                self.basis_A = nn.Parameter(torch.randn(slot.in_features, _TRACE_RANK))
                self.basis_B = nn.Parameter(torch.randn(_TRACE_RANK, slot.out_features))
        self.base = base  # last: until then no name is found in it
        self.kinds = {slot.kind for slot in slots}
        self.fixed = {slot.kind for slot in slots if slot.fixed}

    def forward(self, x: Tensor) -> Tensor:
        """[batch, ..., in] to [batch, ..., out]."""
        y: Tensor = _apply(x, self._dense, 0) if "weight" in self.kinds else self.base(x)
        for kind, change in (
            ("low_rank", self._low_rank), ("delta", self._delta), ("vector", self._vector),
        ):  # fmt: skip
            if kind in self.kinds:
                y = y + _apply(x, change, self._fold(kind))
        if "bias" in self.kinds:
            # Reshaping y, not b: an exporter would fold that into a constant.
            y = _apply(y, lambda rows: rows + self.adapter_b, self._fold("bias"))
        return y

    def _fold(self, kind: str) -> int:
        return 0 if kind in self.fixed else self.fold

    def _dense(self, rows: Tensor) -> Tensor:
        y: Tensor = rows @ self.weight
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return y if bias is None else y + bias

    def _vector(self, rows: Tensor) -> Tensor:
        change: Tensor = ((rows @ self.basis_A) * self.lambda_d) @ self.basis_B * self.lambda_b
        return change

    def _low_rank(self, rows: Tensor) -> Tensor:
        change: Tensor = (rows @ self.adapter_A) @ self.adapter_B
        return change

    def _delta(self, rows: Tensor) -> Tensor:
        # Exporters take the length for a constant; `graph.free_deltas` sets that right.
        change: Tensor = rows[..., : self.adapter_D.shape[1]] @ self.adapter_D
        return change

    def __getattr__(self, name: str) -> Any:
        # Some models read `layer.weight.dtype` of the layer that is wrapped.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class HeadSlot(nn.Module):
    """y = x W + b with W [n, in, classes] and b [n, 1, classes]; n is 1 or the batch size."""

    fold = 1

    def __init__(self, base: nn.Linear, slot: Slot) -> None:
        super().__init__()
        self.fixed = slot.fixed
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = nn.Parameter(torch.randn(1, base.in_features, base.out_features))
        self.bias = nn.Parameter(torch.randn(1, 1, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, ..., in] to [batch, ..., classes]."""
        fold = 0 if self.fixed else self.fold
        return _apply(x, lambda rows: rows @ self.weight + self.bias, fold)


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


def with_slots(model: nn.Module, slots: Sequence[Slot]) -> nn.Module:
    """A copy of `model`, weights shared, with `slots` around its targets and head layers."""
    slotted = shared_copy(model)
    by_target: dict[str, list[Slot]] = {}
    for slot in slots:
        by_target.setdefault(slot.target, []).append(slot)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for path, own in by_target.items():
            slotted.set_submodule(path, _wrapped(path, slotted.get_submodule(path), own))
    return slotted.eval()


def _wrapped(path: str, base: nn.Module, slots: Sequence[Slot]) -> nn.Module:
    if slots[0].kind != "head":
        return TargetSlot(base, slots)
    if not isinstance(base, nn.Linear):  # checked before, by `head_widths`
        raise TypeError(f"{path} must be nn.Linear, got {type(base).__name__}")
    return HeadSlot(base, slots[0])


def _weight_of(base: nn.Module) -> Tensor:
    """The weight of a layer as [1, in, out], sharing its memory."""
    weight = dense_weight(base)
    if weight is None:  # checked before, by `slot_targets`
        raise TypeError(f"{type(base).__name__} must have one weight")
    return weight[None]


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
    slots = [m for m in slotted.modules() if isinstance(m, TargetSlot | HeadSlot)]
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
