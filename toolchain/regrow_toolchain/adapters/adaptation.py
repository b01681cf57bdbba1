"""Training adapters on a frozen backbone: for one user, or for many in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from regrow_export.quantization import rounded_weights
from regrow_format.adapter import Target
from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone, find_targets
from regrow_toolchain.tasks import Loss, choose_task
from regrow_toolchain.training import (
    Checkpoint,
    StateFile,
    accelerated,
    deterministic,
    frozen,
    step_threads,
    torch_threads,
    training_identity,
)

from .group import Adapted, GroupTraining, Shared
from .prober import Prober
from .user_data import UserData, prepare

__all__ = ["TrainingStopped", "adapt", "adapt_each", "adapt_users", "training_threads"]

# Adapters in one pass: together they have about as many samples as keep two cores busy, fewer
# where the backbone is large, since memory grows with both.
_SAMPLES_AT_ONCE = 256
_SAMPLES_TIMES_PARAMETERS = 2_000_000_000


class TrainingStopped(RegrowError):
    """The loss became NaN or infinite.

    Attributes:
        adapted: the last good adapter; None if there was none before the first step.
    """

    def __init__(self, message: str, adapted: Adapted | None) -> None:
        super().__init__(message)
        self.adapted = adapted


def adapt(
    backbone: Backbone,
    data: Dataset,
    config: AdaptConfig | None = None,
    *,
    eval_data: Dataset | None = None,
    loss: Loss | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> Adapted:
    """Train one adapter for one user.

    Args:
        backbone: dense or compressed; its weights do not change.
        data: the user's labelled samples. A share of them is held back to judge the adapter by; of
            few samples (fewer than 50 held back) each is held back in one of five folds, which
            trains six adapters in the place of one.
        eval_data: samples to score on, instead of a share of `data`.
        loss: `loss(outputs, labels)`, one per sample or one for all, instead of the task's.
        checkpoint: a file for the state of training, written every ten seconds and removed in the
            end; with `resume` training goes on from it, to the same result.

    Raises:
        UsageError: labels, targets or settings make no sense.
        TrainingStopped: the loss became NaN or infinite.
    """
    data = replace(data, users=None)
    eval_data = replace(eval_data, users=None) if eval_data is not None else None
    state = None if checkpoint is None else StateFile(Path(checkpoint), resume)
    ((_, done),) = adapt_each(backbone, data, config, eval_data=eval_data, loss=loss, state=state)
    if done.stopped:
        kept = done if done.stopped.step else None
        raise TrainingStopped(str(done.stopped), kept)
    return done


def adapt_users(
    backbone: Backbone,
    data: Dataset,
    config: AdaptConfig | None = None,
    *,
    eval_data: Dataset | None = None,
    loss: Loss | None = None,
) -> dict[str, Adapted]:
    """Train an adapter for each user of `data`, several in one pass over the backbone.

    Each gets what training alone would give, within rounding. Arguments and errors are those of
    `adapt`; a user whose loss is not finite has `stopped` set, the others go on.
    """
    if data.users is None:
        raise UsageError("data must say whose each sample is, got no users")
    return dict(adapt_each(backbone, data, config, eval_data=eval_data, loss=loss))


def adapt_each(
    backbone: Backbone,
    data: Dataset,
    config: AdaptConfig | None = None,
    *,
    eval_data: Dataset | None = None,
    loss: Loss | None = None,
    state: StateFile | None = None,
) -> Iterator[tuple[str, Adapted]]:
    """As `adapt_users`, one after another as they are ready.

    Args:
        state: where the state of training is kept; of several users each group has a file, whose
            name goes on with what it is of.
    """
    config = config or AdaptConfig()
    if not backbone.backbone_id:
        raise UsageError("backbone must be saved before adapters are trained for it: save_backbone")
    task = choose_task(config, data, backbone.task, loss)
    layers = find_targets(backbone.model, config.targets, method=config.method)
    users = prepare(backbone, data, eval_data, task, config)
    if any(user.result.head != "keep" for user in users):
        _check_head(layers, backbone)
    config = replace(config, threads=training_threads(backbone, data, config))
    prober = Prober(backbone.model, data.inputs)
    with ExitStack() as stack:
        stack.enter_context(torch_threads(config.threads))
        stack.enter_context(deterministic(config.seed))
        stack.enter_context(frozen(backbone.model))
        stack.enter_context(rounded_weights(backbone.model, config.precision))
        accelerator = stack.enter_context(accelerated(backbone.model, config))
        shared = Shared(backbone, task, layers, config, accelerator, prober)
        for group, size in list(_groups(users, config, _parameters(backbone))):
            checkpoint = _checkpoint(state, shared, group, several=data.users is not None)
            job = GroupTraining(shared, group, size)
            yield from job.run(checkpoint, resume=state is not None and state.resume)


def training_threads(backbone: Backbone, data: Dataset, config: AdaptConfig) -> int:
    """The config's threads, or what the work of a step makes of it.

    Args:
        data: everybody's samples; whom of many users are still to be trained makes no difference.
    """
    if config.threads:
        return config.threads
    samples = config.batch_size
    if data.users is not None:
        samples = samples * config.users_at_once or max(samples, _SAMPLES_AT_ONCE)
    pieces = min(config.accumulate, samples)
    at_once = math.ceil(min(samples, len(data)) / pieces)
    return step_threads(backbone.model, data, at_once, config.device)


def _check_head(layers: Sequence[Target], backbone: Backbone) -> None:
    """Raise `UsageError` if there is no head to train, or a target is a layer of it."""
    if not backbone.head:
        raise UsageError("backbone must have a head to train one, got none")
    if both := [target.name for target in layers if target.name in backbone.head]:
        raise UsageError(f"targets must not be layers of a head that is trained, got {both[0]}")


def _parameters(backbone: Backbone) -> int:
    return sum(parameter.numel() for parameter in backbone.model.parameters())


def _groups(
    users: Sequence[UserData], config: AdaptConfig, parameters: int
) -> Iterator[tuple[list[UserData], int]]:
    """Users that are dealt with together, their heads alike, and how many adapters fit in a pass.

    A user's own trainings may take several passes, one after another.
    """
    for head in ("keep", "tune", "new"):
        alike = [user for user in users if user.result.head == head]
        trainings = [training for user in alike for training in user.trainings]
        largest = max((min(config.batch_size, len(t.train)) for t in trainings), default=1)
        samples = min(_SAMPLES_AT_ONCE, _SAMPLES_TIMES_PARAMETERS // max(parameters, 1))
        size = config.users_at_once or max(1, samples // largest)
        count = max(1, size // max((len(user.trainings) for user in alike), default=1))
        for start in range(0, len(alike), count):
            yield alike[start : start + count], size


def _checkpoint(
    state: StateFile | None, shared: Shared, users: Sequence[UserData], *, several: bool
) -> Checkpoint | None:
    """Where the state of a group is kept; of several, each has a file named by what it is of."""
    if state is None:
        return None
    task, config = shared.task, shared.config
    identity = training_identity(
        config,
        shared.backbone.backbone_id,
        [target.name for target in shared.layers],
        [task.name, getattr(getattr(task, "loss", None), "__qualname__", "")],
        samples=[
            (f"{user.id} {training.head}", part)
            for user in users
            for training in user.trainings
            for part in (training.train, training.validation)
            if part is not None
        ],
    )
    path = Path(f"{state.path}.{identity.digest[:16]}") if several else state.path
    return Checkpoint(path, identity, began=state.began)
