"""regrow export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regrow_toolchain.config import ExportConfig

from ..config_options import config_options
from ..model_options import AssetFiles, Samples, asset_options, data_options
from ..options import emit, force_option, json_option, out_option, path_argument
from ..tables import cost, size

if TYPE_CHECKING:
    from regrow_format.manifest import Manifest


@click.command("export")
@path_argument("backbone")
@out_option("Folder for the bundle.")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Adapter file: what merged and seeded build in. A swappable bundle gets slots for its "
    "layers only.",
)
@data_options(
    "Samples to measure what --precision costs, in the score of their task: with the model's own "
    "labels, a language model's texts, or without labels, by the answers in fp32"
)
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    help="An .npz with arrays by the names of the model's arguments, to trace and check it with: "
    "for a plain module without --preprocessor; others need none.",
)
@click.option(
    "--expander",
    "expanders",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="ADAPTER",
    help="Write expand-<method>.onnx too, for apps without regrow: seed and numbers of adapters "
    "like this file (its method, settings and layers) in, what slots take out; repeatable.",
)
@config_options(ExportConfig)
@asset_options
@force_option
@json_option
def export_command(
    backbone: Path,
    out: Path,
    config: ExportConfig,
    adapter: Path | None,
    expanders: tuple[Path, ...],
    samples: Samples,
    inputs: Path | None,
    assets: AssetFiles,
    force: bool,
    as_json: bool,
) -> None:
    """Export BACKBONE to an ONNX bundle: a compressed one, a Hugging Face directory, or
    package.module:function that returns an nn.Module.

    The bundle is run in ONNX Runtime and compared to torch, base and adapter, before it is kept.
    """
    from regrow_toolchain.extras import require_extra

    require_extra("export", "regrow export")
    from regrow_export import check_objects
    from regrow_format import Adapter

    check_objects(config, adapter, expanders)
    samples.check()
    _check_output(out, force=force)
    built_in = Adapter.load(adapter) if adapter else None
    like = [Adapter.load(path) for path in expanders]
    from regrow_toolchain.data import load_inputs
    from regrow_toolchain.interop import export_backbone

    model = assets.load(backbone)
    manifest = export_backbone(
        model, out, config, adapter=built_in, expanders=like, force=force,
        inputs=load_inputs(inputs, model) if inputs else None,
        data=samples.load(model, labels="optional"),
    )  # fmt: skip
    result = _result(out, manifest)
    emit(result, _lines(result), as_json=as_json)


def _check_output(out: Path, *, force: bool) -> None:
    from regrow_format.files import check_output
    from regrow_format.manifest import MANIFEST

    check_output(out, force=force, marker=MANIFEST)


def _result(out: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "out": str(out),
        "mode": manifest.mode,
        "variant": manifest.variant,
        "backbone_id": manifest.backbone_id,
        "opset": manifest.opset,
        "slots": len(manifest.slots),
        "cache": manifest.cache is not None,
        "expanders": [expander.file for expander in manifest.expanders],
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "parity": dict(manifest.parity),
        "score": asdict(manifest.score) if manifest.score else None,
    }


def _lines(result: dict[str, Any]) -> list[str]:
    names = {
        "base": "base", "adapter": "with an adapter", "mixed": "mixed batch", "fed": "fed",
        "rounded_inputs": "with inputs of int4 layers rounded",
    }  # fmt: skip
    largest = ", ".join(
        f"{value:.1e} {names.get(name.removesuffix('_max_abs'), name)}"
        for name, value in result["parity"].items()
        if name.endswith("_max_abs")
    )
    return [
        *([cost(result["score"])] if result["score"] else []),
        f"largest difference to torch: {largest}",
        f"wrote {result['out']}: {result['mode']}, {result['variant']}, {size(result['bytes'])}, "
        f"{result['slots']} slots, opset {result['opset']}"
        + (", key-value cache" if result["cache"] else ""),
        *(f"wrote {result['out']}/{name}" for name in result["expanders"]),
    ]
