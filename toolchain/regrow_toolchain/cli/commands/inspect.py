"""regrow inspect."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regrow_toolchain.config import CompressConfig
from regrow_toolchain.pages import table

from ..config_options import setting_options
from ..options import emit, json_option, path_argument
from ..tables import cost, score, size
from .store import listing

if TYPE_CHECKING:
    from regrow_format.adapter import Adapter
    from regrow_format.manifest import Manifest

_SHOWN = 12
# Files beside adapters that people come upon here.
_OTHERS = {
    ".onnx": "an ONNX graph: give the folder of its bundle",
    ".onnx_adapter": "an adapter's dense tensors for ONNX Runtime: give the adapter itself",
}


@click.command("inspect")
@path_argument("path")
@click.option(
    "--ratio", type=click.FloatRange(1), default=2.0, show_default=True,
    help="Of a dense model: what compression would factor, and to which ranks.",
)  # fmt: skip
@setting_options(CompressConfig, ("only", "keep_dense"))
@click.option(
    "--tokens", type=click.IntRange(1), default=128, show_default=True,
    help="Of a text, to count multiplications by.",
)  # fmt: skip
@json_option
def inspect_command(
    path: Path,
    ratio: float,
    only: tuple[str, ...],
    keep_dense: tuple[str, ...],
    tokens: int,
    as_json: bool,
) -> None:
    """Tell what PATH holds: an adapter file, a bundle, a compressed backbone, a store; or of a
    dense model what `regrow compress` would do to each layer, for which its config.json is enough.
    """
    from regrow_format.adapter import Adapter
    from regrow_format.errors import UsageError
    from regrow_format.manifest import MANIFEST, Manifest
    from regrow_runtime.index import INDEX as STORE_INDEX

    if path.is_file() and (kind := _OTHERS.get(path.suffix)):
        raise UsageError(
            f"path must be a regrow adapter, a .safetensors file, got {path}: it is {kind}"
        )
    if path.is_file():
        result = _adapter(Adapter.load(path), path)
    elif (path / MANIFEST).is_file():
        result = _bundle(Manifest.load(path))
    elif (path / "regrow.json").is_file():
        result = _backbone(path)
    elif (path / STORE_INDEX).is_file():
        found, lines = listing(path)
        emit({"kind": "store", **found}, lines, as_json=as_json)
        return
    elif (path / "config.json").is_file() or (not path.exists() and ":" in str(path)):
        from ..model_summary import dense_lines, inspect_dense

        dense = inspect_dense(path, ratio, only, keep_dense, tokens)
        emit(dense, dense_lines(dense), as_json=as_json)
        return
    else:
        told = "a folder with none of them" if path.is_dir() else "no such file or folder"
        raise UsageError(
            "path must be an adapter file, a store, or a folder with manifest.json, regrow.json or "
            f"config.json, got {path}: {told}"
        )
    emit(result, _lines(result), as_json=as_json)


def _adapter(adapter: Adapter, path: Path) -> dict[str, Any]:
    coefficients = sum(part.values.size for part in adapter.coefficients.values())
    return {
        "kind": "adapter",
        "method": adapter.method,
        "config": dict(adapter.config),
        "seed": str(adapter.seed),
        "basis": f"{adapter.basis.kind} {adapter.basis.version}",
        "basis_fields": dict(adapter.basis.fields),
        "backbone_id": adapter.backbone_id,
        "storage": adapter.storage,
        "group": adapter.group,
        "bytes": path.stat().st_size,
        "coefficients": coefficients,
        "labels": list(adapter.head.labels) if adapter.head else None,
        "extra": sorted(adapter.extra),
        "probe": len(adapter.probe.expected) if adapter.probe else None,
        "validated": [vars(score) for score in adapter.validated],
        "user": dict(adapter.user),
        "targets": [[t.name, t.in_features, t.out_features] for t in adapter.targets],
    }


def _bundle(manifest: Manifest) -> dict[str, Any]:
    return {
        "kind": "bundle",
        "mode": manifest.mode,
        "variant": manifest.variant,
        "rounding": asdict(manifest.rounding) if manifest.rounding else None,
        "task": manifest.task,
        "backbone_id": manifest.backbone_id,
        "adapter": manifest.adapter,
        "opset": manifest.opset,
        "ir_version": manifest.ir_version,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "labels": list(manifest.labels),
        "inputs": {s.name: list(s.shape) for g in manifest.graphs for s in g.inputs},
        "outputs": {s.name: list(s.shape) for g in manifest.graphs for s in g.outputs},
        "parity": dict(manifest.parity),
        "score": asdict(manifest.score) if manifest.score else None,
        "partitions": dict(manifest.checks.partitions) if manifest.checks else {},
        "files": {name: entry.size for name, entry in manifest.files.items()},
        "targets": [[s.target, s.in_features, s.out_features, s.kind] for s in manifest.slots],
    }


def _backbone(path: Path) -> dict[str, Any]:
    from regrow_format.fields import parse_json
    from regrow_format.files import read_bytes

    fields = parse_json(
        read_bytes(path / "regrow.json", limit=64 << 20, what="a backbone"), f"{path}/regrow.json"
    )
    return {
        "kind": "backbone",
        "backbone_id": fields.take("backbone_id", str),
        "head": list(fields.strings("head")),
        "report": fields.take("report", dict, {}),
        "targets": [
            [p.take("name", str), p.take("in_features", int), p.take("out_features", int),
             f"rank {p.take('rank', int)}"]
            for p in fields.objects("layers")
        ],
    }  # fmt: skip


def _lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in result.items():
        if name == "bytes":
            lines.append(f"{name:13} {value} ({size(value)})")
        elif name == "score" and value:
            lines.append(f"{name:13} {cost(value)}")
        elif name == "validated" and value:
            lines += [
                f"{name:13} {v['metric']} {score(v['before'], v['metric'])} -> "
                f"{score(v['after'], v['metric'])} on {v['samples']} held-back samples "
                f"({v['variant']})"
                for v in value
            ]
        elif name != "targets" and value not in (None, [], {}, ""):
            lines.append(f"{name:13} {_shown(value)}")
    rows = [[str(cell) for cell in row] for row in result["targets"]]
    head = ["layer", "in", "out", "kind"][: len(rows[0])] if rows else []
    shown = table(head, rows[:_SHOWN]) if rows else []
    more = [f"… {len(rows) - _SHOWN} more (--json lists all)"] if len(rows) > _SHOWN else []
    return lines + shown + more


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
