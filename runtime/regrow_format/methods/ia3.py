"""IA³ (arXiv 2205.05638): a layer's outputs, or a feed-forward layer's inputs, are multiplied.

y (1 + s), or base(x (1 + t)); what the paper and PEFT call l is 1 + s and 1 + t.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, UsageError
from ..fields import Fields
from .base import Expansion, Layout, Method, check_bytes, stacked, unstacked

if TYPE_CHECKING:
    from ..adapter_contents import AdapterContents
    from ..basis import BasisCache
    from ..target_rows import Target

__all__ = ["Ia3", "is_feedforward", "shortest_endings"]

# They bound what a small hostile file makes a reader compare: far above the layers of a model.
_MAX_ENDINGS = 1 << 10
_MAX_CHARACTERS = 1 << 10


class Ia3(Method):
    """Config: `feedforward`, endings of the targets whose inputs are multiplied; [] if left out.

    Coefficients: `s.<out>` [targets with that out, out] of the other targets, `t.<in>` of these.
    """

    name = "ia3"
    kinds = ("scale", "input_scale")

    def read_config(self, fields: Fields) -> dict[str, Any]:
        """At most 1,024 endings of 1,024 characters, sorted, each once."""
        endings = list(fields.strings("feedforward"))
        if endings != sorted(set(endings)) or len(endings) > _MAX_ENDINGS:
            raise FormatError(
                f"{fields.where}: feedforward must be at most {_MAX_ENDINGS} endings, sorted, each "
                f"once, got {endings!r:.80}"
            )
        for ending in endings:
            if not 0 < len(ending) <= _MAX_CHARACTERS or not ending.isprintable():
                raise FormatError(
                    f"{fields.where}: feedforward must name endings of targets, of 1 to "
                    f"{_MAX_CHARACTERS} characters that print, got {ending!r:.80}"
                )
        return {"feedforward": endings}

    def layout(self, config: Mapping[str, Any], targets: Sequence[Target]) -> Layout:
        """s of the targets that are no feed-forward layers, t of those that are."""
        outputs, inputs = _widths(config, targets)
        return {**stacked("s", outputs), **stacked("t", inputs)}

    def fills(self, config: Mapping[str, Any], target: Target) -> tuple[str, ...]:
        """Either of the two."""
        return ("input_scale",) if is_feedforward(config, target.name) else ("scale",)

    def expand(self, adapter: AdapterContents, basis: BasisCache) -> Expansion:
        """s [1, out] or t [1, in] per target; the basis is not used."""
        outputs, inputs = _widths(adapter.config, adapter.targets)
        check_bytes("scales", 4 * (sum(outputs) + sum(inputs)))
        s, t = unstacked(adapter, "s", outputs), unstacked(adapter, "t", inputs)
        return {
            target.name: {"input_scale": {"t": next(t)}}
            if is_feedforward(adapter.config, target.name)
            else {"scale": {"s": next(s)}}
            for target in adapter.targets
        }


def is_feedforward(config: Mapping[str, Any], name: str) -> bool:
    """Whether a target's inputs are multiplied, and not its outputs: one of the endings is its."""
    return f".{name}".endswith(_dotted(tuple(config["feedforward"])))


@lru_cache(maxsize=8)
def _dotted(endings: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{ending}" for ending in endings)


def _widths(config: Mapping[str, Any], targets: Sequence[Target]) -> tuple[list[int], list[int]]:
    """In the order of the targets: out of those whose outputs are multiplied, in of the others."""
    outputs, inputs = [], []
    for target in targets:
        if is_feedforward(config, target.name):
            inputs.append(target.in_features)
        else:
            outputs.append(target.out_features)
    return outputs, inputs


def shortest_endings(chosen: Collection[str], others: Collection[str]) -> list[str]:
    """What a config says for the feed-forward layers `chosen` beside the targets `others`, sorted.

    Raises:
        UsageError: a layer's whole path is the end of another's that is not chosen.
    """
    taken = {ending for name in others for ending in _endings(name)}
    found = set()
    for name in chosen:
        ending = next((ending for ending in _endings(name) if ending not in taken), None)
        if ending is None:
            raise UsageError(
                f"feed-forward layers must have paths that no other target's ends with, got {name}"
            )
        found.add(ending)
    return sorted(found)


def _endings(name: str) -> list[str]:
    """From the last part on, the whole path in the end."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
