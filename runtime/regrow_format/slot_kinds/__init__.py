"""Kinds of slots by name, in the order in which a layer applies them.

A further kind is one file here with its NumPy half, one in `regrow_export.slots.kinds` with its
torch half, and a line in each registry.
"""

from __future__ import annotations

from .base import Changes, Feed, Parts, SlotKind
from .bias import BIAS
from .delta import DELTA
from .head import HEAD
from .input_scale import INPUT_SCALE
from .low_rank import LOW_RANK
from .scale import SCALE
from .vector import VECTOR
from .weight import WEIGHT

__all__ = ["HEAD", "SLOT_KINDS", "Changes", "Feed", "Parts", "SlotKind"]

SLOT_KINDS: dict[str, SlotKind] = {
    kind.name: kind for kind in (INPUT_SCALE, WEIGHT, LOW_RANK, DELTA, VECTOR, SCALE, BIAS, HEAD)
}
