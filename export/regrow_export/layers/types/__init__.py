"""Layer types. A further one is one file here and a line in `LAYER_TYPES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import LayerType
from .conv1d import CONV1D
from .custom import CUSTOM
from .linear import LINEAR
from .norm import NORM
from .pair import PAIR, LowRankLinear

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LAYER_TYPES", "NORM", "LayerType", "LowRankLinear", "layer_type"]

# The first that knows a module has it.
LAYER_TYPES: tuple[LayerType, ...] = (CONV1D, LINEAR, PAIR, CUSTOM, NORM)


def layer_type(module: nn.Module) -> LayerType | None:
    """The type of a module that adapters can change, or None if it is no such layer."""
    return next((found for found in LAYER_TYPES if found.matches(module)), None)
