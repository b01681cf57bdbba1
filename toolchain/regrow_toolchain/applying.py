"""Computing with an adapter in torch: forward hooks that add a change and replace the head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_export.targets import find_linears, widths
from regrow_runtime.adapter import Adapter
from regrow_runtime.basis import BasisCache
from regrow_runtime.errors import MismatchError
from regrow_runtime.methods import get_method

from .methods import Factors

__all__ = ["Hooks", "applied", "linear"]


class Hooks:
    """Forward hooks that add each target's change and replace the head.

    Set `factors` before each forward pass; always `detach` in the end.
    """

    def __init__(self, model: nn.Module, head: dict[str, nn.Linear]) -> None:
        self.model, self.head = model, head
        self.factors: Factors = {}
        self._handles: list[Any] = []

    def attach(self, names: Sequence[str]) -> None:
        """Hook the targets `names`, and the layers of the head."""
        for name in names:
            module = self.model.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._changing(name)))
        for name, layer in self.head.items():
            module = self.model.get_submodule(name)
            self._handles.append(
                module.register_forward_hook(lambda _m, args, _out, layer=layer: layer(args[0]))
            )

    def _changing(self, name: str) -> Any:
        def change(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            a, b = self.factors[name]
            return output + (args[0] @ a) @ b

        return change

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def applied(model: nn.Module, adapter: Adapter) -> Iterator[nn.Module]:
    """Within the block `model` computes with `adapter`, exactly as its file stores it.

    The factors are those that the device's own code expands.

    Raises:
        MismatchError: the model does not have the adapter's layers.
    """
    expansion = get_method(adapter.method).expand(adapter, BasisCache())
    head = {
        layer.name: linear(layer.weight, layer.bias)
        for layer in (adapter.head.layers if adapter.head else ())
    }
    hooks = Hooks(model, head)
    _check_targets(model, adapter)
    hooks.factors = {
        name: (torch.from_numpy(np.array(p["A"])), torch.from_numpy(np.array(p["B"])))
        for name, p in expansion.items()
    }
    try:
        hooks.attach(list(expansion))
        yield model
    finally:
        hooks.detach()


def _check_targets(model: nn.Module, adapter: Adapter) -> None:
    """Raise `MismatchError` unless the model has the adapter's layers, with its widths."""
    linears = find_linears(model)
    findings = [
        f"{t.name} must be a layer {t.in_features} -> {t.out_features}"
        for t in adapter.targets
        if t.name not in linears or widths(linears[t.name]) != (t.in_features, t.out_features)
    ]
    if findings:
        raise MismatchError("model does not fit the adapter:", findings)


def linear(weight: NDArray[np.float32], bias: NDArray[np.float32]) -> nn.Linear:
    """A frozen layer from weight [out, in] and bias [out]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.array(weight)))
        layer.bias.copy_(torch.from_numpy(np.array(bias)))
    return layer.requires_grad_(False)
