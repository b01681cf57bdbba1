"""Several adapters as one, and one at another strength: sums of what residents feed.

A kind of slot says how its changes add up, exactly; those that do not add are refused. A head is no
change but a replacement: equally labelled ones are averaged, with the weights over their sum; one
alone stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from regrow_format.errors import RegrowError, UsageError
from regrow_format.manifest import Manifest, Slot
from regrow_format.slot_kinds import SLOT_KINDS, Feed, SlotKind

from .slots import Feeds, LoadedAdapter

__all__ = ["blend"]

Parts = Sequence[tuple[LoadedAdapter, float]]


def blend(name: str, parts: Parts, manifest: Manifest, base_head: Feeds) -> LoadedAdapter:
    """The resident that changes weights by the sum of weight times what each resident changes.

    Args:
        base_head: what the head's slots have by default, if only some residents have their own.

    Raises:
        UsageError: no adapters, unlike labels, kinds of slots that do not add, or a seeded graph.
        MismatchError: the bundle's slots have a fixed rank, which is less than the ranks' sum.
        RegrowError: the sums are not finite.
    """
    if manifest.mode != "swappable":
        raise UsageError(f"a blend or a scale needs a swappable bundle, got {manifest.mode}")
    if not parts:
        raise UsageError("a blend must be of at least one adapter, got none")
    if len({resident.labels for resident, _ in parts}) > 1:
        found = ", ".join(
            f"{r.name} with {len(r.labels)} ({', '.join(r.labels[:2])} …)" for r, _ in parts
        )
        raise UsageError(f"adapters of a blend must have the same labels, got {found:.400}")
    used = {key for resident, _ in parts for key in resident.feeds}
    _check_linear([slot for slot in manifest.slots if not used.isdisjoint(slot.inputs.values())])
    feeds: Feeds = {}
    with np.errstate(over="ignore", invalid="ignore"):  # found below, by name
        for slot in manifest.slots:
            if not used.isdisjoint(slot.inputs.values()):
                feeds.update(_blended(slot, parts, base_head))
    heads = {name for slot in manifest.head_slots for name in slot.inputs.values()}
    for key, array in feeds.items():
        # In slots of fixed shapes, classes that a head does not have are -inf.
        if not (np.isfinite(array) | (array == -np.inf if key in heads else False)).all():
            raise RegrowError(f"blend: {key} must be finite, got weights that are too large")
    return LoadedAdapter(name, feeds, parts[0][0].labels)


def _check_linear(used: Sequence[Slot]) -> None:
    """Raise `UsageError` for a target whose changes multiply each other."""
    by_target: dict[str, list[SlotKind]] = {}
    for slot in used:
        by_target.setdefault(slot.target, []).append(SLOT_KINDS[slot.kind])
    for target, kinds in by_target.items():
        if any(_multiply(kind, other) for kind in kinds for other in kinds if kind is not other):
            raise UsageError(
                f"changes to blend or scale must add up, got {' and '.join(k.name for k in kinds)} "
                f"of {target}, which multiply each other: merge them, or swap"
            )


def _multiply(kind: SlotKind, other: SlotKind) -> bool:
    """Whether `kind` multiplies what `other` changes: what comes before it, or the weight."""
    order = list(SLOT_KINDS)
    before = order.index(other.name) < order.index(kind.name)
    return kind.multiplies and (before or other.multiplies or other.adds_to_weight)


def _blended(slot: Slot, parts: Parts, base_head: Feeds) -> Feeds:
    kind = SLOT_KINDS[slot.kind]
    found: list[Feed] = []
    for resident, weight in parts:
        feeds = base_head | resident.feeds if kind.is_head else resident.feeds
        if not feeds.keys().isdisjoint(slot.inputs.values()):
            tensors = {part: feeds[name] for part, name in slot.inputs.items()}
            found.append((tensors, weight))
    blended = kind.blend(slot, found)
    return {slot.inputs[part]: array for part, array in blended.items()}
