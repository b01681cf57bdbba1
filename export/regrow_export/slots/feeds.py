"""Adapters and heads as the tensors that slots take, by the name of the graph input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from regrow_format.adapter import HeadLayer, Target
from regrow_format.manifest import SLOT_PARTS, Slot
from regrow_format.methods.base import Expansion

if TYPE_CHECKING:
    import torch

__all__ = [
    "Feeds",
    "expansion_feeds",
    "head_feeds",
    "head_slots",
    "model_head",
    "slot_shapes",
    "target_slot",
]

Feeds = dict[str, NDArray[np.float32]]


def target_slot(
    target: Target,
    kind: str,
    *,
    rank: int | None = None,
    fixed: bool = False,
    seed: str | None = None,
) -> Slot:
    """A slot of a target; its inputs are `<target>.adapter_<part>`, or as the kind calls them."""
    stem = "lambda_" if kind == "vector" else "adapter_"
    names = {part: "weight" if kind == "weight" else stem + part for part in SLOT_PARTS[kind]}
    return Slot(
        target=target.name,
        kind=kind,
        in_features=target.in_features,
        out_features=target.out_features,
        inputs={part: f"{target.name}.{name}" for part, name in names.items()},
        rank=rank,
        fixed=fixed,
        seed=seed,
    )


def slot_shapes(slot: Slot, rank: int) -> dict[str, tuple[int, int]]:
    """By part, the shape of what an adapter of some rank feeds, without the leading n."""
    wide, high = slot.in_features, slot.out_features
    shapes = {
        "low_rank": {"A": (wide, rank), "B": (rank, high)},
        "delta": {"D": (wide, high)},
        "bias": {"b": (1, high)},
        "weight": {"W": (wide, high)},
        "vector": {"d": (1, rank), "b": (1, high)},
        "head": {"weight": (wide, high), "bias": (1, high)},
    }
    return shapes[slot.kind]


def head_slots(widths: Mapping[str, tuple[int, int]], *, fixed: bool = False) -> tuple[Slot, ...]:
    """The slots of a head's layers; inputs are `<path>.weight` and `<path>.bias`."""
    return tuple(
        Slot(
            target=path,
            kind="head",
            in_features=wide,
            out_features=classes,
            inputs={part: f"{path}.{part}" for part in ("weight", "bias")},
            fixed=fixed,
        )
        for path, (wide, classes) in widths.items()
    )


def expansion_feeds(expansion: Expansion) -> Feeds:
    """`<target>.adapter_<part>`: A [1, in, r] and B [1, r, out], D [1, in, out], b [1, 1, out]."""
    return {
        f"{target}.adapter_{part}": value.reshape(1, -1, value.shape[-1])
        for target, parts in expansion.items()
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
