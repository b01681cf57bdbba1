"""What cases and stages are called, and the sentences that tell what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regrow_toolchain.pages import NOT_MEASURED, count, duration, size

__all__ = [
    "KINDS",
    "PLATFORM",
    "STAGES",
    "case_label",
    "case_words",
    "cold_takeaway",
    "common_path",
    "energy_words",
    "failed",
    "grid_takeaway",
    "language_parts",
    "language_takeaway",
    "latency_takeaway",
    "left_out",
    "memory_takeaway",
    "operators_takeaway",
    "residents_takeaway",
    "stages_above",
    "sustained_takeaway",
    "swap_takeaway",
]

Record = Mapping[str, Any]

STAGES = {
    "interpreter": "Python",
    "numpy": "NumPy imported",
    "onnxruntime": "ONNX Runtime imported",
    "regrow": "regrow imported",
    "open": "bundle open",
    "first run": "first run",
    "10 more runs": "10 more runs",
    "swap": "adapter swapped in",
    "run with adapter": "run with it",
}
PLATFORM = "onnxruntime"  # the last stage that any program pays for which uses ONNX Runtime
KINDS = {
    "cold": "From disk, basis rebuilt",
    "cached": "From disk, basis cached",
    "resident": "Resident in RAM",
    "first_run": "First run after a swap",
}


def case_words(row: Record) -> str:
    """Such as "batch 1, length 16, 2 threads, adapter slanted"."""
    threads = row["threads"]
    parts = [f"batch {row['batch']}"]
    if row["length"]:
        parts.append(f"length {row['length']}")
    parts.append(f"{threads} thread{'s' if threads > 1 else ''}")
    parts.append(f"adapter {row['adapter']}" if row["adapter"] else "no adapter")
    return ", ".join(parts)


def case_label(row: Record, *, lengths: bool) -> str:
    """The same where room is short, such as "batch 1 × 16, 2 threads, slanted"."""
    length = f" × {row['length']}" if lengths and row["length"] else ""
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    return f"batch {row['batch']}{length}, {threads}, {row['adapter'] or 'no adapter'}"


def left_out(record: Record) -> list[str]:
    """A line for each adapter that was not profiled."""
    return [
        f"adapter {a['name']} is left out: {a['reason']}" for a in record["adapters"] if a["reason"]
    ]


def failed(record: Record) -> list[str]:
    """A line for each part of the report that could not be made."""
    return [f"not measured, {part['part']}: {part['reason']}" for part in record["failed"]]


def energy_words(record: Record) -> str:
    """Millijoules a run, or why there are none."""
    row = record["latency"][0]
    if row["energy_mj"] is None:
        return f"{NOT_MEASURED}: {row['energy_reason']}"
    return f"{row['energy_mj']:.3g} mJ a run (whole processor package, other programs included)"


def latency_takeaway(record: Record) -> str:
    """What one run takes, and what an adapter adds."""
    base = record["latency"][0]
    told = f"One run takes {duration(base['ms']['p50'])} at the median"
    tail = f"99 of 100 runs take at most {duration(base['ms']['p99'])}"
    adapted = [row for row in _first_cell(record) if row["adapter"]]
    if not adapted:
        return f"{told}; {tail}."
    change = adapted[0]["ms"]["p50"] / base["ms"]["p50"] - 1
    return f"{told}, {abs(change):.0%} {'more' if change >= 0 else 'less'} with an adapter; {tail}."


def grid_takeaway(record: Record) -> str:
    """The case that gives most answers in a second."""
    best = max(record["latency"], key=lambda row: row["per_second"])
    return f"Most samples in a second: {count(best['per_second'])}, with {case_words(best)}."


def _first_cell(record: Record) -> list[Record]:
    rows: Sequence[Record] = record["latency"]
    keys = ("batch", "length", "threads")
    return [row for row in rows if all(row[key] == rows[0][key] for key in keys)]


def language_parts(record: Record) -> list[tuple[str, Record]]:
    """What a language model's times are of, in words, and their distributions."""
    found = record["language"]
    names = {"prefill": f"Prefill, {found['prompt']} tokens", "first_token": "First token",
             "decode": "Each token after it"}  # fmt: skip
    return [(words, found[name]["ms"]) for name, words in names.items() if found.get(name)]


