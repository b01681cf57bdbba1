"""Charts: lengths are the values', ticks cover the data, nothing leaves the drawing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow_toolchain.pages import (
    Axis,
    Bar,
    Canvas,
    Change,
    Histogram,
    Post,
    Row,
    Series,
    Spread,
    dense_row_chart,
    duration,
    line_chart,
    linear_axis,
    log_axis,
    row_chart,
)
from regrow_toolchain.pages.axis import round_ticks
from regrow_toolchain.pages.text_width import shorten, text_width

Element = ElementTree.Element
_VALUES = st.floats(1e-3, 1e9)


def _all(svg: str, tag: str) -> list[Element]:
    return ElementTree.fromstring(svg).findall(tag)


def _numbers(element: Element, *names: str) -> list[float]:
    return [float(element.attrib[name]) for name in names]


def _bars(*values: float, **options: bool) -> str:
    rows = [Row(f"row {value:g}", f"{value:g}", [Bar(0, value, "accent")]) for value in values]
    return row_chart(rows, linear_axis(0, max(values), str), "title", "told", **options)


# -- ticks and scales ------------------------------------------------------------------------------


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e9), st.integers(2, 9))
def test_ticks_are_round_few_and_cover_the_data(low: float, span: float, most: int) -> None:
    high = low + span
    ticks = round_ticks(low, high, most)
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    assert ticks[0] <= low + 1e-3 * step
    assert ticks[-1] >= high - 1e-3 * step
    assert 2 <= len(ticks) <= most + 3
    assert f"{step:.3e}"[:5] in ("1.000", "2.000", "5.000")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 28.4, (0, 10, 20, 30)), (0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1.0)), (0, 0, (0, 0.2)),
     (0.62, 1, (0.6, 0.7, 0.8, 0.9, 1.0)), (194, 606, (100, 200, 300, 400, 500, 600, 700))],
)  # fmt: skip
def test_ticks_of_usual_values(low: float, high: float, ticks: tuple[float, ...]) -> None:
    assert round_ticks(low, high)[: len(ticks)] == pytest.approx(ticks)


def test_a_log_axis_has_a_tick_per_power_of_ten() -> None:
    axis = log_axis(0.003, 1.9, duration)
    assert axis.ticks == pytest.approx((0.001, 0.01, 0.1, 1.0, 10.0))
    assert axis.at(0.01) - axis.at(0.001) == pytest.approx(axis.at(10) - axis.at(1))
    assert axis.at(0.0) == axis.left
    assert len(log_axis(0.0, 0.0, duration).ticks) == 2
    assert log_axis(1.0, 1.0, duration).ticks == pytest.approx((1.0, 10.0))


@given(st.lists(_VALUES, min_size=2, max_size=2), st.booleans())
def test_words_of_ticks_do_not_meet(values: list[float], log: bool) -> None:
    make = log_axis if log else linear_axis
    canvas = Canvas(100)
    make(min(values), max(values), duration).draw(canvas, 80)
    spans = sorted(_extent(text) for text in _all(canvas.svg("a", "b"), "text"))
    assert spans
    assert all(right < left for (_, right), (left, _) in pairwise(spans))


# -- marks -----------------------------------------------------------------------------------------


@given(st.lists(_VALUES, min_size=1, max_size=8))
def test_bars_are_as_long_as_their_values(values: list[float]) -> None:
    widths = [_numbers(bar, "width")[0] for bar in _all(_bars(*values), "rect")]
    share = (352 - 12) / linear_axis(0, max(values), str).ticks[-1]
    assert widths == pytest.approx([value * share for value in values], abs=0.02)


def test_bars_stand_on_each_other() -> None:
    marks = [Bar(0, 3, "accent"), Bar(3, 8, "dim"), Bar(8, 8, "amber"), Bar(8, 7, "amber")]
    svg = row_chart([Row("row", "8", marks)], linear_axis(0, 8, str), "a", "b")
    (x, width), (next_x, next_width) = (_numbers(bar, "x", "width") for bar in _all(svg, "rect"))
    assert next_x == pytest.approx(x + width, abs=0.02)
    assert next_width / width == pytest.approx(5 / 3, abs=0.01)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=40).filter(any))
def test_a_histogram_is_as_high_as_its_counts(counts: list[int]) -> None:
    rows = [Row("row", "", [Histogram(10, 20, counts, "grey")])]
    svg = row_chart(rows, linear_axis(10, 20, str), "a", "b", thick=60)
    boxes = [_numbers(box, "y", "height") for box in _all(svg, "rect")]
    assert [height for _, height in boxes] == pytest.approx(
        [60 * count / max(counts) for count in counts], abs=0.02
    )
    assert {round(y + height, 1) for y, height in boxes} == {80.0}


def test_a_change_shows_both_values_and_their_errors() -> None:
    axis = linear_axis(0, 1, str)
    change = Change(0.4, 0.8, 0.05, 0.1, "accent")
    svg = row_chart([Row("user", "", [Post(0.9), change])], axis, "a", "b")
    dots = [_numbers(dot, "cx")[0] for dot in _all(svg, "circle")]
    assert dots == pytest.approx([axis.at(0.4), axis.at(0.8)], abs=0.01)
    bands = [line for line in _all(svg, "polyline") if "stroke-opacity" in line.attrib["style"]]
    lengths = [abs(b[0] - a[0]) for a, b in map(_points, bands)]
    assert lengths == pytest.approx([0.1 * 340, 0.2 * 340], abs=0.02)


@given(st.lists(_VALUES, min_size=2, max_size=9))
def test_lines_are_as_high_as_their_values(values: list[float]) -> None:
    times = [float(n + 1) for n in range(len(values))]
    svg = line_chart([Series(times, values, "accent")], duration, ("start", "end"), "a", "b")
    points = _points(_all(svg, "polyline")[-1])
    top = round_ticks(0, max(values))[-1]
    assert [y for _, y in points] == pytest.approx([160 - 150 * v / top for v in values], abs=0.02)
    assert [x for x, _ in points] == sorted(x for x, _ in points)


# -- the drawing -----------------------------------------------------------------------------------

_WORDS = st.text(st.characters(exclude_categories=["C", "M", "Z"]), max_size=80)
_TRIPLES = st.lists(_VALUES, min_size=3, max_size=3).map(sorted)


@given(st.lists(st.tuples(_WORDS, _TRIPLES), min_size=1, max_size=6), st.booleans())
def test_nothing_leaves_the_drawing(found: list[tuple[str, list[float]]], dense: bool) -> None:
    ends = min(v[0] for _, v in found), max(v[2] for _, v in found)
    rows = [
        Row(words[:8] if dense else words, duration(v[0]), [Spread(*v, "accent"), Post(v[1])])
        for words, v in found
    ]
    draw = dense_row_chart if dense else row_chart
    _check_inside(draw(rows, log_axis(*ends, duration), "title", "told"))


@given(st.lists(_VALUES, min_size=1, max_size=9))
def test_nothing_leaves_a_line_chart(values: list[float]) -> None:
    times = [float(n + 1) for n in range(len(values))]
    lines = [Series(times, values, "accent"), Series(times, values[::-1], "amber")]
    _check_inside(line_chart(lines, duration, ("start", "after 6 s"), "title", "told"))


def _check_inside(svg: str) -> None:
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for left, right, top, bottom in _boxes(root):
        assert left >= 0
        assert right <= width
        assert top >= 0
        assert bottom <= height


def _boxes(root: Element) -> Iterator[tuple[float, float, float, float]]:
    for box in root.findall("rect"):
        x, y, width, height = _numbers(box, "x", "y", "width", "height")
        yield x, x + width, y, y + height
    for dot in root.findall("circle"):
        x, y, radius = _numbers(dot, "cx", "cy", "r")
        yield x - radius - 0.9, x + radius + 0.9, y - radius - 0.9, y + radius + 0.9
    for line in root.findall("polyline"):
        xs, ys = zip(*_points(line), strict=True)
        yield min(xs), max(xs), min(ys), max(ys)
    for text in root.findall("text"):
        y = _numbers(text, "y")[0]
        yield *_extent(text), y - 10, y + 3


def _points(line: Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in line.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def _extent(text: Element) -> tuple[float, float]:
    x, width = _numbers(text, "x")[0], text_width(text.text or "", strong="class" in text.attrib)
    share = {"start": 0.0, "middle": 0.5, "end": 1.0}[text.attrib["style"].split(": ")[-1]]
    return x - share * width - 0.01, x + (1 - share) * width - 0.01


def test_the_same_chart_is_the_same_bytes() -> None:
    assert _bars(1, 2.5) == _bars(1, 2.5)
    assert "id=" not in _bars(1, 2.5)


def test_words_stay_words() -> None:
    evil = """<script>alert("x")</script> & ' --> ]]>"""
    svg = row_chart([Row(evil[:30], "<b>", [Bar(0, 1, "accent")])], _axis(), evil, evil)
    assert "<script" not in svg
    assert "<b>" not in svg
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == f"{evil} {evil}"
    assert root.findtext("title") == evil
    assert {evil[:30], "<b>"} <= {text.text for text in root.findall("text")}


