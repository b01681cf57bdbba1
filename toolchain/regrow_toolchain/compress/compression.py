"""Compression: PELA's factors, then distillation from the dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from regrow_format.errors import UsageError
from regrow_toolchain.config import CompressConfig
from regrow_toolchain.data import Dataset, split
from regrow_toolchain.models import Backbone
from regrow_toolchain.tasks import Task
from regrow_toolchain.training import (
    Checkpoint,
    State,
    accelerated,
    compression_task,
    deterministic,
    evaluate,
    frozen,
    step_threads,
    teacher_labelled,
    torch_threads,
    training_identity,
)

from .factorization import Factored, factor, restored
from .trainer import PLAN, DistillationTrainer, Epoch

__all__ = ["Compressed", "compress"]

_WAY_OUT = "compression keeps the model's own labels; without data it is the plain SVD"


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed backbone with its scores on held-back samples (NaN if there were none).

    Attributes:
        dense_score, start_score, score: of the dense model, of the factors before training, and
            of the result.
        metric: what the scores are, such as "accuracy".
        factored: what became of each layer.
        history: what each epoch gave; epoch 0 is the start.
        kept: number of the epoch that the result is of.
    """

    backbone: Backbone
    dense_score: float
    start_score: float
    score: float
    samples: int
    factored: Factored
    metric: str = "accuracy"
    history: Sequence[Epoch] = field(default_factory=tuple)
    kept: int = 0


def compress(
    backbone: Backbone,
    data: Dataset | None = None,
    config: CompressConfig | None = None,
    *,
    eval_data: Dataset | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> Compressed:
    """Factor the linear layers of the blocks, then train the factors if there is data.

    Args:
        backbone: the dense model; it is not changed.
        data: samples, with labels or without; without any the result is the plain SVD.
        eval_data: samples to measure on; a share of `data` if not given.
        checkpoint: a file for the state of training, written every ten seconds and left there: it
            can go once the result is saved. With `resume` training goes on from it, to the same
            result.

    Raises:
        UsageError: the ratio, the labels or a setting makes no sense, or the backbone is factored
            already.
        RegrowError: weights are not finite, there is nothing to factor, or the loss became NaN.
    """
    config = config or CompressConfig()
    if backbone.layers:
        raise UsageError("model must be a dense one, got a compressed one: compress its source")
    some = data if data is not None else eval_data
    task = None if some is None else compression_task(config, some, backbone)
    train, eval_data = _parts(backbone, data, eval_data, task, config)
    trains = task is not None and train is not None and config.epochs > 0
    if trains and not config.threads:
        config = replace(config, threads=_threads(backbone, train, config))
    with torch_threads(config.threads), deterministic(config.seed), frozen(backbone.model):
        place = _place(checkpoint, backbone, train, config) if trains else None
        known = place.load() if place and resume else None
        job = _Job(backbone, _factored(backbone, train, config, known), task, eval_data)
        if trains:
            job.train(train, config, place, resume=known is not None)
    return job.result(config)


def _factored(
    backbone: Backbone,
    train: Dataset | None,
    config: CompressConfig,
    known: tuple[int, State] | None,
) -> Factored:
    """The factors as they start, or in the shapes of those in a state."""
    if known is not None:
        return restored(backbone.model, known[1][PLAN], config)
    return factor(backbone.model, train, config)


def _threads(backbone: Backbone, train: Dataset | None, config: CompressConfig) -> int:
    """What the work of a step makes of the threads."""
    assert train is not None
    samples = math.ceil(min(config.batch_size, len(train)) / config.accumulate)
    return step_threads(backbone.model, train, samples, config.device)


def _parts(
    backbone: Backbone,
    data: Dataset | None,
    eval_data: Dataset | None,
    task: Task | None,
    config: CompressConfig,
) -> tuple[Dataset | None, Dataset | None]:
    """(to train on, to measure on)."""

    def fitted(part: Dataset) -> Dataset:
        return part if task is None else task.fit(part, None, backbone, way_out=_WAY_OUT).data

    train = None if data is None else fitted(data)
    if eval_data is None and train is not None:
        train, kept = split(train, config.holdout, config.seed)
        eval_data = kept if len(kept) else None
    elif eval_data is not None:
        eval_data = fitted(eval_data)
    if eval_data is not None and task is not None:
        eval_data = teacher_labelled(task, backbone.model, eval_data)
    return train, eval_data


class _Job:
    """One model's compression, from its factors on."""

    def __init__(
        self, backbone: Backbone, factored: Factored, task: Task | None, eval_data: Dataset | None
    ) -> None:
        self.backbone, self.factored, self.task, self.eval_data = (
            backbone,
            factored,
            task,
            eval_data,
        )
        self.student = factored.model
        self.history: Sequence[Epoch] = ()
        self.kept = 0
        self.dense, self.start = self._score(backbone.model), self._score(self.student)

    def _score(self, model: nn.Module) -> float:
        if self.task is None or self.eval_data is None:
            return math.nan
        return self.task.score(evaluate(model, self.task, self.eval_data), self.eval_data.labels)

    def train(
        self,
        data: Dataset | None,
        config: CompressConfig,
        place: Checkpoint | None,
        *,
        resume: bool,
    ) -> None:
        """Distil; the student then has the best weights."""
        assert self.task is not None
        assert data is not None
        teacher, student = self.backbone.model, self.student
        both = nn.ModuleList([teacher, student])
        with accelerated(both, config) as accelerator:
            training = DistillationTrainer(
                teacher, student, self.task, data, config, accelerator=accelerator,
                score=(lambda: self._score(student)) if self.eval_data is not None else None,
                plan=self.factored.as_tensor(),
            )  # fmt: skip
            training.run(place, resume=resume)
        self.history, self.kept = training.history, training.kept
        self.start = training.history[0].score

    def result(self, config: CompressConfig) -> Compressed:
        """What came out of it."""
        self.student.eval().requires_grad_(False)
        after = self._score(self.student)
        backbone = self._backbone(config)
        samples = len(self.eval_data) if self.eval_data is not None else 0
        metric = self.task.metric if self.task is not None else "accuracy"
        if samples:
            scores = {"dense": self.dense, "start": self.start, "compressed": after}
            backbone.report["metric"] = metric
            backbone.report["scores"] = {n: s for n, s in scores.items() if math.isfinite(s)}
            backbone.report["samples"] = samples
        return Compressed(
            backbone, self.dense, self.start, after, samples, self.factored, metric, self.history,
            self.kept,
        )  # fmt: skip

    def _backbone(self, config: CompressConfig) -> Backbone:
        source = self.backbone
        result = Backbone(
            model=self.student,
            backbone_id="",  # known when it is written
            task=source.task,
            head=source.head,
            labels=source.labels,
            files=source.files,
            layers=self.factored.plans,
            function=source.function,
        )
        result.report = {
            "ratio": config.ratio,
            "precision": config.precision,
            "source": source.backbone_id,
            "parameters": {"dense": source.parameters, "compressed": result.parameters},
        }
        return result


def _place(
    path: str | Path | None,
    backbone: Backbone,
    data: Dataset | None,
    config: CompressConfig,
) -> Checkpoint | None:
    if path is None or data is None:
        return None
    identity = training_identity(config, backbone.backbone_id, samples=[("", data)])
    return Checkpoint(Path(path), identity)
