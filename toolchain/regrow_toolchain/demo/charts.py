"""The report's five charts. Each returns an <svg> that says all its figures in words, too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from regrow_toolchain.pages import (
    MARGIN,
    Bar,
    Canvas,
    Change,
    Colour,
    Post,
    Row,
    Spread,
    count,
    duration,
    linear_axis,
    log_axis,
    percent,
    row_chart,
    size,
)

from .wording import PLATFORM_STAGES, platform_bytes, signed_size

__all__ = ["accuracy_chart", "bytes_chart", "latency_chart", "memory_chart", "swap_chart"]

Numbers = Mapping[str, Any]


def accuracy_chart(users: Sequence[Numbers], title: str, *, plain: float) -> Markup:
    """Before and after for every user, with one standard error on each side.

    Args:
        plain: accuracy of the compressed model on plain digits, marked in every row.
    """
    lowest = min(min(u["before"] - u["before_se"], u["after"] - u["after_se"]) for u in users)
    axis = linear_axis(min(0.9, max(0.0, lowest)), 1.0, lambda share: f"{100 * share:.0f}%")
    rows = [_user(user, plain) for user in users]
    told = "; ".join(
        f"{u['title']}: before {percent(u['before'])}, after {percent(u['after'])}" for u in users
    )
    words = f"Accuracy by user. {told}; compressed model on plain digits {percent(plain)}."
    return row_chart(rows, axis, title, words, thick=22)


def _user(user: Numbers, plain: float) -> Row:
    colour: Colour = "accent" if user["gain"] >= 0 else "amber"
    change = Change(user["before"], user["after"], user["before_se"], user["after_se"], colour)
    figure = f"{percent(user['before'])} → {percent(user['after'])}"
    return Row(user["title"], figure, [Post(plain), change])


def bytes_chart(sizes: Numbers, title: str) -> Markup:
    """Nested squares whose areas are the sizes, smallest in front, each with its figure."""
    rows: list[tuple[str, int, Colour]] = [
        ("Full model", sizes["dense_model"], "dim"),
        ("Compressed model", sizes["compressed_model"], "grey"),
        (f"LoRA, rank {sizes['lora_rank']}", sizes["lora"], "indigo"),
        ("LoRA in int4", sizes["lora_int4"], "amber"),
        ("regrow adapter", sizes["adapter"], "accent"),
    ]
    side, gap, names = 184.0, 40.0, 210.0
    canvas = Canvas(side + 4)
    ranked = sorted(rows, key=lambda row: -row[1])
    for number, (name, value, colour) in enumerate(ranked):
        edge = side * math.sqrt(value / ranked[0][1])
        right, top, line = MARGIN + edge, side + 2 - edge, 14 + gap * number
        canvas.box(MARGIN, right, top, side + 2, colour=colour)
        leader = [(right, top), (names - 5, line - 4)]
        canvas.line(leader, colour="ink", width=0.8, layer=3.5)
        canvas.dot(right, top, colour="ink", radius=1.6)
        canvas.box(names, names + 9, line - 9, line, colour=colour)
        canvas.text(names + 15, line, name, strong=name == "regrow adapter")
        canvas.text(names + 15, line + 16, size(value), colour="muted")
    told = "; ".join(f"{name} {size(value)}" for name, value, _ in rows)
    return canvas.svg(title, f"Bytes, drawn as areas. {told}.")


def swap_chart(swap: Numbers, title: str) -> Markup:
    """Times of a swap on a log scale: median, p90, p99."""
    names = {
        "Cold: basis rebuilt": swap["cold"],
        "Basis cached": swap["cached"],
        "Resident in RAM": swap["resident"],
    }
    least, most = min(r["p50"] for r in names.values()), max(r["p99"] for r in names.values())
    axis = log_axis(least, most, duration, least=1e-4)
    rows = [Row(name, _figure(row), [_spread(row, "accent")]) for name, row in names.items()]
    return row_chart(rows, axis, title, f"Swap time, log scale. {_told(names)}", thick=15)


def latency_chart(latency: Numbers, title: str) -> Markup:
    """Time of one run, from zero: median as a bar, p90 and p99 as a tail."""
    names = {
        "No adapter": latency["base"],
        "With an adapter": latency["adapter"],
        "Merged model": latency["merged"],
        "Seeded model": latency["seeded"],
    }
    rows = [_run(name, row, name == "With an adapter") for name, row in names.items()]
    axis = linear_axis(0, max(row["p99"] for row in names.values()), duration)
    return row_chart(rows, axis, title, f"Time of one run. {_told(names)}", thick=9)


def _run(name: str, row: Numbers, adapted: bool) -> Row:
    bar, tail = Bar(0, row["p50"], "grey"), _spread(row, "muted")
    if adapted:
        bar, tail = Bar(0, row["p50"], "accent"), _spread(row, "accent")
    return Row(name, _figure(row), [bar, tail])


def _spread(row: Numbers, colour: Colour) -> Spread:
    return Spread(row["p50"], row["p90"], row["p99"], colour)


def _figure(row: Numbers) -> str:
    return f"{duration(row['p50'])} (p99 {duration(row['p99'])})"


def _told(names: Mapping[str, Numbers]) -> str:
    return "; ".join(
        f"{name}: p50 {duration(row['p50'])}, p90 {duration(row['p90'])}, "
        f"p99 {duration(row['p99'])}, {count(row['n'])} times"
        for name, row in names.items()
    )


def memory_chart(stages: Sequence[Numbers], title: str) -> Markup:
    """Bytes that each stage has on top of what Python and ONNX Runtime take in any program."""
    platform = platform_bytes(stages)
    added = {
        stage["stage"]: _above(stage["rss_anon"], platform) for stage in stages[PLATFORM_STAGES:]
    }
    axis = linear_axis(0, max([0, *(value or 0 for value in added.values())]) or 1e6, size)
    rows = [
        Row(name, signed_size(value), [Bar(0, value or 0, "accent")])
        for name, value in added.items()
    ]
    told = "; ".join(f"{name}: {signed_size(value)}" for name, value in added.items())
    return row_chart(rows, axis, title, f"Memory by stage, above {size(platform)}. {told}.")


def _above(value: int | None, platform: int | None) -> int | None:
    return None if value is None or platform is None else value - platform
