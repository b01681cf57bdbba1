"""Which layers of a model an adapter can change, by module path."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from regrow_format.adapter import Adapter, Target
from regrow_format.errors import MismatchError, UsageError
from regrow_format.methods import get_method
from regrow_runtime.fit import check_damage

if TYPE_CHECKING:
    import torch

    from regrow_export.source import ExportSource

__all__ = [
    "TARGET_KINDS",
    "check_adapter",
    "dense_weight",
    "find_biased",
    "find_linears",
    "head_widths",
    "is_conv1d",
    "kinds_for",
    "layer_kinds",
    "slot_targets",
    "widths",
]

# Kinds of slots around targets: a layer of one weight takes all, factored pairs all but `weight`.
TARGET_KINDS = ("low_rank", "delta", "bias", "weight", "vector")
_NORM_KINDS = ("bias",)


def kinds_for(method: str) -> tuple[str, ...]:
    """The kinds of slot that a bundle needs for adapters of a method; none for head-only ones."""
    kind = get_method(method).slot
    return () if kind is None else (kind,)


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether it is GPT-2's layer of transformers, whose weight is [in, out].

    Known by its name and its width `nf`: transformers takes a second to import.
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def widths(module: torch.nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer that maps the last dimension linearly, or None if it is no such layer.

    Known by duck type: `in_features` and `out_features` as in `nn.Linear` and in factorised pairs,
    or GPT-2's Conv1D, whose widths are called `nx` and `nf`.
    """
    names = ("nx", "nf") if is_conv1d(module) else ("in_features", "out_features")
    wide, high = (getattr(module, name, None) for name in names)
    return (wide, high) if isinstance(wide, int) and isinstance(high, int) else None


def _norm_width(module: torch.nn.Module) -> int | None:
    """The width of a norm over the last dimension, or None if it is no such layer.

    Known by `normalized_shape`, or by a weight and a bias of one shape.
    """
    from torch import nn

    batch = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    if batch or getattr(module, "data_format", None) == "channels_first":  # ConvNeXt's
        return None
    match getattr(module, "normalized_shape", None):
        case (int(width),):
            return width
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    if isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter):
        return len(bias) if weight.shape == bias.shape and bias.dim() == 1 else None
    return None


def layer_kinds(module: torch.nn.Module) -> tuple[str, ...]:
    """The kinds of slot that a module can have: a bias for a norm, all for a linear layer."""
    if widths(module) is not None:
        return tuple(k for k in TARGET_KINDS if k != "weight" or dense_weight(module) is not None)
    return () if _norm_width(module) is None else _NORM_KINDS


def dense_weight(module: torch.nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer as a view [in, out], or None if it has not just one."""
    from torch import nn

    if is_conv1d(module):
        return module.get_parameter("weight").detach()
    return module.weight.detach().T if isinstance(module, nn.Linear) else None


def find_linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every module that a slot can wrap, by module path, in the model's order."""
    return {name: m for name, m in model.named_modules() if name and widths(m) is not None}


def find_biased(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every linear layer, factored pair and norm that has a bias, by module path."""
    return {name: m for name, m in model.named_modules() if name and _has_bias(m)}


def _has_bias(module: torch.nn.Module) -> bool:
    if not layer_kinds(module):
        return False
    last = getattr(module, "up", module)  # of a factored pair
    return getattr(last, "bias", None) is not None


def _known(model: torch.nn.Module, kinds: Sequence[str]) -> dict[str, torch.nn.Module]:
    """Every module that a slot of one of `kinds` can wrap, by module path."""
    wanted = set(kinds)
    return {n: m for n, m in model.named_modules() if n and wanted.intersection(layer_kinds(m))}


def _noun(kinds: Sequence[str]) -> str:
    return "layer" if "bias" in kinds else "linear layer"


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
    model: torch.nn.Module, names: Sequence[str], kinds: Sequence[str] = ("low_rank",)
) -> tuple[Target, ...]:
    """Check target names against the model; sorted by the UTF-8 bytes of their names.

    Args:
        kinds: of slot; with "bias", norms can be targets too.

    Raises:
        UsageError: a name is unknown (near ones are listed), no layer that takes such a slot, given
            twice, or lies inside another target.
    """
    linears = find_linears(model)
    for name in names if "weight" in kinds else ():
        if name in linears and dense_weight(linears[name]) is None:
            raise UsageError(
                f"target must have one float weight for a weight slot, got {name}, "
                f"{type(linears[name]).__name__}: use slots of another kind"
            )
    layers = _known(model, kinds)
    _check_names(list(names), list(layers), _noun(kinds))
    return tuple(Target(name, *_sizes(layers[name])) for name in sorted(names, key=str.encode))


def _sizes(module: torch.nn.Module) -> tuple[int, int]:
    """(in, out) of a layer that can be a target; a norm has its width twice."""
    width = _norm_width(module) or 0
    return widths(module) or (width, width)


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
        found[path] = widths(linears[path]) or (0, 0)
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


def _target_findings(target: Target, layers: dict[str, torch.nn.Module], noun: str) -> list[str]:
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