def language_takeaway(record: Record) -> str:
    """When the first token comes, and how many then come in a second."""
    found = record["language"]
    told = f"The first token comes after {duration(found['first_token']['ms']['p50'])}"
    if not found["tokens_per_second"]:
        return f"{told}."
    return f"{told}, then {count(found['tokens_per_second'])} come in a second."


def cold_takeaway(record: Record) -> str:
    """From the start of a process to the first answer."""
    cold = record["cold_start"]
    most = max(cold["stages"], key=lambda row: row["ms"])
    return (
        f"A fresh process answers after {duration(cold['total_ms'])}; "
        f"most of it: {STAGES[most['stage']]}, {duration(most['ms'])}."
    )


def memory_takeaway(record: Record) -> str:
    """What Python and ONNX Runtime take, and what the bundle adds."""
    memory = record["memory"]
    last = memory["stages"][-1]["rss_anon"]
    if last is None or memory["platform"] is None:
        peak = memory["stages"][-1]["peak"]
        return f"Private memory was not told by this system; the peak was {size(peak)}."
    return (
        f"Python and ONNX Runtime take {size(memory['platform'])} of private RAM before any bundle "
        f"is open; this one adds {size(last - memory['platform'])}."
    )


def stages_above(memory: Record) -> dict[str, tuple[int, int | None]]:
    """By stage in words, bytes of private memory and of mapped files on top of the platform's.

    Empty where the system does not tell; the platform's own stages are left out.
    """
    rows = memory["stages"]
    last = next(place for place, row in enumerate(rows) if row["stage"] == PLATFORM)
    before, told = rows[last], [row for row in rows[last + 1 :] if row["rss_anon"] is not None]
    if before["rss_anon"] is None:
        return {}
    return {
        STAGES.get(row["stage"], row["stage"]): (
            row["rss_anon"] - before["rss_anon"], _less(row["rss_file"], before["rss_file"]),
        )
        for row in told
    }  # fmt: skip


def _less(value: int | None, before: int | None) -> int | None:
    return None if value is None or before is None else value - before


def swap_takeaway(record: Record) -> str:
    """The quickest and the slowest way to another user."""
    rows = {row["kind"]: row for row in record["swap"] if row["installed"] == _least(record)}
    return (
        f"Changing the user takes {duration(rows['resident']['ms']['p50'])} when the adapter is "
        f"in RAM, and {duration(rows['cold']['ms']['p50'])} from disk with nothing prepared."
    )


def _least(record: Record) -> int:
    return int(min(row["installed"] for row in record["swap"]))


def operators_takeaway(record: Record) -> str:
    """Where most of a run's time goes."""
    operators = record["operators"]
    if not operators["modules"]:
        return "ONNX Runtime’s profile named no kernels."
    name, spent, _ = operators["modules"][0]
    share = spent / operators["kernels_us"] if operators["kernels_us"] else 0
    return f"{share:.0%} of the time in kernels goes to {name}, the most of any module."


def common_path(record: Record) -> str:
    """What all module paths of a model begin with, such as "vit."; "" if there is no such thing."""
    firsts = {
        name.partition(".")[0] for name, _, _ in record["operators"]["modules"] if "." in name
    }
    return f"{firsts.pop()}." if len(firsts) == 1 else ""


def residents_takeaway(record: Record) -> str:
    """What one more adapter takes, and how many stay."""
    rows = record["residents"]
    file = next(a["bytes"] for a in record["adapters"] if not a["reason"])
    told = f"One more adapter in RAM takes {size(rows[-1]['each'])}; its file has {size(file)}."
    lost = [row for row in rows if row["held"] < row["count"]]
    if not lost:
        return told
    return (
        f"{told} Of {lost[0]['count']:,} loaded, {lost[0]['held']:,} stay: there is no more room."
    )


def sustained_takeaway(record: Record) -> str:
    """Whether runs became slower."""
    windows = record["sustained"]["windows"]
    first, last = windows[0], windows[-1]
    change = last["p50"] / first["p50"] - 1
    runs = count(sum(window["n"] for window in windows))
    return (
        f"{runs} runs without a pause, in {duration(1e3 * record['sustained']['seconds'])}: the "
        f"median went from {duration(first['p50'])} to {duration(last['p50'])} ({change:+.0%})."
    )
