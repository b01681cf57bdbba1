"""Training data from disk. A further kind of file is one module here and one line in `_READERS`.

| source | what becomes of it |
|---|---|
| a folder with one folder of images or `.wav` files per class | the model's own preprocessing |
| `.npz` | arrays by the names of the arguments of `forward`, or images |
| `.csv`, `.tsv`, `.jsonl` | a text column through the backbone's tokenizer |
| `.txt` | windows of tokens, for language models |
| a folder that the datasets library saved | as a table, or arrays by the names of arguments |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import UsageError

from .dataset import Dataset
from .folder import read_folder
from .formats import DATA
from .npz import read_inputs, read_npz
from .saved import is_saved, read_saved
from .source import Source
from .tables import read_csv, read_jsonl, read_tsv
from .text import read_text

if TYPE_CHECKING:
    from regrow_toolchain.models import Backbone

__all__ = ["load_data", "load_inputs"]

_READERS: dict[str, Callable[[Source], Dataset]] = {
    ".npz": read_npz,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_jsonl,
    ".txt": read_text,
}


def load_data(
    path: str | Path,
    backbone: Backbone,
    *,
    users: str | None = None,
    text: str | None = None,
    label: str | None = None,
    max_length: int = 128,
    labels: str = "needed",
) -> Dataset:
    """Read samples, and make of them what the backbone takes.

    Args:
        path: see the module's table.
        users: whose each sample is: the column or the array with user ids, or "folder" for
            folders PATH/USER/CLASS. Without it all samples are one user's.
        text: the text column, or two with a comma between for pairs; by default `text`, or the
            only column of words besides labels and users.
        label: the column or the array with labels; by default `label`, `labels` and the like;
            "" for none.
        max_length: tokens per text at most; the backbone may take fewer.
        labels: "needed"; "optional", all -1 where there are none: images without folders, an
            `.npz` or a table without labels, lines of text; or "none", what there is is not read.
            A language model's labels are its tokens all the same.

    Raises:
        UsageError: there is nothing at `path` that can be read, something is missing, or what is
            there does not fit the backbone.
        FormatError: a file is broken.
    """
    path = Path(path)
    source = Source(path, backbone, users, text, label, max_length, labels)
    if path.is_dir():
        return read_saved(source) if is_saved(path) else read_folder(source)
    if not path.exists():
        raise UsageError(f"data must be {DATA}; got {path}: no such file")
    if (reader := _READERS.get(path.suffix.lower())) is None:
        raise UsageError(f"data must be {DATA}; got {path}")
    return reader(source)


def load_inputs(path: str | Path, backbone: Backbone) -> dict[str, NDArray[Any]]:
    """The model's inputs from an `.npz`, as `load_data` reads them; labels are not needed.

    Returns:
        float32, int64 or bool arrays by argument name, samples first.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise UsageError(f"inputs must be an .npz with arrays, got {path}")
    inputs = read_inputs(Source(path, backbone))
    if len({len(array) for array in inputs.values()}) != 1:
        counts = {name: len(array) for name, array in inputs.items()}
        raise UsageError(f"{path}: inputs must have as many samples each, got {counts}")
    return {name: np.ascontiguousarray(array) for name, array in inputs.items()}
