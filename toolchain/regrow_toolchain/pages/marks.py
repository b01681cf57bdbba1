"""What a row of a chart shows: each mark draws itself along an axis, between two heights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .axis import Axis
from .canvas import Canvas, Colour

__all__ = ["Bar", "Change", "Histogram", "Mark", "Post", "Spread"]


class Mark(Protocol):
    """Something to draw in a row."""

    def draw(self, canvas: Canvas, axis: Axis, top: float, bottom: float) -> None:
        """Draw it between two heights in points."""


@dataclass(frozen=True)
class Bar:
    """From one value to another; nothing where `end` is not above `start`."""

    start: float
    end: float
    colour: Colour

    def draw(self, canvas: Canvas, axis: Axis, top: float, bottom: float) -> None:
        """A rectangle as long as the difference."""
        if self.end > self.start:
            left, right = axis.at(self.start), axis.at(self.end)
            canvas.box(left, right, top, bottom, colour=self.colour)


@dataclass(frozen=True)
class Spread:
    """A distribution: its median as a dot, p90 as a stroke, p99 as a ring."""

    p50: float
    p90: float
    p99: float
    colour: Colour

    def draw(self, canvas: Canvas, axis: Axis, top: float, bottom: float) -> None:
        """A line from the median to p99, with its three marks."""
        y, (p50, p90, p99) = (top + bottom) / 2, map(axis.at, (self.p50, self.p90, self.p99))
        canvas.line([(p50, y), (p99, y)], colour=self.colour, width=1.6)
        canvas.line([(p90, y - 5), (p90, y + 5)], colour=self.colour, width=1.8)
        canvas.dot(p99, y, colour=self.colour, radius=3, hollow=True)
        canvas.dot(p50, y, colour=self.colour, radius=4.4)


@dataclass(frozen=True)
class Change:
    """From a hollow dot to a filled one, each with its standard error on both sides."""

    before: float
    after: float
    before_error: float
    after_error: float
    colour: Colour

    def draw(self, canvas: Canvas, axis: Axis, top: float, bottom: float) -> None:
        """The way from one to the other, two bands and two dots."""
        y = (top + bottom) / 2
        ends = (axis.at(self.before), axis.at(self.after))
        canvas.line([(x, y) for x in ends], colour=self.colour, width=2)
        for value, error, hollow in (
            (self.before, self.before_error, True),
            (self.after, self.after_error, False),
        ):
            shade: Colour = "muted" if hollow else self.colour
            band = [(axis.at(value - error), y), (axis.at(value + error), y)]
            canvas.line(band, colour=shade, width=9, alpha=0.28)
            canvas.dot(axis.at(value), y, colour=shade, radius=4.6, hollow=hollow)


@dataclass(frozen=True)
class Post:
    """A stroke across the row: what the row is held against."""

    value: float
    colour: Colour = "muted"

    def draw(self, canvas: Canvas, axis: Axis, top: float, bottom: float) -> None:
        """A line from top to bottom, below dots and above the grid."""
        x = axis.at(self.value)
        canvas.line([(x, top), (x, bottom)], colour=self.colour, width=1.6, layer=3.5)


@dataclass(frozen=True)
class Histogram:
    """How often: `counts` in equal bins from `low` to `high`; the highest fills the row."""

    low: float
    high: float
    counts: Sequence[int]
    colour: Colour

    def draw(self, canvas: Canvas, axis: Axis, top: float, bottom: float) -> None:
        """A bar per bin, with a tenth of its width between two."""
        step, most = (self.high - self.low) / len(self.counts), max(self.counts)
        for number, count in enumerate(self.counts):
            left, right = (axis.at(self.low + n * step) for n in (number, number + 0.9))
            height = (bottom - top) * count / most
            canvas.box(left, right, bottom - height, bottom, colour=self.colour)
