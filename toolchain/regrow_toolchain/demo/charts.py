"""The report's five charts. Each returns an <svg> that says all its figures in words, too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from regrow_toolchain.pages import WIDTH, Canvas, count, duration, percent, size

from .wording import PLATFORM_STAGES, platform_bytes

__all__ = ["accuracy_chart", "bytes_chart", "latency_chart", "memory_chart", "swap_chart"]

Numbers = Mapping[str, Any]
_LONGEST = 32  # characters of a row's name that fit beside its figures
_ROW = 44.0  # points: a line of text above a mark
_USER_ROW = 54.0


def _short(words: str) -> str:
    return words if len(words) <= _LONGEST else words[: _LONGEST - 1].rstrip() + "…"


def _tick_step(span: float) -> float:
    """A round step that cuts `span` into at most five."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(m * power for m in (1, 2, 5, 10) if m * power * 5 >= span * 0.999)


def _steps(low: float, high: float) -> list[float]:
    step = _tick_step(high - low)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def accuracy_chart(users: Sequence[Numbers], backbone: Numbers, title: str) -> str:
    """Before and after for every user, with one standard error on each side."""
    lowest = min(min(u["before"] - u["before_se"], u["after"] - u["after_se"]) for u in users)
    low = max(0.0, math.floor(10 * lowest - 0.2) / 10)
    end = _USER_ROW * len(users) + 2
    canvas = Canvas(end + 22, (low, 1.0))
    ticks = _steps(low, 1.0)
    canvas.ticks(ticks[:-1], [f"{100 * t:.0f}%" for t in ticks[:-1]], 0, end)
    canvas.line([1, 1], [0, end], colour="line", layer=1)
    canvas.text("right", end + 15, "100%", colour="muted")
    for number, user in enumerate(users):
        top, x = _USER_ROW * number, backbone["compressed"]["accuracy"]
        canvas.line([x, x], [top + 24, top + 44], colour="muted", width=1.6, layer=1.5)
        _before_after(canvas, top, user)
    told = "; ".join(
        f"{u['title']}: before {percent(u['before'])}, after {percent(u['after'])}" for u in users
    )
    plain = f"compressed model on plain digits {percent(backbone['compressed']['accuracy'])}"
    return canvas.svg(title, f"Accuracy by user. {told}; {plain}.")


def _before_after(canvas: Canvas, top: float, user: Numbers) -> None:
    """One row: the name and both figures, then a hollow and a filled dot."""
    y, colour = top + 34, "accent" if user["gain"] >= 0 else "amber"
    canvas.text("left", top + 17, _short(user["title"]), strong=True)
    canvas.text("right", top + 17, f"{percent(user['before'])} → {percent(user['after'])}")
    canvas.line([user["before"], user["after"]], [y, y], colour=colour, width=2)
    for key, shade in (("before", "muted"), ("after", colour)):
        x, error = user[key], user[f"{key}_se"]
        canvas.line([x - error, x + error], [y, y], colour=shade, width=9, alpha=0.28)
        canvas.dot(x, y, colour=shade, radius=4.6, hollow=key == "before")


def bytes_chart(sizes: Numbers, title: str) -> str:
    """Nested squares whose areas are the sizes, smallest in front, each with its figure."""
    rows = [
        ("Full model", sizes["dense_model"], "dim"),
        ("Compressed model", sizes["compressed_model"], "grey"),
        (f"LoRA, rank {sizes['lora_rank']}", sizes["lora"], "indigo"),
        ("LoRA in int4", sizes["lora_int4"], "amber"),
        ("regrow adapter", sizes["adapter"], "accent"),
    ]
    side, gap, names = 184.0, 40.0, 204.0
    canvas = Canvas(side + 4, (0, WIDTH - 12))
    ranked = sorted(rows, key=lambda row: -row[1])
    for number, (name, value, colour) in enumerate(ranked):
        edge = side * math.sqrt(value / ranked[0][1])
        top, line = side + 2 - edge, 14 + gap * number
        canvas.box(0, edge, top, side + 2, colour=colour)
        canvas.line([edge, names - 5], [top, line - 4], colour="ink", width=0.8, layer=3.5)
        canvas.dot(edge, top, colour="ink", radius=1.6)
        canvas.box(names, names + 9, line - 9, line, colour=colour)
        canvas.text(names + 15, line, name, strong=name == "regrow adapter")
        canvas.text(names + 15, line + 16, size(value), colour="muted")
    told = "; ".join(f"{name} {size(value)}" for name, value, _ in rows)
    return canvas.svg(title, f"Bytes, drawn as areas. {told}.")


def swap_chart(swap: Numbers, title: str) -> str:
    """Times of a swap on a log scale: median, p90, p99."""
    rows = [
        ("Cold: basis rebuilt", swap["cold"]),
        ("Basis cached", swap["cached"]),
        ("Resident in RAM", swap["resident"]),
    ]
    least = max(1e-4, min(row["p50"] for _, row in rows))
    low = 10.0 ** math.floor(math.log10(least))
    most = max(low * 10, max(row["p99"] for _, row in rows))
    powers = range(round(math.log10(low)), math.ceil(math.log10(most) - 1e-9) + 1)
    ticks = [10.0**power for power in powers]
    canvas = Canvas(_ROW * len(rows) + 28, (low, ticks[-1]), log=True)
    _time_axis(canvas, ticks, _ROW * len(rows) + 6)
    for number, (name, row) in enumerate(rows):
        _spread(canvas, _ROW * number, name, row, low)
    return canvas.svg(title, "Swap time, log scale. " + _told(rows))


