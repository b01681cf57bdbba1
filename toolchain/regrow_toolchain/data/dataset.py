"""Samples, ready for the model, and how to divide them: by user, into two parts, into folds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import UsageError

__all__ = [
    "Dataset",
    "by_user",
    "check_samples",
    "equal_samples",
    "fold_numbers",
    "joined",
    "split",
]

_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Dataset:
    """Model inputs with labels.

    Attributes:
        inputs: arrays by the name of the model's argument, samples first; float32, int64 or bool.
        labels: int64 [samples], indices into `names`; or float32 [samples] or [samples, values],
            what a regression or a teacher gives; or int64 [samples, tokens], where -100 counts
            for no loss. All -1 where there are no labels.
        names: class names; empty where labels are no classes. `named` is False where they are
            only numbers from an array, which then mean the backbone's own outputs.
        users: the id of each sample's user, strings [samples]; None if all are one user's.

    Raises:
        UsageError: the arrays differ in their numbers of samples, or labels are of no such kind.
    """

    inputs: dict[str, NDArray[Any]]
    labels: NDArray[Any]
    names: tuple[str, ...] = ()
    named: bool = True
    users: NDArray[np.str_] | None = None

    def __post_init__(self) -> None:
        inputs = {name: _plain(array) for name, array in self.inputs.items()}
        labels = _plain(np.asarray(self.labels))
        users = None if self.users is None else np.asarray(self.users).astype(np.str_)
        for name, array in (*inputs.items(), ("users", users)):
            if array is not None and (array.ndim < 1 or len(array) != len(labels)):
                raise UsageError(
                    f"{name} must be one per label, got {list(array.shape)} for {len(labels)}"
                )
        if labels.dtype.kind not in "if" or labels.ndim not in (1, 2):
            raise UsageError(
                "labels must be classes, values or tokens, "
                f"got {labels.dtype} of shape {labels.shape}"
            )
        for field, value in (("inputs", inputs), ("labels", labels), ("users", users)):
            object.__setattr__(self, field, value)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def kind(self) -> str:
        """What the labels are: "classes", "values" or "tokens"."""
        if self.labels.dtype.kind == "f":
            return "values"
        return "classes" if self.labels.ndim == 1 else "tokens"

    @property
    def unlabelled(self) -> bool:
        """Whether it has no labels: all of them are -1."""
        return len(self) > 0 and self.kind == "classes" and bool((self.labels == -1).all())

    def take(self, rows: NDArray[np.int64]) -> Dataset:
        """The samples at `rows`."""
        inputs = {name: array[rows] for name, array in self.inputs.items()}
        users = None if self.users is None else self.users[rows]
        return replace(self, inputs=inputs, labels=self.labels[rows], users=users)


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """As torch is to see it: integers as int64, floats as float32, others as they are."""
    kind = array.dtype.kind
    if kind in "iu" and array.dtype != np.int64:
        return array.astype(np.int64)
    if kind == "f" and array.dtype != np.float32:
        with np.errstate(over="ignore"):
            return array.astype(np.float32)
    return array


def _rows_by_user(data: Dataset) -> dict[str, NDArray[np.int64]]:
    """Row numbers in their order, by user id; ids sorted."""
    if data.users is None:
        raise UsageError("data must say whose each sample is, got no users")
    names, index = np.unique(data.users, return_inverse=True)
    order = np.argsort(index, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(index, minlength=len(names)))[:-1])
    return {str(name): rows for name, rows in zip(names, parts, strict=True)}


def by_user(data: Dataset) -> dict[str, Dataset]:
    """One dataset per user, in the order of their ids; within, samples keep their order.

    Raises:
        UsageError: `data` has no users.
    """
    parts = _rows_by_user(data)
    return {user: replace(data.take(rows), users=None) for user, rows in parts.items()}


def joined(parts: Sequence[Dataset]) -> Dataset:
    """The samples of all, in their order; names are those of the first."""
    first = parts[0]
    inputs = {name: np.concatenate([p.inputs[name] for p in parts]) for name in first.inputs}
    users = None
    if first.users is not None:
        users = np.concatenate([p.users for p in parts if p.users is not None])
    labels = np.concatenate([part.labels for part in parts])
    return replace(first, inputs=inputs, labels=labels, users=users)


def equal_samples(data: Dataset) -> NDArray[np.int64]:
    """[samples]: a number for each sample, the same for samples with the same inputs, bit by bit.

    Numbers follow the order of first appearance; labels do not count.
    """
    arrays = [np.ascontiguousarray(array) for _, array in sorted(data.inputs.items())]
    known: dict[bytes, int] = {}
    found = np.empty(len(data), dtype=np.int64)
    for row in range(len(data)):
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(array[row].data)
        found[row] = known.setdefault(digest.digest(), len(known))
    return found


def split(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off about `share` of every class: (the rest, the part split off).

    A class keeps at least one sample in the rest, if it has two; where labels are no classes, the
    samples are drawn as if they were one. Where that takes nothing, as with few samples of each
    class, the share is drawn from all samples together, at least one. Equal samples stay together,
    and count as one of the first one's class. Every user's samples are split as if they were
    alone. With `share` 0 the second part is empty.

    Raises:
        UsageError: `share` is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise UsageError(f"holdout must be from 0 to below 1, got {share}")
    mask = np.zeros(len(data), dtype=bool)
    if share:
        alone = [np.arange(len(data))]
        parts = alone if data.users is None else list(_rows_by_user(data).values())
        for rows in parts:
            firsts, group = _firsts(data.take(rows))
            eval_data = _drawn(_strata(data, rows[firsts]), share, seed)
            mask[rows[np.isin(group, eval_data)]] = True
    return data.take(np.flatnonzero(~mask)), data.take(np.flatnonzero(mask))


def fold_numbers(data: Dataset, count: int, seed: int) -> NDArray[np.int64]:
    """[samples]: the fold, from 0 to `count` - 1, that each sample is held back in.

    Every class is dealt out evenly, and so are all samples together; equal ones stay together.
    """
    firsts, group = _firsts(data)
    classes = _strata(data, firsts)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(firsts))
    order = order[np.argsort(classes[order], kind="stable")]
    fold = np.empty(len(firsts), dtype=np.int64)
    fold[order] = np.arange(len(order)) % count
    return fold[group]


def _firsts(data: Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the first of every group of equal samples, and each sample's group."""
    group = equal_samples(data)
    _, firsts = np.unique(group, return_index=True)
    return firsts, group


