"""Weights below fp32: how they are rounded, a torch model with them, a graph that stores them."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .fake_quantization import rounded_weights as rounded_weights
    from .graph_weights import check_slot_inputs as check_slot_inputs
    from .graph_weights import store_weights as store_weights
    from .schemes import INT8_ROUNDING as INT8_ROUNDING
    from .schemes import PRECISIONS as PRECISIONS
    from .schemes import round_weight as round_weight
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".fake_quantization": ("rounded_weights",),
            ".graph_weights": ("check_slot_inputs", "store_weights"),
            ".schemes": ("INT8_ROUNDING", "PRECISIONS", "round_weight"),
        },
    )
