"""Audio from disk and at the model's rate, with NumPy alone.

The standard library's `wave` reads no floats, and no extensible headers before Python 3.12.
"""

from __future__ import annotations

import struct
from math import gcd
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from regrow_format.errors import FormatError, UsageError

__all__ = ["MAX_SECONDS", "RATES", "WAV_ENDINGS", "read_wav", "resample"]

WAV_ENDINGS = (".wav", ".wave")
RATES = (1_000, 384_000)  # Hz
MAX_SECONDS = 30  # what is beyond is not read
_MAX_BYTES = 64 << 20
_MAX_CHANNELS = 64
_MAX_CHUNKS = 1_000
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_HALF = 10  # zero crossings of the filter on each side, at the lower rate
_BETA = 5.0


def read_wav(path: Path) -> tuple[NDArray[np.float32], int]:
    """The first 30 s of a `.wav`: samples float32 [length], full scale 1, and their rate in Hz.

    PCM of 8, 16, 24 or 32 bits, or floats of 32 or 64; channels are averaged.

    Raises:
        UsageError: there is no such file.
        FormatError: the file is none of these, is cut short, holds no samples or some that are not
            finite, or 30 s of it have more than 64 MiB.
    """
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "no such file"
        raise UsageError(f"clip must be a .wav file, got {path}: {what}")
    try:
        with path.open("rb") as stream:
            return _samples(stream, path, path.stat().st_size)
    except struct.error:
        raise FormatError(f"{path} must be a whole .wav, got one that ends in its header") from None
    except OSError as error:
        raise FormatError(f"{path} could not be read: {error.strerror or error}") from error


def _samples(stream: BinaryIO, path: Path, size: int) -> tuple[NDArray[np.float32], int]:
    kind, channels, rate, width, promised = _header(stream, path)
    block = channels * width
    left = size - stream.tell()
    if promised < block or left < promised:
        found = "none" if min(promised, left) < block else f"{left // block} of {promised // block}"
        raise FormatError(f"{path} must hold the samples that its header promises, got {found}")
    frames = min(promised // block, MAX_SECONDS * rate)
    if frames * block > _MAX_BYTES:
        raise FormatError(
            f"{path} must have at most {_MAX_BYTES} bytes in {MAX_SECONDS} s, got {frames * block}"
        )
    clip = _floats(stream.read(frames * block), kind, width).reshape(-1, channels).mean(axis=1)
    if not np.isfinite(clip).all():
        raise FormatError(f"{path} must hold finite samples, got NaN or infinity")
    return clip.astype(np.float32), rate


def _header(stream: BinaryIO, path: Path) -> tuple[int, int, int, int, int]:
    """(kind, channels, rate, bytes a sample, bytes promised), the stream at the first sample."""
    riff, _, wave = struct.unpack("<4sI4s", stream.read(12))
    found = None
    for _ in range(_MAX_CHUNKS if (riff, wave) == (b"RIFF", b"WAVE") else 0):
        name, size = struct.unpack("<4sI", stream.read(8))
        if name == b"data" and found:
            return (*found, size)
        start = stream.tell()
        if name == b"fmt ":
            found = _format(stream.read(min(size, 40)), path)
        stream.seek(start + size + size % 2)
    raise FormatError(f"{path} must be a .wav of PCM or floats, got another file")


def _format(data: bytes, path: Path) -> tuple[int, int, int, int]:
    kind, channels, rate, _, block, bits = struct.unpack("<HHIIHH", data[:16])
    if kind == _EXTENSIBLE:
        (kind,) = struct.unpack("<H", data[24:26])
    widths = {_PCM: (1, 2, 3, 4), _FLOAT: (4, 8)}.get(kind, ())
    width = block // channels if channels else 0
    if width not in widths or width != -(-bits // 8) or block != width * channels:
        raise FormatError(
            f"{path} must be PCM of 8 to 32 bits or floats of 32 or 64, "
            f"got format {kind} of {bits} bits"
        )
    if channels > _MAX_CHANNELS or not RATES[0] <= rate <= RATES[1]:
        raise FormatError(
            f"{path} must have at most {_MAX_CHANNELS} channels at {RATES[0]} to {RATES[1]} Hz, "
            f"got {channels} at {rate} Hz"
        )
    return kind, channels, rate, width


def _floats(data: bytes, kind: int, width: int) -> NDArray[Any]:
    """Little-endian samples, PCM divided by its full scale; 8 bits are unsigned."""
    numbers: NDArray[Any]
    if kind == _FLOAT:
        numbers = np.frombuffer(data, f"<f{width}")
        return numbers
    if width == 1:
        numbers = np.frombuffer(data, np.uint8).astype(np.int16) - 128
    elif width == 3:  # to the high bytes of 32 bits, which keeps the sign
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        numbers, width = wide.reshape(-1).view("<i4"), 4
    else:
        numbers = np.frombuffer(data, f"<i{width}")
    clip: NDArray[np.float32] = (numbers / 2 ** (8 * width - 1)).astype(np.float32)
    return clip


def resample(clip: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    """The clip at another rate, float32 [⌈length · wanted / rate⌉].

    A polyphase filter (Crochiere and Rabiner, Multirate Digital Signal Processing, 1983): a sinc
    under a Kaiser window (beta 5) that reaches 10 zero crossings of the lower rate to each side;
    beyond its ends the clip is 0. `scipy.signal.resample_poly` gives the same.
    """
    common = gcd(rate, wanted)
    up, down = wanted // common, rate // common
    if up == down:
        return clip
    half = _HALF * max(up, down)
    taps = _lowpass(half, max(up, down)) * up
    reach = 2 * half // up + 1  # samples under the filter
    padded = np.pad(clip.astype(np.float64), reach)
    windows = sliding_window_view(padded, reach)
    made = np.empty(-(-len(clip) * up // down))
    for first in range(min(up, len(made))):  # outputs first, first + up, … use the same taps
        newest, phase = divmod(first * down + half, up)
        part = taps[phase::up][:reach][::-1]
        rows = windows[newest + 1 + reach - len(part) :: down, : len(part)]
        into = made[first::up]
        into[:] = rows[: len(into)] @ part
    return made.astype(np.float32)


def _lowpass(half: int, factor: int) -> NDArray[np.float64]:
    """[2 half + 1], sum 1: cuts off at 1 / `factor` of the Nyquist frequency."""
    steps = np.arange(-half, half + 1)
    taps = np.sinc(steps / factor) * np.kaiser(2 * half + 1, _BETA)
    whole: NDArray[np.float64] = taps / taps.sum()
    return whole
