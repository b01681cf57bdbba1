"""Put results of `run.py` into docs/benchmarks.md, between its marks.

    python examples/benchmarks/peers/report.py RESULTS.json [docs/benchmarks.md]

Every table names the peers that are ahead of regrow in it. Without a document the tables are
printed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = "| " + " | ".join(head) + " |"
    return [line, "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]


def ms(row: Found) -> str:
    return f"{digits(row['p50'])} ({digits(row['p10'])} to {digits(row['p90'])})"


def digits(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def mb(count: float | None) -> str:
    return "not told" if count is None else f"{count / 1e6:,.1f}"


def ahead(names: Sequence[str], what: str) -> list[str]:
    told = (
        f"Ahead of regrow in {what}: {', '.join(names)}."
        if names
        else f"No peer is ahead in {what}."
    )
    return ["", told]


def swap(found: Found) -> list[str]:
    ways = found["ways"]
    rows = [
        [name, ms(row["change"]), digits(row["first"]), digits(row["run"]["p50"])]
        for name, row in ways.items()
    ]
    disk = ways["regrow, cached basis"]["change"]["p50"]
    resident = ways["regrow, resident"]["change"]["p50"]
    before = ("loaded before", "resident")
    quicker = [
        name
        for name, row in ways.items()
        if not name.startswith("regrow")
        and row["change"]["p50"] < (resident if name.endswith(before) else disk)
    ]
    sizes = ", ".join(f"{name} {size:,}" for name, size in found["bytes"].items())
    worst = max(row["differs"] for row in ways.values())
    return [
        *table(["way", "change, ms: p50 (p10 to p90)", "first run after it", "a run"], rows),
        *ahead(quicker, "its kind (from disk; loaded before)"),
        f"Bytes of the user's file: {sizes}. Answers of all ways agree to {worst:.0e}.",
    ]


def steady(found: Found) -> list[str]:
    models = found["models"]
    rows = [
        [name, ms(row["ms"]), mb(row["bytes"]), mb(row["private"]), mb(row["peak"])]
        for name, row in models.items()
    ]
    ours = models["PELA, int8, swappable"]
    peers = {
        name: row for name, row in models.items() if name in ("dense, stock int8", "torch + PEFT")
    }
    lines = table(
        ["model", "one run, ms: p50 (p10 to p90)", "MB on disk", "MB private", "MB peak"], rows
    )
    for key, what in (("ms", "time"), ("bytes", "bytes"), ("private", "private RAM")):
        value: Callable[[Found], float] = lambda row, key=key: (  # noqa: E731
            row["ms"]["p50"] if key == "ms" else row[key] or 0
        )
        better = [name for name, row in peers.items() if value(row) < value(ours)]
        lines += ahead(better, f"{what}, held against PELA in int8 with an adapter swapped in")
    return [*lines, "", *many(found["many"])]


def many(found: Found) -> list[str]:
    rows = []
    for name, part in found.items():
        for row in part["rows"]:
            known = row["private"] is not None and part["before"]["private"] is not None
            more = row["private"] - part["before"]["private"] if known else None
            rows.append([
                name, f"{row['count']:,}", mb(more), mb(part["each_on_disk"] * row["count"]),
                digits(row["load_s"]), ms(row["swap"]),
            ])  # fmt: skip
    head = ["", "adapters", "MB of RAM more", "MB on disk", "s to load", "swap, ms"]
    lines = table(head, rows)
    most = {name: part["rows"][-1] for name, part in found.items()}
    quicker = [n for n, r in most.items() if r["swap"]["p50"] < most["regrow"]["swap"]["p50"]]
    each = {name: _each(part) for name, part in found.items()}
    smaller = [name for name, size in each.items() if size < each["regrow"]]
    return [
        *lines,
        *ahead(quicker, "the time of a swap among the most adapters that were tried with each"),
        *ahead(smaller, "private RAM of a resident adapter"),
    ]


def _each(part: Found) -> float:
    """Private bytes of one more resident adapter."""
    last = part["rows"][-1]
    return float(((last["private"] or 0) - (part["before"]["private"] or 0)) / last["count"])


def user_bytes(found: Found) -> list[str]:
    lines = []
    for task, rows in found["rows"].items():
        cells = [
            [
                r["label"],
                r["file"],
                f"{r['bytes']:,}",
                "" if r["accuracy"] is None else f"{r['accuracy']:.1f}",
            ]
            for r in rows
        ]
        lines += [f"{task}:", "", *table(["method", "file", "bytes", "accuracy %"], cells), ""]
        lora = min(r["bytes"] for r in rows if r["label"] == "LoRA r=1")
        larger = [r["label"] for r in rows if r["file"] == "regrow int4" and r["bytes"] > lora]
        larger = [label for label in larger if not label.startswith("LoRA")]
        if larger:
            lines += [f"LoRA r=1 in int4 is smaller than: {', '.join(larger)}.", ""]
    return lines[:-1]


def basis(found: Found) -> list[str]:
    rows = [
        [name, ms(row), f"{row['ns_per_sign']:.2f}", f"{row['of_the_limit']:.0f}"]
        for name, row in found["rows"].items()
    ]
    return [
        *table(["", "ms: p50 (p10 to p90)", "ns a sign", "times the limit"], rows),
        "",
        f"Memory, by copying 128 MB: {found['bandwidth']['gb_per_s']:.1f} GB/s, so writing "
        f"{found['vectors']:,} × {found['entries']:,} bytes takes {found['limit_ms']:.2f} ms at "
        "least.",
    ]


TASKS: dict[str, Callable[[Found], list[str]]] = {
    "swap": swap,
    "steady": steady,
    "user_bytes": user_bytes,
    "basis": basis,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("document", type=Path, nargs="?")
    given = parser.parse_args()
    results = json.loads(given.results.read_text(encoding="utf-8"))
    text = given.document.read_text(encoding="utf-8") if given.document else ""
    for name, found in results.items():
        about = found["machine"]
        cores = "1 core" if about["cores"] == 1 else f"{about['cores']} cores"
        where = (
            f"{about['cpu']}, {cores}, one thread used; ONNX Runtime {about['onnxruntime']}, "
            f"NumPy {about['numpy']}, Python {about['python']}."
        )
        drawn = "\n".join([*TASKS[name](found), "", where])
        if not given.document:
            print(f"## {name}\n\n{drawn}\n")
        marks = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(marks, lambda m, drawn=drawn: f"{m[1]}\n{drawn}\n\n{m[2]}", text, flags=re.S)
    if given.document:
        given.document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
