"""Which layers an adapter changes: names or patterns, as PEFT users know `target_modules`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from regrow_export.layers import block_lists, find_biased, find_layers, find_linears, layer_type
from regrow_format.adapter import Target
from regrow_format.errors import RegrowError, UsageError
from regrow_format.methods import Method, get_method

from .layer_names import FUSED, PROJECTIONS, SETS, fused_in, role_of
from .structure import find_head

__all__ = ["find_targets", "matching"]

_NEAR = 5
_ALL = "@all"
_ALL_LINEAR = "all-linear"  # PEFT's word
_NAMED = (_ALL, *SETS)
# What nn.MultiheadAttention uses without calling a layer.
_UNCALLED = frozenset({"in_proj", "in_proj_weight", "out_proj"})


def find_targets(
    model: nn.Module, patterns: Sequence[str] = (), *, method: str | None = None
) -> tuple[Target, ...]:
    """The target layers, sorted by the UTF-8 bytes of their module paths.

    Args:
        model: dense or compressed; a factored pair counts as one layer unless a factor is named.
        patterns: endings of module paths (`query`, `output.dense`), patterns over the whole path
            (`*.layer.0.*.query`), or sets of layers in the blocks: `@qv` (query and value; where
            they are fused with others in one layer, that layer), `@attention` (`@qv`, key and
            output), `@mlp`, `@all` (every linear layer; the default). PEFT's `all-linear` is every
            linear layer of the model but its head and convolutions.
        method: the adapter method, whose `targets` say which layers it can change.

    Raises:
        UsageError: a pattern matches nothing; the nearest names are listed, or the fused layer that
            holds what was asked for.
        RegrowError: there are no patterns, and no linear layers in blocks.
    """
    kind = get_method(method) if method else None
    if kind and not kind.kinds:
        if patterns:
            raise UsageError(
                f"method {method} changes no layers, got targets {', '.join(patterns)}"
            )
        return ()
    search = _Search(model, kind)
    chosen: set[str] = set()
    for pattern in patterns or (_ALL,):
        chosen |= search.match(pattern)
    return tuple(search.target(name) for name in sorted(_outermost(chosen), key=str.encode))


class _Search:
    """The layers of a model that a method can change, and what patterns match among them."""

    def __init__(self, model: nn.Module, method: Method | None) -> None:
        self._model, self._method = model, method
        sort = method.targets if method else "linear"
        self._biased, self._noun = sort == "biased", _NOUNS[sort]
        self._attention = tuple(
            f"{name}." if name else ""
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        )
        self._linears = _sizes(find_linears(model))
        found = self._linears if sort == "linear" else _sizes(_FINDERS[sort](model))
        self._found = {n: w for n, w in found.items() if not self._in_attention(n)}
        self._stacks = tuple(f"{prefix}." for prefix, _ in block_lists(model))

    def target(self, name: str) -> Target:
        """A layer that `match` found."""
        return Target(name, *self._found[name])

    def match(self, pattern: str) -> set[str]:
        """Module paths, at least one."""
        if pattern == _ALL:
            return self._blocks()
        if pattern == _ALL_LINEAR:
            return self._all_linear()
        if pattern.startswith("@"):
            return self._named(pattern)
        found = matching(pattern, self._found)
        if not found:
            self._explain(pattern)
        return found

    def _blocks(self) -> set[str]:
        found = set(_outermost(self._inside(self._found)))
        if not found:
            layers = self._noun.format("s")
            raise RegrowError(
                f"model must have {layers} in a stack of blocks, got none: name the targets, or "
                "train a head alone (method head)"
            )
        return found

    def _inside(self, names: Collection[str]) -> list[str]:
        """Those that lie in a stack of blocks."""
        return [name for name in names if self._stacks and name.startswith(self._stacks)]

    def _all_linear(self) -> set[str]:
        layers = find_layers(self._model).items()
        convolutions = {name for name, (module, kind) in layers if kind.is_convolution(module)}
        left_out = convolutions.union(_heads(self._model))
        found = {n for n in self._found if n in self._linears and n not in left_out}
        if not found:
            raise UsageError(f"target {_ALL_LINEAR} must match a layer, got a model without any")
        return found

    def _named(self, name: str) -> set[str]:
        if name not in SETS:
            raise UsageError(f"a set of targets must be one of {', '.join(_NAMED)}, got {name!r}")
        roles = self._roles(name, self._found)
        if not roles:
            self._explain_attention(name)
            self._explain_bias(name, self._roles(name, self._linears))
            raise UsageError(
                f"target {name} must match a layer of the blocks, got none whose name says so: "
                f"name the targets; endings: {', '.join(_endings(self._linears))}"
            )
        lacking = {"query", "value"} - {*roles.values()}
        if name == "@qv" and len(lacking) == 1 and "fused" not in roles.values():
            missing, there = lacking.pop(), sorted({n.rpartition(".")[2] for n in roles})
            raise UsageError(
                f"target @qv must match query and value, got {', '.join(there)} and no {missing}: "
                "name the targets"
            )
        return set(roles)

    def _roles(self, name: str, among: Collection[str]) -> dict[str, str | None]:
        """By module path the role of the layers that a named set has; norms have none."""
        found = {path: role_of(self._in_block(path)) for path in self._block_linears()}
        return {p: r for p, r in found.items() if p in among and r in SETS[name]}

    def _block_linears(self) -> list[str]:
        """The linear layers of the blocks; of the whole model if it has no stack of blocks."""
        names = [n for n in self._linears if not self._in_attention(n)]
        return _outermost(self._inside(names) if self._stacks else names)

    def _in_block(self, path: str) -> str:
        """The path from the stack on, so that no name above it says anything."""
        stack = next((s for s in self._stacks if path.startswith(s)), "")
        return path.removeprefix(stack)

    # -- a pattern that matches nothing -----------------------------------------------------------

    def _explain(self, pattern: str) -> None:
        self._explain_attention(pattern)
        self._explain_bias(pattern, matching(pattern, self._linears))
        wanted = pattern.rpartition(".")[2].strip("*?")
        roles = {
            path.rpartition(".")[2]: role_of(self._in_block(path)) for path in self._block_linears()
        }
        if fused := sorted(n for n in fused_in(wanted) if roles.get(n) in ("fused", "mlp")):
            raise UsageError(
                f"target must match a linear layer, got {pattern!r}, which matches none: "
                f"{FUSED[fused[0]]} are one layer here, target it as a whole: {', '.join(fused)}"
            )
        # The same layer by its name in this model: `query` where PEFT's example says `q_proj`.
        near = [n for n, r in roles.items() if wanted in PROJECTIONS and r == role_of(wanted)]
        endings = _endings(self._found)
        # What people mistype is the last part: `querry` where the model says `query`.
        near = near or difflib.get_close_matches(
            pattern, [*self._found, *endings], n=_NEAR, cutoff=0.4
        )
        raise UsageError(
            f"target must match a {self._noun.format('')}, got {pattern!r}, which matches none; "
            f"{'near: ' + ', '.join(near) if near else 'endings: ' + ', '.join(endings)}"
        )

    def _explain_bias(self, pattern: str, linears: Collection[str]) -> None:
        """Raise if the pattern matches layers that only lack a bias."""
        if self._biased and self._method and linears:
            raise UsageError(
                f"target must match a layer with a bias, got {pattern!r}: "
                f"{min(linears)} has none, and method {self._method.name} trains nothing else"
            )

    def _explain_attention(self, pattern: str) -> None:
        """Raise if the pattern means what `nn.MultiheadAttention` keeps to itself."""
        if not self._attention:
            return
        own = pattern.rpartition(".")[2].strip("*?")
        inner = any(self._in_attention(name) for name in matching(pattern, self._linears))
        if inner or own in _UNCALLED or pattern in ("@qv", "@attention") or own in PROJECTIONS:
            raise UsageError(
                f"target must match a layer that the model calls, got {pattern!r}: "
                "nn.MultiheadAttention multiplies by its parameters in_proj_weight and "
                "out_proj.weight itself; target the MLP (@mlp), or build the model with linear "
                "layers for query, key and value"
            )

    def _in_attention(self, name: str) -> bool:
        return bool(self._attention) and name.startswith(self._attention)


def _all_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, (module, _) in find_layers(model).items()}


# By `Method.targets`.
_NOUNS = {"linear": "linear layer{}", "biased": "layer{} with a bias", "any": "layer{}"}
_FINDERS: dict[str, Callable[[nn.Module], dict[str, nn.Module]]] = {
    "biased": find_biased,
    "any": _all_layers,
}


def matching(pattern: str, names: Collection[str]) -> set[str]:
    """By ending in whole parts, or as a shell pattern over the whole path."""
    return {
        name
        for name in names
        if name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)
    }


def _outermost(names: Collection[str]) -> list[str]:
    """Without those that lie inside another: a factored pair is one layer."""
    there = set(names)
    return [n for n in names if there.isdisjoint(n[:i] for i, c in enumerate(n) if c == ".")]


def _endings(names: Collection[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names if not name[-1].isdigit()})


def _sizes(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """(in, out) by module path."""
    typed = ((name, module, layer_type(module)) for name, module in layers.items())
    return {name: layer.sizes(module) for name, module, layer in typed if layer}


def _heads(model: nn.Module) -> list[str]:
    """Module paths of the layers that give the model's output: those PEFT leaves alone."""
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    if output is not None:
        return [name for name, module in model.named_modules() if module is output]
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    if classes is None:  # a plain module: its last linear layer
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
        classes = last[0].out_features if last else None
    return list(find_head(model, classes))
