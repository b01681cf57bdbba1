"""Each user's samples, made ready: labels as outputs, what trains, what is held back.

Where a share of the samples is enough to tell whether an adapter improves (`acceptance.py`), it
is held back. Of fewer, each is held back once, in one of five folds: five adapters are trained to
judge by, and a sixth of all samples, which is the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from regrow_format.errors import UsageError
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import (
    Dataset,
    by_user,
    check_samples,
    equal_samples,
    fit_labels,
    fold_numbers,
    split,
)
from regrow_toolchain.models import Backbone
from regrow_toolchain.tasks import Task

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
        names: the classes of the head, or the outputs of a regression; empty for other tasks.
        head: "keep", "new" or "tune".
        outputs: how many outputs the head has.
    """

    train: Dataset
    held: Dataset
    validation: Dataset | None
    names: tuple[str, ...]
    head: str
    outputs: int


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
        return tuple(one for one in self.trainings if len(one.held))


def prepare(
    backbone: Backbone,
    data: Dataset,
    held: Dataset | None,
    task: Task,
    config: AdaptConfig,
) -> list[UserData]:
    """The users of `data`, or the one there is, in the order of their ids.

    Args:
        held: samples to judge by; some of `data` if None.

    Raises:
        UsageError: labels that do not fit, or users with too little to learn from; all are named.
    """
    check_samples(data)
    parts = by_user(data) if data.users is not None else {"": data}
    others: Mapping[str, Dataset] = {}
    if held is not None:
        others = by_user(held) if held.users is not None else {"": held}
        if lost := sorted(set(parts) - set(others)):
            raise UsageError(f"held samples must be there for every user, got none of {lost[0]!r}")
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
    held: Dataset | None,
    task: Task,
    config: AdaptConfig,
) -> UserData:
    names, head, outputs, data, held = _fitted(backbone, data, held, task, config)

    def training(train: Dataset, apart: Dataset) -> Training:
        validation = None
        if config.patience:
            train, validation = split(train, config.validation, config.seed + 1)
            if not len(validation):
                raise UsageError("validation must leave samples to stop early on, got none")
        return Training(train, apart, validation, names, head, outputs)

    if held is not None:
        return UserData(id, training(data, held))
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
    backbone: Backbone, data: Dataset, held: Dataset | None, task: Task, config: AdaptConfig
) -> tuple[tuple[str, ...], str, int, Dataset, Dataset | None]:
    """(names, head, outputs, data, held) with labels as the head's outputs."""
    if task.name == "classification":
        return _fitted_classes(backbone, data, held, config)
    if task.name == "regression":
        count = 1 if data.labels.ndim == 1 else data.labels.shape[1]
        fits = bool(backbone.labels) and len(backbone.labels) == count
        head = _head(config, backbone, known=fits)
        if head != "new" and not fits:
            raise UsageError(
                f"backbone must have a trained head of {count} outputs to {head}, got "
                f"{len(backbone.labels)}: --head new trains one"
            )
        names = backbone.labels if fits else _numbered(count)
        return names, head, count, data, held
    if config.head in ("new", "tune") or config.method == "head":
        if task.name != "custom" or config.head == "new":
            raise UsageError(
                f"head must be kept for task {task.name}, got method {config.method} with head "
                f"{config.head}"
            )
        count = _width(backbone)
        return backbone.labels or _numbered(count), "tune", count, data, held
    return (), "keep", 0, data, held


def _width(backbone: Backbone) -> int:
    """How many outputs the backbone's own head has."""
    if not backbone.head:
        raise UsageError("backbone must have a head to train one, got none")
    last = backbone.model.get_submodule(backbone.head[-1])
    return int(getattr(last, "out_features", len(backbone.labels)))


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"value_{i}" for i in range(count))


def _fitted_classes(
    backbone: Backbone, data: Dataset, held: Dataset | None, config: AdaptConfig
) -> tuple[tuple[str, ...], str, int, Dataset, Dataset | None]:
    wanted = "keep" if config.head == "tune" else config.head
    both = _joined(data, held) if held is not None else replace(data, inputs={})
    fitted, fresh = fit_labels(both, backbone.labels, wanted)
    head = "new" if fresh else _head(config, backbone, known=True)
    mine, theirs = np.split(fitted.labels, [len(data)])
    data = replace(data, labels=mine, names=fitted.names)
    rest = None if held is None else replace(held, labels=theirs, names=fitted.names)
    return fitted.names, head, len(fitted.names), data, rest


def _joined(data: Dataset, held: Dataset) -> Dataset:
    """The labels of both; classes that stand only in `held` are an error of their own."""
    if not held.named and not data.named:
        names = max(data.names, held.names, key=len)
        labels = held.labels
    else:
        there = np.unique(held.labels)
        unknown = [held.names[i] for i in there if held.names[i] not in data.names]
        if unknown:
            raise UsageError(f"held samples must be of the data's classes, got {unknown[0]!r}")
        names, known = data.names, {name: i for i, name in enumerate(data.names)}
        index = np.array([known.get(name, -1) for name in held.names], dtype=np.int64)
        labels = index[held.labels]
    joined = np.concatenate([data.labels, labels])
    return Dataset({}, joined, names, data.named)


def _head(config: AdaptConfig, backbone: Backbone, *, known: bool) -> str:
    """What becomes of the head; method "head" trains one in any case."""
    if config.head in ("new", "tune"):
        return config.head
    if config.method == "head":
        return "tune" if known else "new"
    return "keep" if known or config.head == "keep" else "new"
