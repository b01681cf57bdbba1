"""regrow export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..options import (
    carried_options,
    check_data,
    data_options,
    emit,
    force_option,
    json_option,
    out_option,
    path_argument,
    targets_option,
)
from ..tables import cost, size


@click.command("export")
@path_argument("backbone")
@out_option("Folder for the bundle.")
@click.option(
    "--mode",
    type=click.Choice(["swappable", "merged", "seeded"]),
    default="swappable",
    show_default=True,
    help="swappable: adapters come and go. merged: a plain model without slots, one adapter (or "
    "none) folded into its weights; an adapter makes factored layers larger by its rank. seeded: "
    "one graph that rebuilds an adapter's basis from its seed at every run.",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Adapter file: what merged and seeded build in. A swappable bundle gets slots for its "
    "layers only.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    default="fp32",
    show_default=True,
    help="Of the weights of the blocks' linear layers; adapters and the head stay fp32. int8 also "
    "rounds those layers' inputs as it runs.",
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
    "--for",
    "methods",
    multiple=True,
    metavar="METHOD",
    help="Method whose adapters a swappable bundle takes, such as fourierft or bitfit, beside that "
    "of --adapter; repeatable. By default nola, lora and vera, whose slots are the same.",
)
@click.option(
    "--slots",
    multiple=True,
    type=click.Choice(["low_rank", "delta", "bias", "weight", "vector"]),
    help="Kind of slot, instead of what --for asks for; repeatable. weight: a layer's whole "
    "weight, for any method but bitfit, one adapter a batch. vector: two vectors a layer, for VeRA "
    "adapters of the seed and rank of --adapter.",
)
@click.option(
    "--fixed-rank",
    type=click.IntRange(min=1),
    metavar="R",
    help="Give all slots fixed shapes, for accelerators that need them: adapters of rank R or "
    "less, one adapter a batch, classes no more than the backbone's. No more than the narrowest "
    "layer's width, but for VeRA.",
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
@click.option(
    "--constants",
    is_flag=True,
    help="With --mode seeded: the adapter is part of the file, which takes no other.",
)
@click.option(
    "--no-cache",
    is_flag=True,
    help="Leave out the key-value cache of a causal language model; without it, it makes no text.",
)
@targets_option
@carried_options
@force_option
@json_option
def export_command(
    backbone: Path,
    out: Path,
    mode: str,
    adapter: Path | None,
    precision: str,
    data: Path | None,
    text: str | None,
    label: str | None,
    max_length: int,
    preprocessor: Path | None,
    label_file: Path | None,
    inputs: Path | None,
    methods: tuple[str, ...],
    no_cache: bool,
    slots: tuple[str, ...],
    fixed_rank: int | None,
    expanders: tuple[Path, ...],
    constants: bool,
    targets: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Export BACKBONE to an ONNX bundle: a compressed one, a Hugging Face directory, or
    package.module:function that returns an nn.Module.

    The bundle is run in ONNX Runtime and compared to torch, base and adapter, before it is kept.
    """
    from regrow_toolchain.extras import require_extra

    require_extra("export", "regrow export")
    from regrow_format.adapter import Adapter
    from regrow_format.files import check_output
    from regrow_format.manifest import MANIFEST
    from regrow_format.methods import METHODS

    if mode == "seeded" and adapter is None:
        raise click.UsageError("--mode seeded builds one adapter in: give it with --adapter")
    if mode != "swappable" and methods:
        raise click.UsageError(f"--mode {mode} builds one adapter in, of its own method: no --for")
    _check_options(mode, slots, fixed_rank, expanders, constants)
    if unknown := [method for method in methods if method not in METHODS]:
        raise click.UsageError(f"--for must be one of {', '.join(METHODS)}, got {unknown[0]!r}")
    if data is not None:
        check_data(data)
    check_output(out, force=force, marker=MANIFEST)
    loaded = Adapter.load(adapter) if adapter else None
    like = [Adapter.load(path) for path in expanders]
    from regrow_toolchain.data import attach_assets, dummy_inputs, load_data, load_inputs
    from regrow_toolchain.interop import export_backbone
    from regrow_toolchain.models import load_backbone

    model = attach_assets(load_backbone(backbone), preprocessor=preprocessor, labels=label_file)
    manifest = export_backbone(
        model, out, mode=mode, targets=targets, methods=methods, adapter=loaded,
        slots=slots, fixed_rank=fixed_rank, expanders=like, constants=constants,
        precision=precision, inputs=load_inputs(inputs, model) if inputs else dummy_inputs(model),
        data=load_data(data, model, text=text, label=label, max_length=max_length,
                       labels="optional") if data else None,
        cache=not no_cache, force=force,
    )  # fmt: skip
    result = {
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
    emit(result, _lines(result), as_json=as_json)


def _check_options(
    mode: str,
    slots: tuple[str, ...],
    fixed_rank: int | None,
    expanders: tuple[Path, ...],
    constants: bool,
) -> None:
    """Options that belong to another mode."""
    swappable = {"--slots": slots, "--fixed-rank": fixed_rank, "--expander": expanders}
    for name, given in swappable.items():
        if mode != "swappable" and given:
            raise click.UsageError(f"{name} is for --mode swappable, got {mode}")
    if constants and mode != "seeded":
        raise click.UsageError(f"--constants is for --mode seeded, got {mode}")


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
