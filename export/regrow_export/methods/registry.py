"""Graph builders by method. A further method is one file here and one line in `BUILDERS`."""

from __future__ import annotations

from regrow_format.errors import UsageError

from .base import GraphMethod
from .bitfit import BitfitGraph
from .fourierft import FourierftGraph
from .head import HeadGraph
from .ia3 import Ia3Graph
from .lora import LoraGraph
from .nola import NolaGraph
from .ssf import SsfGraph
from .vera import VeraGraph

__all__ = ["BUILDERS", "get_builder"]

BUILDERS: dict[str, GraphMethod] = {
    builder.name: builder
    for builder in (
        NolaGraph(),
        VeraGraph(),
        FourierftGraph(),
        LoraGraph(),
        Ia3Graph(),
        SsfGraph(),
        BitfitGraph(),
        HeadGraph(),
    )
}


def get_builder(name: str) -> GraphMethod:
    """The builder of a method; `UsageError` lists those that can be rebuilt inside a graph."""
    if name not in BUILDERS:
        raise UsageError(f"method must be one of {', '.join(BUILDERS)} for a graph, got {name!r}")
    return BUILDERS[name]
