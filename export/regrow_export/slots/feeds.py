"""Adapters and heads as the tensors that slots take, by the name of the graph input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from regrow_format.adapter import HeadLayer
from regrow_format.manifest import Slot
from regrow_format.methods.base import Expansion
from regrow_format.slot_kinds import HEAD, SLOT_KINDS

if TYPE_CHECKING:
    import torch

__all__ = [
    "Feeds",
    "expansion_feeds",
    "head_feeds",
    "head_slots",
    "model_head",
]

Feeds = dict[str, NDArray[np.float32]]


def head_slots(widths: Mapping[str, tuple[int, int]], *, fixed: bool = False) -> tuple[Slot, ...]:
    """The slots of a head's layers; inputs are `<path>.weight` and `<path>.bias`."""
    return tuple(
        Slot(
            target=path,
            kind=HEAD.name,
            in_features=wide,
            out_features=classes,
            inputs=HEAD.inputs(path),
            fixed=fixed,
        )
        for path, (wide, classes) in widths.items()
    )


def expansion_feeds(expansion: Expansion) -> Feeds:
    """[1, rows, columns] by the names that `SlotKind.inputs` gives."""
    return {
        SLOT_KINDS[kind].inputs(target)[part]: value.reshape(1, -1, value.shape[-1])
        for target, changes in expansion.items()
        for kind, parts in changes.items()
        for part, value in parts.items()
    }


def head_feeds(layers: Sequence[HeadLayer]) -> Feeds:
    """`<path>.weight` [1, in, classes] and `<path>.bias` [1, 1, classes]."""
    feeds: Feeds = {}
    for layer in layers:
        feeds[f"{layer.name}.weight"] = np.ascontiguousarray(layer.weight.T[None])
        feeds[f"{layer.name}.bias"] = layer.bias[None, None]
    return feeds


def model_head(model: torch.nn.Module, paths: Sequence[str]) -> tuple[HeadLayer, ...]:
    """The backbone's own head; a layer without a bias has one of zeros."""
    found = []
    for path in paths:
        values = {k: v.detach().numpy() for k, v in model.get_submodule(path).named_parameters()}
        weight = values["weight"].astype(np.float32)
        bias = values.get("bias", np.zeros(len(weight))).astype(np.float32)
        found.append(HeadLayer(path, weight, bias))
    return tuple(found)
