"""regrow compress."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from regrow_toolchain.config import CompressConfig
from regrow_toolchain.pages import table

from ..config_options import config_options
from ..model_options import AssetFiles, Samples, asset_options, data_options
from ..options import (
    check_state,
    emit,
    force_option,
    json_option,
    out_option,
    path_argument,
    resumable,
    resume_option,
)
from ..tables import giga, score

if TYPE_CHECKING:
    from regrow_toolchain.compress import Compressed
    from regrow_toolchain.data import Dataset
    from regrow_toolchain.models import Backbone

_WITHOUT_DATA = {
    "ratio", "init", "ranks", "multiple", "slow_layers", "precision", "threads", "only",
    "keep_dense",
}  # fmt: skip
_WITH_DATA = {item.name for item in fields(CompressConfig)} - _WITHOUT_DATA


@click.command("compress")
@path_argument("model")
@out_option("Folder for the compressed backbone.")
@data_options("Training data, with the model's own labels or without labels (no data: plain SVD)")
@config_options(CompressConfig)
@asset_options
@resume_option
@force_option
@json_option
def compress_command(
    model: Path,
    out: Path,
    config: CompressConfig,
    samples: Samples,
    assets: AssetFiles,
    resume: bool,
    force: bool,
    as_json: bool,
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
    state = out.with_name(f"{out.name}.resume")
    _check(out, samples, state, resume=resume, force=force)
    from regrow_toolchain.compress import build_report, compress, write_report
    from regrow_toolchain.models import save_backbone

    source = assets.load(model)
    data = samples.load(source, labels="none" if config.task == "distillation" else "optional")
    _tell_distillation(samples.path, data, source, config)
    with resumable(state):
        done = compress(source, data, config, checkpoint=state, resume=resume)
        report = build_report(done, source, data)
        backbone = save_backbone(
            done.backbone, out, force=force, beside=lambda folder: write_report(folder, report)
        )
    state.unlink(missing_ok=True)
    result = _result(out, config, done, backbone, report)
    emit(result, _lines(result, samples.path), as_json=as_json)


def _check(out: Path, samples: Samples, state: Path, *, resume: bool, force: bool) -> None:
    """What can be said before packages take seconds to load."""
    from regrow_format.files import check_output

    check_output(out, force=force, marker="regrow.json")
    check_state(state, resume)
    samples.check()
    if samples.path is None and (unused := _given(_WITH_DATA)):
        click.echo(f"regrow: without --data nothing is trained: no effect of {unused}", err=True)


def _tell_distillation(
    path: Path | None, data: Dataset | None, source: Backbone, config: CompressConfig
) -> None:
    """Say that there are no labels, where some were to be expected."""
    from regrow_toolchain.data import is_saved

    asked = config.task != "auto" or source.task == "feature-extraction" or not source.labels
    if path is None or data is None or not data.unlabelled or asked:
        return
    folder = path.is_dir() and not is_saved(path)
    way = "give a folder per class" if folder else "name a column or an array with --label"
    click.echo(
        f"regrow: no labels found in {path}: it learns by distillation from the dense model "
        f"({way} for labels, or --task distillation to say that none are meant)",
        err=True,
    )


def _result(
    out: Path,
    config: CompressConfig,
    done: Compressed,
    backbone: Backbone,
    report: Mapping[str, Any],
) -> dict[str, Any]:
    return {
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


def _given(names: Collection[str]) -> str:
    """Which of the options stand on the command line."""
    context = click.get_current_context()
    found = [
        name
        for name in context.params
        if name in names and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(found))


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
