"""Training adapters on a frozen backbone: for one user, or for many in one pass."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_export.quantization import rounded_weights
from regrow_format.adapter import STORAGE, Adapter, Coefficients, Target, Validated
from regrow_format.errors import RegrowError, UsageError
from regrow_format.methods import get_method
from regrow_format.philox import check_seed
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset, equal_samples, joined
from regrow_toolchain.models import Backbone, find_targets
from regrow_toolchain.tasks import Loss, Task, choose_task
from regrow_toolchain.training import (
    Augmentation,
    Checkpoint,
    MultiUserBatches,
    accelerated,
    check_settings,
    deterministic,
    evaluate,
    frozen,
    step_threads,
    torch_threads,
)

from .acceptance import Evidence, Verdict, judge
from .heads import Heads
from .hooks import applied
from .methods import TrainableAdapter, get_trainable
from .prober import Prober
from .trainer import AdapterTrainer, Stopped
from .user_data import Training, UserData, prepare

__all__ = ["Adapted", "TrainingStopped", "adapt", "adapt_each", "adapt_users", "training_threads"]

# Adapters in one pass: together they have about as many samples as keep two cores busy, fewer
# where the backbone is large, since memory grows with both.
_SAMPLES_AT_ONCE = 256
_SAMPLES_TIMES_PARAMETERS = 2_000_000_000


@dataclass(frozen=True)
class Adapted:
    """A trained adapter with its scores on samples held back (NaN if none were).

    Attributes:
        before: without the adapter; of a regression with a new head that of the constant answer.
        after: with it, as its file stores it.
        samples: how many were held back, in all folds together.
        folds: 0 if `adapter` itself was judged; otherwise so many adapters were trained to be
            judged, each with another part of the samples held back, and `adapter` has seen all.
        verdict: whether it improves on none, see `gate.py`; None if nothing was held back.
        stopped: why training ended before its last step, if the loss was not finite.
    """

    adapter: Adapter
    before: float
    after: float
    samples: int
    metric: str = "accuracy"
    higher_is_better: bool = True
    folds: int = 0
    verdict: Verdict | None = None
    stopped: Stopped | None = None

    @property
    def improves(self) -> bool:
        """Whether it is better than none; where nobody looked nobody knows: then it counts."""
        return self.verdict is None or self.verdict.improves


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
    targets: Sequence[str] = (),
    held: Dataset | None = None,
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
        targets: names or patterns of the layers to adapt; every linear layer of the blocks if none.
        held: samples to score on, instead of a share of `data`.
        loss: `loss(outputs, labels)`, one per sample or one for all, instead of the task's.
        checkpoint: a file for the state of training, written every ten seconds and removed in the
            end; with `resume` training goes on from it, to the same result.

    Raises:
        UsageError: labels, targets or settings make no sense.
        TrainingStopped: the loss became NaN or infinite.
    """
    data = replace(data, users=None)
    held = replace(held, users=None) if held is not None else None
    ((_, done),) = adapt_each(
        backbone, data, config, targets=targets, held=held, loss=loss, checkpoint=checkpoint,
        resume=resume,
    )  # fmt: skip
    if done.stopped:
        kept = done if done.stopped.step else None
        raise TrainingStopped(str(done.stopped), kept)
    return done


def adapt_users(
    backbone: Backbone,
    data: Dataset,
    config: AdaptConfig | None = None,
    *,
    targets: Sequence[str] = (),
    held: Dataset | None = None,
    loss: Loss | None = None,
) -> dict[str, Adapted]:
    """Train an adapter for each user of `data`, several in one pass over the backbone.

    Each gets what training alone would give, within rounding. Arguments and errors are those of
    `adapt`; a user whose loss is not finite has `stopped` set, the others go on.
    """
    if data.users is None:
        raise UsageError("data must say whose each sample is, got no users")
    return dict(adapt_each(backbone, data, config, targets=targets, held=held, loss=loss))


