"""Log-mel spectra and MFCCs in NumPy: one front end with numbers, which every kind of model sets.

Frames of a clip times a window, their discrete Fourier transform, triangular bands on a mel scale,
the logarithm, and for MFCCs a cosine transform of that (Davis and Mermelstein, Comparison of
parametric representations for monosyllabic word recognition, 1980). docs/inputs.md has the
formulas. Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

__all__ = ["DCT_NORMS", "LOGS", "MEL_SCALES", "MelFrontEnd"]

MEL_SCALES = ("htk", "kaldi", "slaney")
LOGS = ("log", "log10")
DCT_NORMS = ("ortho", "htk")
_AT_ONCE = 1 << 19  # samples of all frames

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MelFrontEnd:
    """From samples to frames of log-mel bands or MFCCs. Lengths are in samples, frequencies in Hz.

    Attributes:
        sampling_rate: of the audio.
        frame_length, hop_length, fft_length: of a frame, between frames, of the transform.
        bands, low, high: how many triangles, and from where to where they reach.
        mel_scale: "htk", "kaldi" (2595 log10 and 1127 ln of 1 + f / 700) or "slaney".
        in_mel: triangles are straight over mels, not over Hz.
        slaney_norm: triangles have equal areas, not equal heights.
        power: 1 for magnitudes, 2 for powers.
        center: frame t is around t · hop, the clip mirrored at its ends; else it begins there.
        periodic: the Hann window is.
        preemphasis, remove_dc: of every frame; its mean is taken off first.
        floor, log: what bands are at least, and "log" or "log10".
        coefficients: how many of the cosine transform to keep; None for log-mel bands.
        dct_norm: "ortho", or "htk", where the first coefficient is scaled as all others.
    """

    sampling_rate: int
    frame_length: int
    hop_length: int
    fft_length: int
    bands: int
    low: float
    high: float
    mel_scale: str = "htk"
    in_mel: bool = False
    slaney_norm: bool = False
    power: int = 2
    center: bool = False
    periodic: bool = True
    preemphasis: float = 0.0
    remove_dc: bool = False
    floor: float = 1e-10
    log: str = "log"
    coefficients: int | None = None
    dct_norm: str = "ortho"

    def __call__(self, clip: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [frames, bands or coefficients]; less than one frame is filled up with zeros."""
        samples = clip.astype(np.float64)
        short = self.frame_length - len(samples)
        samples = np.pad(samples, (0, max(short, 0)))
        if self.center:
            samples = np.pad(samples, self.frame_length // 2, mode="reflect")
        frames = sliding_window_view(samples, self.frame_length)[:: self.hop_length]
        rows = max(_AT_ONCE // self.fft_length, 1)
        parts = [self._features(frames[i : i + rows]) for i in range(0, len(frames), rows)]
        return np.concatenate(parts).astype(np.float32)

    def _features(self, frames: Array) -> Array:
        if self.remove_dc:
            frames = frames - frames.mean(axis=1, keepdims=True)
        if self.preemphasis:
            before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
            frames = frames - self.preemphasis * before
        window = _hann(self.frame_length, self.periodic)
        spectrum = np.abs(np.fft.rfft(frames * window, self.fft_length))
        bands = np.maximum(spectrum**self.power @ _triangles(self), self.floor)
        logs: Array = np.log(bands) if self.log == "log" else np.log10(bands)
        return logs if self.coefficients is None else logs @ _cosines(self)


@lru_cache(maxsize=8)
def _hann(length: int, periodic: bool) -> Array:
    steps = np.arange(length) / max(length if periodic else length - 1, 1)
    window: Array = 0.5 - 0.5 * np.cos(2 * np.pi * steps)
    return window


@lru_cache(maxsize=8)
def _triangles(front: MelFrontEnd) -> Array:
    """[fft_length // 2 + 1, bands]: weights of the frequencies in every band."""
    steps = np.arange(front.fft_length // 2 + 1, dtype=np.float64)
    places = steps * (front.sampling_rate / front.fft_length)
    low, high = _mels(np.array([front.low, front.high]), front.mel_scale).tolist()
    ends: Array = np.linspace(low, high, front.bands + 2)
    if front.in_mel:  # distances are measured on the scale itself
        places = _mels(places, front.mel_scale)
    else:
        ends = _hertz(ends, front.mel_scale)
    left, middle, right = ends[:-2], ends[1:-1], ends[2:]
    up = (places[:, None] - left) / (middle - left)
    down = (right - places[:, None]) / (right - middle)
    weights: Array = np.maximum(np.minimum(up, down), 0)
    if front.slaney_norm:
        weights = weights * 2 / (ends[2:] - ends[:-2])
    return weights


@lru_cache(maxsize=8)
def _cosines(front: MelFrontEnd) -> Array:
    """[bands, coefficients]: a DCT of type II."""
    steps = np.arange(front.bands)[:, None] + 0.5
    cosines: Array = np.cos(np.pi / front.bands * steps * np.arange(front.coefficients or 0))
    cosines *= np.sqrt(2 / front.bands)
    if front.dct_norm == "ortho":
        cosines[:, 0] /= np.sqrt(2)
    return cosines


def _mels(hertz: Array, scale: str) -> Array:
    if scale == "slaney":  # straight to 1000 Hz, logarithmic beyond
        above = 15 + np.log(np.maximum(hertz, 1000) / 1000) * 27 / np.log(6.4)
        return np.where(hertz < 1000, 3 * hertz / 200, above)
    factor = 1127.0 if scale == "kaldi" else 2595 / np.log(10)
    mels: Array = factor * np.log1p(hertz / 700)
    return mels


def _hertz(mels: Array, scale: str) -> Array:
    if scale == "slaney":
        above = 1000 * np.exp((np.maximum(mels, 15) - 15) * np.log(6.4) / 27)
        return np.where(mels < 15, 200 * mels / 3, above)
    factor = 1127.0 if scale == "kaldi" else 2595 / np.log(10)
    hertz: Array = 700 * np.expm1(mels / factor)
    return hertz
