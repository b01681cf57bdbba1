"""Users that are trained together: their passes, and what each of them gets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.adapter import Adapter, Coefficients, Target, Validated
from regrow_format.methods import get_method
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset, equal_samples, joined
from regrow_toolchain.models import Backbone
from regrow_toolchain.tasks import Task
from regrow_toolchain.training import Augmentation, Checkpoint, MultiUserBatches, evaluate

from .acceptance import Evidence, Verdict, judge
from .early_stopping import Stopped
from .heads import Heads
from .hooks import applied
from .methods import TrainableAdapter, get_trainable
from .prober import Prober
from .trainer import AdapterTrainer
from .user_data import Training, UserData

__all__ = ["Adapted", "GroupTraining", "Shared"]


@dataclass(frozen=True)
class Adapted:
    """A trained adapter with its scores on samples held back (NaN if none were).

    Attributes:
        before: without the adapter; where the model has no answer by itself, of a constant one.
        after: with it, as its file stores it.
        samples: how many were held back, in all folds together.
        folds: 0 if `adapter` itself was judged; otherwise so many adapters were trained to be
            judged, each with another part of the samples held back, and `adapter` has seen all.
        verdict: whether it improves on none, see `acceptance.py`; None if nothing was held back.
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


@dataclass(frozen=True)
class _Outcome:
    """What became of one training.

    Attributes:
        answers: `Task.measure` of the samples it had held back; None if there are none.
    """

    adapter: Adapter
    answers: NDArray[np.float32] | None
    stopped: Stopped | None


@dataclass(frozen=True, eq=False)
class Shared:
    """What all trainings of a call have in common."""

    backbone: Backbone
    task: Task
    layers: tuple[Target, ...]
    config: AdaptConfig
    accelerator: Any
    prober: Prober


class GroupTraining:
    """Users that are trained together, in one pass or several, and what becomes of each.

    Args:
        size: how many adapters are trained in a pass.
    """

    def __init__(self, shared: Shared, users: Sequence[UserData], size: int) -> None:
        self.backbone, self.task, self.layers = shared.backbone, shared.task, shared.layers
        self.config, self.accelerator, self.prober = (
            shared.config, shared.accelerator, shared.prober
        )  # fmt: skip
        self.users = users
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
        trained = method.init(
            self.layers, config.method_settings, config.seed, len(trainings),
            model=self.backbone.model,
        )  # fmt: skip
        trained.storage, trained.group = config.coefficient_dtype, config.group_size
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
        counts = [len(training.names) for training in trainings]
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
            if len(training.eval_data):
                found = self._measured(training.eval_data)
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
        before, after = (
            _score(task, evidence, found) for found in (_level(evidence), evidence.adapted)
        )
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
        eval_data = joined([training.eval_data for training in user.judged])
        constants = [
            self.task.constants(training.train.labels, training.eval_data.labels)
            for training in user.judged
        ]
        return Evidence(
            labels=eval_data.labels,
            groups=equal_samples(eval_data),
            folds=np.repeat(np.arange(len(user.judged)), [len(t.eval_data) for t in user.judged]),
            adapted=np.concatenate([_answers(outcomes[training]) for training in user.judged]),
            base=self._base(eval_data, user.result),
            constants={
                name: np.concatenate([found[name] for found in constants]) for name in constants[0]
            },
        )

    def _base(self, eval_data: Dataset, training: Training) -> NDArray[np.float32] | None:
        """What the model answers by itself; None if its head is not for this."""
        if training.head != "new":
            return self._measured(eval_data)
        return self.task.measure_base(eval_data, training.names, self.backbone, self._measured)

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
            storage=config.coefficient_dtype,
            group=config.group_size or None,
            basis=trained.basis,
            stored_basis=trained.stored_basis,
            head=heads.stored(row, names) if heads else None,
        )


def _answers(outcome: _Outcome) -> NDArray[np.float32]:
    assert outcome.answers is not None  # of those who had samples held back
    return outcome.answers


def _level(evidence: Evidence) -> NDArray[np.float32] | None:
    """What there is without the adapter: the base model's answers, or else a constant one."""
    constants = next(iter(evidence.constants.values()), None)
    return constants if evidence.base is None else evidence.base


def _score(task: Task, evidence: Evidence, answer: NDArray[np.float32] | None) -> float:
    """The score that people read: the gate's, if it is the same; NaN of no answer."""
    if answer is None:
        return math.nan
    if task.gate_metric == task.metric:
        return task.gate_score(answer, evidence.labels, evidence.folds)
    return task.score(answer, evidence.labels)


def _stored(
    values: Mapping[str, NDArray[np.float32]],
    constants: Mapping[str, NDArray[np.float32]],
    config: AdaptConfig,
) -> dict[str, Coefficients]:
    return {
        name: Coefficients.store(
            rows, constants[name], config.coefficient_dtype, config.group_size or None
        )
        for name, rows in values.items()
    }
