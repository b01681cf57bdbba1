"""Torch modules through which adapters enter; the tracer keeps their parameters' names.

A slot is an ordinary parameter of a wrapper module, so its initializer in the traced graph has the
module path, and a pass over the graph can turn it into an input.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_export.layers import layer_type
from regrow_format.manifest import Slot
from regrow_format.slot_kinds import SLOT_KINDS

from .kinds import KINDS

__all__ = ["HeadSlot", "TargetSlot", "learn_folds", "set_slots", "shared_copy", "with_slots"]


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
    """A layer and what adapters of some kinds change; n is 1 or the batch size.

    `KINDS` say what each kind computes. `fold` is how many windows of a sample stand in the batch
    dimension (Swin), usually 1.
    """

    fold = 1

    def __init__(self, base: nn.Module, slots: Sequence[Slot]) -> None:
        """`slots` are those of one target, each of another kind."""
        super().__init__()
        layer = layer_type(base)
        if layer is None:  # checked before, by `slot_targets`
            raise TypeError(f"{type(base).__name__} must be a layer of a known type")
        self._type = layer
        self.slots = sorted(slots, key=lambda slot: list(KINDS).index(slot.kind))
        for slot in self.slots:
            for part, value in KINDS[slot.kind].traced(slot, layer, base).items():
                self.register_parameter(_leaf(slot, part), nn.Parameter(value))
            for name, value in KINDS[slot.kind].traced_constants(slot).items():
                self.register_parameter(f"basis_{name}", nn.Parameter(value))
        self.base = base  # last: until then no name is found in it

    def forward(self, x: Tensor) -> Tensor:
        """[batch, ..., in] to [batch, ..., out], or as the layer's type has its features."""
        for slot in self._with("on_input"):
            x = self._by_rows(x, partial(KINDS[slot.kind].on_input, tensors=self._own(slot)), slot)
        whole = next((slot for slot in self.slots if KINDS[slot.kind].replaces_weight), None)
        seen = self._type.seen(self.base, x)
        y: Tensor = (
            self.base(x) if whole is None else self._by_rows(seen, self._dense(whole), whole)
        )
        for slot in self._with("added"):
            if slot is not whole:
                add = partial(KINDS[slot.kind].added, tensors=self._own(slot))
                y = y + self._by_rows(seen, add, slot)
        for slot in self._with("on_output"):
            y = self._by_rows(y, partial(KINDS[slot.kind].on_output, tensors=self._own(slot)), slot)
        return y

    def _with(self, step: str) -> list[Slot]:
        return [slot for slot in self.slots if step in KINDS[slot.kind].steps]

    def _own(self, slot: Slot) -> dict[str, Tensor]:
        """The tensors of a slot by part, and its constants."""
        kind = KINDS[slot.kind]
        found = {part: getattr(self, _leaf(slot, part)) for part in kind.kind.parts}
        return found | {name: getattr(self, f"basis_{name}") for name in kind.constant_names}

    def _by_rows(self, value: Tensor, change: Callable[[Tensor], Tensor], slot: Slot) -> Tensor:
        fold = 0 if slot.fixed else self.fold
        return self._type.by_rows(self.base, value, lambda rows: _apply(rows, change, fold))

    def _dense(self, slot: Slot) -> Callable[[Tensor], Tensor]:
        """The layer with the slot's weight, and its own bias."""
        bias = self._type.bias(self.base)

        def change(rows: Tensor) -> Tensor:
            y = KINDS[slot.kind].added(rows, self._own(slot))
            return y if bias is None else y + bias

        return change

    def __getattr__(self, name: str) -> Any:
        # Some models read `layer.weight.dtype` of the layer that is wrapped.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def _leaf(slot: Slot, part: str) -> str:
    """The name of a slot's parameter."""
    return slot.inputs[part].rpartition(".")[2]


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
    if not SLOT_KINDS[slots[0].kind].is_head:
        return TargetSlot(base, slots)
    if not isinstance(base, nn.Linear):  # checked before, by `head_widths`
        raise TypeError(f"{path} must be nn.Linear, got {type(base).__name__}")
    return HeadSlot(base, slots[0])


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