def _axis() -> Axis:
    return linear_axis(0, 1, lambda tick: "")


# -- widths of words -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "regular", "bold"),
    [
        ("vit.encoder.layer.*.attention.attention.query", 22.076, 25.090),
        ("Other labels for the same signs", 15.696, 17.736),
        ("847 µs (p99 1.31 ms)", 10.747, 11.937),
        ("AMX WWW mm", 7.782, 8.629),
        ("ONNX Runtime imported", 12.333, 13.879),
    ],
)
def test_widths_are_on_the_safe_side(words: str, regular: float, bold: float) -> None:
    """Against DejaVu Sans as FreeType measures it (Pillow's getlength), in sizes of the text."""
    for strong, measured in ((False, regular), (True, bold)):
        width = text_width(words, strong=strong) / 12.5
        assert measured <= width <= 1.2 * measured


@given(st.text(max_size=60), st.floats(13, 400))
def test_short_words_fit(words: str, room: float) -> None:
    short = shorten(words, room)
    assert text_width(short) <= room
    assert short == words or "…" in short


def test_what_is_cut() -> None:
    path = "encoder.layer.*.attention.attention.query"
    head, tail = shorten(path, 200).split("…")
    assert path.startswith(head)
    assert path.endswith(tail)
    assert min(len(head), len(tail)) > 5
    assert shorten("Other labels for the same signs", 120).startswith("Other labels")
    assert shorten("Other labels for the same signs", 120).endswith("…")


def test_a_long_name_leaves_room_for_the_figure() -> None:
    svg = row_chart([Row("n" * 99, "847 µs", [Bar(0, 1, "accent")])], _axis(), "a", "b")
    spans = sorted(_extent(t) for t in _all(svg, "text") if t.attrib["y"] == "15")
    assert len(spans) == 2
    assert spans[0][1] < spans[1][0]
