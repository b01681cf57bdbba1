"""One chart as inline SVG: no pyplot, no settings left behind, colours are CSS variables.

matplotlib draws the shapes with placeholder colours and words; both are replaced in its output, so
that the page's style sheet rules colours and fonts, and no word can be read as markup or formula.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from html import escape
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure

__all__ = ["WIDTH", "Canvas"]

# Points. On a phone of 390 pixels one point is about one pixel, so text of 12.5 stays readable.
WIDTH = 352.0
_MARGIN = 6.0
_NAMES = ("ink", "muted", "line", "grey", "dim", "accent", "amber", "indigo", "surface")
_PLACEHOLDERS = {name: f"#fe01{number:02x}" for number, name in enumerate(_NAMES, start=16)}
_SETTINGS = {"svg.fonttype": "none", "text.parse_math": False, "path.simplify": False}
_NO_METADATA: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))


class Canvas:
    """A drawing area: x in the data's units, y in points from the top, `height` points high."""

    def __init__(self, height: float, limits: tuple[float, float], *, log: bool = False) -> None:
        self._figure = Figure(figsize=(WIDTH / 72, height / 72))
        share = _MARGIN / WIDTH
        self._axes = self._figure.add_axes((share, 0, 1 - 2 * share, 1))
        self._axes.set_axis_off()
        if log:
            self._axes.set_xscale("log")
        self._axes.set_xlim(*limits)
        self._axes.set_ylim(height, 0)
        self._words: list[tuple[str, bool]] = []

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
        at_edge = isinstance(x, str)
        where = self._axes.get_yaxis_transform() if at_edge else self._axes.transData
        self._axes.text(
            {"left": 0.0, "right": 1.0}[x] if isinstance(x, str) else x,
            y,
            f"~{len(self._words)}~",
            transform=where,
            ha="right" if x == "right" else align,
            va="baseline",
            color=_PLACEHOLDERS[colour],
            fontsize=12.5,
        )
        self._words.append((words, strong))

    def line(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        *,
        colour: str,
        width: float = 1.0,
        style: str | tuple[int, tuple[float, float]] = "-",
        alpha: float = 1.0,
        layer: float = 2,
    ) -> None:
        """A line through points."""
        self._axes.plot(
            xs,
            ys,
            color=_PLACEHOLDERS[colour],
            linewidth=width,
            linestyle=style,
            alpha=alpha,
            solid_capstyle="butt",
            clip_on=False,
            zorder=layer,
        )

    def dot(self, x: float, y: float, *, colour: str, radius: float, hollow: bool = False) -> None:
        """A circle, filled or hollow."""
        self._axes.plot(
            [x],
            [y],
            marker="o",
            markersize=2 * radius,
            color=_PLACEHOLDERS[colour],
            markerfacecolor=_PLACEHOLDERS["surface" if hollow else colour],
            markeredgewidth=1.8 if hollow else 0,
            clip_on=False,
            zorder=4,
        )

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
        self._axes.fill(
            [left, right, right, left],
            [top, top, bottom, bottom],
            facecolor=_PLACEHOLDERS[colour],
            edgecolor="none",
            alpha=alpha,
            clip_on=False,
            zorder=3,
        )

    def ticks(self, values: Sequence[float], labels: Sequence[str], top: float, end: float) -> None:
        """Grid lines from `top` to `end`, with their labels below."""
        for value, label in zip(values, labels, strict=True):
            self.line([value, value], [top, end], colour="line", layer=1)
            self.text(value, end + 15, label, colour="muted", align="center")

    def svg(self, name: str, title: str, description: str) -> str:
        """The chart as one <svg> element; `name` makes its ids unique on the page."""
        settings: Any = {**_SETTINGS, "svg.hashsalt": name}
        with matplotlib.rc_context(settings), io.StringIO() as file:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
            drawn = file.getvalue()
        body = self._with_words(_with_colours(_trimmed(drawn[drawn.index("<svg") :], name)))
        box = re.search(r'viewBox="[^"]*"', drawn)
        label = escape(f"{title} {description}")
        head = f'<svg class="chart" role="img" {box.group() if box else ""} aria-label="{label}">'
        return f"{head}<title>{escape(title)}</title>{body}</svg>"

    def _with_words(self, drawn: str) -> str:
        def element(match: re.Match[str]) -> str:
            words, strong = self._words[int(match["index"])]
            kept = re.findall(r"(?:fill|text-anchor): [^;]+", match["style"])
            weight = ' class="strong"' if strong else ""
            style, place = "; ".join(kept), match["place"]
            return f'<text{weight} style="{style}" {place}>{escape(words)}</text>'

        pattern = (
            r'<text style="(?P<style>[^"]*)" (?P<place>x="[^"]*" y="[^"]*")[^>]*>'
            r"~(?P<index>\d+)~</text>"
        )
        return re.sub(pattern, element, drawn)


def _with_colours(drawn: str) -> str:
    """Placeholder colours become CSS variables."""
    for name, colour in _PLACEHOLDERS.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    return drawn


def _trimmed(drawn: str, name: str) -> str:
    """The inside of <svg>: no style sheet, comments or line breaks, ids with the chart's name."""
    inside = drawn[drawn.index(">") + 1 : drawn.rindex("</svg>")]
    inside = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata.*?</metadata>", "", inside, flags=re.S)
    inside = re.sub(r'<g id="[^"]*">', "<g>", inside)
    inside = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", inside)
    return re.sub(r">\s+<", "><", re.sub(r"\s*\n\s*", " ", inside)).strip()
