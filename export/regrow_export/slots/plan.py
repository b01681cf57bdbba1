"""Which slots a bundle gets: asked for by kind, checked, and made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regrow_export.layers import head_widths, layer_kinds, slot_targets
from regrow_export.source import ExportSource
from regrow_format.adapter import Adapter, Target
from regrow_format.basis import PHILOX_SIGN
from regrow_format.errors import UsageError
from regrow_format.manifest import Slot
from regrow_format.methods.base import MAX_RANK

from .feeds import head_slots, target_slot

__all__ = ["SlotPlan"]


@dataclass(frozen=True)
class SlotPlan:
    """How adapters enter a bundle.

    Attributes:
        kinds: of the slots of targets.
        fixed_rank: the rank of low_rank slots, where every dimension of every slot is fixed.
        vera: an adapter whose seed and rank vector slots have.
        expanders: adapters for whose like graphs are written that make the slots' tensors.
        constants: of seeded bundles: the seed and the coefficients are no inputs.
    """

    kinds: tuple[str, ...] = ("low_rank",)
    fixed_rank: int | None = None
    vera: Adapter | None = None
    expanders: tuple[Adapter, ...] = ()
    constants: bool = False

    def check(self, mode: str, precision: str) -> None:
        """Raise `UsageError` for what makes no sense together."""
        if mode != "seeded" and self.constants:
            raise UsageError(f"constants must be of a seeded bundle, got mode {mode}")
        if mode != "swappable" and (self.fixed_rank is not None or self.expanders):
            raise UsageError(f"a fixed rank and expanders must be for mode swappable, got {mode}")
        if self.fixed_rank is not None and not 1 <= self.fixed_rank <= MAX_RANK:
            raise UsageError(f"fixed rank must be from 1 to {MAX_RANK}, got {self.fixed_rank}")
        if "weight" in self.kinds and precision != "fp32":
            raise UsageError(
                f"precision must be fp32 for weight slots, which are float32, got {precision}: "
                "use slots of another kind"
            )
        if "vector" in self.kinds:
            _check_vera(self.vera)

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


def _check_vera(vera: Adapter | None) -> None:
    if vera is None or vera.method != "vera":
        got = "none" if vera is None else f"one of {vera.method}"
        raise UsageError(
            f"vector slots must have a VeRA adapter, whose seed and rank they take, got {got}: "
            "give one (--adapter FILE on the command line)"
        )
    if vera.basis.kind != PHILOX_SIGN.kind:
        raise UsageError(
            f"basis must be {PHILOX_SIGN.kind} for vector slots, got {vera.basis.kind}: use "
            "low_rank slots"
        )
