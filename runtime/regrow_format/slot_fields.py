"""Reading a manifest's slots, checked and bounded."""

from __future__ import annotations

from .errors import FormatError
from .fields import Fields
from .slot import Slot, StoredWeight
from .slot_kinds import SLOT_KINDS

__all__ = ["parse_slot"]

_MAX_WIDTH = 1 << 24


def parse_slot(part: Fields) -> Slot:
    """A slot of a manifest; `FormatError` for what its kind does not allow."""
    kind = SLOT_KINDS[part.choice("kind", tuple(SLOT_KINDS))]
    inputs = part.take("inputs", dict)
    if set(inputs) != set(kind.parts) or not all(isinstance(v, str) for v in inputs.values()):
        raise FormatError(f"{part.where}: inputs must be {', '.join(kind.parts)}")
    weight, seed = part.optional("weight"), part.take("seed", str) if part.has("seed") else None
    slot = Slot(
        target=part.take("target", str),
        kind=kind.name,
        in_features=part.number("in_features", 1, _MAX_WIDTH),
        out_features=part.number("out_features", 1, _MAX_WIDTH),
        inputs=inputs,
        rank=part.number("rank", 1, _MAX_WIDTH) if part.has("rank") else None,
        fixed=part.take("fixed", bool, False),
        seed=seed,
        weight=None if weight is None else _stored(weight),
    )
    part.done()
    if reason := kind.flaw(slot):
        raise FormatError(f"{part.where}: {reason}")
    return slot


def _stored(part: Fields) -> StoredWeight:
    stored = StoredWeight(
        part.take("file", str),
        part.number("offset", 0, 2**53),
        part.choice("orientation", ("in_out",)),
    )
    part.done()
    return stored
