"""What becomes of slots in a traced graph, kind by kind."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from regrow_format.manifest import Slot

from .feeds import Feeds
from .kinds import KINDS

__all__ = ["constant_feeds", "rewrite_slots"]


def rewrite_slots(model: onnx.ModelProto, slots: Sequence[Slot], *, whole: bool) -> None:
    """Let every kind change what the tracer made of its slots.

    Args:
        slots: those of targets.
        whole: they are never empty.

    Raises:
        RegrowError: the tracer lost a slot, or wrote another operator than the kind knows.
    """
    for name, kind in KINDS.items():
        if own := [slot for slot in slots if slot.kind == name]:
            kind.rewrite(model, own, whole=whole)


def constant_feeds(slots: Sequence[Slot]) -> Feeds:
    """By name of the torch slots' parameters, what the graph holds beside their inputs."""
    return {
        f"{slot.target}.basis_{name}": value
        for slot in slots
        for name, value in KINDS[slot.kind].constants(slot).items()
    }
