"""The page's charts. Each returns an <svg> that says its figures in words, too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from regrow_toolchain.pages import Canvas, duration, ram, size

from .wording import KINDS, STAGES, case_label, language_parts

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
_ROW = 40.0
_MOST_ROWS = 8
MOST_CASES = 16
_LONGEST = 38


def latency_chart(record: Record, title: str) -> str:
    """Distribution of the times of a run: without an adapter above, with the first one below."""
    rows = _shown(record["latency"])
    low = min(row["histogram"]["low"] for row in rows)
    high = max(row["histogram"]["high"] for row in rows)
    ticks = _ticks(low, high)
    height = 94.0
    canvas = Canvas(height * len(rows) + 22, (min(low, ticks[0]), max(high, ticks[-1])))
    canvas.ticks(ticks, [duration(t) for t in ticks], 0, height * len(rows) + 2)
    for number, row in enumerate(rows):
        _hill(canvas, height * number, row, "accent" if row["adapter"] else "grey")
    told = "; ".join(_told(row["adapter"] or "no adapter", row["ms"]) for row in rows)
    return canvas.svg(title, f"Distribution of the time of one run. {told}.")


def _shown(rows: Sequence[Record]) -> list[Record]:
    """The first point of the grid, without an adapter and with the first."""
    keys = ("batch", "length", "threads")
    return [row for row in rows if all(row[key] == rows[0][key] for key in keys)][:2]


def _hill(canvas: Canvas, top: float, row: Record, colour: str) -> None:
    """A histogram, with its median as a line and p99 as a ring."""
    found, ms = row["histogram"], row["ms"]
    counts, bottom = found["counts"], top + 88
    step, most = (found["high"] - found["low"]) / len(counts), max(counts)
    for number, count in enumerate(counts):
        left = found["low"] + number * step
        canvas.box(left, left + 0.9 * step, bottom - 60 * count / most, bottom, colour=colour)
    canvas.line([ms["p50"]] * 2, [top + 24, bottom], colour="ink", width=1.6, layer=4)
    canvas.text("left", top + 16, _short(row["adapter"] or "no adapter"), strong=True)
    canvas.text("right", top + 16, f"{duration(ms['p50'])} (p99 {duration(ms['p99'])})")


def _told(name: str, ms: Record) -> str:
    return f"{name}: median {duration(ms['p50'])}, p99 {duration(ms['p99'])}"


def _short(words: str, longest: int = 28) -> str:
    return words if len(words) <= longest else words[: longest - 1].rstrip() + "…"


def _ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers between two others."""
    span = max(high - low, high * 1e-3, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * most >= span * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def _bar_axis(canvas: Canvas, ticks: Sequence[float], labels: Sequence[str], end: float) -> None:
    """Ticks of which the outer two keep their words inside of the chart."""
    canvas.ticks(ticks[1:-1], labels[1:-1], 0, end)
    for edge, place in (("left", 0), ("right", -1)):
        canvas.line([ticks[place]] * 2, [0, end], colour="line", layer=1)
        canvas.text("left" if edge == "left" else "right", end + 15, labels[place], colour="muted")


def _upper(most: float) -> list[float]:
    """Ticks from zero to a round number that is not below `most`."""
    ticks = _ticks(0, most)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else most
    return [n * step for n in range(math.ceil(most / step - 1e-9) + 1)]


def memory_chart(record: Record, title: str) -> str:
    """RAM by stage as stacked bars: Python and ONNX Runtime, what the bundle adds, mapped files."""
    memory = record["memory"]
    rows = [row for row in memory["stages"] if row["rss_anon"] is not None]
    if not rows:
        return ""
    ticks = _upper(max(row["rss_anon"] + (row["rss_file"] or 0) for row in rows))
    end = _ROW * len(rows) + 4
    canvas = Canvas(end + 20, (0, ticks[-1]))
    _bar_axis(canvas, ticks, ["0", *(size(t) for t in ticks[1:])], end)
    for number, row in enumerate(rows):
        top, anon = _ROW * number, row["rss_anon"]
        base = min(anon, memory["platform"] or anon)
        files = row["rss_file"] or 0
        canvas.text("left", top + 15, STAGES.get(row["stage"], row["stage"]), strong=True)
        canvas.text("right", top + 15, _two_sizes(anon, files))
        canvas.box(0, base, top + 21, top + 34, colour="grey")
        canvas.box(base, anon, top + 21, top + 34, colour="accent")
        canvas.box(anon, anon + files, top + 21, top + 34, colour="dim")
    told = "; ".join(
        f"{STAGES.get(row['stage'], row['stage'])}: {ram(row['rss_anon'])} private, "
        f"{ram(row['rss_file'])} mapped files" for row in rows
    )  # fmt: skip
    return canvas.svg(title, f"RAM by stage. {told}.")


def _two_sizes(anon: int, files: int) -> str:
    return f"{anon / 1e6:.1f} + {ram(files)}"


def residents_chart(record: Record, title: str) -> str:
    """Private RAM with N adapters resident."""
    rows = [row for row in record["residents"] or [] if row["rss_anon"] is not None]
    if not rows:
        return ""
    bars = [(_loaded(row), row["rss_anon"], ram) for row in rows]
    return _bars(bars, title, "Private RAM by number of resident adapters.", "accent")


def _loaded(row: Record) -> str:
    held = f", of which {row['held']:,} stay" if row["held"] < row["count"] else ""
    return f"{row['count']:,} adapter{'s' if row['count'] > 1 else ''}{held}"


def grid_chart(record: Record, title: str) -> str:
    """Median time of a run at the first points of the grid."""
    found = record["latency"]
    lengths = any(row["length"] for row in found)
    rows = [
        (_short(case_label(row, lengths=lengths), _LONGEST), row["ms"]["p50"], duration)
        for row in found[:MOST_CASES]
    ]
    return _bars(rows, title, "Median time of a run.", "grey")


def language_chart(record: Record, title: str) -> str:
    """Median times of a prompt's run, the first token, and each after it."""
    rows = [(words, ms["p50"], duration) for words, ms in language_parts(record)]
    return _bars(rows, title, "Median times.", "accent")


def cold_chart(record: Record, title: str) -> str:
    """Time of each stage from the start of a process to its first answer."""
    rows = [(STAGES[row["stage"]], row["ms"], duration) for row in record["cold_start"]["stages"]]
    return _bars(rows, title, "Time of each stage.", "grey")


def operators_chart(record: Record, title: str) -> str:
    """Share of a run's time by module."""
    operators = record["operators"]
    total = operators["kernels_us"] or 1.0
    modules = operators["modules"]
    rows = [(name, spent / total, _share) for name, spent, _ in modules[:_MOST_ROWS]]
    rest = sum(spent for _, spent, _ in modules[_MOST_ROWS:]) / total
    if rest:
        rows.append((f"{len(modules) - _MOST_ROWS} other modules", rest, _share))
    return _bars(rows, title, "Share of the time in kernels by module.", "accent")


def _share(value: float | None) -> str:
    return f"{100 * (value or 0):.0f}%"


def _bars(rows: Sequence[tuple[str, float, Any]], title: str, told: str, colour: str) -> str:
    """Horizontal bars from zero, each with its name and figure above."""
    if not rows:
        return ""
    ticks, words = _upper(max(value for _, value, _ in rows) or 1.0), rows[0][2]
    end = _ROW * len(rows) + 4
    canvas = Canvas(end + 20, (0, ticks[-1]))
    axis = size if words is ram else words
    _bar_axis(canvas, ticks, ["0", *(axis(tick) for tick in ticks[1:])], end)
    for number, (name, value, _) in enumerate(rows):
        top = _ROW * number
        canvas.text("left", top + 15, _tail(name), strong=True)
        canvas.text("right", top + 15, words(value))
        canvas.box(0, value, top + 21, top + 34, colour=colour)
    figures = "; ".join(f"{name} {words(value)}" for name, value, _ in rows)
    return canvas.svg(title, f"{told} {figures}.")


def _tail(name: str) -> str:
    """The end of a long module path says more than its start."""
    return name if len(name) <= _LONGEST else "…" + name[-_LONGEST + 1 :].lstrip(".")


def swap_chart(record: Record, title: str) -> str:
    """Times of a swap on a log axis: p50, p90, p99, by kind and number of adapters installed."""
    rows = [row for row in record["swap"] if row["kind"] != "first_run"]
    low = 10.0 ** math.floor(math.log10(max(1e-5, min(row["ms"]["p50"] for row in rows))))
    most = max(row["ms"]["p99"] for row in rows)
    powers = range(round(math.log10(low)), math.ceil(math.log10(max(most, 10 * low)) - 1e-9) + 1)
    ticks = [10.0**power for power in powers]
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    count, line = len(rows) // len(kinds), 17.0
    end = len(kinds) * (22 + line * count) + 4
    canvas = Canvas(end + 20, (low, ticks[-1]), log=True)
    _bar_axis(canvas, ticks, _sparse([duration(tick) for tick in ticks]), end)
    for number, kind in enumerate(kinds):
        top = number * (22 + line * count)
        canvas.text("left", top + 15, KINDS[kind], strong=True)
        for place, row in enumerate(row for row in rows if row["kind"] == kind):
            _spread(canvas, top + 28 + line * place, row, low)
    told = "; ".join(
        _told(f"{KINDS[r['kind']]}, {r['installed']} installed", r["ms"]) for r in rows
    )
    return canvas.svg(title, f"Swap time, log scale. {told}.")


def _sparse(labels: Sequence[str]) -> list[str]:
    """At most five of them, the last one among them; others are empty."""
    step, last = -(-(len(labels) - 1) // 4), len(labels) - 1
    return [
        label if n == last or (n % step == 0 and last - n >= step) else ""
        for n, label in enumerate(labels)
    ]


def _spread(canvas: Canvas, y: float, row: Record, low: float) -> None:
    """One line: p50 as a dot, p90 as a stroke, p99 as a ring, and how many were installed."""
    p50, p90, p99 = (max(row["ms"][key], low) for key in ("p50", "p90", "p99"))
    canvas.line([p50, p99], [y, y], colour="accent", width=1.6)
    canvas.line([p90, p90], [y - 5, y + 5], colour="accent", width=1.8)
    canvas.dot(p99, y, colour="accent", radius=3, hollow=True)
    canvas.dot(p50, y, colour="accent", radius=4)
    told = f"{row['installed']:,}: {duration(row['ms']['p50'])}"
    canvas.text("left" if row["kind"] != "resident" else "right", y + 4, told, colour="muted")


def sustained_chart(record: Record, title: str) -> str:
    """p50 and p99 of each stretch of time."""
    windows = record["sustained"]["windows"]
    most = max(window["p99"] for window in windows)
    ticks, height = _upper(most), 150.0
    last = windows[-1]["end_s"]
    canvas = Canvas(height + 46, (-0.16 * last, last))
    for tick in ticks:
        y = 10 + height * (1 - tick / ticks[-1])
        canvas.line([0, last], [y, y], colour="line", layer=1)
        canvas.text(0, y + 4, f"{duration(tick) if tick else '0'} ", colour="muted", align="right")
    for key, colour, width in (("p99", "amber", 1.6), ("p50", "accent", 2.2)):
        ys = [10 + height * (1 - window[key] / ticks[-1]) for window in windows]
        canvas.line([window["end_s"] for window in windows], ys, colour=colour, width=width)
        if len(windows) == 1:
            canvas.dot(windows[0]["end_s"], ys[0], colour=colour, radius=4)
    canvas.text(0, height + 30, "start", colour="muted")
    canvas.text("right", height + 30, f"after {duration(1e3 * last)}", colour="muted")
    told = f"p50 from {duration(windows[0]['p50'])} to {duration(windows[-1]['p50'])}"
    return canvas.svg(title, f"Time of a run over time. {told}, p99 at most {duration(most)}.")
