"""Which layers an adapter changes: names or patterns, as PEFT users know `target_modules`."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn

from regrow_export.targets import find_linears, slot_targets
from regrow_runtime.adapter import Target
from regrow_runtime.errors import RegrowError, UsageError

from .structure import block_lists

__all__ = ["find_targets"]

_NEAR = 5


def find_targets(model: nn.Module, patterns: Sequence[str] = ()) -> tuple[Target, ...]:
    """The target layers, sorted by the UTF-8 bytes of their module paths.

    Args:
        model: dense or compressed; a factored pair counts as one layer unless a factor is named.
        patterns: endings of module paths (`query`, `output.dense`), or patterns over the whole
            path (`*.layer.0.*.query`). Without any, every linear layer of the blocks.

    Raises:
        UsageError: a pattern matches nothing; the nearest names are listed.
        RegrowError: there are no patterns, and no linear layers in blocks.
    """
    linears = find_linears(model)
    if not patterns:
        return slot_targets(model, _default(model, list(linears)))
    chosen: set[str] = set()
    for pattern in patterns:
        chosen |= _match(pattern, list(linears))
    return slot_targets(model, sorted(_outermost(chosen)))


def _default(model: nn.Module, names: Collection[str]) -> list[str]:
    stacks = tuple(f"{prefix}." for prefix, _ in block_lists(model))
    found = _outermost([name for name in names if stacks and name.startswith(stacks)])
    if not found:
        raise RegrowError("model must have linear layers in a stack of blocks, got none: "
                          "name the targets")  # fmt: skip
    return found


def _outermost(names: Collection[str]) -> list[str]:
    """Without those that lie inside another: a factored pair is one layer."""
    return [n for n in names if not any(n.startswith(f"{o}.") for o in names if o != n)]


def _match(pattern: str, names: Sequence[str]) -> set[str]:
    found = {
        name
        for name in names
        if name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)
    }
    if not found:
        # What people mistype is the last part: `q_proj` where the model says `query`.
        endings = sorted({name.rpartition(".")[2] for name in names if not name[-1].isdigit()})
        near = difflib.get_close_matches(pattern, [*names, *endings], n=_NEAR, cutoff=0.4)
        raise UsageError(
            f"target must match a linear layer, got {pattern!r}, which matches none; "
            f"{'near: ' + ', '.join(near) if near else 'endings: ' + ', '.join(endings)}"
        )
    return found
