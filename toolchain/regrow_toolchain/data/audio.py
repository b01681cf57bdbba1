"""Audio: `.wav` files through the front end that the device uses too, `regrow_inputs`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import UsageError
from regrow_inputs import PREPROCESSOR, AudioPreprocessor, read_wav
from regrow_inputs.audio import AUDIO_INPUTS, audio_input
from regrow_inputs.audio_settings import is_audio

from .source import Source

__all__ = ["read_audio"]

MAX_VALUES = 1 << 30  # of one input, all samples together: 4 GiB


def read_audio(source: Source, files: Sequence[Path]) -> dict[str, NDArray[Any]]:
    """Inputs of an audio model, padded to the longest clip; what is beyond 30 s is cut off.

    Raises:
        UsageError: the backbone takes no audio, or has no feature extractor.
        FormatError: a file is no `.wav`, or the extractor's configuration is broken.
    """
    wanted = source.arguments()
    folder = source.backbone.folder
    if folder is None or not (folder / PREPROCESSOR).is_file():
        raise UsageError(
            f"model must have {PREPROCESSOR} to take audio, got none: save its feature extractor "
            f"beside it, give one with --preprocessor, or ready arrays ({', '.join(wanted)}) in "
            "an .npz"
        )
    if audio_input(wanted) is None or not is_audio(folder):
        raise UsageError(
            f"backbone must take audio ({', '.join(AUDIO_INPUTS)}), got one of {', '.join(wanted)}"
        )
    prepared = AudioPreprocessor.from_folder(folder)
    rows = [prepared.feeds([read_wav(file)], wanted) for file in files]
    value = prepared.padding if prepared.front is None else 0.0
    return {
        name: _padded(source.path, [row[name][0] for row in rows], 0 if "mask" in name else value)
        for name in rows[0]
    }


def _padded(path: Path, rows: list[NDArray[Any]], value: float) -> NDArray[Any]:
    shape = np.max([row.shape for row in rows], axis=0)
    if (size := len(rows) * int(np.prod(shape))) > MAX_VALUES:
        raise UsageError(
            f"{path} must come to at most {MAX_VALUES} values, got {size}: "
            "shorten the longest audio, or give fewer"
        )
    found = np.full((len(rows), *shape), value, dtype=rows[0].dtype)
    for into, row in zip(found, rows, strict=True):
        into[tuple(slice(size) for size in row.shape)] = row
    return found
