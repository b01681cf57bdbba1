"""The training loop: one pass over a frozen backbone for all users of a group."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regrow_format.errors import RegrowError
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.tasks import Task
from regrow_toolchain.training import (
    Batch,
    Checkpoint,
    MultiUserBatches,
    State,
    cosine_factor,
    progress,
)

from .early_stopping import BestParameters, Stopped
from .head_features import FEATURES, feature_reader, gives_outputs
from .heads import Heads
from .hooks import Hooks
from .methods import TrainableAdapter
from .optimizer_state import optimizer_state, restore_optimizer

__all__ = ["AdapterTrainer"]

# From this share of the steps on, training sees the coefficients as the file will hold them.
_ROUNDED_FROM = 0.5
# Of a user's largest gradient in a tensor: below it float32 has no digits left.
_NOISE = 1e-6


class AdapterTrainer:
    """Trains the adapters, and heads, of a group of users.

    `run` is made of `step`, which calls `losses`, and of `evaluate`; they may be wrapped to watch a
    training.

    Args:
        accelerator: accelerate's, with the model on its device.
        heads: None keeps the backbone's.
        lr: the peak learning rate of the coefficients.
        validation: samples by user to stop early on, in the order of `batches`; None if not wanted.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: TrainableAdapter,
        heads: Heads | None,
        task: Task,
        batches: MultiUserBatches,
        config: AdaptConfig,
        *,
        accelerator: Any,
        lr: float,
        validation: MultiUserBatches | None = None,
    ) -> None:
        device = accelerator.device
        self.model, self.task, self.batches, self.config = model, task, batches, config
        self.trained = trained.to(device)
        self._last_good: State = {}
        self.heads = heads.to(device) if heads else None
        self.validation, self.accelerator = validation, accelerator
        self.users = trained.users
        self.stopped: dict[int, Stopped] = {}
        groups = [{"params": list(trained.parameters()), "lr": lr, "peak": lr}]
        if heads:
            peak = config.head_lr
            groups.append({"params": list(heads.parameters()), "lr": peak, "peak": peak})
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise RegrowError("training must have something to train, got neither targets nor head")
        self.optimizer = accelerator.prepare(torch.optim.Adam(groups))
        replaced = {
            path: partial(heads.layer, i) for i, path in enumerate(heads.paths)
        } if heads else {}  # fmt: skip
        self.hooks = Hooks(model, replaced, self.users)
        self._from_features = False
        self.best = BestParameters(self.users, task.higher_is_better)

    # -- the loop ---------------------------------------------------------------------------------

    def run(self, name: str, checkpoint: Checkpoint | None = None, *, resume: bool = False) -> None:
        """All steps, or as many as it takes; the parameters are those to keep afterwards.

        A user whose loss becomes NaN or infinite keeps what was good and stands in `stopped`; the
        others go on.
        """
        self._last_good = self._copies()
        start = self._resumed(checkpoint) if checkpoint and resume else 0
        self.model.eval()  # a frozen backbone without dropout: what the device computes
        try:
            self.hooks.attach([target.name for target in self.trained.targets])
            if self.users > 1:
                self._check_users()
            if self._is_head_alone():
                self._keep_features()
            with progress(name, self.config.steps) as advance:
                for step in range(start, self.config.steps):
                    losses = self.step(step)
                    alive = [loss for loss in losses.tolist() if loss == loss]
                    mean = sum(alive) / max(len(alive), 1)
                    advance(f"loss {mean:.3f}")
                    if self._is_over(step):
                        break
                    if checkpoint:
                        checkpoint.save(step + 1, self.state)
        finally:
            self.hooks.detach()
        self._note_broken()
        self._keep()

    def step(self, number: int) -> Tensor:
        """The update of this number, from 0 on; each user's loss before it, [users]."""
        config = self.config
        self.trained.rounded = number >= _ROUNDED_FROM * config.steps
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * cosine_factor(number, config.steps)
        self.optimizer.zero_grad()
        losses = torch.zeros(self.users, device=self.accelerator.device)
        parts = min(config.accumulate, max(self.batches.sizes))
        for part in range(parts):
            batch = self.batches.batch(number, part, parts)
            loss = self.losses(batch)
            self.accelerator.backward(loss.sum())
            losses += loss.detach()
        self._note_failures(losses, number)
        if len(self.stopped) < self.users:
            self._last_good = self._copies()
            self._drop_noise()
            self.optimizer.step()
        return losses

    def _drop_noise(self) -> None:
        """Set gradients to 0 that are only rounding.

        Where the true gradient is 0, as of a key's bias or of a shift that the next norm takes
        away, Adam would make whole steps of what rounding leaves, others in company than alone.
        """
        for value in self.parameters().values():
            if value.grad is not None:
                size = value.grad.abs()
                largest = size.amax(dim=(1, 2), keepdim=True)
                value.grad.masked_fill_(size < _NOISE * largest, 0.0)

    def losses(self, batch: Batch) -> Tensor:
        """[users]: the weighted means of the samples' losses."""
        outputs = self.outputs(batch)
        mask = self.heads.mask() if self.heads else None
        losses = self.task.losses(outputs, batch.labels, mask, batch.weights > 0)
        return (losses.float() * batch.weights).sum(1)

    def outputs(self, batch: Batch) -> Tensor:
        """[users, samples, ...]."""
        if self._from_features and self.heads:
            x = batch.inputs[FEATURES]
            with self.accelerator.autocast():
                return self.heads.layer(0, x.reshape(self.users, -1, x.shape[-1]))
        self.hooks.changes = self.trained.changes()
        with self.accelerator.autocast():
            outputs = self.task.outputs(self.model, batch.inputs)
        self.hooks.check_reached()
        return outputs.reshape(self.users, -1, *outputs.shape[1:])

    # -- a head alone -----------------------------------------------------------------------------

    @torch.no_grad()
    def _is_head_alone(self) -> bool:
        """Whether what is trained is one head of samples that repeat, and it pays to keep what the
        head sees: then no step needs the backbone.

        The model must give what its head gives, untouched, and call it once.
        """
        batches, heads = self.batches, self.heads
        if self.trained.targets or heads is None or len(heads.paths) > 1 or not batches.repeats:
            return False
        if sum(batches.counts) > self.config.steps * sum(batches.sizes):
            return False
        return gives_outputs(
            self.model, heads.paths[0], lambda: self.outputs(batches.batch(0)).flatten(0, 1)
        )

    @torch.no_grad()
    def _keep_features(self) -> None:
        """Have batches give what the head sees, float [samples, in], in place of the inputs."""
        assert self.heads is not None
        self.hooks.detach()
        features = feature_reader(self.model, self.heads.paths[0], self.accelerator)
        self.batches = self.batches.mapped(features)
        self.validation = self.validation.mapped(features) if self.validation else None
        self._from_features = True

    @torch.no_grad()
    def _check_users(self) -> None:
        inputs = self.batches.batch(0).inputs
        size = max(self.batches.sizes)
        self.hooks.check_batch_first(
            lambda users: self.task.outputs(
                self.model, {name: value[: users * size] for name, value in inputs.items()}
            )
        )

    @torch.no_grad()
    def tells_users_apart(self) -> bool:
        """Whether these users can be trained in one pass: the layers see the batch first, and the
        loss gives a number for each sample.
        """
        self.model.eval()
        try:
            self.hooks.attach([target.name for target in self.trained.targets])
            self._check_users()
            self.losses(self.batches.batch(0))
        except RegrowError:
            return False  # if it is something else, training says so
        finally:
            self.hooks.detach()
        return True

    # -- failures, early stopping, state ----------------------------------------------------------

    def _note_failures(self, losses: Tensor, step: int) -> None:
        for user in (~torch.isfinite(losses)).nonzero().flatten().tolist():
            if user not in self.stopped and not self.best.done[user]:
                self.stopped[user] = Stopped(step, float(losses[user]))
                self.best.keep(user, self._last_good)

    def _note_broken(self) -> None:
        """The last step has no loss after it: look at the numbers themselves."""
        for user in range(self.users):
            if user in self.stopped or user in self.best.kept or self._is_finite(user):
                continue
            self.stopped[user] = Stopped(self.config.steps, math.nan)
            self.best.keep(user, self._last_good)

    def _is_finite(self, user: int) -> bool:
        return all(bool(value[user].isfinite().all()) for value in self.parameters().values())

    def _is_over(self, step: int) -> bool:
        if len(self.stopped) == self.users:
            return True
        if self.validation is None or (step + 1) % self.config.eval_every:
            return False
        scores = [
            score if self._is_finite(user) else math.nan
            for user, score in enumerate(self.evaluate(self.validation))
        ]
        self.best.update(scores, self._copies(), self.config.patience, set(self.stopped))
        return self.best.all_done(set(self.stopped))

    @torch.no_grad()
    def evaluate(self, validation: MultiUserBatches) -> list[float]:
        """Each user's score on the validation samples, with coefficients as they are trained."""
        batch = validation.batch(0)
        outputs = self.outputs(batch)
        mask = self.heads.mask() if self.heads else None
        if mask is not None:
            outputs = outputs.masked_fill(~mask, -torch.inf)
        scores = []
        for user in range(self.users):
            count = validation.sizes[user]
            labels = batch.labels[user, :count]
            measured = self.task.measure(outputs[user, :count], labels)
            scores.append(self.task.score(measured, labels.cpu().numpy()))
        return scores

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, the first dimension users."""
        found: dict[str, Tensor] = {f"adapter.{n}": p for n, p in self.trained.named_parameters()}
        if self.heads:
            found |= {f"head.{n}": p for n, p in self.heads.named_parameters()}
        return found

    def _copies(self) -> State:
        return {name: value.detach().clone() for name, value in self.parameters().items()}

    def state(self) -> State:
        """All that a resumed training needs; batches and noise follow from the step alone."""
        state = optimizer_state(self.parameters(), self.optimizer)
        state |= {f"good.{name}": value for name, value in self._last_good.items()}
        ends = [self.stopped.get(user, Stopped(-1, 0.0)) for user in range(self.users)]
        state["stopped.step"] = torch.tensor([end.step for end in ends])
        state["stopped.loss"] = torch.tensor([end.loss for end in ends], dtype=torch.float64)
        return {**state, **self.best.state()}

    def _resumed(self, checkpoint: Checkpoint) -> int:
        found = checkpoint.load()
        if found is None:
            return 0
        step, state = found
        device = self.accelerator.device
        restore_optimizer(self.parameters(), self.optimizer, state, device)
        self._last_good = {name: state[f"good.{name}"].to(device) for name in self._last_good}
        ends = zip(state["stopped.step"].tolist(), state["stopped.loss"].tolist(), strict=True)
        self.stopped = {user: Stopped(*end) for user, end in enumerate(ends) if end[0] >= 0}
        self.best.restore(state, device)
        return step

    def _keep(self) -> None:
        """Put back what was kept for users who stopped early."""
        with torch.no_grad():
            for name, value in self.parameters().items():
                for user, kept in self.best.kept.items():
                    value[user] = kept[name]
