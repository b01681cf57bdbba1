"""Sounds: PCM `.wav` files, at the model's rate, through the model's own feature extractor."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from io import BytesIO
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_runtime.errors import FormatError, RegrowError, UsageError
from regrow_runtime.files import read_bytes
from regrow_runtime.preprocess import PREPROCESSOR

from .source import Source

__all__ = ["WAV", "read_sounds", "read_wav", "resample"]

WAV = ".wav"
_MAX_FILE = 64 << 20
_MAX_VALUES = 1 << 30  # of one input, all samples together: 4 GiB
_MAX_SECONDS = 30
_RATES = (1_000, 384_000)
_INPUTS = ("input_values", "input_features")


def read_sounds(source: Source, files: Sequence[Path]) -> dict[str, NDArray[Any]]:
    """Inputs of an audio model, padded to the longest sound; what is beyond 30 s is cut off.

    Raises:
        UsageError: the backbone takes no sounds, or has no feature extractor.
        FormatError: a file is no PCM `.wav`, or the extractor's configuration is broken.
    """
    wanted = source.arguments()
    folder = source.backbone.folder
    if folder is None or not (folder / PREPROCESSOR).is_file():
        raise UsageError(
            f"model must have {PREPROCESSOR} to take sounds, got none: save its feature extractor "
            f"beside it, or give ready arrays ({', '.join(wanted)}) in an .npz"
        )
    if not set(wanted) & set(_INPUTS):
        raise UsageError(
            f"backbone must take sounds ({', '.join(_INPUTS)}), got one of {', '.join(wanted)}"
        )
    extractor = _extractor(folder)
    rate = extractor.sampling_rate
    sounds = [_prepared(file, rate) for file in files]
    if (size := len(sounds) * max(len(sound) for sound in sounds)) > _MAX_VALUES:
        raise UsageError(
            f"{source.path} must come to at most {_MAX_VALUES} values, got {size}: "
            "shorten the longest sounds, or give fewer"
        )
    return _extracted(extractor, sounds, wanted, folder)


def _extractor(folder: Path) -> Any:
    """The model's feature extractor; no code of the folder is run."""
    from transformers import AutoFeatureExtractor

    from ..backbone import quiet_transformers

    with quiet_transformers():
        try:
            found = AutoFeatureExtractor.from_pretrained(  # type: ignore[no-untyped-call]
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises many kinds on broken files
            raise FormatError(
                f"{folder / PREPROCESSOR} must describe a feature extractor: {_line(error)}"
            ) from error
    rate = getattr(found, "sampling_rate", None)
    if type(rate) is not int or not _RATES[0] <= rate <= _RATES[1]:
        raise FormatError(
            f"{folder / PREPROCESSOR}: sampling_rate must be from {_RATES[0]} to {_RATES[1]}, "
            f"got {rate!r}"
        )
    if not isinstance(getattr(found, "padding_value", 0.0), int | float):
        raise FormatError(f"{folder / PREPROCESSOR}: padding_value must be a number")
    return found


def _extracted(
    extractor: Any, sounds: list[NDArray[np.float32]], wanted: Sequence[str], folder: Path
) -> dict[str, NDArray[Any]]:
    """Each sound as if it were alone, as on a device; then padded to the longest."""
    rows: dict[str, list[NDArray[Any]]] = {}
    for sound in sounds:
        try:
            made = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="np")
        except Exception as error:  # whatever comes up inside the extractor
            raise RegrowError(
                f"the feature extractor of {folder} could not prepare a sound: {_line(error)}"
            ) from error
        for name in wanted:
            if name in made:
                rows.setdefault(name, []).append(np.asarray(made[name])[0])
    if not set(rows) & set(_INPUTS):
        raise FormatError(
            f"the feature extractor of {folder} must give {' or '.join(_INPUTS)}, "
            f"got {', '.join(made) or 'nothing'}"
        )
    value = float(getattr(extractor, "padding_value", 0.0))
    return {name: _padded(row, value if name in _INPUTS else 0) for name, row in rows.items()}


def _padded(rows: list[NDArray[Any]], value: float) -> NDArray[Any]:
    shape = np.max([row.shape for row in rows], axis=0)
    found = np.full((len(rows), *shape), value, dtype=rows[0].dtype)
    for into, row in zip(found, rows, strict=True):
        into[tuple(slice(size) for size in row.shape)] = row
    return found


def _prepared(file: Path, rate: int) -> NDArray[np.float32]:
    sound, found = read_wav(file)
    sound = sound[: _MAX_SECONDS * found]
    return sound if found == rate else resample(sound, found, rate)


def resample(sound: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    """The sound at another rate: a polyphase filter (scipy's `resample_poly`)."""
    try:
        from scipy.signal import resample_poly
    except ImportError:
        raise RegrowError(
            f"sounds of {rate} Hz for a model of {wanted} Hz need scipy: "
            "pip install 'regrow[train]'"
        ) from None
    common = gcd(rate, wanted)
    made: NDArray[np.float32] = resample_poly(sound, wanted // common, rate // common)
    return made.astype(np.float32)


def read_wav(path: Path) -> tuple[NDArray[np.float32], int]:
    """Samples from -1 to 1, float32 [length], and their rate in Hz; channels are averaged.

    PCM of 8, 16, 24 or 32 bits.

    Raises:
        FormatError: the file is none of these, is cut short, holds no samples, or has more than
            64 MiB.
    """
    data = read_bytes(path, limit=_MAX_FILE, what="a sound")
    try:
        with wave.open(BytesIO(data)) as stream:
            channels, width, rate = (
                stream.getnchannels(), stream.getsampwidth(), stream.getframerate(),
            )  # fmt: skip
            promised = stream.getnframes()
            frames = stream.readframes(promised)
    except (wave.Error, EOFError, RuntimeError, OverflowError, MemoryError) as error:
        raise FormatError(f"{path} must be a PCM .wav, got another file: {error}") from None
    if width > 4 or not _RATES[0] <= rate <= _RATES[1]:
        raise FormatError(
            f"{path} must be of 8 to 32 bits at {_RATES[0]} to {_RATES[1]} Hz, "
            f"got {8 * width} bits at {rate} Hz"
        )
    if not frames or len(frames) != promised * channels * width:
        what = "none" if not frames else f"{len(frames) // (channels * width)} of {promised}"
        raise FormatError(f"{path} must hold the samples that its header promises, got {what}")
    sound: NDArray[np.float32] = _floats(frames, width).reshape(-1, channels).mean(axis=1)
    return sound, rate


def _floats(frames: bytes, width: int) -> NDArray[np.float32]:
    """Little-endian PCM as floats from -1 to 1; 8 bits are unsigned."""
    numbers: NDArray[Any]
    if width == 1:
        numbers = np.frombuffer(frames, np.uint8).astype(np.int16) - 128
    elif width == 3:  # to the high bytes of 32 bits, which keeps the sign
        wide = np.zeros((len(frames) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(frames, np.uint8).reshape(-1, 3)
        numbers, width = wide.reshape(-1).view("<i4"), 4
    else:
        numbers = np.frombuffer(frames, f"<i{width}")
    sound: NDArray[np.float32] = (numbers / 2 ** (8 * width - 1)).astype(np.float32)
    return sound


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
