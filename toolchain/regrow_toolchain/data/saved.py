"""A folder that the datasets library saved (`save_to_disk`); read only if it is installed."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import FormatError, RegrowError, UsageError

from .columns import MAX_ROWS, Table, table_data
from .dataset import Dataset
from .formats import LABEL_NAMES
from .npz import array_data
from .source import Source

__all__ = ["is_saved", "read_saved"]

_ONE, _MANY, _STATE = "dataset_info.json", "dataset_dict.json", "state.json"
_AT_ONCE = 64
_IMAGE_ARRAYS = ("image", "images", "img")


def is_saved(path: Path) -> bool:
    """Whether the folder is one that `save_to_disk` wrote."""
    return (path / _MANY).is_file() or ((path / _ONE).is_file() and (path / _STATE).is_file())


def read_saved(source: Source) -> Dataset:
    """Columns as in a table, arrays by the names of forward's arguments, or images.

    Raises:
        RegrowError: the datasets library is not installed.
        UsageError: the folder holds several splits, or columns are missing.
        FormatError: it cannot be read.
    """
    path = source.path
    if (path / _MANY).is_file():
        parts = sorted(p.name for p in path.iterdir() if (p / _ONE).is_file())
        raise UsageError(f"data must be one split, got {path} with {', '.join(parts)}: name one")
    if find_spec("datasets") is None:
        raise RegrowError(f"{path} needs the datasets library: pip install datasets")
    try:
        stored = import_module("datasets").load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds on broken folders
        if _holds_nothing(path):  # the library writes no rows, but cannot read them
            raise UsageError(_rows(path, 0)) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path} must be a whole datasets folder: {reason}") from error
    if not 0 < len(stored) <= MAX_ROWS:
        raise UsageError(_rows(path, len(stored)))
    return _dataset(source, stored)


def _holds_nothing(path: Path) -> bool:
    try:
        return bool(json.loads((path / _STATE).read_bytes())["_data_files"] == [])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _rows(path: Path, count: int) -> str:
    return f"{path} must have from 1 to {MAX_ROWS} rows, got {count}"


def _dataset(source: Source, stored: Any) -> Dataset:
    arguments, columns = source.arguments(), list(stored.column_names)
    images = [name for name in columns if name in _IMAGE_ARRAYS and "pixel_values" in arguments]
    if not images and not set(columns) & set(arguments):
        return table_data(source, _table(source, stored))
    source.refuse("text")
    named = {name for name in (source.label, source.users, *LABEL_NAMES) if name}
    arrays = {
        name: _array(source, stored, name) for name in columns if name in {*arguments, *named}
    }
    if images and "pixel_values" not in arrays:
        arrays["pixel_values"] = _pictures(source, stored, images[0])
    return array_data(source, arrays)


def _table(source: Source, stored: Any) -> Table:
    """The columns of words and numbers."""
    kept = [n for n in stored.column_names if isinstance(stored[0][n], str | int | float)]
    cells = stored.select_columns(kept)[:]
    classes = {name: names for name in kept if (names := _classes(stored, name))}
    rows = range(1, len(stored) + 1)
    return Table(source.path, cells, rows, unit="row", classes=classes)


def _classes(stored: Any, name: str) -> list[str]:
    """The names behind a column of class numbers; none for any other column."""
    return list(getattr(stored.features[name], "names", None) or ())


def _array(source: Source, stored: Any, name: str) -> NDArray[Any]:
    array: NDArray[Any] = np.asarray(stored.with_format("numpy", columns=[name])[:][name])
    if array.dtype.kind not in "biufU":
        raise FormatError(
            f"{source.path}: {name} must be numbers or strings of one shape in every row, "
            f"got {array.dtype}"
        )
    if names := _classes(stored, name):
        if array.min() < 0 or array.max() >= len(names):
            raise FormatError(
                f"{source.path}: {name} must be from 0 to {len(names) - 1} everywhere"
            )
        array = np.array(names)[array]
    return array


def _pictures(source: Source, stored: Any, name: str) -> NDArray[Any]:
    """Through the model's preprocessing, few at a time."""
    preprocessor = source.backbone.preprocessor()
    parts = []
    for start in range(0, len(stored), _AT_ONCE):
        images = stored[start : start + _AT_ONCE][name]
        if not all(hasattr(image, "convert") for image in images):
            raise FormatError(f"{source.path}: {name} must be images in every row")
        parts.append(preprocessor(images))
    return np.concatenate(parts)
