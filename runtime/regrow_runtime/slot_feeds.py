"""Which slots an adapter uses, and what it feeds to them."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.adapter import Adapter
from regrow_format.basis import BasisCache
from regrow_format.errors import UsageError
from regrow_format.manifest import Manifest
from regrow_format.methods import get_method
from regrow_format.slot_kinds import SLOT_KINDS, Changes, Parts

__all__ = ["Feeds", "needed_kinds", "slot_feeds", "used_kinds"]

Feeds = dict[str, NDArray[Any]]


def needed_kinds(adapter: Adapter) -> tuple[str, ...]:
    """The kinds of slot that the adapter's expansion fills, each once."""
    method = get_method(adapter.method)
    filled = (kind for t in adapter.targets for kind in method.fills(adapter.config, t))
    return tuple(dict.fromkeys(filled))


def used_kinds(adapter: Adapter, manifest: Manifest) -> tuple[str, ...]:
    """The kinds that it uses of a bundle's: those it fills, or one that takes it as a whole."""
    needed, there = needed_kinds(adapter), manifest.target_kinds
    ways = [needed, *((kind,) for kind in get_method(adapter.method).also)]
    return next((way for way in ways if there.issuperset(way)), needed) if needed else ()


def slot_feeds(adapter: Adapter, manifest: Manifest, basis: BasisCache, folder: Path) -> Feeds:
    """What an adapter that fits feeds to its targets' slots, by input name, with n = 1."""
    method, used, feeds = get_method(adapter.method), used_kinds(adapter, manifest), Feeds()
    whole = used[0] if used and used[0] in method.also else None
    expansion = method.expand_for(whole, adapter, basis) if whole else method.expand(adapter, basis)
    for target, changes in expansion.items():
        for kind, parts in _taken(changes, whole).items():
            slot = manifest.slot_of(target, kind)
            if slot is None:
                raise UsageError(f"{target} must be a slot of the bundle, got none")
            for part, array in SLOT_KINDS[kind].feed(slot, parts, folder).items():
                feeds[slot.inputs[part]] = array[None]
    return feeds


def _taken(changes: Changes, whole: str | None) -> Changes:
    """By kind of slot, what it is fed: everything as one dense change where `whole` wants that."""
    if whole is None or not SLOT_KINDS[whole].takes_dense:
        return changes
    (part,) = SLOT_KINDS[whole].parts
    return {whole: {part: reduce(np.add, map(_dense, *zip(*changes.items(), strict=True)))}}


def _dense(kind: str, parts: Parts) -> NDArray[np.float32]:
    change = SLOT_KINDS[kind].dense(parts)
    if change is None:
        raise UsageError(f"change must be dense to be added to a weight, got one of kind {kind}")
    return change
