"""Graphs that expand adapters themselves: seeded ones, and expanders beside a swappable one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import FormatError
from .fields import Fields
from .graph_spec import TensorSpec, parse_tensor
from .record import Record

__all__ = ["ExpanderSpec", "SeededSpec", "parse_expander", "parse_seeded"]


class SeededSpec(Record):
    """How a seeded graph takes an adapter: its method, config and targets are built in.

    `inputs` maps "seed" and every coefficient tensor (and "<tensor>.scale") to a graph input; it is
    empty where they are constants. `storage` is "int8" where codes of 2 to 8 bits are fed as int8,
    else "fp32".
    """

    method: str
    config: Mapping[str, Any]
    storage: str
    targets: tuple[str, ...]
    inputs: Mapping[str, str]


class ExpanderSpec(Record):
    """A graph that makes slots' tensors of adapters' numbers, for one method, config and targets.

    `inputs` are what a `SeededSpec` lists; `outputs` are names of slots' inputs.
    """

    method: str
    config: Mapping[str, Any]
    storage: str
    targets: tuple[str, ...]
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]


def parse_seeded(part: Fields) -> SeededSpec:
    """Read and check the manifest's `seeded`."""
    inputs = part.take("inputs", dict)
    named = all(isinstance(v, str) for v in inputs.values())
    if not named or (inputs and "seed" not in inputs):
        raise FormatError(f"{part.where}: inputs must name the seed's and every tensor's")
    spec = SeededSpec(**_built_in(part), inputs=inputs)
    part.done()
    return spec


def parse_expander(part: Fields) -> ExpanderSpec:
    """Read and check one of the manifest's `expanders`."""
    spec = ExpanderSpec(
        **_built_in(part),
        file=part.take("file", str),
        inputs=tuple(parse_tensor(item) for item in part.objects("inputs")),
        outputs=part.strings("outputs"),
    )
    part.done()
    return spec


def _built_in(part: Fields) -> dict[str, Any]:
    """What an expansion has built in."""
    return {
        "method": part.take("method", str),
        "config": part.take("config", dict),
        "storage": part.choice("storage", ("int8", "fp32")),
        "targets": part.strings("targets"),
    }
