"""Whether an adapter fits a bundle; every mismatch is found before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from regrow_format.adapter import Adapter, Head, Target
from regrow_format.basis import PHILOX_SIGN
from regrow_format.errors import MismatchError, UsageError
from regrow_format.manifest import Manifest, SeededSpec
from regrow_format.methods import get_method
from regrow_format.slot_kinds import SLOT_KINDS

from .slot_feeds import used_kinds

__all__ = ["check_damage", "check_fit"]

_SHORT = 19  # characters of a backbone_id that people are shown


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
    used = used_kinds(adapter, manifest)
    if manifest.seeded is None:
        findings += [text for t in adapter.targets for text in _target(t, adapter, manifest, used)]
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
    if manifest.seeded is None:
        _check_kinds(adapter, manifest, used, findings)
    if findings:
        raise MismatchError("adapter does not fit this bundle:", findings)


def _check_kinds(
    adapter: Adapter, manifest: Manifest, used: Sequence[str], findings: list[str]
) -> None:
    """Raise `MismatchError` for kinds that the bundle has nowhere, or that take others."""
    there = manifest.target_kinds
    if not there.issuperset(used):
        raise MismatchError(
            f"adapter does not fit this bundle: its method, {adapter.method}, needs "
            f"{' and '.join(used)} slots, got {', '.join(sorted(there)) or 'none'}; export it with "
            f"--for {adapter.method}, or where kinds are named, with {_as_options(used)}",
            findings,
            show=0,
        )
    for slot in (manifest.slot_of(t.name, kind) for t in adapter.targets for kind in used):
        if slot is not None and (reason := SLOT_KINDS[slot.kind].misfit(slot, adapter)):
            raise MismatchError(reason, findings, show=0)


def _as_options(kinds: Sequence[str]) -> str:
    return " ".join(f"--slots {kind}" for kind in kinds)


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


def _target(
    target: Target, adapter: Adapter, manifest: Manifest, used: Sequence[str]
) -> Iterator[str]:
    """What is wrong with the slots of a target, once for each thing."""
    filled = get_method(adapter.method).fills(adapter.config, target)
    wanted = [kind for kind in filled if kind in used] or used
    slots = {kind: manifest.slot_of(target.name, kind) for kind in wanted}
    if lacking := [kind for kind, slot in slots.items() if slot is None]:
        others = [s.kind for s in manifest.slots if s.target == target.name]
        yield (
            f"{target.name} must have a {' and a '.join(lacking)} slot, got {', '.join(others)}"
            if others
            else f"{target.name} must be a slot of the bundle, got none: export it with this target"
        )
    have = (target.in_features, target.out_features)
    wants = {(slot.in_features, slot.out_features) for slot in slots.values() if slot}
    for want in wants - {have}:
        yield f"{target.name} must be {want[0]} -> {want[1]}, got {have[0]} -> {have[1]}"


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
    slots = {slot.target: slot for slot in manifest.head_slots}
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
