"""One chart as inline SVG, in points from its upper left corner; colours are the page's variables.

No plotting library: pages are also made on devices, and matplotlib's SVG does not take the page's
colours (light, dark, print) and is the same twice only with a salt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from xml.etree import ElementTree

from markupsafe import Markup

__all__ = ["MARGIN", "WIDTH", "Anchor", "Canvas", "Colour"]

# Points. On a phone of 390 pixels one point is about one pixel, so text of 12.5 stays readable.
WIDTH = 352.0
MARGIN = 6.0
Anchor = Literal["start", "middle", "end"]
Colour = Literal[
    "ink", "muted", "line", "surface", "grey", "dim", "accent", "amber", "indigo"
]  # fmt: skip


class Canvas:
    """A drawing area `WIDTH` by `height` points; what has a higher layer lies above."""

    def __init__(self, height: float) -> None:
        self._height = height
        self._parts: list[tuple[float, ElementTree.Element]] = []

    def _add(self, layer: float, tag: str, style: str, **attributes: str | float) -> None:
        given = {name: _number(value) for name, value in attributes.items()}
        self._parts.append((layer, ElementTree.Element(tag, {"style": style, **given})))

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        colour: Colour = "ink",
        anchor: Anchor = "start",
        strong: bool = False,
    ) -> None:
        """One line of words whose baseline is at `y`."""
        style = f"fill: var(--{colour}); text-anchor: {anchor}"
        self._add(3, "text", style, x=x, y=y, **({"class": "strong"} if strong else {}))
        self._parts[-1][1].text = words

    def line(
        self,
        points: Sequence[tuple[float, float]],
        *,
        colour: Colour,
        width: float = 1.0,
        alpha: float = 1.0,
        layer: float = 2,
    ) -> None:
        """A line through points."""
        style = f"fill: none; stroke: var(--{colour}); stroke-width: {_number(width)}"
        style += f"; stroke-opacity: {_number(alpha)}" if alpha < 1 else ""
        path = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self._add(layer, "polyline", style, points=path)

    def dot(
        self, x: float, y: float, *, colour: Colour, radius: float, hollow: bool = False
    ) -> None:
        """A circle, filled or hollow."""
        style = f"fill: var(--{'surface' if hollow else colour})"
        style += f"; stroke: var(--{colour}); stroke-width: 1.8" if hollow else ""
        self._add(4, "circle", style, cx=x, cy=y, r=radius)

    def box(self, left: float, right: float, top: float, bottom: float, *, colour: Colour) -> None:
        """A filled rectangle."""
        place = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        self._add(3, "rect", f"fill: var(--{colour})", **place)

    def svg(self, title: str, description: str) -> Markup:
        """The chart as one <svg> element, whose figures a screen reader finds in words."""
        about = {"class": "chart", "role": "img"}
        about["viewBox"] = f"0 0 {_number(WIDTH)} {_number(self._height)}"
        root = ElementTree.Element("svg", {**about, "aria-label": f"{title} {description}"})
        ElementTree.SubElement(root, "title").text = title
        root.extend(element for _, element in sorted(self._parts, key=lambda part: part[0]))
        return Markup(ElementTree.tostring(root, encoding="unicode"))


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f}".rstrip("0").rstrip(".")
