"""Each user's samples, made ready: labels as outputs, what trains, what is held back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from regrow_format.errors import UsageError

from .backbone import Backbone
from .config import AdaptConfig
from .data import Dataset
from .data.dataset import by_user, check_samples, split
from .labels import fit_labels
from .tasks import Task

__all__ = ["Person", "prepare"]


@dataclass(frozen=True, eq=False)
class Person:
    """One user, ready to be trained for.

    Attributes:
        train, held, validation: samples to train on, to score on, and to stop early on.
        names: the classes of the head, or the outputs of a regression; empty for other tasks.
        head: "keep", "new" or "tune".
        outputs: how many outputs the head has.
    """

    id: str
    train: Dataset
    held: Dataset
    validation: Dataset | None
    names: tuple[str, ...]
    head: str
    outputs: int


def prepare(
    backbone: Backbone,
    data: Dataset,
    held: Dataset | None,
    task: Task,
    config: AdaptConfig,
) -> list[Person]:
    """The users of `data`, or the one there is, in the order of their ids.

    Args:
        held: samples to score on; a share of `data` if None.

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
    people = []
    for id, part in parts.items():
        try:
            people.append(_person(backbone, id, part, others.get(id), task, config))
        except UsageError as error:
            raise UsageError(f"user {id}: {error}" if id else str(error)) from None
    return people


def _person(
    backbone: Backbone,
    id: str,
    data: Dataset,
    held: Dataset | None,
    task: Task,
    config: AdaptConfig,
) -> Person:
    names, head, outputs, data, held = _fitted(backbone, data, held, task, config)
    train, apart = (data, held) if held is not None else split(data, config.holdout, config.seed)
    validation = None
    if config.patience:
        train, validation = split(train, config.validation, config.seed + 1)
        if not len(validation):
            raise UsageError("validation must leave samples to stop early on, got none")
    return Person(id, train, apart, validation, names, head, outputs)


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
