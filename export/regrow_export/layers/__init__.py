"""Layers of a model: which take adapters, what they are, and the blocks they stand in."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .blocks import BlockWeight as BlockWeight
    from .blocks import block_lists as block_lists
    from .blocks import block_weights as block_weights
    from .targets import TARGET_KINDS as TARGET_KINDS
    from .targets import check_adapter as check_adapter
    from .targets import dense_weight as dense_weight
    from .targets import find_biased as find_biased
    from .targets import find_linears as find_linears
    from .targets import head_widths as head_widths
    from .targets import is_conv1d as is_conv1d
    from .targets import kinds_for as kinds_for
    from .targets import layer_kinds as layer_kinds
    from .targets import slot_targets as slot_targets
    from .targets import widths as widths
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".blocks": ("BlockWeight", "block_lists", "block_weights"),
            ".targets": (
                "TARGET_KINDS",
                "check_adapter",
                "dense_weight",
                "find_biased",
                "find_linears",
                "head_widths",
                "is_conv1d",
                "kinds_for",
                "layer_kinds",
                "slot_targets",
                "widths",
            ),
        },
    )
