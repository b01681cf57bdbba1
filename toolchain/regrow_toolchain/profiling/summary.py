"""From what the workers measured to the rows of the record.

A row's `rounds` holds one figure per fresh process (bytes, or a median of times less what the
calling thread waited for a core): how much they differ is the noise that `compare.py` goes by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from regrow_toolchain.measurement import Times

from .settings import Cell

__all__ = [
    "cold_start",
    "language_row",
    "latency_rows",
    "memory_stages",
    "resident_rows",
    "swap_rows",
]

_BINS = 36
_COLD = ("interpreter", "numpy", "onnxruntime", "regrow", "open", "first run")
_PLATFORM = ("interpreter", "numpy", "onnxruntime")
_MEMORY = ("rss_anon", "rss_file", "pss", "peak", "data")
Numbers = Mapping[str, Any]


def times_row(rounds: Sequence[Numbers]) -> dict[str, Any]:
    """`ms`, the distribution over all processes; `rounds`, the own median of each."""
    values = [value for part in rounds for value in part["ms"]]
    return {"ms": asdict(Times.of(values)), "rounds": [part["own_ms"] for part in rounds]}


def latency_rows(
    rounds: Sequence[Sequence[Numbers]], cells: Sequence[Cell]
) -> list[dict[str, Any]]:
    """A row for each point of the grid and each adapter ("" is none)."""
    rows = []
    for number, cell in enumerate(cells):
        parts = [one[number] for one in rounds]
        for name in parts[0]["subjects"]:
            subject = [part["subjects"][name] for part in parts]
            energy = [one["energy_mj"] for one in subject if one["energy_mj"] is not None]
            row = times_row(subject)
            rows.append({
                **asdict(cell),
                "adapter": name or None,
                **row,
                "per_second": 1e3 * cell.batch / row["ms"]["p50"],
                "cpu_ms": median(one["cpu_ms"] for one in subject),
                "energy_mj": median(energy) if energy else None,
                "energy_reason": parts[0]["energy_reason"],
                "histogram": _histogram([value for part in subject for value in part["ms"]]),
            })  # fmt: skip
    return rows


def _histogram(values: Sequence[float]) -> dict[str, Any]:
    """Counts in equal bins; what is longer than p99, or 2.5 medians, is in `beyond`."""
    times = Times.of(values)
    low = times.min
    high = max(min(times.p99, 2.5 * times.p50), low * 1.001)
    counts, beyond = [0] * _BINS, 0
    for value in values:
        place = math.floor((value - low) / (high - low) * _BINS)
        if value > high:
            beyond += 1
        else:
            counts[min(place, _BINS - 1)] += 1
    return {"low": low, "high": high, "counts": counts, "beyond": beyond}


def _by_name(rounds: Sequence[Sequence[Numbers]]) -> dict[str, list[Numbers]]:
    found: dict[str, list[Numbers]] = {stage["name"]: [] for stage in rounds[0]}
    for stages in rounds:
        for stage in stages:
            found[stage["name"]].append(stage)
    return found


def cold_start(rounds: Sequence[Sequence[Numbers]]) -> dict[str, Any]:
    """Milliseconds from the start of a process to its first answer, by stage and together."""
    stages = {name: found for name, found in _by_name(rounds).items() if name in _COLD}
    rows = [
        {"stage": name, "ms": median(_column(found, "ms")), "rounds": _column(found, "own_ms")}
        for name, found in stages.items()
    ]
    total, own = (
        [sum(one) for one in zip(*(_column(found, key) for found in stages.values()), strict=True)]
        for key in ("ms", "own_ms")
    )
    return {"stages": rows, "total_ms": median(total), "rounds": own}


def _column(found: Sequence[Numbers], key: str) -> list[float]:
    return [one[key] for one in found]


def memory_stages(rounds: Sequence[Sequence[Numbers]]) -> dict[str, Any]:
    """Bytes at each stage; `platform`: what Python, NumPy and ONNX Runtime take before a bundle."""
    found = _by_name(rounds)
    rows = []
    for name, stages in found.items():
        memories = [stage["memory"] for stage in stages]
        figures = {key: _median([m[key] for m in memories]) for key in _MEMORY}
        anon = [m["rss_anon"] for m in memories]
        rows.append({"stage": name, **figures, "rounds": [] if None in anon else anon})
    before = next(row for row in rows if row["stage"] == _PLATFORM[-1])
    source = found["interpreter"][0]["memory"]["source"]
    return {"source": source, "stages": rows, "platform": before["rss_anon"]}


def _median(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return round(median(known)) if known else None


def resident_rows(stages: Sequence[Numbers]) -> list[dict[str, Any]]:
    """Memory with N adapters resident; `each`: private bytes that one more takes."""
    steps = [stage for stage in stages if "held" in stage]
    start = steps[0]
    rows = []
    for stage in steps[1:]:
        anon, before = stage["memory"]["rss_anon"], start["memory"]["rss_anon"]
        known = anon is not None and before is not None and stage["held"]
        rows.append({
            "count": stage["count"],
            "held": stage["held"],
            **{key: stage["memory"][key] for key in _MEMORY},
            "each": round((anon - before) / stage["held"]) if known else None,
            "load_ms": stage["ms"],
        })  # fmt: skip
    return rows


def swap_rows(rounds: Sequence[Numbers]) -> list[dict[str, Any]]:
    """A row for each number of adapters and each kind of swap."""
    if not rounds:
        return []
    rows = []
    for count in (part["installed"] for part in rounds[0]["counts"]):
        parts = [p for one in rounds for p in one["counts"] if p["installed"] == count]
        for kind in ("cold", "cached", "resident", "first_run"):
            found = [part[kind] for part in parts]
            row = {"installed": count, "kind": kind, **times_row(found)}
            if "cpu_ms" in found[0]:
                row["cpu_ms"] = median(one["cpu_ms"] for one in found)
            if "read_check_expand_ms" in found[0]:
                columns = zip(*(one["read_check_expand_ms"] for one in found), strict=True)
                row["parts_ms"] = dict(
                    zip(("read", "check", "expand"), map(median, columns), strict=True)
                )
            rows.append(row | {"held": parts[0]["held"], "held_bytes": parts[0]["held_bytes"]})
    return rows


def language_row(rounds: Sequence[Numbers]) -> dict[str, Any]:
    """Prefill, first token, and decode, with tokens per second."""
    first = rounds[0]
    parts = {
        name: times_row([one[name] for one in rounds])
        for name in ("prefill", "first_token", "decode")
        if first[name]
    }
    decode = parts.get("decode")
    return {
        "cache": first["cache"],
        "prompt": first["prompt"],
        "tokens": first["tokens"],
        **parts,
        "tokens_per_second": 1e3 / decode["ms"]["p50"] if decode else None,
    }
