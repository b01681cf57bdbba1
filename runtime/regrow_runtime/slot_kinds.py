"""Which slots an adapter uses, and what it feeds to each kind of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.adapter import Adapter
from regrow_format.basis import PHILOX_SIGN, BasisCache
from regrow_format.errors import FormatError, UsageError
from regrow_format.manifest import Manifest, Slot
from regrow_format.methods import get_method
from regrow_format.methods.vera import vectors

__all__ = ["Feeds", "basis_mismatch", "slot_feeds", "slot_kind"]

Feeds = dict[str, NDArray[Any]]


def slot_kind(adapter: Adapter, manifest: Manifest) -> str | None:
    """The kind of slot that the adapter uses: its method's, or another that the bundle has."""
    method, there = get_method(adapter.method), {slot.kind for slot in manifest.slots}
    return next((kind for kind in (method.slot, *method.also) if kind in there), method.slot)


def basis_mismatch(adapter: Adapter, manifest: Manifest, kind: str | None) -> str | None:
    """Why an adapter does not fit slots of a fixed rank, or of one VeRA basis; None if it does."""
    rank = adapter.config.get("rank", 0)
    for slot in (manifest.slot_of(target.name, kind) for target in adapter.targets):
        if slot is None or slot.rank is None:
            continue
        if kind == "low_rank" and rank > slot.rank:
            return (
                f"adapter must have rank {slot.rank} or less, as the bundle's slots have, got "
                f"{rank}: export the bundle with --fixed-rank {rank}"
            )
        wanted, got = (PHILOX_SIGN.kind, slot.seed), (adapter.basis.kind, str(adapter.seed))
        if kind == "vector" and (*wanted, slot.rank) != (*got, rank):
            return (
                f"adapter must have the basis of the bundle's vector slots, rank {slot.rank} and "
                f"{' of seed '.join(map(str, wanted))}, got rank {rank} and {' of seed '.join(got)}"
                f": export the bundle with --for {adapter.method}"
            )
    return None


def slot_feeds(adapter: Adapter, manifest: Manifest, basis: BasisCache, folder: Path) -> Feeds:
    """What an adapter that fits feeds to its targets' slots, by input name, with n = 1."""
    method, kind, feeds = get_method(adapter.method), slot_kind(adapter, manifest), Feeds()
    expansion = vectors(adapter) if kind == "vector" else method.expand(adapter, basis)
    for name, parts in expansion.items():
        slot = manifest.slot_of(name, kind)
        if slot is None:
            raise UsageError(f"{name} must be a slot of the bundle, got none")
        if kind == "low_rank" and slot.rank is not None:
            missing = slot.rank - len(parts["B"])
            parts["A"] = np.pad(parts["A"], ((0, 0), (0, missing)))
            parts["B"] = np.pad(parts["B"], ((0, missing), (0, 0)))
        if kind == "weight":
            change = parts["D"] if "D" in parts else parts["A"] @ parts["B"]
            parts = {"W": np.add(change, _base_weight(slot, folder), out=change)}
        for part, array in parts.items():
            feeds[slot.inputs[part]] = array.reshape(1, -1, array.shape[-1])
    return feeds


def _base_weight(slot: Slot, folder: Path) -> NDArray[np.float32]:
    """float32 [in, out]: the default of a weight slot, mapped from the bundle's file."""
    stored, shape = slot.weight, (slot.in_features, slot.out_features)
    if stored is None:
        raise UsageError(f"{slot.target} must have its weight in the bundle, got none")
    try:
        return np.memmap(folder / stored.file, "<f4", "r", stored.offset, shape)
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder / stored.file} must hold the weights: {error}") from None
