"""A folder with one folder of pictures per class; the folders' names are the class names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from regrow_runtime.errors import UsageError
from regrow_runtime.preprocess import ImagePreprocessor, image_files, read_image

from .dataset import Dataset

__all__ = ["read_folder"]

_AT_ONCE = 64


def read_folder(path: Path, preprocessor: ImagePreprocessor) -> Dataset:
    """Read `path`/CLASS/PICTURE; pictures are prepared as they are read, so few are open at once.

    Raises:
        UsageError: there are no folders with pictures in `path`.
        FormatError: a picture cannot be read.
    """
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UsageError(f"data must be a folder with one folder per class, got {path} without any")
    files, labels = [], []
    for index, folder in enumerate(folders):
        found = image_files(folder)
        files += found
        labels += [index] * len(found)
    parts = [
        preprocessor([read_image(file) for file in files[start : start + _AT_ONCE]])
        for start in range(0, len(files), _AT_ONCE)
    ]
    names = tuple(folder.name for folder in folders)
    return Dataset({"pixel_values": np.concatenate(parts)}, np.array(labels, dtype=np.int64), names)
