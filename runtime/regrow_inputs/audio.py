"""From audio to a graph's input, as the bundle's preprocessor_config.json says; NumPy alone.

The same code serves training and the device, and its results equal those of transformers' feature
extractors (tested).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import UsageError

from .audio_settings import AudioSettings, read_extractor
from .wav import MAX_SECONDS, RATES, resample

__all__ = ["AUDIO_INPUTS", "AudioPreprocessor", "audio_input"]

AUDIO_INPUTS = ("input_values", "input_features")  # what transformers' models call them
_MASK = "attention_mask"

Audio = NDArray[Any] | tuple[NDArray[Any], int]


class AudioPreprocessor(AudioSettings):
    """Cut or fill up, a spectrum or none, cut or fill up that, normalise.

    Its fields are those of `AudioSettings`.
    """

    @classmethod
    def from_folder(cls, folder: Path) -> AudioPreprocessor:
        """Read `folder`/preprocessor_config.json.

        Raises:
            UsageError: there is no such file.
            FormatError: it is broken, or describes something that is not known here.
        """
        return cls(**vars(read_extractor(folder)))

    def __call__(self, audio: Sequence[Audio]) -> dict[str, NDArray[Any]]:
        """`values` float32 [batch, …], and `attention_mask` int64 [batch, samples] if there is one.

        Args:
            audio: samples [length], full scale 1, at the model's rate, or (samples, rate). Each is
                prepared as if it were alone, then filled up to the longest; what is beyond 30 s is
                cut off.

        Raises:
            UsageError: there is no clip, or one that holds none or is not finite.
        """
        if not len(audio):
            raise UsageError("audio must be at least one clip, got none")
        ready = [self._ready(clip) for clip in audio]
        made = {"values": _filled([self._one(clip) for clip in ready], self.padding)}
        if self.mask:
            masks = [_fitted(np.ones(len(s), np.int64), self.samples, 0) for s in ready]
            made[_MASK] = _filled(masks, 0)
        return made

    def feeds(self, audio: Sequence[Audio], wanted: Sequence[str]) -> dict[str, NDArray[Any]]:
        """As calling it, by the names of a model's inputs, `wanted`.

        Raises:
            UsageError: none of them can take audio.
        """
        made, name = self(audio), audio_input(wanted)
        if name is None:
            raise UsageError(
                f"model must take audio ({', '.join(AUDIO_INPUTS)}), got {', '.join(wanted)}"
            )
        found = {name: made["values"]}
        if _MASK in wanted and _MASK in made:
            found[_MASK] = made[_MASK]
        return found

    def _ready(self, clip: Audio) -> NDArray[np.float32]:
        samples, rate = clip if isinstance(clip, tuple) else (clip, self.sampling_rate)
        is_array = isinstance(samples, np.ndarray)
        if not is_array or samples.ndim != 1 or samples.dtype.kind != "f":
            found = f"{samples.dtype} {list(samples.shape)}" if is_array else type(samples).__name__
            raise UsageError(f"a clip must be floats [length], full scale 1, got {found}")
        if not len(samples) or not np.isfinite(samples).all():
            what = "none" if not len(samples) else "NaN or infinity"
            raise UsageError(f"a clip must have finite samples, got {what}")
        if not RATES[0] <= rate <= RATES[1]:
            raise UsageError(f"a clip must be of {RATES[0]} to {RATES[1]} Hz, got {rate}")
        part = samples[: MAX_SECONDS * rate].astype(np.float32)
        return resample(part, rate, self.sampling_rate)

    def _one(self, clip: NDArray[np.float32]) -> NDArray[np.float32]:
        clip = clip[: self.samples]
        if self.normalize:
            clip = (clip - clip.mean()) / np.sqrt(clip.var() + 1e-7)
        clip = _fitted(clip, self.samples, self.padding)
        if self.front is None:
            return clip
        found = self.front(clip)
        if self.whisper:
            found = found[:-1]
            found = (np.maximum(found, found.max() - 8) + 4) / 4
        found = _fitted(found, self.frames, 0)
        found = ((found - np.float32(self.mean)) / np.float32(self.std)).astype(np.float32)
        return found.T if self.time_last else found


def audio_input(wanted: Sequence[str]) -> str | None:
    """Which of a model's inputs takes audio: one of the usual names, or else the only one."""
    usual = [name for name in AUDIO_INPUTS if name in wanted]
    others = [name for name in wanted if name != _MASK]
    if usual or len(others) != 1 or others[0] in ("pixel_values", "input_ids"):
        return usual[0] if usual else None
    return others[0]


def _fitted(array: NDArray[Any], length: int | None, value: float) -> NDArray[Any]:
    """The first `length` rows, filled up behind."""
    if length is None:
        return array
    array = array[:length]
    missing = [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)]
    return np.pad(array, missing, constant_values=value)


def _filled(rows: list[NDArray[Any]], value: float) -> NDArray[Any]:
    """Stacked, each filled up behind to the largest."""
    found = np.full((len(rows), *np.max([r.shape for r in rows], axis=0)), value, rows[0].dtype)
    for into, row in zip(found, rows, strict=True):
        into[tuple(slice(size) for size in row.shape)] = row
    return found
