"""From an adapter to what the graph's slots take; every mismatch is found before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from regrow_format.adapter import Adapter, Head, HeadLayer, Probe, Target
from regrow_format.basis import PHILOX_SIGN, BasisCache
from regrow_format.errors import FormatError, MismatchError, RegrowError, UsageError
from regrow_format.files import read_bytes
from regrow_format.manifest import Manifest, SeededSpec, Slot
from regrow_format.philox import key_of

from .slot_kinds import Feeds, basis_mismatch, slot_feeds, slot_kind

__all__ = [
    "HEAD_FILE",
    "Feeds",
    "LoadedAdapter",
    "check_damage",
    "check_fit",
    "expand",
    "load_head",
    "stack",
]

HEAD_FILE = "head.safetensors"
_MAX_HEAD_BYTES = 1 << 30
_SHORT = 19  # characters of a backbone_id that people are shown


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter that is expanded and in RAM: swapping to it changes one pointer.

    Attributes:
        feeds: graph input name to array; low_rank A [1, in, r] and B [1, r, out], delta D
            [1, in, out], bias b [1, 1, out], weight W [1, in, out], vector d [1, 1, r] and b
            [1, 1, out], head weight [1, in, classes] and bias [1, 1, classes].
        labels: class names, the adapter's own or the bundle's.
        used: when it was used last, counted in uses.
        probe: what the model gives with it, if its file says so.
        last_use: when it was activated or asked for last, in seconds of `time.time`.
    """

    name: str
    feeds: Feeds
    labels: tuple[str, ...]
    used: int = 0
    probe: Probe | None = None
    last_use: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of RAM that the arrays take."""
        return sum(array.nbytes for array in self.feeds.values())


def check_fit(adapter: Adapter, manifest: Manifest, *, any_backbone: bool = False) -> None:
    """Raise `MismatchError` with every reason why `adapter` does not fit the bundle.

    For an adapter of another backbone the message says just that; `findings` still has the rest.
    """
    if manifest.mode == "merged":
        raise UsageError(
            "bundle must be swappable to take an adapter, got a merged one, which is one model "
            "for good: export it with --mode swappable"
        )
    if manifest.seeded and not manifest.seeded.inputs:
        raise UsageError(
            "bundle must take an adapter, got one whose adapter is built in with its seed: export "
            "it without --constants"
        )
    findings = []
    kind = slot_kind(adapter, manifest)
    if manifest.seeded is None:
        findings += [text for t in adapter.targets if (text := _target_finding(t, manifest, kind))]
    else:
        findings += _seeded_findings(adapter, manifest.seeded)
    if adapter.head is not None:
        findings += _head_findings(adapter.head, manifest)
    if adapter.extra:
        findings.append(
            f"extra must be folded in by a merged export, got {len(adapter.extra)} whole tensors "
            f"(such as {min(adapter.extra)}) for which a bundle has no slots"
        )
    if adapter.backbone_id != manifest.backbone_id and not any_backbone:
        check_damage(adapter.backbone_id, manifest.backbone_id)
        more = f" ({len(findings)} of its layers do not fit either)" if findings else ""
        raise MismatchError(
            f"adapter must be of the bundle's backbone, {_short(manifest.backbone_id)}, "
            f"got one of another, {_short(adapter.backbone_id)}{more}: train it on this backbone, "
            "or use the bundle of its own (a compressed backbone is another than the dense one)",
            findings,
            show=0,
        )
    kinds = {slot.kind for slot in manifest.slots} - {"head"}
    if adapter.targets and manifest.seeded is None and kind not in kinds:
        raise MismatchError(
            f"adapter does not fit this bundle: its method, {adapter.method}, needs {kind} "
            f"slots, got {', '.join(sorted(kinds)) or 'none'}; export it with "
            f"--for {adapter.method}",
            findings,
            show=0,
        )
    if reason := basis_mismatch(adapter, manifest, kind):
        raise MismatchError(reason, findings, show=0)
    if findings:
        raise MismatchError("adapter does not fit this bundle:", findings)


def _short(backbone_id: str) -> str:
    return backbone_id[:_SHORT] + "…" if len(backbone_id) > _SHORT + 1 else backbone_id


def check_damage(found: str, wanted: str) -> None:
    """Raise if two hashes begin alike, which those of two backbones do not."""
    if found[:_SHORT] == wanted[:_SHORT]:
        place = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
                     min(len(found), len(wanted)))  # fmt: skip
        raise MismatchError(
            f"adapter must be of this backbone, {wanted}, got {found}, which differs from "
            f"character {place + 1} on: one of the two files is damaged; get it again"
        )


def _target_finding(target: Target, manifest: Manifest, kind: str | None) -> str | None:
    slot = manifest.slot_of(target.name, kind)
    if slot is None:
        others = [s.kind for s in manifest.slots if s.target == target.name]
        if others:
            return f"{target.name} must have a {kind} slot, got {', '.join(others)}"
        return f"{target.name} must be a slot of the bundle, got none: export it with this target"
    if (slot.in_features, slot.out_features) != (target.in_features, target.out_features):
        return (
            f"{target.name} must be {slot.in_features} -> {slot.out_features}, "
            f"got {target.in_features} -> {target.out_features}"
        )
    return None


def _seeded_findings(adapter: Adapter, seeded: SeededSpec) -> list[str]:
    storage = "int8" if adapter.storage.startswith("int") else "fp32"
    wanted = {
        "method": (seeded.method, adapter.method),
        "config": (dict(seeded.config), dict(adapter.config)),
        "storage": (seeded.storage, storage),
        "basis": (PHILOX_SIGN.kind, adapter.basis.kind),
        "scales": ("one per vector", f"one per {adapter.group or 'vector'}"),
    }
    findings = [
        f"{name} must be {want!r:.120} as in the seeded graph, got {got!r:.120}"
        for name, (want, got) in wanted.items()
        if want != got
    ]
    names = tuple(target.name for target in adapter.targets)
    if names != seeded.targets:
        odd = min(set(names) ^ set(seeded.targets), default="their order")
        findings.append(
            f"its {len(names)} layers must be the {len(seeded.targets)} of the seeded graph; "
            f"one that differs is {odd}"
        )
    return findings


def _head_findings(head: Head, manifest: Manifest) -> list[str]:
    slots = {slot.target: slot for slot in manifest.slots if slot.kind == "head"}
    names = [layer.name for layer in head.layers]
    if set(names) != set(slots):
        return [f"head must be {sorted(slots)}, got {sorted(names)}"]
    findings = []
    for layer in head.layers:
        slot, last = slots[layer.name], layer is head.layers[-1]
        if layer.weight.shape[1] != slot.in_features:
            findings.append(
                f"head {layer.name} must take {slot.in_features} features, "
                f"got {layer.weight.shape[1]}"
            )
        if not last and layer.weight.shape[0] != slot.out_features:
            findings.append(
                f"head {layer.name} must give {slot.out_features} features, "
                f"got {layer.weight.shape[0]}"
            )
        if last and slot.fixed and layer.weight.shape[0] > slot.out_features:
            findings.append(
                f"head {layer.name} must have {slot.out_features} classes or less in a bundle of "
                f"fixed shapes, got {layer.weight.shape[0]}"
            )
    return findings


def expand(adapter: Adapter, manifest: Manifest, basis: BasisCache, folder: Path) -> Feeds:
    """The feeds of an adapter that fits the bundle in `folder`; see `Resident.feeds`.

    Raises:
        RegrowError: its numbers, finite each, are not so together, or it expands to gigabytes.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # found here, by name
        feeds = (
            slot_feeds(adapter, manifest, basis, folder)
            if manifest.seeded is None
            else _seeded_feeds(adapter, manifest.seeded.inputs)
        )
        # Targets are views of few arrays: these are looked at first, and by name only to blame one.
        wholes = {id(whole): whole for whole in map(_whole, feeds.values())}
        if not all(map(_is_finite, wholes.values())):
            for name, array in feeds.items():
                if not _is_finite(array):
                    raise RegrowError(
                        f"adapter: {name} must be finite when expanded, its scale is too large"
                    )
    if adapter.head is not None:
        for layer in adapter.head.layers:
            feeds.update(_head_feeds(layer, manifest))
    return feeds


