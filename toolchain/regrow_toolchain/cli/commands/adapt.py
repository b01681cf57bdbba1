"""regrow adapt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.pages import table

from ..options import (
    carried_options,
    check_data,
    config_options,
    data_options,
    emit,
    force_option,
    json_option,
    out_option,
    parse_pairs,
    path_argument,
    resumable,
    targets_option,
)
from ..tables import score, size

if TYPE_CHECKING:
    from regrow_toolchain.adapters import Adapted, Verdict
    from regrow_toolchain.data import Dataset
    from regrow_toolchain.models import Backbone

_SHOWN = 20
_SETTINGS = (
    "nola: k=64, l=64, rank=8, c=8.0, shared=true; vera: rank=64, d_initial=0.1; "
    "fourierft: n=128, alpha=64.0, init=zero, bias_frequency=0, bias_width=0; "
    "lora: rank=4, alpha=4.0, rslora=false"
)


@click.command("adapt")
@path_argument("backbone")
@out_option("Adapter file to write (.safetensors); with --users a folder of them.")
@data_options("The user's samples", required=True)
@click.option(
    "--users",
    metavar="NAME",
    help="Train an adapter for every user in one pass: the column or the array with user ids, or "
    "`folder` for DATA/USER/CLASS.",
)
@targets_option
@config_options(AdaptConfig)
@click.option(
    "--set",
    "pairs",
    multiple=True,
    metavar="NAME=VALUE",
    help=f"A setting of the method; repeatable. {_SETTINGS} (these are the defaults).",
)
@click.option(
    "--loss",
    metavar="MODULE:FUNCTION",
    help="A loss of your own: function(outputs, labels), a number per sample. It is imported.",
)
@click.option(
    "--keep-anyway", is_flag=True, help="Write an adapter that is not shown to be better than none."
)
@click.option(
    "--resume", is_flag=True, help="Go on with a training that was interrupted (OUT.resume)."
)
@carried_options
@force_option
@json_option
def adapt_command(
    backbone: Path,
    out: Path,
    data: Path,
    text: str | None,
    label: str | None,
    max_length: int,
    preprocessor: Path | None,
    label_file: Path | None,
    users: str | None,
    targets: tuple[str, ...],
    pairs: tuple[str, ...],
    loss: str | None,
    keep_anyway: bool,
    resume: bool,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train an adapter for BACKBONE: a compressed one, a Hugging Face directory, or
    package.module:function that returns an nn.Module.

    The backbone's weights stay as they are. Part of the samples is held back to judge the adapter
    by; where that are fewer than 50, each is held back once, in five folds, and the adapter
    learns from all. One that is not shown to be better than none is not written. Labels that are
    the backbone's keep its head; others get a head of their own.
    """
    from regrow_toolchain.extras import require_extra

    settings["method_settings"] = parse_pairs(pairs, "--set")
    require_extra("export", "regrow adapt")
    from regrow_format.errors import RegrowError
    from regrow_format.files import check_output

    check_data(data)
    if out.exists() and out.samefile(data):
        raise click.UsageError(f"output must not be the data itself, got {out}")
    if users is None:
        check_output(out, force=force)
        _check_state(out, resume)
    from regrow_toolchain.data import attach_assets, load_data
    from regrow_toolchain.models import load_backbone

    config = AdaptConfig(**settings)
    own_loss = _loss(loss)
    model = attach_assets(load_backbone(backbone), preprocessor=preprocessor, labels=label_file)
    samples = load_data(data, model, users=users, text=text, label=label, max_length=max_length)
    arguments = {"targets": targets, "loss": own_loss}
    if users is None:
        result = _one(model, samples, config, arguments, out, keep_anyway, resume)
        emit(result, _lines(result), as_json=as_json)
    else:
        result = _many(model, samples, config, arguments, out, keep_anyway, resume, force)
        emit(result, _user_lines(result), as_json=as_json)
        if not result["written"]:
            raise RegrowError(_none_gains(result))


def _loss(name: str | None) -> Callable[..., Any] | None:
    if name is None:
        return None
    from regrow_toolchain.models import function_called

    return function_called(name, "loss")


# -- one user --------------------------------------------------------------------------------------


