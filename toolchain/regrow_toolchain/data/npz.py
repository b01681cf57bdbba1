"""An `.npz` with arrays by argument name, or images, and labels; read without pickle."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import UsageError
from regrow_inputs import as_images
from regrow_runtime.arrays import read_arrays

from .dataset import Dataset
from .formats import LABEL_NAMES
from .labels import IGNORED, Labels, as_words, labels_of_array, no_labels
from .source import Source

__all__ = ["array_data", "read_inputs", "read_npz"]

_PIXELS = "pixel_values"
Arrays = Mapping[str, NDArray[Any]]


def read_npz(source: Source) -> Dataset:
    """Read arrays by name.

    Inputs are arrays whose names are arguments of the model's forward; for a model of images
    also `images` (or `x`), see `as_images`. `labels` (or `y`) are integers that mean the model's
    outputs, strings that name classes, floats [n] or [n, m], or tokens [n, tokens]. A language
    model without labels learns its own `input_ids`.

    Raises:
        UsageError: an array is missing, or has the wrong shape or values.
        FormatError: the file is broken.
    """
    source.refuse("text")
    return array_data(source, read_arrays(source.path))


def read_inputs(source: Source) -> dict[str, NDArray[Any]]:
    """The inputs alone."""
    return _inputs(source, read_arrays(source.path), ())


def array_data(source: Source, arrays: Arrays) -> Dataset:
    """A dataset from arrays in memory, by the rules of `read_npz`."""
    label = _label_name(source, arrays)
    learns_itself = label is None and source.language_model
    if source.labels == "none" and not learns_itself:
        return _unlabelled(source, arrays, label)
    others = {name for name in (label, source.users) if name}
    if label is None and not learns_itself:
        if source.labels == "optional":
            return _unlabelled(source, arrays, None)
        raise UsageError(
            f"{source.path} must have an array `labels`, got {sorted(arrays)}: "
            "name one with --label"
        )
    users = _users(source, arrays)
    if label is None:
        inputs = _inputs(source, arrays, others)
        labels = Labels(own_tokens(source, inputs))
    else:
        labels = labels_of_array(arrays[label], str(source.path), one_value=source.one_value)
        inputs = _inputs(source, arrays, others)
    for name, array in (*inputs.items(), ("users", users)):
        if array is not None and len(array) != len(labels.values):
            raise UsageError(
                f"{source.path}: {name} must be one per label, "
                f"got {len(array)} for {len(labels.values)} labels"
            )
    _check_tokens(source, inputs, labels.values)
    return Dataset(inputs, labels.values, labels.names, labels.named, users)


def _unlabelled(source: Source, arrays: Arrays, label: str | None) -> Dataset:
    """The inputs alone; an array of labels, if there is one, is none of them."""
    inputs = _inputs(source, arrays, {label} if label else ())
    counts = {name: len(array) for name, array in inputs.items()}
    if len(set(counts.values())) != 1:
        raise UsageError(f"{source.path}: inputs must have as many samples each, got {counts}")
    labels = no_labels(next(iter(counts.values())))
    return Dataset(inputs, labels.values, labels.names, labels.named)


def _label_name(source: Source, arrays: Arrays) -> str | None:
    if source.label == "":
        return None
    if source.label is None:
        return next((name for name in ("labels", *LABEL_NAMES) if name in arrays), None)
    if source.label not in arrays:
        raise UsageError(
            f"{source.path}: label must name an array, got {source.label!r} of {sorted(arrays)}"
        )
    return source.label


def _users(source: Source, arrays: Arrays) -> NDArray[np.str_] | None:
    if source.users is None:
        return None
    ids = arrays.get(source.users)
    if ids is None:
        raise UsageError(
            f"{source.path}: users must name an array, got {source.users!r} of {sorted(arrays)}"
        )
    if ids.ndim != 1 or ids.dtype.kind not in "iuUS":
        raise UsageError(
            f"{source.path}: {source.users} must be integers or strings, one per sample, "
            f"got {ids.dtype} of shape {ids.shape}"
        )
    if ids.dtype.kind in "iu":
        return ids.astype(np.str_)
    return as_words(ids, f"{source.path}: {source.users}")


def _inputs(source: Source, arrays: Arrays, others: Collection[str]) -> dict[str, NDArray[Any]]:
    wanted = source.arguments()
    named = {
        name: array
        for name, array in arrays.items()
        if name not in others and (name in wanted or source.takes_any())
    }
    if _PIXELS in wanted and (_PIXELS in named or not named):
        named[_PIXELS] = as_images(arrays, source.path, source.backbone.preprocessor)
    if not named:
        raise UsageError(
            f"{source.path} must have arrays by the names of forward's arguments "
            f"({', '.join(wanted)}), got {sorted(arrays)}"
        )
    return {name: _input(array, f"{source.path}: {name}") for name, array in named.items()}


def _input(array: NDArray[Any], where: str) -> NDArray[Any]:
    """float32, int64 or bool."""
    kind = array.dtype.kind
    if kind not in "fiub" or array.ndim == 0:
        raise UsageError(
            f"{where} must be numbers, samples first, got {array.dtype} of shape {array.shape}"
        )
    if kind == "b":
        return array
    if kind in "iu":
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise UsageError(f"{where} must be below 2**63, got {array.max()}")
        return array.astype(np.int64)
    with np.errstate(over="ignore"):
        floats = array.astype(np.float32)
    if not np.isfinite(floats).all():
        raise UsageError(f"{where} must be finite, got NaN or infinity")
    return floats


def own_tokens(source: Source, inputs: Arrays) -> NDArray[np.int64]:
    """A language model's labels: its own tokens, those of the padding left out."""
    tokens = inputs.get("input_ids")
    if tokens is None or tokens.ndim != 2 or tokens.dtype != np.int64:
        found = {name: f"{a.dtype} {list(a.shape)}" for name, a in inputs.items()}
        raise UsageError(
            f"{source.path} must have input_ids, integers [samples, tokens], got {found}"
        )
    mask = inputs.get("attention_mask")
    if mask is None:
        return tokens.copy()
    if mask.shape != tokens.shape:
        raise UsageError(
            f"{source.path}: attention_mask must have the shape of input_ids, "
            f"{list(tokens.shape)}, got {list(mask.shape)}"
        )
    return np.where(mask.astype(bool), tokens, IGNORED)


def _check_tokens(source: Source, inputs: Arrays, labels: NDArray[Any]) -> None:
    """A language model's labels are tokens, and fit those of its inputs."""
    if not source.language_model or labels.ndim != 2 or labels.dtype.kind == "f":
        return
    tokens = inputs.get("input_ids")
    if tokens is not None and tokens.shape != labels.shape:
        raise UsageError(
            f"{source.path}: labels of tokens must have the shape of input_ids, "
            f"{list(tokens.shape)}, got {list(labels.shape)}"
        )
    if not (labels[:, 1:] != IGNORED).any(axis=1).all():
        short = int((labels[:, 1:] == IGNORED).all(axis=1).argmax())
        raise UsageError(
            f"{source.path}: a language model's sample must have two tokens or more, "
            f"got fewer in sample {short}"
        )
