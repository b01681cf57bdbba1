"""An `.npz` with `images` or `pixel_values`, and `labels`; read without pickle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_runtime.arrays import as_pictures, read_arrays
from regrow_runtime.errors import UsageError
from regrow_runtime.preprocess import ImagePreprocessor

from .dataset import Dataset

__all__ = ["read_npz"]

_LABELS = ("labels", "label", "y")
_MAX_CLASSES = 1 << 20  # as in the adapter file; a stray number must not cost gigabytes


def read_npz(path: Path, preprocessor: Callable[[], ImagePreprocessor]) -> Dataset:
    """Read arrays by name.

    `pixel_values` float32 [n, channels, height, width] are taken as they are; `images` (or `x`)
    are pictures, see `as_pictures`. `labels` (or `y`) [n] are integers that mean the model's
    outputs, or strings that name classes.

    Raises:
        UsageError: an array is missing or has the wrong shape.
        FormatError: the file is broken.
    """
    arrays = read_arrays(path)
    labels = _labels(arrays, path)
    pixels = as_pictures(arrays, path, preprocessor)
    if len(pixels) != len(labels):
        raise UsageError(f"{path}: labels must be one per image, got {len(labels)}, {len(pixels)}")
    if labels.dtype.kind in "US":
        words, index = np.unique(labels.astype(str), return_inverse=True)
        names = tuple(str(word) for word in words)
        return Dataset({"pixel_values": pixels}, index.astype(np.int64), names)
    numbers = labels.astype(np.int64)
    names = tuple(str(n) for n in range(int(numbers.max(initial=0)) + 1))
    return Dataset({"pixel_values": pixels}, numbers, names, named=False)


def _labels(arrays: Mapping[str, NDArray[Any]], path: Path) -> NDArray[Any]:
    name = next((n for n in _LABELS if n in arrays), None)
    if name is None:
        raise UsageError(f"{path} must have an array `labels`, got {sorted(arrays)}")
    labels = arrays[name]
    if labels.size == 0:
        raise UsageError(f"{path}: labels must be at least one, got none")
    if labels.ndim != 1 or labels.dtype.kind not in "iuUS" or not len(labels):
        raise UsageError(
            f"{path}: labels must be a list of integers or strings, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if labels.dtype.kind in "iu" and labels.min() < 0:
        raise UsageError(f"{path}: labels must be 0 or more, got {labels.min()}")
    if labels.dtype.kind in "iu" and labels.max() >= _MAX_CLASSES:
        raise UsageError(f"{path}: labels must be below {_MAX_CLASSES}, got {labels.max()}")
    return labels
