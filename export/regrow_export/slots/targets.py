"""Which layers of a model an adapter can change, by module path."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from regrow_export.layers import NORM, find_layers, find_linears, layer_type
from regrow_format.adapter import Adapter, Target
from regrow_format.errors import MismatchError, UsageError
from regrow_format.methods import get_method
from regrow_runtime.fit import check_damage

from .kinds import KINDS

if TYPE_CHECKING:
    from torch import nn

    from regrow_export.source import ExportSource

__all__ = ["check_adapter", "head_widths", "kinds_for", "kinds_of", "slot_targets"]


def kinds_for(method: str) -> tuple[str, ...]:
    """The kinds of slot that a bundle needs for adapters of a method; none for head-only ones."""
    return get_method(method).kinds


def kinds_of(module: nn.Module) -> tuple[str, ...]:
    """The kinds of slot that a module can have; none if adapters cannot change it."""
    layer = layer_type(module)
    return tuple(name for name, kind in KINDS.items() if layer and kind.takes(layer))


def _known(model: nn.Module, kinds: Sequence[str]) -> dict[str, nn.Module]:
    """Every module that a slot of one of `kinds` can wrap, by module path."""
    wanted = [KINDS[kind] for kind in kinds]
    return {
        name: module
        for name, (module, layer) in find_layers(model).items()
        if any(kind.takes(layer) for kind in wanted)
    }


def _noun(kinds: Sequence[str]) -> str:
    """What targets are called: layers where norms can be some."""
    return "layer" if any(KINDS[kind].takes(NORM) for kind in kinds) else "linear layer"


def _suggest(name: str, known: Sequence[str], noun: str) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; near: {', '.join(near)}" if near else f"; there are {len(known)} {noun}s"


def _check_names(names: Sequence[str], known: Sequence[str], noun: str) -> None:
    for name in names:
        if name not in known:
            raise UsageError(
                f"target must be the path of a {noun}, got {name!r}{_suggest(name, known, noun)}"
            )
        if names.count(name) > 1:
            raise UsageError(f"targets must be named once, got {name!r} twice")
        outer = next((other for other in names if name.startswith(other + ".")), None)
        if outer:
            raise UsageError(f"target must not lie inside another, got {name!r} inside {outer!r}")


def slot_targets(
    model: nn.Module, names: Sequence[str], kinds: Sequence[str] = ("low_rank",)
) -> tuple[Target, ...]:
    """Check target names against the model; sorted by the UTF-8 bytes of their names.

    Args:
        kinds: of slot; with "bias", norms can be targets too.

    Raises:
        UsageError: a name is unknown (near ones are listed), no layer that takes such a slot, given
            twice, or lies inside another target.
    """
    _check_each(model, names, kinds)
    layers = _known(model, kinds)
    _check_names(list(names), list(layers), _noun(kinds))
    return tuple(Target(name, *_sizes(layers[name])) for name in sorted(names, key=str.encode))


def _check_each(model: nn.Module, names: Sequence[str], kinds: Sequence[str]) -> None:
    """Raise `UsageError` for a linear layer that lacks a kind which other linear layers take."""
    linears = find_linears(model)
    for kind in (KINDS[name] for name in kinds):
        for name in (name for name in names if name in linears):
            layer = layer_type(linears[name])
            if layer and not kind.takes(layer):
                raise kind.refuse(name, linears[name])


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a layer that can be a target."""
    layer = layer_type(module)
    return layer.sizes(module) if layer else (0, 0)


def head_widths(source: ExportSource, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(in, out) of each layer of the head, after checking that it can be a slot of its own."""
    from torch.nn import Linear

    linears = find_linears(source.model)
    found = {}
    for path in source.head:
        if not isinstance(linears.get(path), Linear):
            raise UsageError(
                f"head must name nn.Linear layers, got {path!r}"
                f"{_suggest(path, list(linears), 'linear layer')}"
            )
        clash = next((t for t in targets if f"{t}.".startswith(f"{path}.")), None)
        if clash or any(path.startswith(f"{t}.") for t in targets):
            raise UsageError(f"a layer must be a target or the head, got {path!r} as both")
        found[path] = _sizes(linears[path])
    return found


def check_adapter(source: ExportSource, adapter: Adapter) -> None:
    """Compare an adapter to the model that it is to be built into.

    Raises:
        MismatchError: another backbone, unknown targets, other widths, or another head; all of it
            in one error.
    """
    if adapter.backbone_id != source.backbone_id:
        check_damage(adapter.backbone_id, source.backbone_id)
        raise MismatchError(
            f"adapter must be of this backbone, {source.backbone_id:.19}…, "
            f"got one of another, {adapter.backbone_id:.19}…: export the backbone that it was "
            "trained on, or train one for this"
        )
    kinds = kinds_for(adapter.method)
    layers = _known(source.model, kinds)
    findings = []
    for target in adapter.targets:
        findings += _target_findings(target, layers, _noun(kinds))
    findings += _head_findings(source, adapter, find_linears(source.model))
    findings += _extra_findings(source, adapter)
    if findings:
        raise MismatchError("adapter must fit the model that is exported", findings)


def _target_findings(target: Target, layers: dict[str, nn.Module], noun: str) -> list[str]:
    if target.name not in layers:
        return [f"{target.name}: no such {noun}{_suggest(target.name, list(layers), noun)}"]
    have, want = (target.in_features, target.out_features), _sizes(layers[target.name])
    return [] if have == want else [f"{target.name}: in, out must be {want}, got {have}"]


def _extra_findings(source: ExportSource, adapter: Adapter) -> list[str]:
    """Saved modules replace parameters of the same shape."""
    parameters = source.model.named_parameters(remove_duplicate=False)
    known = {name: tuple(value.shape) for name, value in parameters}
    found = []
    for name, value in adapter.extra.items():
        if name not in known:
            near = _suggest(name, list(known), "parameter")
            found.append(f"extra {name}: no such parameter{near}")
        elif known[name] != value.shape:
            found.append(f"extra {name}: shape must be {known[name]}, got {value.shape}")
    return found


def _head_findings(
    source: ExportSource, adapter: Adapter, linears: dict[str, nn.Module]
) -> list[str]:
    layers = adapter.head.layers if adapter.head else ()
    names = [layer.name for layer in layers]
    if layers and sorted(names) != sorted(source.head):
        return [f"head must have the layers {list(source.head)}, got {names}"]
    found = []
    for layer in layers:
        wide = _sizes(linears[layer.name])[0] if layer.name in linears else 0
        if layer.weight.shape[1] != wide:
            found.append(f"head {layer.name}: in must be {wide}, got {layer.weight.shape[1]}")
    return found