def adapt_each(
    backbone: Backbone,
    data: Dataset,
    config: AdaptConfig | None = None,
    *,
    targets: Sequence[str] = (),
    held: Dataset | None = None,
    loss: Loss | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    began: Callable[[], object] = lambda: None,
) -> Iterator[tuple[str, Adapted]]:
    """As `adapt_users`, one after another as they are ready.

    Args:
        began: called before a state is written: whatever can be wrong before the first step is not.
    """
    config = config or AdaptConfig()
    _check(config, backbone)
    task = choose_task(config, data, backbone.task, loss)
    layers = find_targets(backbone.model, targets, method=config.method)
    users = prepare(backbone, data, held, task, config)
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
        for group, size in list(_groups(users, config, _parameters(backbone))):
            several = data.users is not None
            state = _checkpoint(
                checkpoint, backbone, group, layers, task, config, several=several, began=began
            )
            job = _Job(backbone, task, layers, group, size, config, accelerator, prober)
            yield from job.run(state, resume=resume)


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


def _check(config: AdaptConfig, backbone: Backbone) -> None:
    check_seed(config.seed)
    check_settings(config)
    if not backbone.backbone_id:
        raise UsageError("backbone must be saved before adapters are trained for it: save_backbone")
    if config.group and (config.group < 8 or STORAGE[config.storage] > 8):
        raise UsageError(
            "group must be 0, or 8 or more with a storage of 8 bits or fewer, "
            f"got {config.group} with {config.storage}"
        )
    if config.method == "head" and config.head == "keep":
        raise UsageError("head must be auto, new or tune for method head, got keep")


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
    path: str | Path | None,
    backbone: Backbone,
    users: Sequence[UserData],
    layers: Sequence[Target],
    task: Task,
    config: AdaptConfig,
    *,
    several: bool,
    began: Callable[[], object],
) -> Checkpoint | None:
    """Where the state of a group is kept; of several, each has a file named by what it is of."""
    if path is None:
        return None
    digest = hashlib.sha256()
    settings = {
        k: v for k, v in asdict(config).items() if k not in ("device", "threads", "method_settings")
    }
    own = {name: str(value) for name, value in sorted(config.method_settings.items())}
    names = [target.name for target in layers]
    kind = [task.name, getattr(getattr(task, "loss", None), "__qualname__", "")]
    digest.update(repr([settings, own, names, kind, backbone.backbone_id]).encode())
    for user in users:
        for training in user.trainings:
            for part in (training.train, training.validation):
                arrays = {} if part is None else {"": part.labels, **part.inputs}
                for name, array in arrays.items():
                    digest.update(f"{user.id} {training.head} {name} {array.shape}".encode())
                    digest.update(np.ascontiguousarray(array).tobytes())
    identity = digest.hexdigest()
    place = Path(f"{path}.{identity[:16]}" if several else path)
    return Checkpoint(place, identity, threads=config.threads, began=began)


@dataclass(frozen=True)
class _Outcome:
    """What became of one training.

    Attributes:
        answers: `Task.measure` of the samples it had held back; None if there are none.
    """

    adapter: Adapter
    answers: NDArray[np.float32] | None
    stopped: Stopped | None


