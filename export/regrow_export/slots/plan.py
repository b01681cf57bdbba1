"""Which slots a bundle gets: asked for by kind, and made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regrow_export.source import ExportSource
from regrow_format.adapter import Adapter
from regrow_format.manifest import Slot
from regrow_format.methods import get_method

from .feeds import head_slots
from .kinds import KINDS
from .targets import head_widths, kinds_of, slot_targets

__all__ = ["SlotPlan", "adapter_slots"]


@dataclass(frozen=True)
class SlotPlan:
    """How adapters enter a bundle.

    Attributes:
        kinds: of the slots of targets.
        fixed_rank: the rank of low_rank slots, where every dimension of every slot is fixed.
        like: an adapter that the slots are for; vector slots have its seed and rank.
    """

    kinds: tuple[str, ...] = ("low_rank",)
    fixed_rank: int | None = None
    like: Adapter | None = None

    def target_slots(self, source: ExportSource, targets: Sequence[str]) -> tuple[Slot, ...]:
        """A slot of every kind that a target takes: a norm takes a bias alone.

        Raises:
            UsageError: a target is no such layer.
        """
        return tuple(
            KINDS[kind].slot(target, self.fixed_rank, self.like)
            for target in slot_targets(source.model, targets, self.kinds)
            for kind in self.kinds
            if kind in kinds_of(source.model.get_submodule(target.name))
        )

    def head_slots(self, source: ExportSource, targets: Sequence[str]) -> tuple[Slot, ...]:
        """The slots of the head's layers."""
        return head_slots(head_widths(source, targets), fixed=self.fixed_rank is not None)


def adapter_slots(adapter: Adapter) -> list[Slot]:
    """The slots that an adapter fills, for graphs and models that are its own."""
    fills = get_method(adapter.method).fills
    return [
        KINDS[kind].slot(target)
        for target in adapter.targets
        for kind in fills(adapter.config, target)
    ]
