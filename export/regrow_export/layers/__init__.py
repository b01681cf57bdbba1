"""Layers of a model: their types, which take adapters, and the blocks they stand in."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .blocks import BlockWeight as BlockWeight
    from .blocks import block_lists as block_lists
    from .blocks import block_weights as block_weights
    from .find import find_biased as find_biased
    from .find import find_layers as find_layers
    from .find import find_linears as find_linears
    from .types import LINEAR_TITLES as LINEAR_TITLES
    from .types import NORM as NORM
    from .types import LayerType as LayerType
    from .types import LowRankLinear as LowRankLinear
    from .types import LowRankPair as LowRankPair
    from .types import layer_type as layer_type
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".blocks": ("BlockWeight", "block_lists", "block_weights"),
            ".find": ("find_biased", "find_layers", "find_linears"),
            ".types": (
                "LINEAR_TITLES",
                "NORM",
                "LayerType",
                "LowRankLinear",
                "LowRankPair",
                "layer_type",
            ),
        },
    )
