"""regrow compress."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from regrow_toolchain.cli.options import (
    check_data,
    config_options,
    data_options,
    emit,
    force_option,
    json_option,
    out_option,
    path_argument,
)
from regrow_toolchain.cli.tables import percent, table
from regrow_toolchain.config import CompressConfig


@click.command("compress")
@path_argument("model")
@out_option("Folder for the compressed backbone.")
@data_options("Training data with the model's own labels (without it: plain SVD)")
@config_options(CompressConfig)
@force_option
@json_option
def compress_command(
    model: Path,
    out: Path,
    data: Path | None,
    text: str | None,
    label: str | None,
    max_length: int,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Turn MODEL into a low-rank backbone (PELA): a Hugging Face directory or hub name, or
    package.module:function that returns an nn.Module.

    Every linear layer of the blocks becomes two of a rank that divides its parameters by the
    ratio. With --data the factors are then trained: on the labels, to give the dense model's
    features after every block, and to stay near the dense weights.
    """
    from regrow_toolchain.extras import need

    need("export", "regrow compress")
    from regrow_runtime.files import check_output

    check_output(out, force=force, marker="regrow.json")
    if data is not None:
        check_data(data)
    from regrow_toolchain.backbone import load_backbone, save_backbone
    from regrow_toolchain.compressing import compress
    from regrow_toolchain.data import load_data

    source = load_backbone(model)
    samples = None
    if data is not None:
        samples = load_data(data, source, text=text, label=label, max_length=max_length)
    done = compress(source, samples, CompressConfig(**settings))
    backbone = save_backbone(done.backbone, out, force=force)
    result = {
        "out": str(out),
        "backbone_id": backbone.backbone_id,
        "ratio": settings["ratio"],
        "layers": len(backbone.layers),
        "parameters": {"dense": source.parameters, "compressed": backbone.parameters},
        "accuracy": backbone.report.get("accuracy"),
        "samples": done.samples,
    }
    emit(result, _lines(result, done.samples), as_json=as_json)


def _lines(result: dict[str, Any], samples: int) -> list[str]:
    parameters, accuracy = result["parameters"], result["accuracy"] or {}
    rows = [
        [name, f"{count:,}", percent(score) if not math.isnan(score) else "not measured"]
        for name, count, score in (
            ("dense", parameters["dense"], accuracy.get("dense", math.nan)),
            ("factored (SVD)", parameters["compressed"], accuracy.get("svd", math.nan)),
            ("after training", parameters["compressed"], accuracy.get("compressed", math.nan)),
        )
    ]
    note = f"accuracy on {samples} held-back samples" if samples else "no data, so plain SVD"
    return [
        *table(["model", "parameters", "accuracy"], rows if samples else rows[:2]),
        f"{result['layers']} layers factored; {note}",
        f"wrote {result['out']}",
    ]
