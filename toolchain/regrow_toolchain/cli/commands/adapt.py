"""regrow adapt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from regrow_toolchain.cli.options import (
    check_data,
    config_options,
    emit,
    force_option,
    json_option,
    out_option,
    parse_pairs,
    path_argument,
    targets_option,
)
from regrow_toolchain.cli.tables import percent, size
from regrow_toolchain.config import AdaptConfig


@click.command("adapt")
@path_argument("backbone")
@out_option("Adapter file to write (.safetensors).")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="The user's samples: a folder of pictures by class, or an .npz.",
)
@targets_option
@config_options(AdaptConfig)
@click.option(
    "--set",
    "pairs",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the method; repeatable. nola: k=64, l=64, rank=8, c=8.0, shared=true; "
    "lora: rank=4, alpha=4.0, rslora=false (these are the defaults).",
)
@force_option
@json_option
def adapt_command(
    backbone: Path,
    out: Path,
    data: Path,
    targets: tuple[str, ...],
    pairs: tuple[str, ...],
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train an adapter for BACKBONE (a compressed one, or a Hugging Face directory).

    The backbone's weights stay as they are. Part of the samples is held back to score the adapter
    before and after. Labels that are the backbone's keep its head; others get a head of their own.
    """
    from regrow_toolchain.extras import need

    settings["method_settings"] = parse_pairs(pairs, "--set")
    need("export", "regrow adapt")
    from regrow_runtime.files import check_output

    check_output(out, force=force)
    check_data(data)
    from regrow_toolchain.adapting import adapt
    from regrow_toolchain.backbone import load_backbone
    from regrow_toolchain.data import load_data

    model = load_backbone(backbone)
    samples = load_data(data, model.preprocessor)
    done = adapt(model, samples, AdaptConfig(**settings), targets=targets)
    written = done.adapter.save(out)
    adapter = done.adapter
    result = {
        "out": str(out),
        "bytes": written,
        "method": adapter.method,
        "config": dict(adapter.config),
        "storage": adapter.storage,
        "seed": str(adapter.seed),
        "backbone_id": adapter.backbone_id,
        "targets": len(adapter.targets),
        "labels": list(adapter.head.labels) if adapter.head else None,
        "samples": {"data": len(samples), "held_back": done.samples},
        "before": None if math.isnan(done.before) else done.before,
        "after": None if math.isnan(done.after) else done.after,
    }
    emit(result, _lines(result), as_json=as_json)
    if done.after < done.before:
        click.echo(
            "regrow: warning: this adapter is worse than none on held-back samples", err=True
        )


def _lines(result: dict[str, Any]) -> list[str]:
    held = result["samples"]["held_back"]
    score = (
        f"accuracy on {held} held-back samples: {percent(result['before'])} before, "
        f"{percent(result['after'])} after"
        if held
        else "no samples held back, so no score"
    )
    head = f", own head of {len(result['labels'])} classes" if result["labels"] else ""
    kept = "the backbone's, so its head is kept (--head new trains one for your own)"
    labels = f"the user's own: {', '.join(result['labels'])}" if result["labels"] else kept
    return [
        f"labels: {labels}",
        score,
        f"wrote {result['out']}: {size(result['bytes'])}, {result['method']} in "
        f"{result['storage']}, {result['targets']} layers{head}",
    ]
