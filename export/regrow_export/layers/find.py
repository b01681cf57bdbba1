"""The layers of a model that adapters can change, by module path."""

from __future__ import annotations

from torch import nn

from .types import LayerType, layer_type

__all__ = ["find_biased", "find_layers", "find_linears"]


def find_layers(model: nn.Module) -> dict[str, tuple[nn.Module, LayerType]]:
    """Every layer of a known type with its type, in the model's order."""
    typed = ((name, module, layer_type(module)) for name, module in model.named_modules())
    return {name: (module, found) for name, module, found in typed if name and found}


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Those that map features linearly: linear layers, factored pairs, and what looks like them."""
    return {name: module for name, (module, kind) in find_layers(model).items() if kind.is_linear}


def find_biased(model: nn.Module) -> dict[str, nn.Module]:
    """Those that have a bias: linear layers, factored pairs and norms."""
    return {
        name: module
        for name, (module, kind) in find_layers(model).items()
        if kind.bias(module) is not None
    }
