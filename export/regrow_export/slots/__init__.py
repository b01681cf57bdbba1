"""Slots: torch modules and graph inputs through which adapters enter, and what they are fed."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .feeds import Feeds as Feeds
    from .feeds import expansion_feeds as expansion_feeds
    from .feeds import head_feeds as head_feeds
    from .feeds import head_slots as head_slots
    from .feeds import model_head as model_head
    from .feeds import slot_shapes as slot_shapes
    from .feeds import target_slot as target_slot
    from .graph_inputs import head_tensors as head_tensors
    from .graph_inputs import target_tensors as target_tensors
    from .modules import learn_folds as learn_folds
    from .modules import set_slots as set_slots
    from .modules import shared_copy as shared_copy
    from .modules import with_slots as with_slots
    from .plan import SlotPlan as SlotPlan
    from .vera import basis_feeds as basis_feeds
    from .vera import share_basis as share_basis
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".feeds": (
                "Feeds",
                "expansion_feeds",
                "head_feeds",
                "head_slots",
                "model_head",
                "slot_shapes",
                "target_slot",
            ),
            ".graph_inputs": ("head_tensors", "target_tensors"),
            ".modules": ("learn_folds", "set_slots", "shared_copy", "with_slots"),
            ".plan": ("SlotPlan",),
            ".vera": ("basis_feeds", "share_basis"),
        },
    )
