"""Which layers of a model an adapter can change, by module path."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from regrow_runtime.adapter import Adapter, Target
from regrow_runtime.errors import MismatchError, UsageError
from regrow_runtime.methods import get_method

if TYPE_CHECKING:
    import torch

    from .source import ExportSource

__all__ = ["check_adapter", "find_linears", "head_widths", "slot_targets", "widths"]


def widths(module: torch.nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer that maps the last dimension linearly, or None if it is no such layer.

    Known by duck type: `in_features` and `out_features` as in `nn.Linear` and in factorised pairs,
    or GPT-2's Conv1D, whose widths are called `nx` and `nf`.
    """
    names = ("nx", "nf") if type(module).__name__ == "Conv1D" else ("in_features", "out_features")
    wide, high = (getattr(module, name, None) for name in names)
    return (wide, high) if isinstance(wide, int) and isinstance(high, int) else None


def find_linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every module that a slot can wrap, by module path, in the model's order."""
    return {name: m for name, m in model.named_modules() if name and widths(m) is not None}


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; near: {', '.join(near)}" if near else f"; there are {len(known)} linear layers"


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(
                f"target must be the path of a linear layer, got {name!r}{_suggest(name, known)}"
            )
        if names.count(name) > 1:
            raise UsageError(f"targets must be named once, got {name!r} twice")
        outer = next((other for other in names if name.startswith(other + ".")), None)
        if outer:
            raise UsageError(f"target must not lie inside another, got {name!r} inside {outer!r}")


def slot_targets(model: torch.nn.Module, names: Sequence[str]) -> tuple[Target, ...]:
    """Check target names against the model; sorted by the UTF-8 bytes of their names.

    Raises:
        UsageError: a name is unknown (near ones are listed), no linear layer, given twice, or lies
            inside another target.
    """
    linears = find_linears(model)
    _check_names(list(names), list(linears))
    found = []
    for name in sorted(names, key=str.encode):
        wide, high = widths(linears[name]) or (0, 0)
        found.append(Target(name, wide, high))
    return tuple(found)


def head_widths(source: ExportSource, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(in, out) of each layer of the head, after checking that it can be a slot of its own."""
    from torch.nn import Linear

    linears = find_linears(source.model)
    found = {}
    for path in source.head:
        if not isinstance(linears.get(path), Linear):
            raise UsageError(
                f"head must name nn.Linear layers, got {path!r}{_suggest(path, list(linears))}"
            )
        clash = next((t for t in targets if f"{t}.".startswith(f"{path}.")), None)
        if clash or any(path.startswith(f"{t}.") for t in targets):
            raise UsageError(f"a layer must be a target or the head, got {path!r} as both")
        found[path] = widths(linears[path]) or (0, 0)
    return found


def check_adapter(source: ExportSource, adapter: Adapter) -> None:
    """Compare an adapter to the model that it is to be built into.

    Raises:
        MismatchError: another backbone, unknown targets, other widths, or another head; all of it
            in one error.
    """
    if adapter.backbone_id != source.backbone_id:
        raise MismatchError(
            f"adapter must be of this backbone, {source.backbone_id:.19}…, "
            f"got one of another, {adapter.backbone_id:.19}…"
        )
    findings = []
    linears = find_linears(source.model)
    for target in adapter.targets:
        findings += _target_findings(target, linears)
    findings += _head_findings(source, adapter, linears)
    if get_method(adapter.method).slot != "low_rank":
        findings.append(f"method must fill low_rank slots, got {adapter.method}")
    if findings:
        raise MismatchError("adapter must fit the model that is exported", findings)


def _target_findings(target: Target, linears: dict[str, torch.nn.Module]) -> list[str]:
    if target.name not in linears:
        return [f"{target.name}: no such linear layer{_suggest(target.name, list(linears))}"]
    have, want = (target.in_features, target.out_features), widths(linears[target.name])
    return [] if have == want else [f"{target.name}: in, out must be {want}, got {have}"]


def _head_findings(
    source: ExportSource, adapter: Adapter, linears: dict[str, torch.nn.Module]
) -> list[str]:
    layers = adapter.head.layers if adapter.head else ()
    names = [layer.name for layer in layers]
    if layers and sorted(names) != sorted(source.head):
        return [f"head must have the layers {list(source.head)}, got {names}"]
    found = []
    for layer in layers:
        wide = (widths(linears[layer.name]) or (0, 0))[0] if layer.name in linears else 0
        if layer.weight.shape[1] != wide:
            found.append(f"head {layer.name}: in must be {wide}, got {layer.weight.shape[1]}")
    return found
