"""profile.html and compare.html: one file each, no script, no network, phone and desktop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from regrow_toolchain.pages import (
    chips,
    definitions,
    document,
    duration,
    figure,
    key,
    paragraphs,
    ram,
    scroll_table,
    size,
    style,
    tiles,
)

from . import charts, wording
from .tables import Table, all_tables, comparison_tables
from .text import comparison_notes, notes

__all__ = ["comparison_page", "profile_page"]

Record = Mapping[str, Any]
Chart = Callable[[Record, str], str]

_WORDS = {
    "p50, p90, p99": "Half, 90% and 99% of the measured times were this short or shorter. p50 is "
    "the median.",
    "Spread": "p90 less p10, as a share of p50.",
    "Bundle": "The folder that a device needs: the model in ONNX and a manifest.",
    "Adapter": "One small file that makes the model fit one user.",
    "Swap": "Making another user’s adapter the active one, without loading the model again.",
    "Basis": "Pseudo-random numbers that an adapter is a sum of; the device makes them again from "
    "a seed.",
    "Installed, resident": "On disk; expanded and in RAM.",
    "Private": "RAM that belongs to this process alone (RssAnon).",
    "Mapped files": "Parts of files in RAM, such as program libraries; several processes can share "
    "them (RssFile).",
    "PSS": "All RAM of the process, with what is shared divided by the number that share it.",
    "Kernel": "One operator at work inside of ONNX Runtime.",
    "KB, MB": "1,000 and 1,000,000 bytes.",
}
_LATENCY = (
    "How often each time was measured: bars as high as the count, the line is the median. Longer "
    "times than the axis shows are in p99. Each case ran in several fresh processes, in turns."
)
_LANGUAGE = (
    "Medians. Prefill is one run over the whole prompt; the first token needs it, and those after "
    "it are made one at a time."
)
_OPERATORS = (
    "From ONNX Runtime’s own profile, with the adapter if one was given: medians of each kernel. "
    "A star stands for all layers. Fused kernels have lost their module’s name."
)
_COLD = (
    "A fresh process each time. The files were in the system’s cache: a first start after "
    "switching on takes longer."
)
_SWAP = (
    f"{key('dot')} median (p50), {key('tick')} p90, {key('ring own')} p99. The number before each "
    "time is how many adapters are installed, for the last: resident. Log scale: each line is ten "
    "times the one before."
)
_RAM = (
    f"{key('grey')} Python, NumPy and ONNX Runtime, {key('accent')} what regrow, the bundle and "
    f"the adapter add: private memory, the first figure. {key('dim')} mapped files, the second, "
    "most of them program libraries. Figures from "
)


def profile_page(record: Record) -> str:
    """The page for a record."""
    name = str(record["bundle"]["path"]).rstrip("/").rsplit("/", 1)[-1]
    version, made = (
        escape(str(text)) for text in (record["environment"]["regrow"], record["made"])
    )
    body = [
        "<header>",
        '<p class="kicker">regrow profile</p>',
        f"<h1>What “{escape(name)}” costs on this machine</h1>",
        chips(_chips(record)),
        tiles(_tiles(record)),
        "</header><main>",
        '<div class="columns">',
        *_figures(record),
        "</div>",
        _tables("The figures behind the charts, and those that no chart shows", all_tables(record)),
        _about(record),
        "</main>",
        f"<footer>Made by regrow {version} with <code>regrow profile</code>, {made}. This page is "
        "one file and loads nothing.</footer>",
    ]
    return document(f"regrow profile: {name}", style(), body)


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


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    first, cold, bundle = record["latency"][0], record["cold_start"], record["bundle"]
    fast = f"p99 {duration(first['ms']['p99'])}, no adapter"
    return [
        ("One run", duration(first["ms"]["p50"]), fast),
        ("Cold start", duration(cold["total_ms"]), "from a process’s start to its first answer"),
        _memory_tile(record["memory"]),
        ("Bundle on disk", size(bundle["bytes"]), f"{bundle['mode']}, {bundle['variant']}"),
        _last_tile(record),
    ]


def _memory_tile(memory: Record) -> tuple[str, str, str]:
    last, platform = memory["stages"][-1], memory["platform"]
    if last["rss_anon"] is None or platform is None:
        return ("Peak RAM", ram(last["peak"]), memory["source"])
    note = f"on top of {ram(platform)} for Python and ONNX Runtime"
    return ("Private RAM it adds", ram(last["rss_anon"] - platform), note)


def _last_tile(record: Record) -> tuple[str, str, str]:
    first = record["latency"][0]
    if record["swap"]:
        rows = {row["kind"]: row["ms"] for row in reversed(record["swap"])}
        note = f"to an adapter that is in RAM: {duration(rows['resident']['p50'])}"
        return ("Swap from disk", duration(rows["cold"]["p50"]), note)
    energy = first["energy_mj"]
    told = "not measured" if energy is None else f"{energy:.3g} mJ"
    return ("CPU time of a run", duration(first["cpu_ms"]), f"energy: {told}")


def _figures(record: Record) -> Iterator[str]:
    def panel(kicker: str, title: str, chart: Chart, caption: str) -> str:
        return figure(kicker, title, chart(record, title), caption)

    source = escape(record["memory"]["source"])
    yield panel("Latency", wording.latency_takeaway(record), charts.latency_chart, _LATENCY)
    if len(record["latency"]) > 2:
        title, caption = wording.grid_takeaway(record), "Median time of one run of a whole batch."
        if (more := len(record["latency"]) - charts.MOST_CASES) > 0:
            caption += f" {more} more cases are in the table below."
        yield panel("Cases", title, charts.grid_chart, caption)
    if record["language"]:
        title = wording.language_takeaway(record)
        yield panel("Language model", title, charts.language_chart, _LANGUAGE)
    yield panel("RAM", wording.memory_takeaway(record), charts.memory_chart, f"{_RAM}{source}.")
    if record["swap"]:
        yield panel("Swap", wording.swap_takeaway(record), charts.swap_chart, _SWAP)
    if record["operators"]:
        title = wording.operators_takeaway(record)
        yield panel("Operators", title, charts.operators_chart, _OPERATORS)
    yield panel("Cold start", wording.cold_takeaway(record), charts.cold_chart, _COLD)
    if record["residents"] and record["residents"][-1]["each"] is not None:
        title, caption = wording.residents_takeaway(record), "Private RAM of the whole process."
        yield panel("Many users", title, charts.residents_chart, caption)
    if record["sustained"]:
        caption = f"{key('accent')} median, {key('amber')} p99 of each stretch of time."
        title = wording.sustained_takeaway(record)
        yield panel("Sustained", title, charts.sustained_chart, caption)


def _tables(title: str, tables: Sequence[Table]) -> str:
    drawn = "".join(scroll_table(part.caption, part.head, part.rows) for part in tables)
    return (
        f'<section class="panel"><p class="kicker">All figures</p><h2>{escape(title)}</h2>'
        f'<div class="tables single">{drawn}</div></section>'
    )


def _about(record: Record) -> str:
    about, bundle, settings = record["environment"], record["bundle"], record["settings"]
    facts = {
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
    return (
        '<div class="pair"><section class="panel"><p class="kicker">How it was measured</p>'
        f"<h2>Times and memory of this machine and this run.</h2>{definitions(facts)}"
        f"{paragraphs(notes(record))}</section>"
        '<section class="panel"><p class="kicker">Words</p>'
        f"<h2>What the words on this page mean</h2>{definitions(_WORDS)}</section></div>"
    )


def comparison_page(found: Record) -> str:
    """The page for what `compare` found."""
    real = sum(bool(row["real"]) for row in found["rows"])
    verdict = f"{real} of {len(found['rows'])} figures differ" if real else "No figure differs"
    body = [
        "<header>",
        '<p class="kicker">regrow profile --compare</p>',
        f"<h1>{verdict} by more than the noise</h1>",
        chips([("", f"A: {found['a']}"), ("", f"B: {found['b']}")]),
        "</header><main>",
        '<section class="panel"><p class="kicker">The rule</p>',
        f"{paragraphs(comparison_notes(found))}</section>",
        _tables("Every figure that both profiles have", comparison_tables(found)),
        "</main><footer>This page is one file and loads nothing.</footer>",
    ]
    return document("regrow profile --compare", style(), body)
