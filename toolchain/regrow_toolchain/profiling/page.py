"""profile.html and compare.html: one file each, no script, no network, phone and desktop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from regrow_toolchain.pages import Panel, Tile, duration, ram, render_page, size

from . import charts, wording
from .tables import all_tables, comparison_tables
from .text import comparison_notes, notes

__all__ = ["comparison_page", "profile_page"]

Record = Mapping[str, Any]
Chart = Callable[[Record, str], Markup | str]
Takeaway = Callable[[Record], str]


def profile_page(record: Record) -> str:
    """The page for a record."""
    return render_page(
        __package__,
        "profile.html.jinja",
        r=record,
        name=str(record["bundle"]["path"]).rstrip("/").rsplit("/", 1)[-1],
        chips=_chips(record),
        tiles=_tiles(record),
        panels=_panels(record),
        more_cases=len(record["latency"]) - charts.MOST_CASES,
        path=wording.common_path(record) if record["operators"] else "",
        platform=_platform(record["memory"]),
        tables=all_tables(record),
        facts=_facts(record),
        notes=notes(record),
    )


def _chips(record: Record) -> list[tuple[str, str]]:
    noise, fit = record["noise"], record["fit"]
    quiet = "bad" if "not quiet" in noise["note"] else "" if noise["others"] is None else "good"
    found = [(quiet, _sentence(noise["note"]))]
    if fit:
        found.append(({True: "good", False: "bad", None: ""}[fit["fits"]], fit["answer"]))
    found += [
        ("bad", _sentence(line)) for line in (*wording.failed(record), *wording.left_out(record))
    ]
    where = wording.case_words({**record["latency"][0], "adapter": None})
    where = where.removesuffix(", no adapter")
    return [
        *found,
        ("", f"unless told otherwise: {where}, profile “{record['settings']['profile']}”"),
        ("", f"measured in {duration(1e3 * record['seconds'])}"),
    ]


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _tiles(record: Record) -> list[Tile]:
    """The headline figures."""
    first, cold, bundle = record["latency"][0], record["cold_start"], record["bundle"]
    start = "from a process’s start to its first answer"
    fast = f"p99 {duration(first['ms']['p99'])}, no adapter"
    return [
        Tile("One run", duration(first["ms"]["p50"]), fast),
        Tile("Cold start", duration(cold["total_ms"]), start),
        _memory_tile(record["memory"]),
        Tile("Bundle on disk", size(bundle["bytes"]), f"{bundle['mode']}, {bundle['variant']}"),
        _last_tile(record),
    ]


def _memory_tile(memory: Record) -> Tile:
    last, platform = memory["stages"][-1], memory["platform"]
    if last["rss_anon"] is None or platform is None:
        return Tile("Peak RAM", ram(last["peak"]), memory["source"])
    note = f"on top of {ram(platform)} for Python and ONNX Runtime"
    return Tile("Private RAM it adds", ram(last["rss_anon"] - platform), note)


def _last_tile(record: Record) -> Tile:
    first = record["latency"][0]
    if record["swap"]:
        rows = {row["kind"]: row["ms"] for row in reversed(record["swap"])}
        note = f"to an adapter that is in RAM: {duration(rows['resident']['p50'])}"
        return Tile("Swap from disk", duration(rows["cold"]["p50"]), note)
    energy = first["energy_mj"]
    told = "not measured" if energy is None else f"{energy:.3g} mJ"
    return Tile("CPU time of a run", duration(first["cpu_ms"]), f"energy: {told}")


def _platform(memory: Record) -> str:
    """Private memory and mapped files before any bundle is open, such as "22.1 MB + 22.5 MB"."""
    row = next(row for row in memory["stages"] if row["stage"] == wording.PLATFORM)
    return " + ".join(ram(row[key]) for key in ("rss_anon", "rss_file") if row[key] is not None)


def _panels(record: Record) -> dict[str, Panel]:
    """Each chart that the record has figures for, with its takeaway."""
    residents = record["residents"]
    wanted: dict[str, tuple[object, Takeaway, Chart]] = {
        "latency": (True, wording.latency_takeaway, charts.latency_chart),
        "grid": (len(record["latency"]) > 2, wording.grid_takeaway, charts.grid_chart),
        "language": (record["language"], wording.language_takeaway, charts.language_chart),
        "memory": (True, wording.memory_takeaway, charts.memory_chart),
        "swap": (record["swap"], wording.swap_takeaway, charts.swap_chart),
        "operators": (record["operators"], wording.operators_takeaway, charts.operators_chart),
        "cold": (True, wording.cold_takeaway, charts.cold_chart),
        "residents": (
            residents and residents[-1]["each"] is not None,
            wording.residents_takeaway,
            charts.residents_chart,
        ),
        "sustained": (record["sustained"], wording.sustained_takeaway, charts.sustained_chart),
    }
    found = {}
    for name, (has, takeaway, chart) in wanted.items():
        if has:
            title = takeaway(record)
            found[name] = Panel(title, chart(record, title))
    return found


def _facts(record: Record) -> dict[str, str]:
    """What was measured, and where."""
    about, bundle, settings = record["environment"], record["bundle"], record["settings"]
    return {
        "Processor": f"{about['cpu']}, cores: {about['cores']}, "
        f"governor: {about['governor'] or 'not told'}",
        "System": about["system"],
        "Versions": f"regrow {about['regrow']}, ONNX Runtime {about['onnxruntime']}, "
        f"NumPy {about['numpy']}, Python {about['python']}",
        "Bundle": f"{bundle['task']}, {bundle['targets']} layers with slots, "
        f"backbone {bundle['backbone_id'][:19]}…",
        "Runs": f"at least {settings['runs']} and {settings['seconds']:g} s of each case, in "
        f"{settings['rounds']} fresh processes, after warming up",
    }


def comparison_page(found: Record) -> str:
    """The page for what `compare` found."""
    real = sum(bool(row["real"]) for row in found["rows"])
    verdict = f"{real} of {len(found['rows'])} figures differ" if real else "No figure differs"
    return render_page(
        __package__,
        "compare.html.jinja",
        verdict=verdict,
        chips=[("", f"A: {found['a']}"), ("", f"B: {found['b']}")],
        notes=comparison_notes(found),
        tables=comparison_tables(found),
    )
