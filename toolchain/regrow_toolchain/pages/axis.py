"""From values to points along a chart: round ticks that cover the data, linear or logarithmic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .canvas import MARGIN, WIDTH, Canvas
from .text_width import text_width

__all__ = ["Axis", "linear_axis", "log_axis", "round_ticks"]

Words = Callable[[float], str]
_GAP = 8.0  # points between the words of two ticks


@dataclass(frozen=True)
class Axis:
    """A scale from the first tick to the last, between two edges in points.

    Attributes:
        ticks: rising; at least two.
        words: what a tick is called; zero of a linear axis is "0".
        log: logarithmic; all ticks are above zero.
        left, right: points where the first and the last tick are.
    """

    ticks: tuple[float, ...]
    words: Words
    log: bool = False
    left: float = MARGIN
    right: float = WIDTH - MARGIN

    def at(self, value: float) -> float:
        """Points from the left; what lies beyond an end is at that end."""
        low, high = self._scaled(self.ticks[0]), self._scaled(self.ticks[-1])
        share = (self._scaled(value) - low) / (high - low)
        return self.left + min(1.0, max(0.0, share)) * (self.right - self.left)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, self.ticks[0])) if self.log else value

    def draw(self, canvas: Canvas, end: float) -> None:
        """A grid line per tick from the top down to `end`, and their words below."""
        for tick in self.ticks:
            x = self.at(tick)
            canvas.line([(x, 0.0), (x, end)], colour="line", layer=1)
        for x, words in self._labels():
            canvas.text(x, end + 15, words, colour="muted", anchor="middle")

    def _labels(self) -> list[tuple[float, str]]:
        """Middles of the words: every tick's, or every second's and so on, as many as have room."""
        every = [self._label(tick) for tick in reversed(self.ticks)]
        return next(
            found
            for step in range(1, len(every) + 1)
            if _have_room(found := every[::step]) or len(found) == 1
        )

    def _label(self, tick: float) -> tuple[float, str]:
        """Where the middle of a tick's words is, so that they stay inside of the chart."""
        words = self.words(tick) if tick or self.log else "0"
        half = text_width(words) / 2
        return min(max(self.at(tick), MARGIN + half), WIDTH - MARGIN - half), words


def _have_room(labels: Sequence[tuple[float, str]]) -> bool:
    """Whether words do not meet; from right to left."""
    return all(
        right - text_width(words) / 2 >= left + text_width(before) / 2 + _GAP
        for (right, words), (left, before) in pairwise(labels)
    )


def linear_axis(low: float, high: float, words: Words) -> Axis:
    """An axis with round ticks, the first not above `low`, the last not below `high`."""
    return Axis(round_ticks(low, high), words)


def log_axis(low: float, high: float, words: Words, least: float = 1e-5) -> Axis:
    """An axis with a tick per power of ten; values below `least` are at its start."""
    first = math.floor(math.log10(max(low, least)) + 1e-9)
    last = max(first + 1, math.ceil(math.log10(max(high, least)) - 1e-9))
    return Axis(tuple(10.0**power for power in range(first, last + 1)), words, log=True)


def round_ticks(low: float, high: float, most: int = 5) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten that cover `low` to `high` in few steps.

    The step is the smallest with which `most` of them are at least as long as what is covered.
    """
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * most >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(number * step for number in range(first, max(last, first + 1) + 1))
