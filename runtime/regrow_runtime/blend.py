"""Several adapters as one, and one at another strength: sums of what residents feed.

Every method is linear in delta W, so nothing is approximated: sum_i w_i A_i B_i is [A_1 A_2 ...]
times [w_1 B_1; w_2 B_2; ...], and deltas and biases add up. A head is no change but a replacement:
equally labelled ones are averaged, with the weights over their sum; one alone stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import MismatchError, RegrowError, UsageError
from regrow_format.manifest import Manifest, Slot

from .slots import Feeds, LoadedAdapter

__all__ = ["as_weight", "blend"]

Parts = Sequence[tuple[LoadedAdapter, float]]


def as_weight(weight: object, what: str) -> float:
    """The weight as a float; `UsageError` if it is no finite number."""
    if not isinstance(weight, Real) or not math.isfinite(weight):
        raise UsageError(f"{what} must be a finite number, got {weight!r:.40}")
    return float(weight)


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
    feeds: Feeds = {}
    with np.errstate(over="ignore", invalid="ignore"):  # found below, by name
        for slot in manifest.slots:
            if not used.isdisjoint(slot.inputs.values()):
                feeds.update(_blended(slot, parts, base_head))
    heads = {
        name for slot in manifest.slots if slot.kind == "head" for name in slot.inputs.values()
    }
    for key, array in feeds.items():
        # In slots of fixed shapes, classes that a head does not have are -inf.
        if not (np.isfinite(array) | (array == -np.inf if key in heads else False)).all():
            raise RegrowError(f"blend: {key} must be finite, got weights that are too large")
    return LoadedAdapter(name, feeds, parts[0][0].labels)


def _blended(slot: Slot, parts: Parts, base_head: Feeds) -> Feeds:
    if slot.kind == "head":
        return {key: _mean(key, parts, base_head) for key in slot.inputs.values()}
    found = [(r.feeds, w) for r, w in parts if not r.feeds.keys().isdisjoint(slot.inputs.values())]
    if slot.kind == "low_rank":
        a, b = slot.inputs["A"], slot.inputs["B"]
        return _side_by_side(
            slot,
            np.concatenate([feeds[a] for feeds, _ in found], axis=2),
            np.concatenate([weight * feeds[b] for feeds, weight in found], axis=1),
        )
    if slot.kind in ("delta", "bias"):
        key = next(iter(slot.inputs.values()))
        return {key: _sum((feeds[key], weight) for feeds, weight in found)}
    raise UsageError(
        f"slots to blend or scale must be low_rank, delta or bias, got {slot.kind} ({slot.target})"
    )


def _side_by_side(slot: Slot, a: NDArray[np.float32], b: NDArray[np.float32]) -> Feeds:
    """A [1, in, ranks] and B [1, ranks, out] as the slot takes them."""
    if slot.rank is not None:
        # Residents are padded to the slot's rank with columns and rows that add nothing.
        used = np.flatnonzero(a.any(axis=(0, 1)) & b.any(axis=(0, 2)))
        missing = slot.rank - used.size
        if missing < 0:
            raise MismatchError(
                f"{slot.target}: ranks of a blend must add up to {slot.rank} or less, as the slot "
                f"has, got {used.size}: blend fewer, or export with --fixed-rank {used.size}"
            )
        a = np.pad(a[:, :, used], ((0, 0), (0, 0), (0, missing)))
        b = np.pad(b[:, used], ((0, 0), (0, missing), (0, 0)))
    return {slot.inputs["A"]: a, slot.inputs["B"]: b}


def _mean(key: str, parts: Parts, base_head: Feeds) -> NDArray[np.float32]:
    heads = [(r.feeds[key] if key in r.feeds else base_head[key], w) for r, w in parts]
    if len(heads) == 1:
        return heads[0][0]
    total = sum(weight for _, weight in heads)
    if not total > 0:
        raise UsageError(f"weights of adapters with heads must add up to more than 0, got {total}")
    return _sum((head, weight / total) for head, weight in heads)


def _sum(parts: Iterable[tuple[NDArray[np.float32], float]]) -> NDArray[np.float32]:
    return reduce(np.add, (np.multiply(array, weight) for array, weight in parts))
