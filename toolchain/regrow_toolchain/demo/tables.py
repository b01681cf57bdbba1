"""Every figure of the report as tables of words: a caption, a head, rows of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regrow_toolchain.pages import Table, count, duration, percent, size

from .wording import platform_bytes, plus_minus, points

__all__ = ["all_tables"]

Numbers = Mapping[str, Any]
_SHARES = ["p50", "p90", "p99"]
_LATENCY = {
    "base": "no adapter",
    "adapter": "with an adapter",
    "merged": "merged model",
    "seeded": "seeded model",
}
_SWAP = {
    "cold": "cold",
    "cached": "basis cached",
    "resident": "resident",
}
_BUNDLES = {
    "swappable": "swappable: one backbone, any adapter",
    "merged": "merged: one user’s adapter folded in",
    "seeded": "seeded: the graph rebuilds the basis",
}


def all_tables(report: Numbers) -> list[Table]:
    """The tables, in the order of the page."""
    return [
        _users(report["users"]),
        _models(report["backbone"]),
        _bundles(report["bundles"]),
        _times("Time of one run", _LATENCY, report["device"]["latency_ms"]),
        _times("Time of a swap", _SWAP, report["device"]["swap_ms"]),
        _sizes(report["bytes"]),
        _memory(report["device"]),
    ]


def _users(users: Sequence[Numbers]) -> Table:
    head = [
        "user",
        "samples",
        "before",
        "after",
        "gain, points",
        "adapter",
        "own head",
        "stored as",
    ]
    head += ["largest difference from PyTorch", "same answers", "cold", "cached", "resident"]
    return Table("Users (± one standard error; swap times)", head, [_user(u) for u in users])


def _user(user: Numbers) -> list[str]:
    return [
        user["title"],
        count(user["samples"]),
        plus_minus(user["before"], user["before_se"]),
        plus_minus(user["after"], user["after_se"]),
        f"{points(user['gain']).split()[0]} ± {100 * user['gain_se']:.1f}",
        size(user["adapter_bytes"]),
        size(user["head_bytes"]) if user["own_head"] else "–",
        user["storage"],
        f"{user['parity_max_abs']:.1e}",
        percent(user["agree"]),
        *(duration(user["swap_ms"][kind]) for kind in ("cold", "cached", "resident")),
    ]


def _models(backbone: Numbers) -> Table:
    small = backbone["compressed"]
    names = {
        "dense": "dense",
        "svd_only": "cut by SVD, not trained again",
        "compressed": f"PELA: {small['layers']} layers cut, then trained again",
    }
    rows = []
    for key, name in names.items():
        model = backbone[key]
        parameters, stored = model.get("parameters"), model.get("bytes")
        rows.append(
            [
                name,
                count(parameters) if parameters else "–",
                size(stored) if stored else "–",
                plus_minus(model["accuracy"], model["se"]),
            ]
        )
    return Table("Backbone, on plain digits", ["model", "parameters", "weights", "accuracy"], rows)


def _sizes(sizes: Numbers) -> Table:
    adapter = f"{sizes['adapter_method'].upper()} adapter, {sizes['adapter_storage']}"
    rows = [
        ["full model, weights", size(sizes["dense_model"])],
        ["compressed model, weights", size(sizes["compressed_model"])],
        [f"LoRA, rank {sizes['lora_rank']}, float32", size(sizes["lora"])],
        [f"LoRA, rank {sizes['lora_rank']}, int4", size(sizes["lora_int4"])],
        [adapter, size(sizes["adapter"])],
    ]
    return Table("Sizes on disk", ["what", "size"], rows)


def _bundles(bundles: Numbers) -> Table:
    rows = [
        [_BUNDLES.get(name, name), size(one["bytes"]), duration(1000 * one["seconds"])]
        for name, one in bundles.items()
    ]
    return Table("Exported bundles", ["mode", "size", "export took"], rows)


def _times(caption: str, names: Mapping[str, str], times: Numbers) -> Table:
    shown = ["mean", *_SHARES] if "mean" in next(iter(times.values())) else _SHARES
    rows = [
        [name, count(times[key]["n"]), *(duration(times[key][share]) for share in shown)]
        for key, name in names.items()
    ]
    head = ["what", "runs", *shown]
    return Table(caption, head, rows)


def _memory(device: Numbers) -> Table:
    stages = device["memory"]
    platform = platform_bytes(stages)
    rows = []
    for stage in stages:
        value = stage["rss_anon"]
        unknown = value is None or platform is None or value <= platform
        rows.append([stage["stage"], size(value), "–" if unknown else size(value - platform)])
    rows.append(["peak of the whole process", size(device["peak_bytes"]), "–"])
    head = ["stage", "memory", "added by regrow"]
    return Table("Memory of the device process", head, rows)
