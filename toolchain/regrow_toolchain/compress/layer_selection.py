"""Which layers compression factors: a rule for all architectures, a few exceptions, patterns.

Linear layers (GPT-2's Conv1D and convolutions of 1 x 1 among them) inside of the model's stacks of
blocks are factored; embeddings, norms, pooler and head lie outside and stay dense. What else stays
dense says why.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from regrow_export.layers import LayerType, LowRankPair, block_lists, layer_type
from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.models import Plan, find_targets, rank_for

__all__ = ["LayerPlan", "factored_layers", "plan_layers", "plans_of"]

# Layers with fewer outputs hold too little to be worth two products (as in the paper's code), and
# so do those with hardly any inputs (such as Swin v2's of a position's two coordinates).
_LEAST_OUTPUTS, _LEAST_INPUTS = 10, 4
# By what a model's type or class begins with: path patterns of layers that stay dense, and why.
_EXCEPTIONS = {
    "swin": {
        "*.attention.output.dense": "attention's output, dense in the paper's code for Swin",
        "*.attn.proj": "attention's output, dense in the paper's code for Swin",
        "*.attn.out_proj": "attention's output, dense in the paper's code for Swin",
    },
}
_EVERYWHERE = {"*reduction": "merges patches, dense in the paper's code"}


@dataclass(frozen=True)
class LayerPlan:
    """A linear layer of a model and what becomes of it.

    Attributes:
        rank: of its factors; 0 if it stays dense.
        skip_reason: the reason, empty for a layer that is factored.
        is_timed: it is a product in a graph, which `kernel_timing` measures; convolutions are none.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    rank: int = 0
    skip_reason: str = ""
    is_timed: bool = True

    @property
    def dense(self) -> int:
        """Parameters before, the bias included."""
        return self.in_features * self.out_features + self.bias * self.out_features

    @property
    def after(self) -> int:
        """Parameters after, the bias included."""
        if not self.rank:
            return self.dense
        return self.rank * (self.in_features + self.out_features) + self.bias * self.out_features

    def kept_dense(self, why: str) -> LayerPlan:
        """The same layer, left as it is."""
        return replace(self, rank=0, skip_reason=why)


def plan_layers(
    model: nn.Module,
    ratio: float,
    *,
    only: Sequence[str] = (),
    keep_dense: Sequence[str] = (),
) -> tuple[LayerPlan, ...]:
    """Every linear layer of the model, those to factor with the paper's rank for `ratio`.

    Args:
        model: dense; "meta" weights will do.
        only: patterns as adapters' targets are named (endings, shell patterns over the whole path,
            `@attention`, `@mlp`); these layers are factored and no others, wherever they lie.
        keep_dense: patterns of layers that stay dense.

    Raises:
        UsageError: `ratio` is below 1 or so large that a rank is 0, or a pattern matches nothing.
    """
    if not (math.isfinite(ratio) and ratio >= 1):
        raise UsageError(f"ratio must be a finite number of at least 1, got {ratio}")
    named = {target.name for target in find_targets(model, only)} if only else None
    kept = {target.name for target in find_targets(model, keep_dense)} if keep_dense else set()
    outcome = _Rule(model, named, kept)
    found = []
    for name, module, kind in _linears(model):
        wide, high = kind.sizes(module)
        biased = kind.bias(module) is not None
        layer = LayerPlan(name, wide, high, biased, is_timed=kind.product is not None)
        why = outcome.skip_reason(layer)
        found.append(layer.kept_dense(why) if why else replace(layer, rank=_rank(layer, ratio)))
    _check_ranks(found, ratio)
    return tuple(found)


def _rank(layer: LayerPlan, ratio: float) -> int:
    return rank_for(layer.in_features, layer.out_features, ratio)


