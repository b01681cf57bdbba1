"""The page's charts. Each returns an <svg> that says its figures in words, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from regrow_toolchain.pages import (
    Bar,
    Colour,
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
    percent,
    ram,
    row_chart,
    size,
)

from .wording import KINDS, STAGES, case_label, common_path, language_parts, stages_above

__all__ = [
    "MOST_CASES",
    "cold_chart",
    "grid_chart",
    "language_chart",
    "latency_chart",
    "memory_chart",
    "operators_chart",
    "residents_chart",
    "sustained_chart",
    "swap_chart",
]  # fmt: skip

Record = Mapping[str, Any]
Words = Callable[[float], str]
_MOST_ROWS = 8
MOST_CASES = 16


def latency_chart(record: Record, title: str) -> Markup:
    """Distribution of the times of a run: without an adapter above, with the first one below."""
    cases = _shown(record["latency"])
    low = min(row["histogram"]["low"] for row in cases)
    high = max(row["histogram"]["high"] for row in cases)
    rows = [_distribution(row, "accent" if row["adapter"] else "grey") for row in cases]
    told = "; ".join(_told(row["adapter"] or "no adapter", row["ms"]) for row in cases)
    words = f"Distribution of the time of one run. {told}."
    return row_chart(rows, linear_axis(low, high, duration), title, words, thick=62)


def _shown(rows: Sequence[Record]) -> list[Record]:
    """The first point of the grid, without an adapter and with the first."""
    keys = ("batch", "length", "threads")
    return [row for row in rows if all(row[key] == rows[0][key] for key in keys)][:2]


def _distribution(row: Record, colour: Colour) -> Row:
    """A histogram, with its median as a line."""
    found, ms = row["histogram"], row["ms"]
    hill = Histogram(found["low"], found["high"], found["counts"], colour)
    figure = f"{duration(ms['p50'])} (p99 {duration(ms['p99'])})"
    return Row(row["adapter"] or "no adapter", figure, [hill, Post(ms["p50"], "ink")])


def _told(name: str, ms: Record) -> str:
    return f"{name}: median {duration(ms['p50'])}, p99 {duration(ms['p99'])}"


def memory_chart(record: Record, title: str) -> Markup | str:
    """RAM by stage above what Python, NumPy and ONNX Runtime take: private, and mapped files."""
    added = stages_above(record["memory"])
    if not added:
        return ""
    axis = linear_axis(0, max(sum(map(_drawn, one)) for one in added.values()) or 1e6, size)
    rows = [_two_bars(name, anon, files) for name, (anon, files) in added.items()]
    told = "; ".join(
        f"{name}: {ram(anon)} private, {ram(files)} mapped files"
        for name, (anon, files) in added.items()
    )
    return row_chart(rows, axis, title, f"RAM that each stage adds. {told}.")


def _drawn(value: int | None) -> int:
    """A bar has no length below zero: a stage may give back what one before it took."""
    return max(0, value or 0)


def _two_bars(name: str, anon: int, files: int | None) -> Row:
    figure = ram(anon) if files is None else f"{anon / 1e6:.1f} + {ram(files)}"
    edge = _drawn(anon)
    return Row(name, figure, [Bar(0, edge, "accent"), Bar(edge, edge + _drawn(files), "dim")])


def residents_chart(record: Record, title: str) -> Markup:
    """Private RAM that N adapters take together."""
    rows = [row for row in record["residents"] if row["each"] is not None]
    bars = [(_loaded(row), row["each"] * row["held"]) for row in rows]
    return _bars(bars, size, title, "Private RAM of all resident adapters.", "accent")


def _loaded(row: Record) -> str:
    held = f", of which {row['held']:,} stay" if row["held"] < row["count"] else ""
    return f"{row['count']:,} adapter{'s' if row['count'] > 1 else ''}{held}"


def grid_chart(record: Record, title: str) -> Markup:
    """Median time of a run at the first points of the grid."""
    found = record["latency"]
    lengths = any(row["length"] for row in found)
    rows = [(case_label(row, lengths=lengths), row["ms"]["p50"]) for row in found[:MOST_CASES]]
    return _bars(rows, duration, title, "Median time of a run.", "grey")


def language_chart(record: Record, title: str) -> Markup:
    """Median times of a prompt's run, the first token, and each after it."""
    rows = [(words, ms["p50"]) for words, ms in language_parts(record)]
    return _bars(rows, duration, title, "Median times.", "accent")


