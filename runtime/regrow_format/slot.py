"""A slot: where an adapter enters a bundle's graph. `slot_kinds` says what each kind takes."""

from __future__ import annotations

from collections.abc import Mapping

from .record import Record

__all__ = ["Slot", "StoredWeight"]


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
