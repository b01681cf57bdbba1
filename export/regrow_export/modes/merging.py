"""Folding one adapter into the weights, on a copy of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from regrow_export.layers import layer_type
from regrow_export.slots import KINDS, shared_copy
from regrow_format.adapter import HeadLayer
from regrow_format.errors import UsageError
from regrow_format.methods.base import Expansion
from regrow_format.slot_kinds import Changes

__all__ = ["merged_model", "with_extra"]


def merged_model(
    model: nn.Module, expansion: Expansion, head: Sequence[HeadLayer] = ()
) -> nn.Module:
    """A copy of `model` that shares all weights but those of the targets and the head.

    Args:
        expansion: by target and kind of slot.
        head: layers that replace the model's own; their class count may differ.

    Raises:
        UsageError: a target is no layer whose weights such a change fits into.
    """
    merged = shared_copy(model)
    for name, changes in expansion.items():
        merged.set_submodule(name, _merged(name, merged.get_submodule(name), changes))
    for part in head:
        merged.set_submodule(part.name, _linear(part))
    return merged.eval()


def with_extra(model: nn.Module, extra: Mapping[str, NDArray[np.floating]]) -> nn.Module:
    """A copy of `model`, weights shared but for the parameters that an adapter replaces whole."""
    changed = shared_copy(model)
    for name, value in extra.items():
        path, _, leaf = name.rpartition(".")
        fresh = nn.Parameter(_tensor(value), requires_grad=False)
        changed.get_submodule(path).register_parameter(leaf, fresh)
    return changed


def _merged(name: str, module: nn.Module, changes: Changes) -> nn.Module:
    """The layer with all changes in it, in the order in which slots apply them to the weight.

    What scales the inputs of a layer scales those of added changes too: (W + D) (1 + t), so it is
    folded in after them.
    """
    kinds = [KINDS[kind] for kind in KINDS if kind in changes]
    for kind in sorted(kinds, key=lambda kind: "on_input" in kind.steps):
        tensors = {part: _tensor(value) for part, value in changes[kind.name].items()}
        layer = layer_type(module)
        found = kind.merged(layer, module, tensors) if layer else None
        if found is None:
            raise UsageError(
                f"target must be {kind.fits} to be merged, got {name}: {type(module).__name__}; "
                "export it swappable"
            )
        module = found
    return module


def _tensor(value: NDArray[np.floating]) -> torch.Tensor:
    return torch.from_numpy(np.array(value, dtype=np.float32))


def _linear(part: HeadLayer) -> nn.Linear:
    classes, wide = part.weight.shape
    layer = nn.Linear(wide, classes)
    layer.load_state_dict(
        {
            name: torch.from_numpy(np.array(v))
            for name, v in (("weight", part.weight), ("bias", part.bias))
        }
    )
    return layer