def _check_ranks(layers: Sequence[LayerPlan], ratio: float) -> None:
    """Raise `UsageError` for a layer to factor without a rank; it says the largest ratio."""
    factored = [layer for layer in layers if not layer.skip_reason]
    if all(layer.rank for layer in factored):
        return
    least = min(factored, key=lambda layer: layer.in_features * layer.out_features
                / (layer.in_features + layer.out_features))  # fmt: skip
    most = least.in_features * least.out_features / (least.in_features + least.out_features)
    lower = f"take at most {math.floor(most * 10) / 10:g}, or " if most >= 1 else ""
    raise UsageError(
        f"ratio must leave every layer a rank of 1 or more, got {ratio}, which leaves {least.name} "
        f"({least.in_features} -> {least.out_features}) none: {lower}keep it dense (--keep-dense)"
    )


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerType]]:
    for name, module in model.named_modules():
        layer = layer_type(module)
        if layer and layer.is_linear and layer.has_one_weight:
            parent = model.get_submodule(name.rpartition(".")[0])
            if not isinstance(parent, LowRankPair):
                yield name, module, layer


class _Rule:
    """Why a layer of this model stays dense, if it does."""

    def __init__(self, model: nn.Module, only: set[str] | None, kept: Collection[str]) -> None:
        self.only, self.kept = only, kept
        self.stacks = tuple(f"{prefix}." for prefix, _ in block_lists(model))
        self.uncalled = tuple(
            f"{name}." if name else ""
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        )
        self.tied = _tied(model)
        self.exceptions = {**_EVERYWHERE, **_exceptions(model)}

    def skip_reason(self, layer: LayerPlan) -> str:
        name = layer.name
        if self.uncalled and name.startswith(self.uncalled):
            return "nn.MultiheadAttention uses its weight without calling it"
        if name in self.tied:
            return "shares its weight"
        if name in self.kept:
            return "as asked for"
        if self.only is not None:
            return "" if name in self.only else "not asked for"
        if not (self.stacks and name.startswith(self.stacks)):
            return "outside of the blocks"
        if layer.out_features < _LEAST_OUTPUTS:
            return f"fewer than {_LEAST_OUTPUTS} outputs"
        if layer.in_features < _LEAST_INPUTS:
            return f"fewer than {_LEAST_INPUTS} inputs"
        found = (why for pattern, why in self.exceptions.items() if fnmatchcase(name, pattern))
        return next(found, "")


def _exceptions(model: nn.Module) -> dict[str, str]:
    kind = str(getattr(getattr(model, "config", None), "model_type", "")).lower()
    names = (kind, type(model).__name__.lower())
    found: dict[str, str] = {}
    for family, patterns in _EXCEPTIONS.items():
        if any(name.startswith(family) for name in names):
            found |= patterns
    return found


def _tied(model: nn.Module) -> set[str]:
    """Layers whose weight another module has too."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def plans_of(layers: Sequence[LayerPlan]) -> tuple[Plan, ...]:
    """The layers to factor.

    Raises:
        RegrowError: there are none.
    """
    if not any(layer.rank for layer in layers):
        reasons = sorted({layer.skip_reason for layer in layers})
        found = f"{len(layers)} that stay dense: {'; '.join(reasons)}" if layers else "none"
        raise RegrowError(
            f"model must have linear layers to factor in its blocks, got {found}: "
            + ("name layers to factor (--only)" if layers else "use the model as it is")
        )
    return tuple(
        Plan(layer.name, layer.in_features, layer.out_features, layer.rank, layer.bias)
        for layer in layers
        if layer.rank
    )


def factored_layers(
    model: nn.Module,
    ratio: float,
    *,
    only: Sequence[str] = (),
    keep_dense: Sequence[str] = (),
) -> tuple[Plan, ...]:
    """The layers that `plan_layers` factors, with the paper's ranks.

    Raises:
        UsageError: as `plan_layers`.
        RegrowError: there is no layer to factor.
    """
    return plans_of(plan_layers(model, ratio, only=only, keep_dense=keep_dense))