def _one(
    model: Backbone,
    samples: Dataset,
    config: AdaptConfig,
    arguments: dict[str, Any],
    out: Path,
    keep_anyway: bool,
    resume: bool,
) -> dict[str, Any]:
    from regrow_format.errors import RegrowError
    from regrow_toolchain.adapters import adapt

    if config.holdout and not keep_anyway:
        _check_enough(samples)
    state = _state(out)
    with _last_good(out, keep_anyway), resumable(state):
        done = adapt(model, samples, config, checkpoint=state, resume=resume, **arguments)
    if not done.improves and not keep_anyway:
        raise RegrowError(_no_gain(done))
    adapter = done.adapter
    return {
        "out": str(out),
        "bytes": adapter.save(out),
        "method": adapter.method,
        "config": dict(adapter.config),
        "storage": adapter.storage,
        "seed": str(adapter.seed),
        "backbone_id": adapter.backbone_id,
        "targets": len(adapter.targets),
        "labels": list(adapter.head.labels) if adapter.head else None,
        "samples": {"data": len(samples), "held_back": done.samples, "folds": done.folds},
        "metric": done.metric,
        "before": None if math.isnan(done.before) else done.before,
        "after": None if math.isnan(done.after) else done.after,
        "gate": _gate(done.verdict),
    }


def _gate(verdict: Verdict | None) -> dict[str, Any] | None:
    """The verdict as JSON has it."""
    if verdict is None:
        return None
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in vars(verdict).items()
    }


def _check_enough(samples: Dataset) -> None:
    """Raise `UsageError` where no adapter could be told to improve: training would be in vain."""
    import numpy as np

    from regrow_format.errors import UsageError
    from regrow_toolchain.adapters import FEWEST_GROUPS
    from regrow_toolchain.data import check_samples, equal_samples

    check_samples(samples)
    if (found := len(np.unique(equal_samples(samples)))) < FEWEST_GROUPS:
        raise UsageError(
            f"data must have {FEWEST_GROUPS} different samples or more to tell whether an adapter "
            f"improves, got {found}: give more, or train one untested with --holdout 0"
        )


def _state(out: Path) -> Path:
    return out.with_name(f"{out.name}.resume")


def _check_state(out: Path, resume: bool) -> None:
    """Raise `UsageError` if a state lies there that nobody asked to go on with."""
    from regrow_format.errors import UsageError

    if _state(out).exists() and not resume:
        raise UsageError(
            f"an interrupted training left {_state(out)}: --resume goes on with it, or remove it"
        )
    if resume and not _state(out).exists():
        click.echo(f"regrow: nothing to resume at {_state(out)}: it starts anew", err=True)


@contextmanager
def _last_good(out: Path, keep_anyway: bool) -> Iterator[None]:
    """Write what was good before the loss stopped being a number, and say where."""
    from regrow_format.errors import RegrowError
    from regrow_toolchain.adapters import TrainingStopped

    try:
        yield
    except TrainingStopped as error:
        if error.adapted is None or not (error.adapted.improves or keep_anyway):
            raise RegrowError(f"{error}; no adapter that improves on none was reached") from error
        kept = out.with_name(f"{out.stem}.last-good.safetensors")
        error.adapted.adapter.save(kept)
        raise RegrowError(
            f"{error}; the last good adapter is {kept} "
            f"({_score(error.adapted.after, error.adapted.metric)})"
        ) from error


def _no_gain(done: Adapted) -> str:
    """Why an adapter was refused, and what to do."""
    from regrow_toolchain.adapters import FEWEST_GROUPS

    verdict = done.verdict
    assert verdict is not None  # without one nothing is refused
    where = f"{done.samples} samples held back" + (f" in {done.folds} folds" if done.folds else "")
    if verdict.groups < FEWEST_GROUPS:
        return (
            f"data must hold back {FEWEST_GROUPS} different samples or more to tell whether an "
            f"adapter improves, got {verdict.groups}: give more samples (--keep-anyway writes it)"
        )
    return (
        f"adapter must be better than none to be written, got {_gain(verdict)} on {where}: give "
        "more samples, or try --steps, --lr or another --method (--keep-anyway writes it)"
    )


def _gain(verdict: Verdict) -> str:
    """What was found, score and test."""
    from regrow_toolchain.adapters import SIGNIFICANCE

    before, after = (score(value, verdict.metric) for value in (verdict.before, verdict.after))
    return (
        f"{verdict.metric} {before} before and {after} after, and a loss of "
        f"{verdict.loss_after:.3g} beside {verdict.loss_before:.3g} of the {verdict.baseline} "
        f"({_p(verdict.p_value)}, must be at most {SIGNIFICANCE})"
    )


def _score(value: float | None, metric: str) -> str:
    shown = score(value, metric)
    return shown if shown == "no score" else f"{metric} {shown}"


def _test(gate: dict[str, Any] | None) -> str:
    if not gate:
        return ""
    found = f" ({_p(gate['p_value'])} against the {gate['baseline']})"
    return found if gate["improves"] else f"{found}: not shown to be better than none"


