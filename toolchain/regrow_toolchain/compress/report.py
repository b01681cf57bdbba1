"""The report beside a compressed backbone: what it was, what it is, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow_format.errors import RegrowError
from regrow_format.fields import dump_json
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import (
    WEIGHTS,
    Backbone,
    LowRankPair,
    count_macs,
    example_inputs,
    weight_of,
)

from .compression import Compressed
from .factorization import one_sample, tokens_by_layer
from .kernel_timing import latency
from .trainer import as_rows

__all__ = ["REPORT_JSON", "REPORT_MD", "build_report", "render", "write_report"]

REPORT_JSON, REPORT_MD = "report.json", "report.md"


def build_report(done: Compressed, source: Backbone, data: Dataset | None) -> dict[str, Any]:
    """What `report.json` holds.

    Multiplications and latencies are those of one sample: the data's first, else a made-up one.
    What cannot be known is None. Latencies are medians of interleaved repeats in ONNX Runtime, on
    one thread of this machine, of the layer alone, in `precision`; of convolutions there are none.
    """
    inputs = one_sample(data) if data is not None else example_inputs(source.model)
    names = [layer.name for layer in done.factored.layers]
    sample = one_sample(data) if data is not None else {}
    tokens = tokens_by_layer(source.model, done.factored.layers, sample) if inputs else {}
    result = done.backbone
    return {
        **result.report,
        "macs": {"dense": _macs(source, inputs), "compressed": _macs(result, inputs)},
        "start_samples": done.factored.samples,
        "epochs": as_rows(done.history),
        "kept_epoch": done.kept,
        "layers": [_layer(done, source, name, tokens.get(name)) for name in names],
    }


def _macs(backbone: Backbone, inputs: Mapping[str, Tensor]) -> int | None:
    if not inputs:
        return None
    try:
        return count_macs(backbone.model, inputs)
    except RegrowError:
        return None


def _layer(done: Compressed, source: Backbone, name: str, tokens: int | None) -> dict[str, Any]:
    layer = next(layer for layer in done.factored.layers if layer.name == name)
    row: dict[str, Any] = {
        "name": name,
        "in": layer.in_features,
        "out": layer.out_features,
        "rank": layer.rank or None,
        "parameters": {"dense": layer.dense, "compressed": layer.after},
    }
    if not layer.rank:
        return {**row, "dense_because": layer.skip_reason}
    row["relative_error"] = _error(done, source, name)
    row["start_error"] = math.sqrt(done.factored.lost[name]) if done.factored.lost else None
    if tokens:
        row["tokens"] = tokens
    if tokens and layer.is_timed:
        shape = (layer.in_features, layer.out_features, layer.rank, tokens)
        times = latency(*shape, done.backbone.report["precision"])
        row["milliseconds"] = dict(zip(("dense", "factored"), times, strict=True))
    return row


@torch.no_grad()
def _error(done: Compressed, source: Backbone, name: str) -> float:
    """||V Uᵀ - W|| / ||W|| in Frobenius' norm, of the trained factors."""
    weight = weight_of(source.model.get_submodule(name))
    pair = done.backbone.model.get_submodule(name)
    assert isinstance(pair, LowRankPair)
    return float((pair.weight - weight).norm() / weight.norm().clamp_min(1e-30))


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """`report.json` and `report.md` into a backbone's folder, with the size of its weights."""
    size = (folder / WEIGHTS).stat().st_size
    dense = 4 * report["parameters"]["dense"]
    whole = {**report, "bytes": {"dense": dense, "compressed": size}}
    (folder / REPORT_JSON).write_text(dump_json(whole, indent=1) + "\n", encoding="utf-8")
    (folder / REPORT_MD).write_text(render(whole), encoding="utf-8")


def render(report: Mapping[str, Any]) -> str:
    """Markdown for people."""
    names = ("parameters", "macs", "bytes")
    rows = [_compared(name, report[name]) for name in names if report.get(name)]
    if scores := report.get("scores"):
        shown = [f"{scores[k]:.4f}" if k in scores else "–" for k in ("dense", "compressed")]
        start = f" (start {scores['start']:.4f})" if "start" in scores else ""
        name = f"{report['metric']}, {report['samples']} samples"
        rows.append(f"| {name} | {shown[0]} | {shown[1]}{start} | |")
    about = (
        f"Ratio {report['ratio']:g}; multiplications are one sample's, the dense model's bytes "
        f"four a parameter, milliseconds those of a layer alone in {report['precision']}, one "
        "thread."
    )
    lines = ["# Compression", "", about, ""]
    lines += ["| | dense | compressed | share |", "|---|---|---|---|", *rows, ""]
    lines += ["## Layers", "", "| layer | in | out | rank | error | dense ms | factored ms |"]
    lines += ["|---|---|---|---|---|---|---|", *map(_layer_row, report["layers"]), ""]
    return "\n".join(lines + _epochs(report["epochs"], report["kept_epoch"]))


def _compared(name: str, values: Mapping[str, Any]) -> str:
    dense, small = values["dense"], values["compressed"]
    if dense is None or small is None:
        return f"| {name} | not known | not known | |"
    return f"| {name} | {dense:,} | {small:,} | {small / dense:.3f} |"


def _layer_row(row: Mapping[str, Any]) -> str:
    begin = f"| `{row['name']}` | {row['in']} | {row['out']} |"
    if row["rank"] is None:
        return f"{begin} dense: {row['dense_because']} | | | |"
    times = row.get("milliseconds", {})
    both = " | ".join(f"{times[k]:.3f}" if times else "" for k in ("dense", "factored"))
    return f"{begin} {row['rank']} | {row['relative_error']:.3f} | {both} |"


def _epochs(epochs: Sequence[Mapping[str, Any]], kept: int) -> list[str]:
    if not epochs:
        return []
    keys = ("loss", "base", "fd", "rwp", "score")
    lines = ["## Training", "", f"| epoch | {' | '.join(keys)} |", "|---|---|---|---|---|---|"]
    for epoch in epochs:
        cells = ("" if epoch[key] is None else f"{epoch[key]:.4f}" for key in keys)
        lines.append(f"| {epoch['number']} | {' | '.join(cells)} |")
    return [*lines, "", f"Epoch {kept} is kept; 0 is the start.", ""]
