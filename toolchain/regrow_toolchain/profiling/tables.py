"""The record as tables: the same for the terminal, profile.md and profile.html."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrow_toolchain.pages import GAP, NOT_MEASURED, Table, count, duration, ram, size

from .wording import KINDS, STAGES, case_label, language_parts

__all__ = ["all_tables", "comparison_tables"]

Record = Mapping[str, Any]
_MOST_MODULES = 15


def all_tables(record: Record) -> list[Table]:
    """Every table that the record has rows for."""
    made = [
        _latency(record), _language(record), _cold_start(record), _memory(record),
        _residents(record), _swap(record), _adapters(record), _operators(record),
    ]  # fmt: skip
    return [table for table in made if table is not None and table.rows]


def _latency(record: Record) -> Table:
    head = ["case", "p50", "p90", "p95", "p99", "mean", "min", "max", "p90 − p10", "CPU", "runs"]
    lengths = any(row["length"] for row in record["latency"])
    rows = []
    for row in record["latency"]:
        ms = row["ms"]
        figures = [duration(ms[key]) for key in ("p50", "p90", "p95", "p99", "mean", "min", "max")]
        rows.append([
            case_label(row, lengths=lengths), *figures, duration(ms["spread"] * ms["p50"]),
            duration(row["cpu_ms"]), count(ms["n"]),
        ])  # fmt: skip
    return Table("Time of one run", head, rows)


def _language(record: Record) -> Table | None:
    found = record["language"]
    if not found:
        return None
    rows = [
        [words, *(duration(ms[key]) for key in ("p50", "p90", "p99"))]
        for words, ms in language_parts(record)
    ]
    how = "with a key-value cache" if found["cache"] else "without a cache: all tokens again"
    return Table(f"Language model, {how}", ["", "p50", "p90", "p99"], rows)


def _cold_start(record: Record) -> Table:
    cold = record["cold_start"]
    rows = [[STAGES[row["stage"]], duration(row["ms"])] for row in cold["stages"]]
    together = ["together", duration(cold["total_ms"])]
    return Table("Cold start of a fresh process", ["stage", "time"], [*rows, together])


def _memory(record: Record) -> Table:
    head = ["after", "private", "mapped files", "PSS", "peak so far"]
    keys = ("rss_anon", "rss_file", "pss", "peak")
    rows = [
        [STAGES.get(row["stage"], row["stage"]), *(ram(row[key]) for key in keys)]
        for row in record["memory"]["stages"]
    ]
    return Table("RAM of the process", head, rows)


def _residents(record: Record) -> Table | None:
    head = ["adapters", "stay resident", "private", "peak", "each"]
    rows = [
        [
            count(row["count"]),
            count(row["held"]),
            ram(row["rss_anon"]),
            ram(row["peak"]),
            size(row["each"]),
        ]
        for row in record["residents"] or []
    ]
    return Table("RAM with adapters resident", head, rows)


def _swap(record: Record) -> Table:
    head = ["swap", "installed", "p50", "p90", "p95", "p99", "max", "CPU", "swaps"]
    rows = []
    for row in record["swap"]:
        ms = row["ms"]
        figures = [duration(ms[key]) for key in ("p50", "p90", "p95", "p99", "max")]
        cpu = duration(row["cpu_ms"]) if "cpu_ms" in row else "–"
        rows.append([KINDS[row["kind"]], count(row["installed"]), *figures, cpu, count(ms["n"])])
    return Table("Swap", head, rows)


def _adapters(record: Record) -> Table:
    rows = [
        [a["name"], a["method"], a["storage"], size(a["bytes"]), size(a["resident_bytes"])]
        for a in record["adapters"]
        if not a["reason"]
    ]
    return Table("Adapters", ["adapter", "method", "stored as", "on disk", "expanded"], rows)


def _operators(record: Record) -> Table | None:
    found = record["operators"]
    if not found:
        return None
    total = found["kernels_us"] or 1.0
    rows = [
        [name, duration(spent / 1e3), f"{spent / total:.1%}", count(kernels)]
        for name, spent, kernels in found["modules"]
    ]
    rest = rows[_MOST_MODULES:]
    shown = rows[:_MOST_MODULES] + ([[f"{len(rest)} more", "", "", ""]] if rest else [])
    return Table("Where a run’s time goes", ["module", "time", "share", "kernels"], shown)


def comparison_tables(found: Record) -> list[Table]:
    """A table per group of figures."""
    groups: dict[str, list[list[str]]] = {}
    for row in found["rows"]:
        groups.setdefault(row["group"], []).append(_side_by_side(row))
    head = ["", "differs?", f"B{GAP}/{GAP}A", "A", "B", "interval"]
    return [Table(name[0].upper() + name[1:], head, rows) for name, rows in groups.items()]


def _side_by_side(row: Record) -> list[str]:
    words = duration if row["unit"] == "ms" else ram if row["group"] == "private RAM" else size
    interval = NOT_MEASURED if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
    both = [words(row["a"]), words(row["b"])]
    return [row["name"], _verdict(row), f"{row['ratio']:.2f}", *both, interval]


def _verdict(row: Record) -> str:
    if row["real"] is None:
        return "too few rounds"
    if not row["real"]:
        return "no"
    more, less = ("slower", "faster") if row["unit"] == "ms" else ("larger", "smaller")
    return f"yes, {more if row['ratio'] > 1 else less}"