def cold_chart(record: Record, title: str) -> Markup:
    """Time of each stage from the start of a process to its first answer."""
    rows = [(STAGES[row["stage"]], row["ms"]) for row in record["cold_start"]["stages"]]
    return _bars(rows, duration, title, "Time of each stage.", "grey")


def operators_chart(record: Record, title: str) -> Markup | str:
    """Share of a run's time by module, without the path that all of them have in common."""
    operators = record["operators"]
    total, modules = operators["kernels_us"] or 1.0, operators["modules"]
    if not modules:
        return ""
    path = common_path(record)
    rows = [(name.removeprefix(path), spent / total) for name, spent, _ in modules[:_MOST_ROWS]]
    rest = sum(spent for _, spent, _ in modules[_MOST_ROWS:]) / total
    if rest:
        rows.append((f"{len(modules) - _MOST_ROWS} other modules", rest))
    told = "Share of the time in kernels by module."
    return _bars(rows, percent, title, told, "accent", strong=False)


def _bars(
    rows: Sequence[tuple[str, float]],
    words: Words,
    title: str,
    told: str,
    colour: Colour,
    *,
    strong: bool = True,
) -> Markup:
    """Horizontal bars from zero, each with its name and figure above."""
    axis = linear_axis(0, max(value for _, value in rows), _whole if words is percent else words)
    drawn = [Row(name, words(value), [Bar(0, value, colour)]) for name, value in rows]
    figures = "; ".join(f"{name} {words(value)}" for name, value in rows)
    return row_chart(drawn, axis, title, f"{told} {figures}.", strong=strong)


def _whole(share: float) -> str:
    return f"{100 * share:.0f}%"


def swap_chart(record: Record, title: str) -> Markup:
    """Times of a swap on a log axis: p50, p90, p99, by kind and number of adapters installed."""
    found = [row for row in record["swap"] if row["kind"] != "first_run"]
    least, most = min(row["ms"]["p50"] for row in found), max(row["ms"]["p99"] for row in found)
    rows = []
    for kind in KINDS:
        if of_kind := [row for row in found if row["kind"] == kind]:
            rows += [Row(KINDS[kind]), *map(_swaps, of_kind)]
    told = "; ".join(
        _told(f"{KINDS[row['kind']]}, {row['installed']} installed", row["ms"]) for row in found
    )
    axis = log_axis(least, most, duration)
    return dense_row_chart(rows, axis, title, f"Swap time, log scale. {told}.")


def _swaps(row: Record) -> Row:
    ms = row["ms"]
    spread = Spread(ms["p50"], ms["p90"], ms["p99"], "accent")
    return Row(f"{row['installed']:,}", duration(ms["p50"]), [spread])


def sustained_chart(record: Record, title: str) -> Markup:
    """p50 and p99 of each stretch of time."""
    windows = record["sustained"]["windows"]
    times = [window["end_s"] for window in windows]
    colours: dict[str, Colour] = {"p99": "amber", "p50": "accent"}
    lines = [
        Series(times, [window[key] for window in windows], colour)
        for key, colour in colours.items()
    ]
    p50, p99 = ([window[key] for window in windows] for key in ("p50", "p99"))
    told = f"p50 from {duration(p50[0])} to {duration(p50[-1])}, p99 at most {duration(max(p99))}"
    ends = ("start", f"after {duration(1e3 * times[-1])}")
    return line_chart(lines, duration, ends, title, f"Time of a run over time. {told}.")
