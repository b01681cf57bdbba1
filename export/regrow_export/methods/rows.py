"""Coefficients that the file stacks over the targets of one width, by target again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regrow_export.graph import GraphBuilder

__all__ = ["scaled", "scaled_rows"]


def scaled(g: GraphBuilder, inputs: Mapping[str, str], name: str) -> str:
    """float32 [rows, length]: a coefficient tensor times its scales, rounded once."""
    scale = g.op("Unsqueeze", inputs[f"{name}.scale"], g.integers(1))
    return g.op("Mul", g.cast(inputs[name], "float32"), scale)


def scaled_rows(
    g: GraphBuilder, inputs: Mapping[str, str], part: str, widths: Sequence[int], each: int = 1
) -> list[str]:
    """By target, float32 [each, width]: its rows of `<part>.<width>`, times their scales."""
    found = [""] * len(widths)
    for width in dict.fromkeys(widths):
        group = [index for index, other in enumerate(widths) if other == width]
        rows = g.split(scaled(g, inputs, f"{part}.{width}"), len(group), axis=0)
        for index, row in zip(group, rows, strict=True):
            found[index] = row
    return found