def _whole(array: NDArray[Any]) -> NDArray[Any]:
    whole = array.base
    return whole if isinstance(whole, np.ndarray) and whole.dtype == array.dtype else array


def _is_finite(array: NDArray[Any]) -> bool:
    if array.dtype.kind != "f":
        return True
    # A finite sum of squares has finite parts only, and takes no array of flags. It may overflow.
    flat = array.reshape(-1)
    return math.isfinite(np.dot(flat, flat)) or bool(np.isfinite(array).all())


def _seeded_feeds(adapter: Adapter, inputs: Mapping[str, str]) -> Feeds:
    feeds: Feeds = {inputs["seed"]: np.array(key_of(adapter.seed), dtype=np.uint32)}
    for name, part in adapter.coefficients.items():
        feeds[inputs[name]] = part.values
        feeds[inputs[f"{name}.scale"]] = part.scale
    return feeds


def _head_feeds(layer: HeadLayer, manifest: Manifest) -> Feeds:
    slot = manifest.slot_of(layer.name, "head")
    if slot is None:
        raise UsageError(f"{layer.name} must be a head slot of the bundle, got none")
    missing = slot.out_features - len(layer.bias) if slot.fixed else 0
    weight = np.pad(layer.weight, ((0, missing), (0, 0)))
    bias = np.pad(layer.bias, (0, missing), constant_values=-np.inf)
    return {
        slot.inputs["weight"]: np.ascontiguousarray(weight.T)[None],
        slot.inputs["bias"]: bias[None, None],
    }