def latency_chart(latency: Numbers, title: str) -> str:
    """Time of one run, from zero: median as a bar, p90 and p99 as a tail."""
    names = ("base", "adapter", "merged", "seeded")
    titles = ("No adapter", "With an adapter", "Merged model", "Seeded model")
    rows = [(title, latency[name]) for title, name in zip(titles, names, strict=True)]
    most = max(row["p99"] for _, row in rows) or 1.0
    step = _tick_step(most)
    ticks = _steps(0, math.ceil(most / step - 1e-9) * step)
    canvas = Canvas(_ROW * len(rows) + 28, (0, ticks[-1]))
    _time_axis(canvas, ticks, _ROW * len(rows) + 6)
    for number, (name, row) in enumerate(rows):
        y = _ROW * number + 31
        canvas.box(0, row["p50"], y - 4, y + 4, colour="accent" if number == 1 else "grey")
        _spread(canvas, _ROW * number, name, row, 0, "accent" if number == 1 else "muted")
    return canvas.svg(title, "Time of one run. " + _told(rows))


def _time_axis(canvas: Canvas, ticks: Sequence[float], end: float) -> None:
    labels = [duration(tick) if tick else "0" for tick in ticks]
    canvas.ticks(ticks[1:-1], labels[1:-1], 0, end)
    for edge, tick, label in (("left", ticks[0], labels[0]), ("right", ticks[-1], labels[-1])):
        canvas.line([tick, tick], [0, end], colour="line", layer=1)
        canvas.text("left" if edge == "left" else "right", end + 15, label, colour="muted")


def _spread(
    canvas: Canvas, top: float, name: str, row: Numbers, low: float, colour: str = "accent"
) -> None:
    """One row: the name and the median, then p50 (dot), p90 (stroke) and p99 (ring)."""
    y = top + 31
    p50, p90, p99 = (max(row[key], low) for key in ("p50", "p90", "p99"))
    canvas.text("left", top + 17, name, strong=True)
    canvas.text("right", top + 17, f"{duration(row['p50'])} (p99 {duration(row['p99'])})")
    canvas.line([p50, p99], [y, y], colour=colour, width=1.6)
    canvas.line([p90, p90], [y - 5, y + 5], colour=colour, width=1.8)
    canvas.dot(p99, y, colour=colour, radius=3, hollow=True)
    canvas.dot(p50, y, colour=colour, radius=4.6)


def _told(rows: Sequence[tuple[str, Numbers]]) -> str:
    return "; ".join(
        f"{name}: p50 {duration(row['p50'])}, p90 {duration(row['p90'])}, "
        f"p99 {duration(row['p99'])}, {count(row['n'])} times"
        for name, row in rows
    )


def memory_chart(stages: Sequence[Numbers], peak: int | None, title: str) -> str:
    """Memory by stage, bytes: grey is there before any bundle, the rest came with it; the peak."""
    rows = [*stages, {"stage": "Peak of the process", "rss_anon": peak}]
    most = max(row["rss_anon"] or 0 for row in rows) or 1e6
    step = _tick_step(most / 1e6)
    ticks = _steps(0, math.ceil(most / 1e6 / step - 1e-9) * step)
    end = _ROW * len(rows) + 6
    canvas = Canvas(end + 22, (0, ticks[-1]))
    if any(row["rss_anon"] for row in rows):
        canvas.ticks(ticks[1:-1], [f"{tick:g} MB" for tick in ticks[1:-1]], 0, end)
        canvas.text("left", end + 15, "0", colour="muted")
        canvas.text("right", end + 15, f"{ticks[-1]:g} MB", colour="muted")
    for number, row in enumerate(rows):
        with_bundle = PLATFORM_STAGES <= number < len(stages)
        base = platform_bytes(stages) if with_bundle else row["rss_anon"]
        _stage(canvas, _ROW * number, row, base, "grey" if number < len(stages) else "dim")
    told = "; ".join(f"{row['stage']}: {size(row['rss_anon'])}" for row in rows)
    return canvas.svg(title, f"Memory by stage. {told}.")


def _stage(canvas: Canvas, top: float, stage: Numbers, base: int | None, shade: str) -> None:
    """One row: the name and the figure, then a bar up to `base` and the rest above it; bytes."""
    value = stage["rss_anon"]
    canvas.text("left", top + 17, _short(stage["stage"]), strong=True)
    canvas.text("right", top + 17, size(value), colour="muted" if value is None else "ink")
    if value is None:
        return
    before = value if base is None else min(value, base)
    canvas.box(0, before / 1e6, top + 25, top + 36, colour=shade)
    if value > before:
        canvas.box(before / 1e6, value / 1e6, top + 25, top + 36, colour="accent")
