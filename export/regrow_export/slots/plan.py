"""Which slots a bundle gets: asked for by kind, and made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regrow_export.layers import head_widths, layer_kinds, slot_targets
from regrow_export.source import ExportSource
from regrow_format.adapter import Adapter, Target
from regrow_format.manifest import Slot

from .feeds import head_slots, target_slot

__all__ = ["SlotPlan"]


@dataclass(frozen=True)
class SlotPlan:
    """How adapters enter a bundle.

    Attributes:
        kinds: of the slots of targets.
        fixed_rank: the rank of low_rank slots, where every dimension of every slot is fixed.
        vera: an adapter whose seed and rank vector slots have.
    """

    kinds: tuple[str, ...] = ("low_rank",)
    fixed_rank: int | None = None
    vera: Adapter | None = None

    def target_slots(self, source: ExportSource, targets: Sequence[str]) -> tuple[Slot, ...]:
        """A slot of every kind that a target takes: a norm takes a bias alone.

        Raises:
            UsageError: a target is no such layer.
        """
        return tuple(
            self._slot(target, kind)
            for target in slot_targets(source.model, targets, self.kinds)
            for kind in self.kinds
            if kind in layer_kinds(source.model.get_submodule(target.name))
        )

    def head_slots(self, source: ExportSource, targets: Sequence[str]) -> tuple[Slot, ...]:
        """The slots of the head's layers."""
        return head_slots(head_widths(source, targets), fixed=self.fixed_rank is not None)

    def _slot(self, target: Target, kind: str) -> Slot:
        rank, seed, fixed = None, None, self.fixed_rank is not None
        if kind == "low_rank":
            rank = self.fixed_rank
        elif kind == "vector" and self.vera is not None:
            rank, seed = int(self.vera.config["rank"]), str(self.vera.seed)
        return target_slot(target, kind, rank=rank, fixed=fixed or kind == "weight", seed=seed)
