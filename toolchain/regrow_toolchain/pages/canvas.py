"""One chart as inline SVG, written by hand: no plotting library, colours are CSS variables.

x is in the data's units, y in points from the top. Words are escaped: none can be read as markup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Literal

__all__ = ["WIDTH", "Canvas"]

# Points. On a phone of 390 pixels one point is about one pixel, so text of 12.5 stays readable.
WIDTH = 352.0
_MARGIN = 6.0
_ANCHORS = {"left": "start", "center": "middle", "right": "end"}


class Canvas:
    """A drawing area `height` points high; what has a higher layer lies above."""

    def __init__(self, height: float, limits: tuple[float, float], *, log: bool = False) -> None:
        self._height = height
        self._scale = math.log10 if log else float
        self._low, self._high = (self._scale(limit) for limit in limits)
        self._parts: list[tuple[float, str]] = []

    def _x(self, value: float) -> float:
        share = (self._scale(value) - self._low) / (self._high - self._low)
        return _MARGIN + share * (WIDTH - 2 * _MARGIN)

    def _add(self, layer: float, element: str) -> None:
        self._parts.append((layer, element))

    def text(
        self,
        x: float | Literal["left", "right"],
        y: float,
        words: str,
        *,
        colour: str = "ink",
        align: Literal["left", "center", "right"] = "left",
        strong: bool = False,
    ) -> None:
        """One line of words; `x` in data units, or at an edge of the chart."""
        at = {"left": _MARGIN, "right": WIDTH - _MARGIN}[x] if isinstance(x, str) else self._x(x)
        anchor = _ANCHORS["right" if x == "right" else align]
        weight = ' class="strong"' if strong else ""
        style = f"fill: var(--{colour}); text-anchor: {anchor}"
        place = f'x="{_number(at)}" y="{_number(y)}"'
        self._add(3, f'<text{weight} style="{style}" {place}>{escape(words)}</text>')

    def line(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        *,
        colour: str,
        width: float = 1.0,
        alpha: float = 1.0,
        layer: float = 2,
    ) -> None:
        """A line through points."""
        points = " ".join(
            f"{_number(self._x(x))},{_number(y)}" for x, y in zip(xs, ys, strict=True)
        )
        style = f"fill: none; stroke: var(--{colour}); stroke-width: {_number(width)}"
        style += f"; stroke-opacity: {_number(alpha)}" if alpha < 1 else ""
        self._add(layer, f'<polyline style="{style}" points="{points}"/>')

    def dot(self, x: float, y: float, *, colour: str, radius: float, hollow: bool = False) -> None:
        """A circle, filled or hollow."""
        style = f"fill: var(--{'surface' if hollow else colour})"
        style += f"; stroke: var(--{colour}); stroke-width: 1.8" if hollow else ""
        place = f'cx="{_number(self._x(x))}" cy="{_number(y)}" r="{_number(radius)}"'
        self._add(4, f'<circle style="{style}" {place}/>')

    def box(
        self,
        left: float,
        right: float,
        top: float,
        bottom: float,
        *,
        colour: str,
        alpha: float = 1.0,
    ) -> None:
        """A filled rectangle."""
        low, high = sorted((self._x(left), self._x(right)))
        style = f"fill: var(--{colour})" + (f"; opacity: {_number(alpha)}" if alpha < 1 else "")
        place = f'x="{_number(low)}" y="{_number(top)}"'
        extent = f'width="{_number(high - low)}" height="{_number(bottom - top)}"'
        self._add(3, f'<rect style="{style}" {place} {extent}/>')

    def ticks(self, values: Sequence[float], labels: Sequence[str], top: float, end: float) -> None:
        """Grid lines from `top` to `end`, with their labels below."""
        for value, label in zip(values, labels, strict=True):
            self.line([value, value], [top, end], colour="line", layer=1)
            self.text(value, end + 15, label, colour="muted", align="center")

    def svg(self, title: str, description: str) -> str:
        """The chart as one <svg> element, whose figures a screen reader finds in words."""
        ordered = sorted(self._parts, key=lambda part: part[0])
        label = escape(f"{title} {description}")
        box = f'viewBox="0 0 {_number(WIDTH)} {_number(self._height)}"'
        head = f'<svg class="chart" role="img" {box} aria-label="{label}">'
        body = "".join(element for _, element in ordered)
        return f"{head}<title>{escape(title)}</title>{body}</svg>"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