def _strata(data: Dataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """What is divided evenly: classes, or zeros where labels are none."""
    classed = data.kind == "classes" and not data.unlabelled
    found: NDArray[np.int64] = data.labels[rows] if classed else np.zeros(len(rows), np.int64)
    return found


def _drawn(classes: NDArray[np.int64], share: float, seed: int) -> list[int]:
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(classes))
    eval_data: list[int] = []
    for label in np.unique(classes):
        rows = order[classes[order] == label]
        eval_data += rows[: min(round(share * len(rows)), len(rows) - 1)].tolist()
    if share and not eval_data and len(order) > 1:
        counts = np.bincount(classes, minlength=1)
        # From the classes that have most, so that few lose their only sample.
        order = order[np.argsort(-counts[classes[order]], kind="stable")]
        eval_data = order[: max(1, round(share * len(order)))].tolist()
    return eval_data


def check_samples(data: Dataset) -> None:
    """Raise `UsageError` where there is too little to learn from, naming the users.

    Every user needs two samples or more, of two classes or more where labels are classes.
    """
    parts = {"": np.arange(len(data))} if data.users is None else _rows_by_user(data)
    poor = {user: why for user, rows in parts.items() if (why := _lack(data, rows))}
    if not poor:
        return
    wanted = "two samples or more" + (", of two classes" if data.kind == "classes" else "")
    if data.users is None:
        raise UsageError(f"data must have {wanted}; got {poor['']}")
    shown = "; ".join(f"{user}: {why}" for user, why in list(poor.items())[:_SHOWN])
    more = f"; and {len(poor) - _SHOWN} users more" if len(poor) > _SHOWN else ""
    raise UsageError(f"every user must have {wanted}; got {shown}{more}")


def _lack(data: Dataset, rows: NDArray[np.int64]) -> str:
    if len(rows) < 2:
        return f"{len(rows)} sample" + ("s" if not len(rows) else "")
    if data.kind != "classes" or (data.labels[rows] != data.labels[rows[0]]).any():
        return ""
    label = int(data.labels[rows[0]])
    name = data.names[label] if label < len(data.names) else str(label)
    return f"{len(rows)} samples of one class, {name}"
