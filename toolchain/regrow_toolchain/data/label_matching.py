"""Whether a user's labels are the backbone's, or need a head of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from regrow_format.errors import UsageError

from .dataset import Dataset

__all__ = ["fit_both", "fit_labels"]

_SHOWN = 5
_OWN_HEAD = "--head new trains a head for your own labels"


def fit_labels(
    data: Dataset, labels: tuple[str, ...], head: str, *, way_out: str = ""
) -> tuple[Dataset, bool]:
    """The data with labels as output indices, and whether a new head is needed.

    Args:
        labels: the backbone's class names, in the order of its outputs; none if its head is
            not trained.
        head: "keep" (labels must be the backbone's), "new", or "auto": keep if all of them are,
            new if none is.
        way_out: what the error for labels that do not fit ends with; by default it names
            --head new.

    Raises:
        UsageError: the labels do not fit, or there are fewer than two classes for a new head.
    """
    way_out = way_out or _OWN_HEAD
    if not labels and head == "keep":
        raise UsageError(
            f"backbone must have a trained head with class names to keep, got none: {way_out}"
        )
    if (least := int(data.labels.min())) < 0:
        raise UsageError(f"labels must be 0 or more, got {least}")
    if head == "new" or not labels:
        return _own_labels(data), True
    known = dict(zip(labels, range(len(labels)), strict=True))
    if not data.named:
        if (top := int(data.labels.max())) >= len(labels):
            raise UsageError(
                f"labels must be from 0 to {len(labels) - 1} as in the backbone, got {top}: "
                f"{way_out}"
            )
        return replace(data, names=labels), False
    _check_named(data)
    there = [data.names[i] for i in np.unique(data.labels)]  # other users may have more
    unknown = [name for name in there if name not in known]
    if head == "auto" and len(unknown) == len(there):
        return _own_labels(data), True
    if unknown:
        raise UsageError(
            f"labels must be among the backbone's ({_shown(labels)}), got {_shown(unknown)}: "
            f"{way_out}"
        )
    index = np.array([known.get(name, -1) for name in data.names], dtype=np.int64)
    return replace(data, labels=index[data.labels], names=labels), False


def fit_both(
    data: Dataset,
    eval_data: Dataset | None,
    labels: tuple[str, ...],
    head: str,
    *,
    way_out: str = "",
) -> tuple[Dataset, Dataset | None, bool]:
    """As `fit_labels`, of the samples to train on and of those to judge by together.

    Raises:
        UsageError: also where a class stands only in `eval_data`.
    """
    both = replace(data, inputs={}) if eval_data is None else _joined(data, eval_data)
    fitted, fresh = fit_labels(both, labels, head, way_out=way_out)
    mine, theirs = np.split(fitted.labels, [len(data)])
    data = replace(data, labels=mine, names=fitted.names)
    if eval_data is not None:
        eval_data = replace(eval_data, labels=theirs, names=fitted.names)
    return data, eval_data, fresh


def _joined(data: Dataset, eval_data: Dataset) -> Dataset:
    """The labels of both; classes that stand only in `eval_data` are an error of their own."""
    if not eval_data.named and not data.named:
        names = max(data.names, eval_data.names, key=len)
        labels = eval_data.labels
    else:
        there = np.unique(eval_data.labels)
        unknown = [eval_data.names[i] for i in there if eval_data.names[i] not in data.names]
        if unknown:
            raise UsageError(f"eval_data must be of the data's classes, got {unknown[0]!r}")
        names, known = data.names, {name: i for i, name in enumerate(data.names)}
        index = np.array([known.get(name, -1) for name in eval_data.names], dtype=np.int64)
        labels = index[eval_data.labels]
    joined = np.concatenate([data.labels, labels])
    return Dataset({}, joined, names, data.named)


def _own_labels(data: Dataset) -> Dataset:
    """Only the classes that occur, numbered from 0."""
    _check_named(data)
    used, index = np.unique(data.labels, return_inverse=True)
    if len(used) < 2:
        raise UsageError(f"labels must be of two classes or more for a new head, got {len(used)}")
    names = tuple(data.names[i] for i in used)
    return replace(data, labels=index.astype(np.int64), names=names)


def _check_named(data: Dataset) -> None:
    if (top := int(data.labels.max())) >= len(data.names):
        raise UsageError(f"labels must be below {len(data.names)}, the number of names, got {top}")


def _shown(names: tuple[str, ...] | list[str]) -> str:
    more = f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
