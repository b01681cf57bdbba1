"""regrow compress."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from regrow_toolchain.config import CompressConfig
from regrow_toolchain.pages import table

from ..options import (
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
from ..tables import giga, score

_WITHOUT_DATA = {"ratio", "start", "ranks", "multiple", "slow_layers", "precision", "threads"}
_WITH_DATA = {item.name for item in fields(CompressConfig) if item.metadata} - _WITHOUT_DATA


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
    from regrow_toolchain.extras import require_extra

    require_extra("export", "regrow compress")
    from regrow_format.files import check_output

    check_output(out, force=force, marker="regrow.json")
    state = out.with_name(f"{out.name}.resume")
    check_state(state, resume)
    if data is not None:
        check_data(data)
    elif unused := _given(_WITH_DATA):
        click.echo(f"regrow: without --data nothing is trained: no effect of {unused}", err=True)
    from regrow_toolchain.compress import build_report, compress, write_report
    from regrow_toolchain.data import attach_assets, is_saved, load_data
    from regrow_toolchain.models import load_backbone, save_backbone

    source = attach_assets(load_backbone(model), preprocessor=preprocessor, labels=label_file)
    samples = None
    if data is not None:
        samples = load_data(
            data, source, text=text, label=label, max_length=max_length,
            labels="none" if settings["task"] == "distillation" else "optional",
        )  # fmt: skip
    config = CompressConfig(**settings)
    asked = config.task != "auto" or source.task == "feature-extraction" or not source.labels
    if data is not None and samples is not None and samples.unlabelled and not asked:
        folder = data.is_dir() and not is_saved(data)
        way = "give a folder per class" if folder else "name a column or an array with --label"
        click.echo(
            f"regrow: no labels found in {data}: it learns by distillation from the dense model "
            f"({way} for labels, or --task distillation to say that none are meant)",
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
        "epochs": max(len(done.history) - 1, 0),
        "kept_epoch": done.kept,
    }
    emit(result, _lines(result, data), as_json=as_json)


def _given(names: Collection[str]) -> str:
    """Which of the options stand on the command line."""
    context = click.get_current_context()
    found = [
        name
        for name in context.params
        if name in names and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(found))


def check_state(state: Path, resume: bool) -> None:
    """Raise `UsageError` if a state lies there that nobody asked to go on with."""
    from regrow_format.errors import UsageError

    if state.exists() and not resume:
        raise UsageError(
            f"an interrupted training left {state}: --resume goes on with it, or remove it"
        )
    if resume and not state.exists():
        click.echo(f"regrow: nothing to resume at {state}: it starts anew", err=True)


def _lines(result: dict[str, Any], data: Path | None) -> list[str]:
    parameters, macs = result["parameters"], result["macs"]
    scores, metric = result["scores"] or {}, result["metric"] or ""
    kinds = [("dense", "dense", "dense"), ("factored", "compressed", "start")]
    if result["epochs"]:
        kinds.append(("after training", "compressed", "compressed"))
    rows = [
        [name, f"{parameters[kind]:,}", giga(macs[kind]), score(scores.get(key), metric)]
        for name, kind, key in kinds
    ]
    head = ["model", "parameters", "GMACs", metric or "score"]
    return [
        *table(head, rows),
        f"{result['layers']} layers factored; {_measured(result, data)}",
        *_kept(result),
        f"wrote {result['out']}, with report.md",
    ]


def _measured(result: dict[str, Any], data: Path | None) -> str:
    if data is None:
        return "no data, so plain SVD"
    samples = result["samples"]
    if samples:
        return f"{result['metric']} on {samples} held-back samples"
    return "no samples held back, so no score"


def _kept(result: dict[str, Any]) -> list[str]:
    epochs, kept = result["epochs"], result["kept_epoch"]
    if not epochs:
        return []
    if not kept:
        return [f"kept the start: none of {epochs} epochs was better (try a lower --lr)"]
    return [f"kept epoch {kept} of {epochs}"]
