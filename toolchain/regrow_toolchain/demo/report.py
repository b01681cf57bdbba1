"""The demo's report as one self-contained page: no network, no scripts, the same bytes every time.

Whoever reads it wants to judge in a minute what regrow gives. So the page starts with what was done
and five figures; each chart's heading says what the chart shows; every figure stands in a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from markupsafe import Markup

from regrow_toolchain.pages import Panel, Tile, count, duration, percent, ratio, render_page, size

from . import charts, wording
from .images import data_uri
from .tables import all_tables
from .wording import plus_minus, points, size_range

__all__ = ["render_html"]

Numbers = Mapping[str, Any]
# The words `device.blocked` uses, as a reader knows them.
_PRETTY = {"torch": "PyTorch", "onnx": "the onnx package", "transformers": "Transformers"}


def render_html(report: Numbers) -> str:
    """The page for a report (accuracies 0..1, bytes, milliseconds; `report.json` of the demo)."""
    device = report["device"]
    platform = wording.platform_bytes(device["memory"])
    return render_page(
        __package__,
        "report.html.jinja",
        r=report,
        title=_title(report),
        summary=_summary(report),
        tiles=_tiles(report),
        cards=[_card(user) for user in report["users"]],
        panels=_panels(report),
        plain={
            name: plus_minus(report["backbone"][name]["accuracy"], report["backbone"][name]["se"])
            for name in ("dense", "compressed")
        },
        tables=all_tables(report),
        checks_title=wording.checks_summary(report["checks"]),
        checks_ok=all(check["ok"] for check in report["checks"]),
        blocked=_blocked(device),
        platform=None if platform is None else size(platform),
        peak=size(device["peak_bytes"]),
        seconds=duration(1000 * report["seconds"]),
        thousand=size(_thousand(report)),
    )


def _title(report: Numbers) -> str:
    users = report["users"]
    each = size_range([_on_disk(user) for user in users])
    return f"One small model, {wording.users_words(len(users))}, {each} for each"


def _on_disk(user: Numbers) -> int:
    """Bytes of a user's file: the adapter, and the head if the user has an own one."""
    return int(user["adapter_bytes"] + user["head_bytes"])


def _summary(report: Numbers) -> list[tuple[str, str]]:
    """What was done, in three sentences, each with its name."""
    users, data, backbone = report["users"], report["data"], report["backbone"]
    dense, small = backbone["dense"]["parameters"], backbone["compressed"]["parameters"]
    kept, where = wording.same_labels(users)
    before, after = (percent(wording.mean([u[key] for u in kept])) for key in ("before", "after"))
    cannot = " that cannot import PyTorch" if report["device"]["torch_blocked"] else ""
    compress = (
        f"A small vision transformer learned to read {count(data['train'])} handwritten digits, "
        f"and PELA compressed it from {count(dense)} to {count(small)} parameters."
    )
    adapt = (
        f"Each of {len(users)} made-up users, whose strokes, scanner or labels differ, got an "
        f"adapter trained on {count(data['adapt_per_user'])} samples: a seed and a few numbers."
    )
    swap = (
        f"A fresh process{cannot} opened the exported model once and swapped through the users’ "
        f"adapters; {where}mean accuracy went from {before} to {after}."
    )
    return [("Compress", compress), ("Adapt", adapt), ("Swap", swap)]


def _tiles(report: Numbers) -> list[Tile]:
    """The headline figures."""
    dense, small = report["backbone"]["dense"], report["backbone"]["compressed"]
    kept, where = wording.same_labels(report["users"])
    gains, sizes = [user["gain"] for user in kept], report["bytes"]
    weights = ratio(small["parameters"], dense["parameters"])
    accuracy = f"dense: {percent(dense['accuracy'])}, with {weights} times the weights"
    full = f"a full model is {ratio(sizes['adapter'], sizes['dense_model'])} times that"
    spread = f"{where}from {points(min(gains))} to {points(max(gains))}"
    return [
        Tile("Accuracy, compressed", percent(small["accuracy"]), accuracy),
        Tile("One user’s adapter", size(sizes["adapter"]), full),
        Tile("Mean gain per user", points(wording.mean(gains)), spread),
        *_device_tiles(report["device"]),
    ]


def _device_tiles(device: Numbers) -> list[Tile]:
    swap, added = device["swap_ms"], wording.added_bytes(device["memory"])
    resident = f"to an adapter that is in RAM: {duration(swap['resident']['p50'])}"
    return [
        Tile("Swap, from disk", duration(swap["cold"]["p50"]), resident),
        Tile(
            "Private RAM that it adds",
            size(added),
            f"bundle and adapters; whole process, mapped files too: {size(device['peak_bytes'])}",
        ),
    ]


def _card(user: Numbers) -> dict[str, Any]:
    """One user: images of the same digits, plain and as scanned, and the figures."""
    pairs = zip(user["examples_plain"], user["examples"], user["example_labels"], strict=True)
    return {
        "title": user["title"],
        "condition": user["condition"],
        "digits": [{"plain": data_uri(a), "seen": data_uri(b), "label": c} for a, b, c in pairs],
        "labels": user["labels"] if user["own_head"] else [],
        "before": percent(user["before"]),
        "after": percent(user["after"]),
        "gain": points(user["gain"]),
        "lost": user["gain"] < 0,
        "size": size(_on_disk(user)),
        "long": any(len(str(label)) > 2 for label in user["example_labels"]),
    }


def _panels(report: Numbers) -> dict[str, Panel]:
    """Each chart with its takeaway."""
    device, plain = report["device"], report["backbone"]["compressed"]["accuracy"]
    accuracy = partial(charts.accuracy_chart, plain=plain)
    return {
        "accuracy": _panel(wording.accuracy_takeaway, accuracy, report["users"]),
        "bytes": _panel(wording.bytes_takeaway, charts.bytes_chart, report["bytes"]),
        "swap": _panel(wording.swap_takeaway, charts.swap_chart, device["swap_ms"]),
        "latency": _panel(wording.latency_takeaway, charts.latency_chart, device["latency_ms"]),
        "memory": _panel(wording.memory_takeaway, charts.memory_chart, device["memory"]),
    }


def _panel(takeaway: Callable[[Any], str], chart: Callable[[Any, str], Markup], of: Any) -> Panel:
    title = takeaway(of)
    return Panel(title, chart(of, title))


def _blocked(device: Numbers) -> str:
    """The packages that the device process cannot import, as words."""
    names = [_PRETTY.get(name, name) for name in device["blocked"]]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _thousand(report: Numbers) -> float:
    """Bytes of the compressed model and a thousand adapters."""
    sizes = report["bytes"]
    return float(sizes["compressed_model"] + 1000 * sizes["adapter"])
