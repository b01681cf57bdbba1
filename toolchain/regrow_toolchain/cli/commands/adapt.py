"""regrow adapt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from regrow_toolchain.config import AdaptConfig

from ..adapt_texts import named_score, no_gain, none_gains, result_lines, user_lines
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

if TYPE_CHECKING:
    from regrow_toolchain.adapters import Adapted, UserFolder, Verdict
    from regrow_toolchain.data import Dataset
    from regrow_toolchain.models import Backbone
    from regrow_toolchain.tasks import Loss


@dataclass(frozen=True)
class _Output:
    """Where adapters go, and which."""

    path: Path
    keep_anyway: bool
    resume: bool
    force: bool

    @property
    def state(self) -> Path:
        """The state of one user's training."""
        return self.path.with_name(f"{self.path.name}.resume")

    def check(self, samples: Samples, *, several: bool) -> None:
        """What can be said before packages take seconds to load."""
        from regrow_format.files import check_output

        samples.check()
        if self.path.exists() and samples.path and self.path.samefile(samples.path):
            raise click.UsageError(f"output must not be the data itself, got {self.path}")
        if not several:  # else the folder checks itself
            check_output(self.path, force=self.force)
            check_state(self.state, self.resume)


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
@config_options(AdaptConfig)
@click.option(
    "--loss",
    metavar="MODULE:FUNCTION",
    help="A loss of your own: function(outputs, labels), a number per sample. It is imported.",
)
@click.option(
    "--keep-anyway", is_flag=True, help="Write an adapter that is not shown to be better than none."
)
@resume_option
@asset_options
@force_option
@json_option
def adapt_command(
    backbone: Path,
    config: AdaptConfig,
    samples: Samples,
    assets: AssetFiles,
    users: str | None,
    loss: str | None,
    as_json: bool,
    **output: Any,
) -> None:
    """Train an adapter for BACKBONE: a compressed one, a Hugging Face directory, or
    package.module:function that returns an nn.Module.

    The backbone's weights stay as they are. Part of the samples is held back to judge the adapter
    by; where that are fewer than 50, each is held back once, in five folds, and the adapter
    learns from all. One that is not shown to be better than none is not written. Labels that are
    the backbone's keep its head; others get a head of their own.
    """
    from regrow_toolchain.extras import require_extra

    require_extra("export", "regrow adapt")
    from regrow_format.errors import RegrowError

    out = _Output(output.pop("out"), **output)
    out.check(samples, several=users is not None)
    own_loss = _loss(loss)
    model = assets.load(backbone)
    data = samples.load(model, users=users)
    assert data is not None  # click requires it
    if users is None:
        result = _one(model, data, config, own_loss, out)
        emit(result, result_lines(result), as_json=as_json)
        return
    result = _many(model, data, config, own_loss, out)
    emit(result, user_lines(result), as_json=as_json)
    if not result["written"]:
        raise RegrowError(none_gains(result))


def _loss(name: str | None) -> Loss | None:
    if name is None:
        return None
    from regrow_toolchain.models import function_called

    return function_called(name, "loss")


# -- one user --------------------------------------------------------------------------------------


def _one(
    model: Backbone, data: Dataset, config: AdaptConfig, loss: Loss | None, out: _Output
) -> dict[str, Any]:
    from regrow_format.errors import RegrowError
    from regrow_toolchain.adapters import adapt

    if config.holdout and not out.keep_anyway:
        _check_enough(data)
    with _last_good(out), resumable(out.state):
        done = adapt(model, data, config, loss=loss, checkpoint=out.state, resume=out.resume)
    if not done.improves and not out.keep_anyway:
        raise RegrowError(no_gain(done))
    return _result(out.path, done, len(data))


def _result(out: Path, done: Adapted, samples: int) -> dict[str, Any]:
    """Write the adapter; what is said of it."""
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
        "samples": {"data": samples, "held_back": done.samples, "folds": done.folds},
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


@contextmanager
def _last_good(out: _Output) -> Iterator[None]:
    """Write what was good before the loss stopped being a number, and say where."""
    from regrow_format.errors import RegrowError
    from regrow_toolchain.adapters import TrainingStopped

    try:
        yield
    except TrainingStopped as error:
        if error.adapted is None or not (error.adapted.improves or out.keep_anyway):
            raise RegrowError(f"{error}; no adapter that improves on none was reached") from error
        kept = out.path.with_name(f"{out.path.stem}.last-good.safetensors")
        error.adapted.adapter.save(kept)
        raise RegrowError(
            f"{error}; the last good adapter is {kept} "
            f"({named_score(error.adapted.after, error.adapted.metric)})"
        ) from error


# -- many users ------------------------------------------------------------------------------------


def _many(
    model: Backbone, data: Dataset, config: AdaptConfig, loss: Loss | None, out: _Output
) -> dict[str, Any]:
    import numpy as np

    from regrow_toolchain.adapters import UserFolder, adapt_each, training_threads
    from regrow_toolchain.training import training_identity

    check_state(out.state, out.resume)
    config = replace(config, threads=training_threads(model, data, config))
    # How many are trained at once decides nothing.
    identity = training_identity(
        replace(config, users_at_once=0), model.backbone_id, getattr(loss, "__qualname__", "")
    )
    folder = UserFolder(
        out.path, identity, force=out.force, keep_anyway=out.keep_anyway, resume=out.resume
    )
    assert data.users is not None
    left = data.take(np.flatnonzero(~np.isin(data.users, sorted(folder.done))))
    with resumable(folder.scratch):
        if len(left):
            for user, done in adapt_each(model, left, config, loss=loss, state=folder.state):
                folder.add(user, done)
        folder.finish()
    return _users_result(folder, config)


def _users_result(folder: UserFolder, config: AdaptConfig) -> dict[str, Any]:
    scored = [row for row in folder.rows if row["after"] is not None]
    return {
        "out": str(folder.out),
        "users": len(folder.rows),
        "written": sum(row["file"] is not None for row in folder.rows),
        "bytes": sum(row["bytes"] for row in folder.rows),
        "method": config.method,
        "storage": config.coefficient_dtype,
        "metric": folder.rows[0]["metric"],
        "before": fmean(row["before"] for row in scored) if scored else None,
        "after": fmean(row["after"] for row in scored) if scored else None,
        "adapters": folder.rows,
    }
