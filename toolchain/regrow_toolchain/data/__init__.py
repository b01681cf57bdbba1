"""Training data from disk. A further kind of source is one file here and one line in `_readers`.

Sources: a folder with one folder of pictures per class, or an `.npz` with `images` (or ready
`pixel_values`) and `labels`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from regrow_runtime.errors import UsageError
from regrow_runtime.preprocess import ImagePreprocessor

from .dataset import Dataset
from .folder import read_folder
from .npz import read_npz

__all__ = ["Dataset", "load_data"]


def load_data(path: str | Path, preprocessor: Callable[[], ImagePreprocessor]) -> Dataset:
    """Read labelled pictures.

    Args:
        path: a folder of pictures by class, or an `.npz`.
        preprocessor: gives the model's preprocessing; called only if pictures must be prepared.

    Raises:
        UsageError: there is nothing at `path` that can be read, or labels are missing.
        FormatError: a file is broken.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path, preprocessor())
    if path.suffix == ".npz":
        return read_npz(path, preprocessor)
    raise UsageError(
        f"data must be a folder of pictures by class or an .npz, got {path}"
        + ("" if path.exists() else ": no such file")
    )