class _Job:
    """Users that are trained together, in one pass or several, and what becomes of each.

    Args:
        size: how many adapters are trained in a pass.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        layers: tuple[Target, ...],
        users: Sequence[UserData],
        size: int,
        config: AdaptConfig,
        accelerator: Any,
        prober: Prober,
    ) -> None:
        self.backbone, self.task, self.layers, self.prober = backbone, task, layers, prober
        self.users, self.config, self.accelerator = users, config, accelerator
        trainings = [training for user in users for training in user.trainings]
        # Of several users, those who cannot share a pass are an error; one has nobody to blame.
        if len(users) == 1 and not self._can_share(trainings[:size]):
            size = 1
        self.passes = [trainings[i : i + size] for i in range(0, len(trainings), size)]

    def run(self, checkpoint: Checkpoint | None, *, resume: bool) -> Iterator[tuple[str, Adapted]]:
        """Train, then judge each as its file stores it."""
        outcomes: dict[Training, _Outcome] = {}
        for number, trainings in enumerate(self.passes):
            if checkpoint:
                checkpoint.begin(number)
            outcomes |= self._trained(number, trainings, checkpoint, resume=resume)
        for user in self.users:
            yield user.id, self._adapted(user, outcomes)
        if checkpoint:
            checkpoint.remove()

    def _trained(
        self,
        number: int,
        trainings: Sequence[Training],
        checkpoint: Checkpoint | None,
        *,
        resume: bool,
    ) -> Iterator[tuple[Training, _Outcome]]:
        """One pass."""
        fitting = self._fitting(trainings)
        fitting.run(self._title(number), checkpoint, resume=resume)
        if checkpoint:
            checkpoint.end(self.config.steps, fitting.state)
        for row, training in enumerate(trainings):
            adapter = self._adapter(fitting.trained, fitting.heads, row, training.names)
            yield training, self._measured_with(adapter, training, fitting.stopped.get(row))

    def _fitting(self, trainings: Sequence[Training]) -> AdapterTrainer:
        config, method = self.config, get_trainable(self.config.method)
        trained = method.start(self.layers, config.method_settings, config.seed, len(trainings))
        trained.storage, trained.group = config.storage, config.group
        return AdapterTrainer(
            self.backbone.model, trained, self._heads(trainings), self.task,
            self._cohort(trainings, "train"), config, accelerator=self.accelerator,
            lr=config.lr or method.default_lr,
            validation=self._cohort(trainings, "validation") if config.patience else None,
        )  # fmt: skip

    def _can_share(self, trainings: Sequence[Training]) -> bool:
        return len(trainings) == 1 or self._fitting(trainings[:2]).tells_users_apart()

    def _title(self, number: int) -> str:
        """What the progress bar of a pass says."""
        users, folds = len(self.users), max(len(user.folds) for user in self.users)
        parts = [self.config.method]
        parts += [f"{users} users"] if users > 1 else []
        parts += [f"{folds} folds"] if folds else []
        passes = f", pass {number + 1} of {len(self.passes)}" if len(self.passes) > 1 else ""
        return f"adapt ({', '.join(parts)}){passes}"

    def _heads(self, trainings: Sequence[Training]) -> Heads | None:
        kind = trainings[0].head
        if kind == "keep":
            return None
        counts = [training.outputs for training in trainings]
        return Heads(self.backbone, counts, fresh=kind == "new", seed=self.config.seed)

    def _cohort(self, trainings: Sequence[Training], part: str) -> MultiUserBatches:
        config = self.config
        parts = [getattr(training, part) for training in trainings]
        device = self.accelerator.device
        if part == "validation":
            return MultiUserBatches(
                parts, size=max(map(len, parts)), seed=config.seed, device=device
            )
        augmentation = Augmentation(config.shift, config.noise)
        return MultiUserBatches(
            parts, size=config.batch_size, seed=config.seed, device=device,
            augmentation=augmentation,
        )  # fmt: skip

    # -- what it is worth -------------------------------------------------------------------------

    def _measured(self, data: Dataset) -> NDArray[np.float32]:
        return evaluate(self.backbone.model, self.task, data)

    def _measured_with(
        self, adapter: Adapter, training: Training, stopped: Stopped | None
    ) -> _Outcome:
        found = None
        with applied(self.backbone.model, adapter):
            if len(training.held):
                found = self._measured(training.held)
            if any(training is user.result for user in self.users):
                probe = self.prober.probe(rounded=self.config.precision != "fp32")
                adapter = replace(adapter, probe=probe)
        return _Outcome(adapter, found, stopped)

    def _adapted(self, user: UserData, outcomes: Mapping[Training, _Outcome]) -> Adapted:
        done, task = outcomes[user.result], self.task
        if not user.judged:
            nan = math.nan
            return Adapted(
                done.adapter, nan, nan, 0, task.metric, task.higher_is_better,
                stopped=done.stopped,
            )  # fmt: skip
        evidence = self._evidence(user, outcomes)
        answer = next(iter(evidence.constants.values())) if evidence.base is None else evidence.base
        before, after = (_score(task, evidence, found) for found in (answer, evidence.adapted))
        adapter, samples = done.adapter, len(evidence.labels)
        if math.isfinite(before) and math.isfinite(after):
            found = Validated(self.config.precision, task.metric, before, after, samples)
            adapter = replace(adapter, validated=(found,))
        return Adapted(
            adapter, before, after, samples, task.metric, task.higher_is_better,
            len(user.folds), judge(task, evidence), done.stopped,
        )  # fmt: skip

    def _evidence(self, user: UserData, outcomes: Mapping[Training, _Outcome]) -> Evidence:
        """All samples held back, fold by fold."""
        held = joined([training.held for training in user.judged])
        constants = [
            self.task.constants(training.train.labels, training.held.labels)
            for training in user.judged
        ]
        return Evidence(
            labels=held.labels,
            groups=equal_samples(held),
            folds=np.repeat(np.arange(len(user.judged)), [len(t.held) for t in user.judged]),
            adapted=np.concatenate([_answers(outcomes[training]) for training in user.judged]),
            base=self._base(held, user.result),
            constants={
                name: np.concatenate([found[name] for found in constants]) for name in constants[0]
            },
        )

    def _base(self, held: Dataset, training: Training) -> NDArray[np.float32] | None:
        """What the model answers by itself; None if its head is not for this."""
        if training.head != "new":
            return self._measured(held)
        if self.task.name == "regression":
            return None
        # By class names: labels that the backbone does not know are missed.
        known = {name: index for index, name in enumerate(self.backbone.labels)}
        theirs = np.array([known.get(name, -1) for name in training.names])
        found = self._measured(replace(held, labels=theirs[held.labels], names=()))
        mine = {int(index): own for own, index in enumerate(theirs) if index >= 0}
        found[:, 0] = [mine.get(int(answer), -1) for answer in found[:, 0]]
        return found

    # -- the file ---------------------------------------------------------------------------------

    def _adapter(
        self, trained: TrainableAdapter, heads: Heads | None, row: int, names: Sequence[str]
    ) -> Adapter:
        config = self.config
        constants = get_method(config.method).constants(trained.config, trained.targets)
        return Adapter(
            method=config.method,
            config=trained.config,
            seed=config.seed,
            backbone_id=self.backbone.backbone_id,
            targets=trained.targets,
            coefficients=_stored(trained.values(row), constants, config),
            storage=config.storage,
            group=config.group or None,
            basis=trained.basis,
            stored_basis=trained.stored_basis,
            head=heads.stored(row, names) if heads else None,
        )


def _answers(outcome: _Outcome) -> NDArray[np.float32]:
    assert outcome.answers is not None  # of those who had samples held back
    return outcome.answers


def _score(task: Task, evidence: Evidence, answer: NDArray[np.float32]) -> float:
    """The score that people read: the gate's, if it is the same."""
    if task.gate_metric == task.metric:
        return task.gate_score(answer, evidence.labels, evidence.folds)
    return task.score(answer, evidence.labels)


def _stored(
    values: Mapping[str, NDArray[np.float32]],
    constants: Mapping[str, NDArray[np.float32]],
    config: AdaptConfig,
) -> dict[str, Coefficients]:
    return {
        name: Coefficients.store(rows, constants[name], config.storage, config.group or None)
        for name, rows in values.items()
    }
