"""Slots: torch modules and graph inputs through which adapters enter, and what they are fed."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .feeds import Feeds as Feeds
    from .feeds import expansion_feeds as expansion_feeds
    from .feeds import head_feeds as head_feeds
    from .feeds import head_slots as head_slots
    from .feeds import model_head as model_head
    from .graph_inputs import head_tensors as head_tensors
    from .graph_inputs import target_tensors as target_tensors
    from .kinds import KINDS as KINDS
    from .kinds import TARGET_KINDS as TARGET_KINDS
    from .kinds import Tensors as Tensors
    from .kinds import TorchKind as TorchKind
    from .modules import TargetSlot as TargetSlot
    from .modules import learn_folds as learn_folds
    from .modules import set_slots as set_slots
    from .modules import shared_copy as shared_copy
    from .modules import with_slots as with_slots
    from .plan import SlotPlan as SlotPlan
    from .plan import adapter_slots as adapter_slots
    from .rewriting import constant_feeds as constant_feeds
    from .rewriting import rewrite_slots as rewrite_slots
    from .targets import check_adapter as check_adapter
    from .targets import head_widths as head_widths
    from .targets import kinds_for as kinds_for
    from .targets import kinds_of as kinds_of
    from .targets import slot_targets as slot_targets
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".feeds": ("Feeds", "expansion_feeds", "head_feeds", "head_slots", "model_head"),
            ".graph_inputs": ("head_tensors", "target_tensors"),
            ".kinds": ("KINDS", "TARGET_KINDS", "Tensors", "TorchKind"),
            ".modules": ("TargetSlot", "learn_folds", "set_slots", "shared_copy", "with_slots"),
            ".plan": ("SlotPlan", "adapter_slots"),
            ".rewriting": ("constant_feeds", "rewrite_slots"),
            ".targets": (
                "check_adapter",
                "head_widths",
                "kinds_for",
                "kinds_of",
                "slot_targets",
            ),
        },
    )
