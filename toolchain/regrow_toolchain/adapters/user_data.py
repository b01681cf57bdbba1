"""Each user's samples, made ready: labels as outputs, what trains, what is held back.

Where a share of the samples is enough to tell whether an adapter improves (`acceptance.py`), it
is held back. Of fewer, each is held back once, in one of five folds: five adapters are trained to
judge by, and a sixth of all samples, which is the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from regrow_format.errors import UsageError
from regrow_format.methods import get_method
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import (
    Dataset,
    by_user,
    check_samples,
    equal_samples,
    fold_numbers,
    split,
)
from regrow_toolchain.models import Backbone
from regrow_toolchain.tasks import Fitted, Task

__all__ = ["Training", "UserData", "prepare"]


# So many different samples held back, or it is folds: of 20, of which a base misses five, what an
# adapter mends is not told from chance (p = 0.04 where accuracy rises from 75 to 100 %).
_ENOUGH_HELD = 50
_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Training:
    """What one adapter is trained on.

    Attributes:
        train, held, validation: samples to train on, to judge it by, and to stop early on.
        names: of the outputs that a head for these labels has; empty if nothing says what they are.
        head: "keep", "new" or "tune".
    """

    train: Dataset
    eval_data: Dataset
    validation: Dataset | None
    names: tuple[str, ...]
    head: str


@dataclass(frozen=True, eq=False)
class UserData:
    """One user, ready to be trained for.

    Attributes:
        result: the training whose adapter the user gets.
        folds: trainings that only tell what it is worth; none if samples are held back from
            `result`, or nobody asked.
    """

    id: str
    result: Training
    folds: tuple[Training, ...] = ()

    @property
    def trainings(self) -> tuple[Training, ...]:
        """All of them, the result last."""
        return (*self.folds, self.result)

    @property
    def judged(self) -> tuple[Training, ...]:
        """Those with samples to judge by."""
        return tuple(one for one in self.trainings if len(one.eval_data))


def prepare(
    backbone: Backbone,
    data: Dataset,
    eval_data: Dataset | None,
    task: Task,
    config: AdaptConfig,
) -> list[UserData]:
    """The users of `data`, or the one there is, in the order of their ids.

    Args:
        eval_data: samples to judge by; some of `data` if None.

    Raises:
        UsageError: labels that do not fit, or users with too little to learn from; all are named.
    """
    check_samples(data)
    parts = by_user(data) if data.users is not None else {"": data}
    others: Mapping[str, Dataset] = {}
    if eval_data is not None:
        others = by_user(eval_data) if eval_data.users is not None else {"": eval_data}
        if lost := sorted(set(parts) - set(others)):
            raise UsageError(f"eval_data must have samples of every user, got none of {lost[0]!r}")
    users = []
    for id, part in parts.items():
        try:
            users.append(_user(backbone, id, part, others.get(id), task, config))
        except UsageError as error:
            raise UsageError(f"user {id}: {error}" if id else str(error)) from None
    return users


def _user(
    backbone: Backbone,
    id: str,
    data: Dataset,
    eval_data: Dataset | None,
    task: Task,
    config: AdaptConfig,
) -> UserData:
    fitted, head = _fitted(backbone, data, eval_data, task, config)
    data, eval_data = fitted.data, fitted.eval_data

    def training(train: Dataset, apart: Dataset) -> Training:
        validation = None
        if config.patience:
            train, validation = split(train, config.validation, config.seed + 1)
            if not len(validation):
                raise UsageError("validation must leave samples to stop early on, got none")
        return Training(train, apart, validation, fitted.names, head)

    if eval_data is not None:
        return UserData(id, training(data, eval_data))
    train, apart = split(data, config.holdout, config.seed)
    if not config.holdout or len(np.unique(equal_samples(apart))) >= _ENOUGH_HELD:
        return UserData(id, training(train, apart))
    folds = [training(*parts) for parts in _folds(data, config.seed)]
    return UserData(id, training(data, data.take(np.arange(0))), tuple(folds))


def _folds(data: Dataset, seed: int) -> Iterator[tuple[Dataset, Dataset]]:
    """(what trains, what is held back) of each fold."""
    different = len(np.unique(equal_samples(data)))
    if different < 2:
        raise UsageError(f"data must have two different samples or more, got {len(data)} equal")
    count = min(_FOLDS, different)
    numbers = fold_numbers(data, count, seed)
    for fold in range(count):
        apart = numbers == fold
        yield data.take(np.flatnonzero(~apart)), data.take(np.flatnonzero(apart))


def _fitted(
    backbone: Backbone, data: Dataset, eval_data: Dataset | None, task: Task, config: AdaptConfig
) -> tuple[Fitted, str]:
    """Labels as the task takes them, and what becomes of the head."""
    fitted = task.fit(data, eval_data, backbone, "keep" if config.head == "tune" else config.head)
    head = _head(config, known=fitted.known)
    if head != "keep" and head not in task.heads:
        raise UsageError(
            f"head must be kept for task {task.name}, got method {config.method} with head "
            f"{config.head}"
        )
    if head != "new" and not fitted.known:
        raise UsageError(
            f"backbone must have a trained head of {len(fitted.names)} outputs to {head}, got "
            f"{len(backbone.labels)}: --head new trains one"
        )
    return fitted, head


def _head(config: AdaptConfig, *, known: bool) -> str:
    """What becomes of the head; a method without targets trains one in any case."""
    if config.head in ("new", "tune"):
        return config.head
    if not get_method(config.method).kinds:
        return "tune" if known else "new"
    return "keep" if known or config.head == "keep" else "new"
