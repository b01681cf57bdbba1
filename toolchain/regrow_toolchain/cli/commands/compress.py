"""regrow compress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from regrow_toolchain.cli.options import (
    carried_options,
    check_data,
    config_options,
    data_options,
    emit,
    force_option,
    json_option,
    layers_options,
    out_option,
    path_argument,
    resumable,
)
from regrow_toolchain.cli.tables import score, table
from regrow_toolchain.config import CompressConfig


@click.command("compress")
@path_argument("model")
@out_option("Folder for the compressed backbone.")
@data_options("Training data, with the model's own labels or without labels (no data: plain SVD)")
@layers_options
@config_options(CompressConfig)
@carried_options
@click.option(
    "--resume", is_flag=True, help="Go on with a training that was interrupted (OUT.resume)."
)
@force_option
@json_option
def compress_command(
    model: Path,
    out: Path,
    data: Path | None,
    text: str | None,
    label: str | None,
    max_length: int,
    resume: bool,
    preprocessor: Path | None,
    label_file: Path | None,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Turn MODEL into a low-rank backbone (PELA): a Hugging Face directory or hub name, or
    package.module:function that returns an nn.Module.

    Every linear layer of the blocks becomes two (`regrow inspect MODEL` shows which, and their
    ranks). With --data the factors start from what samples show, and are trained: on the labels if
    there are any, to give the dense model's features after every block, and to stay near the dense
    weights. A report lies beside the result: report.json, report.md.
    """
    from regrow_toolchain.extras import need

    need("export", "regrow compress")
    from regrow_format.files import check_output

    check_output(out, force=force, marker="regrow.json")
    state = out.with_name(f"{out.name}.resume")
    check_state(state, resume)
    if data is not None:
        check_data(data)
    from regrow_toolchain.backbone import load_backbone, save_backbone
    from regrow_toolchain.carried import carry
    from regrow_toolchain.compressing import compress
    from regrow_toolchain.data import load_data
    from regrow_toolchain.data.saved import is_saved
    from regrow_toolchain.reporting import build_report, write_report

    source = carry(load_backbone(model), preprocessor=preprocessor, labels=label_file)
    samples = None
    if data is not None:
        samples = load_data(
            data, source, text=text, label=label, max_length=max_length,
            labels="none" if settings["task"] == "imitation" else "optional",
        )  # fmt: skip
    config = CompressConfig(**settings)
    asked = config.task != "auto" or source.task == "feature-extraction" or not source.labels
    if data is not None and samples is not None and samples.unlabelled and not asked:
        folder = data.is_dir() and not is_saved(data)
        way = "give a folder per class" if folder else "name a column or an array with --label"
        click.echo(
            f"regrow: no labels found in {data}: it learns by imitation of the dense model "
            f"({way} for labels, or --task imitation to say that none are meant)",
            err=True,
        )
    with resumable(state):
        done = compress(source, samples, config, checkpoint=state, resume=resume)
        report = build_report(done, source, samples)
        backbone = save_backbone(
            done.backbone, out, force=force, beside=lambda folder: write_report(folder, report)
        )
    state.unlink(missing_ok=True)
    result = {
        "out": str(out),
        "backbone_id": backbone.backbone_id,
        "ratio": config.ratio,
        "layers": len(backbone.layers),
        "parameters": report["parameters"],
        "macs": report["macs"],
        "metric": report.get("metric"),
        "scores": report.get("scores"),
        "samples": done.samples,
    }
    emit(result, _lines(result), as_json=as_json)


def check_state(state: Path, resume: bool) -> None:
    """Raise `UsageError` if a state lies there that nobody asked to go on with."""
    from regrow_format.errors import UsageError

    if state.exists() and not resume:
        raise UsageError(
            f"an interrupted training left {state}: --resume goes on with it, or remove it"
        )
    if resume and not state.exists():
        click.echo(f"regrow: nothing to resume at {state}: it starts anew", err=True)


def _lines(result: dict[str, Any]) -> list[str]:
    parameters, macs = result["parameters"], result["macs"]
    scores, metric = result["scores"] or {}, result["metric"] or ""
    rows = [
        [name, f"{parameters[kind]:,}", _giga(macs[kind]), score(scores.get(key), metric)]
        for name, kind, key in (
            ("dense", "dense", "dense"),
            ("factored", "compressed", "start"),
            ("after training", "compressed", "compressed"),
        )
    ]
    samples = result["samples"]
    note = f"{metric} on {samples} held-back samples" if samples else "no data, so plain SVD"
    head = ["model", "parameters", "GMACs", metric or "score"]
    return [
        *table(head, rows if samples else rows[:2]),
        f"{result['layers']} layers factored; {note}",
        f"wrote {result['out']}, with report.md",
    ]


def _giga(macs: int | None) -> str:
    return "not known" if macs is None else f"{macs / 1e9:.3g}"
