"""`modules_to_save`: a classifier that PEFT trained along becomes the adapter's head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from regrow_format.adapter import Head, HeadLayer
from regrow_toolchain.models import StoredTensor

from .base_model import Base
from .tensors import read_float32

__all__ = ["head_findings", "read_head"]

Saved = Mapping[str, Mapping[str, StoredTensor]]


def head_findings(saved: Saved, base: Base, named: Sequence[str]) -> list[str]:
    """Every reason why the saved modules are not the backbone's head; none were saved: none.

    Args:
        named: the names in `modules_to_save`.
    """
    known = ", ".join(base.head) or "none"
    findings = [
        f"modules_to_save must be the head ({known}), got {name}: train without it"
        for name in saved
        if name not in base.head
    ]
    if not saved and not any(_is_named(name, named) for name in base.head):
        return findings
    for name in base.head:
        if "weight" not in saved.get(name, {}):
            findings.append(f"head {name} must be in modules_to_save whole, got no weight of it")
        else:
            findings += _layer_findings(name, saved[name], base)
    return findings


def _is_named(layer: str, named: Sequence[str]) -> bool:
    """Whether the layer, or a module that it lies in, ends with one of the names.

    PEFT looks at the end alone: its `classifier` saves `pre_classifier` too.
    """
    parts = layer.split(".")
    inside = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(path.endswith(name) for path in inside for name in named)


def _layer_findings(name: str, parts: Mapping[str, StoredTensor], base: Base) -> list[str]:
    weight = parts["weight"].shape
    wide, high = base.head[name]
    last = name == list(base.head)[-1]
    if len(weight) != 2 or weight[0] < 1 or weight[1] != wide or not (last or weight[0] == high):
        out = "classes" if last else high
        return [f"head {name} must have a weight [{out}, {wide}], got {list(weight)}"]
    bias = parts["bias"].shape if "bias" in parts else weight[:1]
    if bias != weight[:1]:
        return [f"head {name} must have a bias [{weight[0]}], got {list(bias)}"]
    return []


def read_head(saved: Saved, base: Base, storage: str) -> Head | None:
    """The head, rounded as `storage` ("fp16" or "fp32") keeps it; None if no module was saved.

    Class names are the backbone's where it has as many, else "0", "1", ….
    """
    if not saved:
        return None
    layers = tuple(_layer(name, saved[name], storage) for name in base.head)
    classes = layers[-1].bias.size
    names = base.labels if len(base.labels) == classes else tuple(map(str, range(classes)))
    return Head(layers, names, storage)


def _layer(name: str, parts: Mapping[str, StoredTensor], storage: str) -> HeadLayer:
    weight = _rounded(read_float32(parts["weight"]), storage)
    if "bias" not in parts:  # such as Llama's `score`
        return HeadLayer(name, weight, np.zeros(len(weight), dtype=np.float32))
    return HeadLayer(name, weight, _rounded(read_float32(parts["bias"]), storage))


def _rounded(values: NDArray[np.float32], storage: str) -> NDArray[np.float32]:
    if storage == "fp32":
        return values
    with np.errstate(over="ignore"):  # what becomes infinite is refused when the file is written
        return values.astype(np.float16).astype(np.float32)
