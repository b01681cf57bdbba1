"""A slot: where an adapter enters a bundle's graph. `slot_kinds` says what each kind takes."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import FormatError
from .fields import Fields
from .record import Record
from .slot_kinds import SLOT_KINDS

__all__ = ["Slot", "StoredWeight", "parse_slot"]

_MAX_WIDTH = 1 << 24


class StoredWeight(Record):
    """Where the default of a weight slot stands: float32, little-endian, [in, out]."""

    file: str
    offset: int
    orientation: str = "in_out"


class Slot(Record):
    """Where an adapter enters: graph inputs with a default, by part.

    `kind` is one of `SLOT_KINDS`, which has the parts, their shapes and what their defaults are. n,
    the first dimension of every part, is 1 or the batch size. A target may have one slot of each
    kind. `rank` is set where a low_rank or vector slot has a fixed one. `fixed`: every dimension
    is, with n = 1. `weight` is where a weight slot's default stands, `seed` that of the basis which
    a vector slot has.
    """

    target: str
    kind: str
    in_features: int
    out_features: int
    inputs: Mapping[str, str]
    rank: int | None = None
    fixed: bool = False
    seed: str | None = None
    weight: StoredWeight | None = None


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
