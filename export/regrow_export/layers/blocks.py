"""A model's stacks of blocks, and the weights in them that a precision below fp32 changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from regrow_format.errors import RegrowError

from .types import LowRankPair, layer_type

__all__ = ["BlockWeight", "block_lists", "block_weights"]

# nn.MultiheadAttention multiplies by parameters of its own; the graph has them as any other weight.
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True, eq=False)
class BlockWeight:
    """The weight of a linear layer in a block.

    Attributes:
        owner: module path of the layer; the first one's where layers share the weight.
        name: of the parameter in it.
        transposed: whether it is [out, in]; else [in, out].
    """

    owner: str
    name: str
    parameter: nn.Parameter
    transposed: bool

    @property
    def path(self) -> str:
        return f"{self.owner}.{self.name}"

    def values(self) -> NDArray[np.float32]:
        """[in, out], as in a MatMul."""
        weight = self.parameter.data
        dense = weight.T if self.transposed else weight
        return np.ascontiguousarray(dense.float().cpu().numpy())


def block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList | nn.Sequential]]:
    """The outermost lists of blocks of one class, with their module paths.

    Transformers and most plain models keep their encoder and decoder layers in a `ModuleList`;
    some (timm's) in a `Sequential`, which counts if it holds two or more modules that have parts.
    """
    found: list[tuple[str, nn.ModuleList | nn.Sequential]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        listed = name and isinstance(module, nn.ModuleList | nn.Sequential)
        if listed and not inside and _is_stack(module):
            found.append((name, module))
    return found


def _is_stack(modules: nn.ModuleList | nn.Sequential) -> bool:
    kinds = {type(module) for module in modules}
    has_weights = any(True for module in modules for _ in module.parameters())
    if len(kinds) != 1 or not has_weights or any(map(_is_linear, modules)):
        return False  # a list of single linear layers is no stack
    # A model of one layer in a list is still one; a sequence may be any chain of layers.
    listed = isinstance(modules, nn.ModuleList)
    return listed or (len(modules) > 1 and all(any(m.children()) for m in modules))


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, or the pair that compression made of one."""
    kind = layer_type(module)
    return isinstance(module, LowRankPair) or bool(kind and kind.is_linear and kind.has_one_weight)


def block_weights(model: nn.Module) -> list[BlockWeight]:
    """The weight of each linear layer in the stacks of blocks, tied ones once.

    Both factors of a compressed layer are among them; embeddings, norms, biases, convolutions and
    the head are not.

    Raises:
        RegrowError: there are none.
    """
    found: dict[int, BlockWeight] = {}
    for prefix, stack in block_lists(model):
        for path, module in stack.named_modules(prefix=prefix):
            for name, transposed in _weight_names(module):
                weight = getattr(module, name)
                if weight is not None:
                    found.setdefault(id(weight), BlockWeight(path, name, weight, transposed))
    if not found:
        raise RegrowError(
            "model must have linear layers in a stack of blocks to round, got none: use fp32, in "
            "which convolutions stay"
        )
    return list(found.values())


def _weight_names(module: nn.Module) -> Iterator[tuple[str, bool]]:
    """Name of each weight, and whether it is [out, in]."""
    if isinstance(module, nn.MultiheadAttention):
        yield from ((name, True) for name in _ATTENTION)
    elif (kind := layer_type(module)) and kind.product:
        yield "weight", kind.product == "out_in"
