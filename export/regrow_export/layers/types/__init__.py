"""Layer types. A further one is one file here and a line in `SINGLE_TYPES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import LayerType
from .conv1d import CONV1D
from .conv2d import CONV2D
from .custom import CUSTOM
from .linear import LINEAR
from .low_rank_pair import LowRankLinear, LowRankPair
from .norm import NORM
from .pair import PairType

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "LAYER_TYPES",
    "LINEAR_TITLES",
    "NORM",
    "LayerType",
    "LowRankLinear",
    "LowRankPair",
    "layer_type",
]

# Linear layers whose weight is one parameter; each may be a factor of a pair.
SINGLE_TYPES: tuple[LayerType, ...] = (
    CONV1D,
    LINEAR,
    CONV2D,
)
# What messages call them.
LINEAR_TITLES = ", ".join(found.title for found in SINGLE_TYPES)
# The first that knows a module has it.
LAYER_TYPES: tuple[LayerType, ...] = (*SINGLE_TYPES, PairType(SINGLE_TYPES), CUSTOM, NORM)


def layer_type(module: nn.Module) -> LayerType | None:
    """The type of a module that adapters can change, or None if it is no such layer."""
    return next((found for found in LAYER_TYPES if found.matches(module)), None)