def load_head(folder: Path, manifest: Manifest) -> Feeds:
    """The backbone's own head as feeds, for batches in which only some samples have their own."""
    path = folder / HEAD_FILE
    try:
        tensors = load_safetensors(read_bytes(path, limit=_MAX_HEAD_BYTES, what="the base's head"))
    except SafetensorError as error:
        raise FormatError(f"{path} must be a whole safetensors file: {error}") from None
    feeds: Feeds = {}
    for slot in (slot for slot in manifest.slots if slot.kind == "head"):
        wide, high = slot.in_features, slot.out_features
        weight = _head_tensor(tensors, f"{slot.target}.weight", (high, wide), path)
        bias = _head_tensor(tensors, f"{slot.target}.bias", (high,), path)
        feeds.update(_head_feeds(HeadLayer(slot.target, weight, bias), manifest))
    return feeds


def _head_tensor(
    tensors: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...], path: Path
) -> NDArray[np.float32]:
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != shape or tensor.dtype != np.float32:
        raise FormatError(f"{path}: {name} must be float32 {list(shape)}")
    return tensor


def stack(
    residents: Sequence[LoadedAdapter | None], slots: Sequence[Slot], base_head: Feeds
) -> Feeds:
    """Feeds in which every sample of a batch has its own adapter, or None for the base.

    Ranks are padded with zeros, and so are the deltas and biases that a sample does not have. Heads
    of fewer classes are padded with zero weights and a bias of -inf, so that a class which a sample
    does not have gets the logit -inf.
    """
    used = {name for resident in residents if resident for name in resident.feeds}
    feeds: Feeds = {}
    for slot in slots:
        if used.isdisjoint(slot.inputs.values()):
            continue
        for part, name in slot.inputs.items():
            rows = [_row(resident, name, part, slot, base_head) for resident in residents]
            minus = slot.kind == "head" and part == "bias"
            feeds[name] = _stack_padded(rows, -np.inf if minus else 0.0)
    return feeds


def _row(
    resident: LoadedAdapter | None, name: str, part: str, slot: Slot, base_head: Feeds
) -> NDArray[Any]:
    feeds = base_head if slot.kind == "head" else {}
    if resident is not None and name in resident.feeds:
        feeds = resident.feeds
    if name in feeds:
        row: NDArray[Any] = feeds[name][0]
        return row
    width = slot.rank or 0 if part == "d" else slot.out_features
    empty = (slot.in_features, 0) if part == "A" else (0, width)
    return np.zeros(empty, dtype=np.float32)


def _stack_padded(rows: Sequence[NDArray[Any]], fill: float) -> NDArray[Any]:
    shape = tuple(max(row.shape[axis] for row in rows) for axis in range(2))
    stacked = np.full((len(rows), *shape), fill, dtype=np.float32)
    for index, row in enumerate(rows):
        stacked[index, : row.shape[0], : row.shape[1]] = row
    return stacked
