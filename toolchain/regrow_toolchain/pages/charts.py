"""The two kinds of chart that pages have: named rows along one axis, and lines over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from .axis import Axis, Words, linear_axis
from .canvas import MARGIN, WIDTH, Canvas, Colour
from .marks import Mark
from .text_width import shorten, text_width

__all__ = ["Row", "Series", "dense_row_chart", "line_chart", "row_chart"]

_GAP = 10.0  # points between two texts, or a text and a mark
_HEAD = 20.0  # points of a row's name and figure, above its marks
_LINE = 19.0  # points of a row whose name stands beside its marks
_AXIS = 20.0  # points of the ticks' words
_LINES = 150.0  # points of a line chart's height


@dataclass(frozen=True)
class Row:
    """One row: a name, a figure in words, and marks; a row without marks is a heading."""

    name: str
    figure: str = ""
    marks: Sequence[Mark] = ()


def row_chart(
    rows: Sequence[Row],
    axis: Axis,
    title: str,
    told: str,
    *,
    thick: float = 13.0,
    strong: bool = True,
) -> Markup:
    """Rows one below the other, each with its name and figure above its marks.

    Args:
        told: the chart in words, for a screen reader.
        thick: points that marks are high.
        strong: names are bold.
    """
    step = _HEAD + thick + 7
    end = step * len(rows) + 2
    canvas = Canvas(end + _AXIS)
    axis.draw(canvas, end)
    for number, row in enumerate(rows):
        top = step * number
        canvas.text(WIDTH - MARGIN, top + 15, row.figure, anchor="end")
        width = WIDTH - 2 * MARGIN - text_width(row.figure) - _GAP
        canvas.text(MARGIN, top + 15, shorten(row.name, width, strong=strong), strong=strong)
        for mark in row.marks:
            mark.draw(canvas, axis, top + _HEAD, top + _HEAD + thick)
    return canvas.svg(title, told)


def dense_row_chart(rows: Sequence[Row], axis: Axis, title: str, told: str) -> Markup:
    """Rows with their names to the left of their marks and their figures to the right."""
    named = [row for row in rows if row.marks]
    left, right = (
        max(text_width(words) for words in column) + _GAP + 5
        for column in zip(*((row.name, row.figure) for row in named), strict=True)
    )
    axis = replace(axis, left=MARGIN + left, right=WIDTH - MARGIN - right)
    end = _LINE * len(rows) + 4
    canvas = Canvas(end + _AXIS)
    axis.draw(canvas, end)
    for number, row in enumerate(rows):
        top, heading = _LINE * number, not row.marks
        colour: Colour = "ink" if heading else "muted"
        canvas.text(MARGIN, top + 14, row.name, strong=heading, colour=colour)
        canvas.text(WIDTH - MARGIN, top + 14, row.figure, anchor="end")
        for mark in row.marks:
            mark.draw(canvas, axis, top + 4, top + 16)
    return canvas.svg(title, told)


@dataclass(frozen=True)
class Series:
    """Values at points in time; as many of both."""

    times: Sequence[float]
    values: Sequence[float]
    colour: Colour


def line_chart(
    series: Sequence[Series], words: Words, ends: tuple[str, str], title: str, told: str
) -> Markup:
    """Lines from zero up, over the same time; `ends` are the words below the axis of time."""
    ticks = linear_axis(0, max(value for one in series for value in one.values), words).ticks
    names = [words(tick) if tick else "0" for tick in ticks]
    left = MARGIN + max(map(text_width, names)) + _GAP
    last = max(time for one in series for time in one.times)
    across = Axis((0.0, last), words, left=left)
    heights = replace(across, ticks=ticks, left=10.0 + _LINES, right=10.0)
    canvas = Canvas(_LINES + 26 + _AXIS)
    for tick, name in zip(ticks, names, strict=True):
        y = heights.at(tick)
        canvas.line([(left, y), (across.right, y)], colour="line", layer=1)
        canvas.text(left - _GAP, y + 4, name, colour="muted", anchor="end")
    for one in series:
        pairs = zip(one.times, one.values, strict=True)
        points = [(across.at(time), heights.at(value)) for time, value in pairs]
        canvas.line(points, colour=one.colour, width=2)
        if len(points) == 1:
            canvas.dot(*points[0], colour=one.colour, radius=4)
    canvas.text(left, _LINES + 30, ends[0], colour="muted")
    canvas.text(across.right, _LINES + 30, ends[1], colour="muted", anchor="end")
    return canvas.svg(title, told)
