"""The training of a compressed model: L = L_base + alpha L_fd + beta L_rwp (arXiv 2310.10700)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow_toolchain.config import CompressConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import LowRankPair, weight_of
from regrow_toolchain.tasks import Task
from regrow_toolchain.training import (
    Augmentation,
    Batch,
    Checkpoint,
    MultiUserBatches,
    State,
    check_loss,
    cosine_factor,
    mixed,
    progress,
    trimmed,
)

from .losses import BlockFeatures, feature_blocks, feature_loss, perturbation_loss

__all__ = ["PLAN", "DistillationTrainer", "Epoch", "as_rows"]

PLAN = "plan"  # in a checkpoint: which layers have which ranks
_BETAS = (0.9, 0.999)
_PARTS = ("base", "fd", "rwp")
_PIECES = 4  # that a step of texts is cut into, by their lengths
_LARGEST_NORM = 1.0  # of all gradients together


@dataclass(frozen=True)
class Epoch:
    """What a pass gave: the means of the loss and of its unweighted terms, and the score.

    Attributes:
        score: on samples held back; NaN without any. Epoch 0 is the start.
    """

    number: int
    loss: float
    base: float
    fd: float
    rwp: float
    score: float


class DistillationTrainer:
    """Trains the student beside a frozen teacher; both are on the accelerator's device.

    Tables of embeddings stay as they are: compression has not changed them, and most of their rows
    get no gradient. Both models compute as in use, without dropout. What a step sees follows from
    the seed and the step, so a training that was killed goes on to the same result.

    Args:
        score: of the student as it is; called after every epoch. None if nothing is held back.
        plan: kept in checkpoints under the name `PLAN`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        task: Task,
        data: Dataset,
        config: CompressConfig,
        *,
        accelerator: Any,
        score: Callable[[], float] | None = None,
        plan: Tensor | None = None,
    ) -> None:
        self.plan = plan
        self.teacher, self.student, self.task, self.config = teacher, student, task, config
        self.accelerator, self.score = accelerator, score
        augmentation = Augmentation(config.shift, config.noise)
        self.batches = MultiUserBatches(
            [data], size=config.batch_size, seed=config.seed, device=accelerator.device,
            augmentation=augmentation,
        )  # fmt: skip
        self.per_epoch = math.ceil(len(data) / self.batches.sizes[0])
        self.steps = config.epochs * self.per_epoch
        self.parameters = _trained(student)
        self.optimizer = accelerator.prepare(torch.optim.AdamW(self._groups(), betas=_BETAS))
        self.average = {n: p.detach().clone() for n, p in self._averaged().items()}
        self.history: list[Epoch] = []
        self.best: State = {}
        self._sums = torch.zeros(1 + len(_PARTS), dtype=torch.float64)
        self._dense = {
            name: weight_of(teacher.get_submodule(name))
            for name, module in student.named_modules()
            if isinstance(module, LowRankPair)
        }

    def _groups(self) -> list[dict[str, Any]]:
        """Biases and norms are not decayed."""
        parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in self.parameters.values():
            parts[parameter.dim() < 2].append(parameter)
        decays = (self.config.weight_decay, 0.0)
        return [
            {"params": part, "lr": self.config.lr, "weight_decay": decay}
            for part, decay in zip(parts, decays, strict=True)
            if part
        ]

    def _averaged(self) -> dict[str, nn.Parameter]:
        return self.parameters if self.config.ema else {}

    # -- the loop ----------------------------------------------------------------------------------

    def run(self, checkpoint: Checkpoint | None = None, *, resume: bool = False) -> None:
        """All steps; the student then has the best weights."""
        start = self._resumed(checkpoint) if checkpoint and resume else 0
        self.teacher.eval()
        self.student.eval()
        blocks = feature_blocks(self.student, self.config.blocks)
        if not start:
            self._evaluate(0)
        seen = BlockFeatures(self.student, blocks), BlockFeatures(self.teacher, blocks)
        try:
            with progress("compress", self.steps, start) as advance:
                for step in range(start, self.steps):
                    self.step(step, seen)
                    if (step + 1) % self.per_epoch == 0:
                        seen[0].paused = True  # the teacher is not scored
                        self._evaluate((step + 1) // self.per_epoch)
                        seen[0].paused = False
                    advance(self._note(step))
                    if checkpoint:
                        checkpoint.save(step + 1, self._state)
        finally:
            for features in seen:
                features.close()
        if checkpoint:
            checkpoint.save(self.steps, self._state, now=True)
        self._keep()

    def step(self, number: int, seen: tuple[BlockFeatures, BlockFeatures]) -> None:
        """The update of this number, from 0 on; `seen`: features of the student, the teacher."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * cosine_factor(number, self.steps, config.warmup)
        self.optimizer.zero_grad()
        torch.manual_seed(mixed(config.seed, number))
        sums = torch.zeros(1 + len(_PARTS), dtype=torch.float64)
        for piece, batch in enumerate(self.pieces(number)):
            terms = self.terms(batch, seen, first=piece == 0)
            loss = terms[0] + config.alpha * terms[1] + config.beta * terms[2]
            check_loss(loss, number)
            self.accelerator.backward(loss)
            sums += torch.stack([loss, *terms]).detach().double().cpu()
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), _LARGEST_NORM)
        self.optimizer.step()
        self._average(number)
        self._sums += sums

    def pieces(self, step: int) -> Iterator[Batch]:
        """The samples of a step; texts are cut by length, so that little of them is padding."""
        count = min(self.config.accumulate, self.batches.sizes[0])
        whole = self.batches.batch(step)
        mask = whole.inputs.get("attention_mask")
        rows = torch.arange(self.batches.sizes[0], device=self.accelerator.device)
        if mask is not None and mask.dim() == 2:
            count = max(count, min(_PIECES, len(rows)))
            rows = mask.sum(1).argsort(stable=True)
        for piece in rows.tensor_split(count):
            inputs = {name: value[piece] for name, value in whole.inputs.items()}
            yield Batch(inputs, whole.labels[:, piece], whole.weights[:, piece])

    def terms(
        self, batch: Batch, seen: tuple[BlockFeatures, BlockFeatures], *, first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """L_base, L_fd and L_rwp of a piece, which add up over the pieces of a step."""
        config = self.config
        inputs = trimmed(batch.inputs)
        with self.accelerator.autocast():
            with torch.no_grad():
                wanted = self.task.outputs(self.teacher, inputs)
            found = self.task.outputs(self.student, inputs)
        labels = _cut(batch.labels, found)
        if self.task.learns_from_teacher:
            labels = wanted.unsqueeze(0)
        losses = self.task.losses(found.unsqueeze(0), labels)
        base = (losses.float() * batch.weights).sum()
        own, others = (kept.take() for kept in seen)
        fd = rwp = torch.zeros((), device=base.device)
        if config.alpha:
            mask, relative = inputs.get("attention_mask"), config.features == "relative"
            fd = feature_loss(own, others, mask, relative=relative) * batch.weights.sum()
        if config.beta and first:
            rwp = perturbation_loss(self.student, self._dense, config.epsilon, config.perturbation)
        return base, fd, rwp

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(self.config.ema, (1 + step) / (10 + step))
        for name, value in self.average.items():
            value.lerp_(self.parameters[name], 1 - decay)

    # -- what is kept ------------------------------------------------------------------------------

    def _evaluate(self, number: int) -> None:
        """After an epoch: the score, and the weights if they are the best so far."""
        means = [math.nan] * 4
        if number:
            means = (self._sums / self.per_epoch).tolist()
        self._sums.zero_()
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        if number:
            self._set(self.average)
        score = self.score() if self.score else math.nan
        if self._is_best(score):
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._set(trained)
        loss, base, fd, rwp = means
        self.history.append(Epoch(number, loss, base, fd, rwp, score))

    def _is_best(self, score: float) -> bool:
        """Of equal ones the later; without scores the last."""
        if self.config.keep == "last":
            return True
        if math.isnan(score):
            return all(math.isnan(epoch.score) for epoch in self.history)
        sign = 1 if self.task.higher_is_better else -1
        return all(
            sign * score >= sign * epoch.score
            for epoch in self.history
            if not math.isnan(epoch.score)
        )

    @torch.no_grad()
    def _set(self, values: State) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)

    @property
    def kept(self) -> int:
        """The number of the epoch that is kept; 0 is the start."""
        return next(e.number for e in reversed(self.history) if self._is_kept(e))

    def _is_kept(self, epoch: Epoch) -> bool:
        scores = [e.score for e in self.history if not math.isnan(e.score)]
        if self.config.keep == "last" or not scores:
            return True
        return epoch.score == (max if self.task.higher_is_better else min)(scores)

    def _keep(self) -> None:
        self._set(self.best)

    def _note(self, step: int) -> str:
        done = (step + 1) % self.per_epoch
        if done:
            loss, *parts = (self._sums / done).tolist()
        else:
            last = self.history[-1]
            loss, parts = last.loss, [last.base, last.fd, last.rwp]
        terms = ", ".join(f"{n} {v:.3g}" for n, v in zip(_PARTS, parts, strict=True))
        score = self.history[-1].score
        shown = "" if math.isnan(score) else f", {self.task.metric} {score:.4f}"
        return f"loss {loss:.3f} ({terms}){shown}"

    # -- checkpoints -------------------------------------------------------------------------------

    def _state(self) -> State:
        state: State = {"sums": self._sums}
        if self.plan is not None:
            state[PLAN] = self.plan
        for name, value in self.parameters.items():
            state[f"value.{name}"] = value
            for key, moment in self.optimizer.state[value].items():
                state[f"adam.{key}.{name}"] = moment
        state |= {f"average.{name}": value for name, value in self.average.items()}
        state |= {f"best.{name}": value for name, value in self.best.items()}
        rows = [[e.number, e.loss, e.base, e.fd, e.rwp, e.score] for e in self.history]
        state["history"] = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
        return state

    def _resumed(self, checkpoint: Checkpoint) -> int:
        found = checkpoint.load()
        if found is None:
            return 0
        step, state = found
        device = self.accelerator.device
        self._set({name: state[f"value.{name}"] for name in self.parameters})
        for name, value in self.parameters.items():
            self.optimizer.state[value] = {
                key: moment if key == "step" else moment.to(device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if (moment := state.get(f"adam.{key}.{name}")) is not None
            }
        self.average = {name: state[f"average.{name}"].to(device) for name in self.average}
        kept = {name: state.get(f"best.{name}") for name in self.parameters}
        self.best = {name: value.to(device) for name, value in kept.items() if value is not None}
        self._sums = state["sums"]
        self.history = [Epoch(int(row[0]), *row[1:]) for row in state["history"].tolist()]
        return step


def _trained(student: nn.Module) -> dict[str, nn.Parameter]:
    """Every floating-point parameter but tables of embeddings; tied ones once."""
    tables = {id(module.weight) for module in student.modules() if isinstance(module, nn.Embedding)}
    found = {
        name: parameter
        for name, parameter in student.named_parameters()
        if id(parameter) not in tables and parameter.is_floating_point()
    }
    student.requires_grad_(False)
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def _cut(labels: Tensor, outputs: Tensor) -> Tensor:
    """Labels of tokens [1, S, T] without those of the padding that was cut off."""
    tokens = labels.dim() == 3 and outputs.dim() == 3
    return labels[..., : outputs.shape[1]] if tokens else labels


def as_rows(history: Sequence[Epoch]) -> list[dict[str, float | int | None]]:
    """For JSON: what is not a number is None."""
    return [
        {n: None if isinstance(v, float) and math.isnan(v) else v for n, v in vars(e).items()}
        for e in history
    ]
