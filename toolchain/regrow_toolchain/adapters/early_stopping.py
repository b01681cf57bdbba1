"""Who stops training before its end: users whose loss fails, or whose score grows no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regrow_toolchain.training import State

__all__ = ["BestParameters", "Stopped"]


@dataclass(frozen=True)
class Stopped:
    """Why a user's training ended before its last step."""

    step: int
    loss: float

    def __str__(self) -> str:
        return f"loss must be finite, got {self.loss} at step {self.step}: lower --lr"


class BestParameters:
    """By user: the best validation score so far, its parameters, and evaluations since."""

    def __init__(self, users: int, higher: bool) -> None:
        self.sign = 1.0 if higher else -1.0
        self.scores = torch.full((users,), -torch.inf, dtype=torch.float64)
        self.stale = torch.zeros(users, dtype=torch.int64)
        self.done = torch.zeros(users, dtype=torch.bool)
        self.kept: dict[int, State] = {}

    def keep(self, user: int, copies: State) -> None:
        """A user's rows of `copies`, unless something was kept already."""
        self.kept.setdefault(user, {name: value[user].clone() for name, value in copies.items()})

    def update(
        self, scores: Sequence[float], copies: State, patience: int, stopped: set[int]
    ) -> None:
        """Note an evaluation; a user whose patience is over keeps what was best then."""
        for user, score in enumerate(scores):
            if self.done[user] or user in stopped:
                continue
            if self.sign * score > self.scores[user]:
                self.scores[user] = self.sign * score
                self.stale[user] = 0
                self.kept.pop(user, None)
                self.keep(user, copies)
            else:
                self.stale[user] += 1
                self.done[user] = bool(self.stale[user] >= patience)
                if self.done[user]:  # no evaluation was good: what there is now, as if alone
                    self.keep(user, copies)

    def all_done(self, stopped: set[int]) -> bool:
        """Whether nobody is left to train."""
        return all(bool(done) or user in stopped for user, done in enumerate(self.done))

    def state(self) -> State:
        """For a checkpoint."""
        state = {"best.scores": self.scores, "best.stale": self.stale, "best.done": self.done}
        for user, kept in self.kept.items():
            state |= {f"kept.{user}.{name}": value for name, value in kept.items()}
        return state

    def restore(self, state: State, device: torch.device) -> None:
        """From a checkpoint, where there is a resumed training."""
        self.scores, self.stale = state["best.scores"], state["best.stale"]
        self.done = state["best.done"]
        for name, value in state.items():
            if name.startswith("kept."):
                _, user, key = name.split(".", 2)
                self.kept.setdefault(int(user), {})[key] = value.to(device)
