"""Computing with adapters in torch: forward hooks that add changes and replace the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_export.layers import LayerType, layer_type
from regrow_export.slots import KINDS, Tensors, TorchKind
from regrow_format.adapter import Adapter
from regrow_format.basis import BasisCache
from regrow_format.errors import MismatchError, RegrowError
from regrow_format.methods import get_method
from regrow_format.methods.base import Expansion

from .methods import Changes

__all__ = ["Hooks", "applied", "linear"]

# By user: [users, rows, in] to [users, rows, out].
Change = Callable[[Tensor], Tensor]


class Hooks:
    """Forward hooks through which the adapters of several users enter a model.

    Set `changes` before each forward pass; always `detach` in the end. The batch holds every user's
    samples together, as many of each.

    Args:
        heads: by module path, what replaces a layer: x [users, rows, in] to [users, rows, out].
    """

    def __init__(
        self, model: nn.Module, heads: Mapping[str, Change] | None = None, users: int = 1
    ) -> None:
        self.model, self.users = model, users
        self.changes: Changes = {}
        self._heads = dict(heads or {})
        self._handles: list[Any] = []
        self._first: dict[str, int] | None = None
        self._missed: set[str] = set()

    def attach(self, names: Sequence[str]) -> None:
        """Hook the targets `names`, and the layers of the heads."""
        for name in names:
            module = self.model.get_submodule(name)
            layer = layer_type(module)
            if layer is None:
                raise MismatchError(f"{name} must be a layer, got {type(module).__name__}")
            self._hook_before(module, partial(self._before, name, layer, module))
            self._hook(module, partial(self._after, name, layer, module))
        for name in self._heads:
            self._hook(self.model.get_submodule(name), partial(self._replaced, name))
        self._missed = {*names, *self._heads}

    def check_reached(self) -> None:
        """Raise `RegrowError` if a layer was never called: a change there would do nothing.

        Some models read a layer's weight and multiply themselves. To be called after a forward
        pass.
        """
        if self._missed:
            first, count = min(self._missed), len(self._missed)
            more = f" and {count - 1} more" if count > 1 else ""
            raise RegrowError(
                "targets must be called by the model's forward pass, got no call of "
                f"{first}{more}: drop them from the targets"
            )

    def _hook(self, module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        def hook(
            _module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
        ) -> Tensor:
            return change(args[0] if args else next(iter(named.values())), output)

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _hook_before(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if args:
                return (change(args[0]), *args[1:]), named
            first = next(iter(named))
            return args, {**named, first: change(named[first])}

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _before(self, name: str, layer: LayerType, module: nn.Module, x: Tensor) -> Tensor:
        """What the layer sees."""
        for kind, tensors in self._with("on_input", name, x):
            change = partial(self._by_user, partial(kind.on_input, tensors=tensors))
            x = layer.by_rows(module, x, change)
        return x

    def _after(
        self, name: str, layer: LayerType, module: nn.Module, x: Tensor, y: Tensor
    ) -> Tensor:
        """What the layer gives; `x` is what it saw."""
        self._note(name, x)
        for kind, tensors in self._with("added", name, x):
            add = partial(self._by_user, partial(kind.added, tensors=tensors))
            y = y + layer.by_rows(module, layer.seen(module, x), add)
        for kind, tensors in self._with("on_output", name, y):
            change = partial(self._by_user, partial(kind.on_output, tensors=tensors))
            y = layer.by_rows(module, y, change)
        return y

    def _with(self, step: str, name: str, like: Tensor) -> Iterator[tuple[TorchKind, Tensors]]:
        """The kinds that have such a step in a target's changes, and their tensors."""
        changes = self.changes.get(name, {})
        for kind in (KINDS[kind] for kind in KINDS if kind in changes):
            if step in kind.steps:
                yield kind, {p: value.to(like.dtype) for p, value in changes[kind.name].items()}

    def _replaced(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        self._note(name, x)
        return output if self._first is not None else self._by_user(self._heads[name], x)

    def _by_user(self, change: Change, value: Tensor) -> Tensor:
        rows = value.reshape(self.users, -1, value.shape[-1])
        return change(rows).reshape(*value.shape[:-1], -1)

    def _note(self, name: str, x: Tensor) -> None:
        self._missed.discard(name)
        if self._first is not None:
            self._first[name] = x.shape[0]

    def check_batch_first(self, run: Callable[[int], object]) -> None:
        """Raise `RegrowError` if a layer does not see the samples of the batch first.

        Where users share a batch, such a layer would mix them without an error.

        Args:
            run: runs the model on so many users' samples.
        """
        if self.users == 1:
            return
        counts = []
        users, changes, self.changes = self.users, self.changes, {}
        try:
            for number in (1, 2):
                self._first, self.users = {}, number
                run(number)
                counts.append(self._first)
        finally:
            self._first, self.users, self.changes = None, users, changes
        for name, one in counts[0].items():
            if counts[1].get(name) != 2 * one:
                raise RegrowError(
                    f"targets must see the batch first for several users at once, got {name}, "
                    "which does not: train them one by one"
                )

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def applied(model: nn.Module, adapter: Adapter) -> Iterator[nn.Module]:
    """Within the block `model` computes with `adapter`, exactly as its file stores it.

    The tensors are those that the device's own code expands.

    Raises:
        MismatchError: the model does not have the adapter's layers.
    """
    _check_targets(model, adapter)
    expansion = get_method(adapter.method).expand(adapter, BasisCache())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    heads = {
        layer.name: partial(_in_float, linear(layer.weight, layer.bias).to(device))
        for layer in (adapter.head.layers if adapter.head else ())
    }
    hooks = Hooks(model, heads)
    replaced = _replace(model, adapter.extra, device)
    hooks.changes = _tensors(expansion, device)
    try:
        hooks.attach(list(expansion))
        yield model
    finally:
        hooks.detach()
        for module, name, parameter in replaced:
            module.register_parameter(name, parameter)


def _replace(
    model: nn.Module, extra: Mapping[str, NDArray[Any]], device: torch.device
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Put an adapter's own parameters in; returns what was there."""
    found = []
    for path, value in extra.items():
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(parent)
        found.append((module, name, module.get_parameter(name)))
        fresh = torch.from_numpy(np.array(value, dtype=np.float32)).to(device)
        module.register_parameter(name, nn.Parameter(fresh, requires_grad=False))
    return found


def _tensors(expansion: Expansion, device: torch.device) -> Changes:
    """[1, rows, columns] of every part."""
    return {
        target: {
            kind: {
                part: torch.from_numpy(np.array(value)).reshape(1, -1, value.shape[-1]).to(device)
                for part, value in parts.items()
            }
            for kind, parts in changes.items()
        }
        for target, changes in expansion.items()
    }


def _check_targets(model: nn.Module, adapter: Adapter) -> None:
    """Raise `MismatchError` unless the model has the adapter's layers, with its widths."""
    modules = dict(model.named_modules())
    findings = [
        f"{t.name} must be a layer {t.in_features} -> {t.out_features}"
        for t in adapter.targets
        if t.name not in modules or _sizes(modules[t.name]) != (t.in_features, t.out_features)
    ]
    for layer in adapter.head.layers if adapter.head else ():
        wide = layer.weight.shape[1]
        if getattr(modules.get(layer.name), "in_features", None) != wide:
            findings.append(f"{layer.name} must be a head of {wide} inputs")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    findings += [
        f"{name} must be a parameter of shape {list(value.shape)}"
        for name, value in adapter.extra.items()
        if shapes.get(name) != value.shape
    ]
    if findings:
        raise MismatchError("model does not fit the adapter:", findings)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    layer = layer_type(module)
    return layer.sizes(module) if layer else None


def _in_float(layer: nn.Module, x: Tensor) -> Tensor:
    """A head of float32 in a model of any dtype."""
    result: Tensor = layer(x.float()).to(x.dtype)
    return result


def linear(weight: NDArray[np.float32], bias: NDArray[np.float32]) -> nn.Linear:
    """A frozen layer from weight [out, in] and bias [out]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.array(weight)))
        layer.bias.copy_(torch.from_numpy(np.array(bias)))
    return layer.requires_grad_(False)
