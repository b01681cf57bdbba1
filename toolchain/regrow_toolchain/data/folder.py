"""A folder with one folder of images or audio per class; the folders' names are the classes'."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import UsageError
from regrow_inputs import IMAGE_ENDINGS, WAV_ENDINGS, read_image

from .audio import read_audio
from .dataset import Dataset
from .labels import no_labels
from .source import Source

__all__ = ["read_folder"]

_AT_ONCE = 64


@dataclass(frozen=True)
class _Sample:
    file: Path
    label: str
    user: str


def read_folder(source: Source) -> Dataset:
    """Read PATH/CLASS/FILE, or with users "folder" PATH/USER/CLASS/FILE.

    Files are images, or all of them `.wav`.

    Raises:
        UsageError: there are no folders with files in it, or the backbone takes no such files.
        FormatError: a file cannot be read.
    """
    source.refuse("text", "label")
    if source.users not in (None, "folder"):
        raise UsageError(
            f"users must be `folder` for a folder of files (PATH/USER/CLASS), got {source.users!r}"
        )
    classes = _has_classes(source)
    samples = _samples(source) if classes else [_Sample(f, "", "") for f in _files(source.path)]
    files = [sample.file for sample in samples]
    if audio := [file for file in files if file.suffix.lower() in WAV_ENDINGS]:
        if len(audio) != len(files):
            other = next(file for file in files if file not in audio)
            raise UsageError(f"data must be images or audio, got both: {other}, {audio[0]}")
        inputs = read_audio(source, files)
    else:
        inputs = {"pixel_values": _pictures(source, files)}
    if not classes:
        labels = no_labels(len(files))
        return Dataset(inputs, labels.values, labels.names, labels.named)
    names, index = np.unique([sample.label for sample in samples], return_inverse=True)
    return Dataset(
        inputs,
        index.astype(np.int64),
        tuple(str(name) for name in names),
        users=np.array([sample.user for sample in samples]) if source.users else None,
    )


def _has_classes(source: Source) -> bool:
    """Whether labels are wanted, and there are folders that may be classes."""
    if source.labels == "optional":
        return any(p.is_dir() and not p.name.startswith(".") for p in source.path.iterdir())
    return source.labels == "needed"


def _samples(source: Source) -> list[_Sample]:
    if source.users is None:
        return _by_class(source.path, "")
    users = _folders(source.path, "one folder per user")
    for user in users:
        if not any(p.is_dir() for p in user.iterdir()):
            raise UsageError(
                f"data must be a folder of USER/CLASS/file with users `folder`, got {source.path}: "
                f"{user.name} has no folders per class in it (of one user: leave out --users)"
            )
    return [sample for user in users for sample in _by_class(user, user.name)]


def _by_class(path: Path, user: str) -> list[_Sample]:
    classes = _folders(path, "one folder per class")
    return [_Sample(file, folder.name, user) for folder in classes for file in _files(folder)]


def _folders(path: Path, wanted: str) -> list[Path]:
    found = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise UsageError(f"data must be a folder with {wanted}, got {path} without any")
    return found


def _files(folder: Path) -> list[Path]:
    endings = (*IMAGE_ENDINGS, *WAV_ENDINGS)
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in endings)
    if not found:
        raise UsageError(f"{folder} must have images or audio ({', '.join(endings)}), got none")
    return found


def _pictures(source: Source, files: list[Path]) -> NDArray[Any]:
    """float32 [n, channels, height, width]; prepared as they are read: few are open at once."""
    if "pixel_values" not in (wanted := source.arguments()):
        raise UsageError(
            f"backbone must take images (pixel_values), got one of {', '.join(wanted)}"
        )
    preprocessor = source.backbone.preprocessor()
    parts = [
        preprocessor([read_image(file) for file in files[start : start + _AT_ONCE]])
        for start in range(0, len(files), _AT_ONCE)
    ]
    return np.concatenate(parts)