def _p(value: float) -> str:
    """A p-value; drawn sign patterns tell nothing below a thousandth."""
    return "p < 0.001" if value < 1e-3 else f"p = {value:.2g}"


def _lines(result: dict[str, Any]) -> list[str]:
    held, metric = result["samples"]["held_back"], result["metric"]
    folds = result["samples"]["folds"]
    how = (
        f"{held} samples, each held back in one of {folds} folds"
        if folds
        else (f"{held} held-back samples")
    )
    scores = (
        f"{_score(result['before'], metric)} before, {score(result['after'], metric)} after, "
        f"on {how}{_test(result['gate'])}"
        if held
        else "no samples held back, so no score"
    )
    labels = result["labels"] or []
    names = ", ".join(labels[:_SHOWN]) + (" …" if len(labels) > _SHOWN else "")
    kept = "the head is the backbone's (--head new trains one of the user's own)"
    return [
        f"the adapter has a head of its own: {names}" if labels else kept,
        scores,
        f"wrote {result['out']}: {size(result['bytes'])}, {result['method']} in "
        f"{result['storage']}, {result['targets']} layers"
        + (f", own head of {len(labels)} outputs" if labels else ""),
    ]


# -- many users ------------------------------------------------------------------------------------


def _many(
    model: Backbone,
    samples: Dataset,
    config: AdaptConfig,
    arguments: dict[str, Any],
    out: Path,
    keep_anyway: bool,
    resume: bool,
    force: bool,
) -> dict[str, Any]:
    from dataclasses import replace

    import numpy as np

    from regrow_toolchain.adapters import UserFolder, adapt_each, training_threads

    _check_state(out, resume)
    config = replace(config, threads=training_threads(model, samples, config))
    folder = UserFolder(
        out, _identity(model, config, arguments), threads=config.threads, force=force,
        keep_anyway=keep_anyway, resume=resume,
    )  # fmt: skip
    assert samples.users is not None
    left = samples.take(np.flatnonzero(~np.isin(samples.users, sorted(folder.done))))
    with resumable(folder.room):
        if len(left):
            trained = adapt_each(
                model,
                left,
                config,
                checkpoint=folder.state,
                began=folder.begin,
                resume=resume,
                **arguments,
            )
            for user, done in trained:
                folder.add(user, done)
        folder.finish()
    scored = [row for row in folder.rows if row["after"] is not None]
    return {
        "out": str(out),
        "users": len(folder.rows),
        "written": sum(row["file"] is not None for row in folder.rows),
        "bytes": sum(row["bytes"] for row in folder.rows),
        "method": config.method,
        "storage": config.storage,
        "metric": folder.rows[0]["metric"],
        "before": fmean(row["before"] for row in scored) if scored else None,
        "after": fmean(row["after"] for row in scored) if scored else None,
        "adapters": folder.rows,
    }


def _identity(model: Backbone, config: AdaptConfig, arguments: dict[str, Any]) -> str:
    """Everything but the samples that decides what a user gets."""
    from dataclasses import asdict

    settings = {
        k: v for k, v in asdict(config).items() if k not in ("device", "threads", "users_at_once")
    }
    loss = getattr(arguments["loss"], "__qualname__", "")
    return repr([model.backbone_id, sorted(settings.items()), arguments["targets"], loss])


def _user_lines(result: dict[str, Any]) -> list[str]:
    metric = result["metric"]
    rows = [
        (
            row["user"],
            score(row["before"], metric),
            score(row["after"], metric),
            str(row["held_back"]),
            "" if row["p_value"] is None else _p(row["p_value"]),
            size(row["bytes"]) if row["file"] else ("stopped" if row["stopped"] else "not written"),
        )
        for row in result["adapters"]
    ]
    hidden = [f"… {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
    refused = result["users"] - result["written"]
    wrote = (
        f"wrote {result['out']}: {result['written']} adapters, {size(result['bytes'])}, "
        f"{result['method']} in {result['storage']}"
        + (
            f"; {refused} not written: not shown to be better than none (--keep-anyway)"
            if refused
            else ""
        )
    )
    return [
        *table(("user", f"{metric} before", "after", "samples", "test", "file"), rows[:_SHOWN]),
        *hidden,
        f"mean {_score(result['before'], metric)} before, {_score(result['after'], metric)} after "
        f"({result['users']} users)",
        *([wrote] if result["written"] else []),
    ]


def _none_gains(result: dict[str, Any]) -> str:
    return (
        f"adapters must be better than none to be written (p at most 0.02), got none that is, of "
        f"{result['users']} users: {result['out']} was not written; give more samples, or try "
        "--steps, --lr or another --method (--keep-anyway writes them)"
    )
