"""regrow export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from regrow_toolchain.cli.options import (
    emit,
    force_option,
    json_option,
    out_option,
    path_argument,
    targets_option,
)
from regrow_toolchain.cli.tables import size


@click.command("export")
@path_argument("backbone")
@out_option("Folder for the bundle.")
@click.option(
    "--mode",
    type=click.Choice(["swappable", "merged", "seeded"]),
    default="swappable",
    show_default=True,
    help="swappable: adapters come and go. merged: one adapter folded into the weights, a plain "
    "model, larger by its rank where layers are factored. seeded: one graph that rebuilds an "
    "adapter's basis from its seed.",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Adapter file: what merged and seeded build in. A swappable bundle gets slots for its "
    "layers only.",
)
@targets_option
@force_option
@json_option
def export_command(
    backbone: Path,
    out: Path,
    mode: str,
    adapter: Path | None,
    targets: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Export BACKBONE (a compressed one, or a Hugging Face directory) to an ONNX bundle.

    The bundle is run in ONNX Runtime and compared to torch, base and adapter, before it is kept.
    """
    from regrow_toolchain.extras import need

    need("export", "regrow export")
    from regrow_runtime.adapter import Adapter
    from regrow_runtime.files import check_output
    from regrow_runtime.manifest import MANIFEST

    if mode != "swappable" and adapter is None:
        raise click.UsageError(f"--mode {mode} builds one adapter in: give it with --adapter")
    check_output(out, force=force, marker=MANIFEST)
    loaded = Adapter.load(adapter) if adapter else None
    from regrow_toolchain.backbone import load_backbone
    from regrow_toolchain.exporting import export_backbone

    manifest = export_backbone(
        load_backbone(backbone), out, mode=mode, targets=targets, adapter=loaded, force=force
    )
    result = {
        "out": str(out),
        "mode": manifest.mode,
        "backbone_id": manifest.backbone_id,
        "opset": manifest.opset,
        "slots": len(manifest.slots),
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "parity": dict(manifest.parity),
    }
    emit(result, _lines(result), as_json=as_json)


def _lines(result: dict[str, Any]) -> list[str]:
    names = {"base": "base", "adapter": "with an adapter", "mixed": "mixed batch", "fed": "fed"}
    largest = ", ".join(
        f"{value:.1e} {names.get(name.removesuffix('_max_abs'), name)}"
        for name, value in result["parity"].items()
        if name.endswith("_max_abs")
    )
    return [
        f"largest difference to torch: {largest}",
        f"wrote {result['out']}: {result['mode']}, {size(result['bytes'])}, "
        f"{result['slots']} slots, opset {result['opset']}",
    ]
