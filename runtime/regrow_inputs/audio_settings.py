"""Kinds of preprocessor_config.json for audio: one function each, one line in `_KINDS`.

`MelFeatureExtractor` is regrow's own, for models that have none in transformers: docs/inputs.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regrow_format.errors import FormatError
from regrow_format.fields import Fields, parse_json
from regrow_format.files import read_bytes

from .images import PREPROCESSOR
from .mel import DCT_NORMS, LOGS, MEL_SCALES, MelFrontEnd
from .wav import MAX_SECONDS, RATES

__all__ = ["AudioSettings", "is_audio", "read_extractor"]

_MAX_BYTES = 64 << 20
_MAX_FFT = 1 << 16
_MAX_BANDS = 4096
_MAX_FRAMES = 1 << 20
_MAX_VALUES = 1 << 24


@dataclass(frozen=True)
class AudioSettings:
    """How audio becomes a graph's input.

    Attributes:
        sampling_rate: in Hz, what audio is brought to.
        samples: how many a clip is cut or filled up to; None for as many as it has.
        front: what makes frames of it; None where the model takes samples.
        frames: how many frames are cut or filled up to; None for as many as there are.
        whisper: the last frame is dropped and the loudest 8 decades become about -1 to 1.
        normalize: samples get mean 0 and variance 1.
        mean, std: taken off frames, and what they are divided by.
        padding: what audio is filled up with.
        mask: give an attention_mask too, 1 where there is audio.
        time_last: frames are columns, [features, frames].
    """

    sampling_rate: int
    samples: int | None = None
    front: MelFrontEnd | None = None
    frames: int | None = None
    whisper: bool = False
    normalize: bool = False
    mean: float = 0.0
    std: float = 1.0
    padding: float = 0.0
    mask: bool = False
    time_last: bool = False


def is_audio(folder: Path) -> bool:
    """Whether the folder's preprocessor_config.json is one for audio."""
    if not (folder / PREPROCESSOR).is_file():
        return False
    fields = _read(folder)
    return fields.plain("feature_extractor_type", str) in _KINDS or fields.has("sampling_rate")


def read_extractor(folder: Path) -> AudioSettings:
    """What the folder's preprocessor_config.json says; see `AudioPreprocessor.from_folder`."""
    fields = _read(folder)
    kind = fields.choice("feature_extractor_type", tuple(_KINDS))
    found = _KINDS[kind](fields)
    _check_size(found, fields.where)
    return found


def _read(folder: Path) -> Fields:
    path = folder / PREPROCESSOR
    return parse_json(read_bytes(path, limit=_MAX_BYTES, what="audio preprocessing"), str(path))


def _wav2vec2(fields: Fields) -> AudioSettings:
    return AudioSettings(
        _rate(fields),
        normalize=_flag(fields, "do_normalize", True),
        padding=fields.take("padding_value", float, 0.0),
        mask=_flag(fields, "return_attention_mask", False),
    )


def _ast(fields: Fields) -> AudioSettings:
    rate = _rate(fields)
    bands = fields.number("num_mel_bins", 1, _MAX_BANDS, 128)
    normal = _flag(fields, "do_normalize", True)
    mean, std = _mean_and_std(fields, -4.2677393, 4.5689974)
    front = MelFrontEnd(
        rate, 400, 160, 512, bands, 20.0, rate // 2, "kaldi", in_mel=True, periodic=False,
        preemphasis=0.97, remove_dc=True, floor=float(np.finfo(np.float32).eps),
    )  # fmt: skip
    return AudioSettings(
        rate, front=front, frames=fields.number("max_length", 1, _MAX_FRAMES, 1024),
        mean=mean if normal else 0.0, std=2 * std if normal else 1.0,
    )  # fmt: skip


def _whisper(fields: Fields) -> AudioSettings:
    rate = _rate(fields)
    fft = fields.number("n_fft", 2, _MAX_FFT, 400)
    front = MelFrontEnd(
        rate, fft, fields.number("hop_length", 1, _MAX_FFT, 160), fft,
        fields.number("feature_size", 1, _MAX_BANDS, 80), 0.0, 8000.0, "slaney", slaney_norm=True,
        center=True, log="log10",
    )  # fmt: skip
    if fields.take("dither", float, 0.0):
        raise FormatError(f"{fields.where}: dither must be 0, since answers would be random")
    seconds = fields.number("chunk_length", 1, MAX_SECONDS, MAX_SECONDS)
    return AudioSettings(
        rate, seconds * rate, front, whisper=True, time_last=True,
        padding=fields.take("padding_value", float, 0.0),
    )  # fmt: skip


def _own(fields: Fields) -> AudioSettings:
    """Every field is known, or the file is refused: nobody else writes it."""
    rate = _rate(fields)
    samples = _number(fields, "num_samples", MAX_SECONDS * rate)
    length = fields.number("frame_length", 2, _MAX_FFT)
    bands = fields.number("num_mel_filters", 1, _MAX_BANDS)
    front = MelFrontEnd(
        sampling_rate=rate,
        frame_length=length,
        hop_length=fields.number("hop_length", 1, _MAX_FFT),
        fft_length=fields.number("fft_length", length, _MAX_FFT, length),
        bands=bands,
        low=fields.take("min_frequency", float, 0.0),
        high=fields.take("max_frequency", float, rate / 2),
        mel_scale=_choice(fields, "mel_scale", MEL_SCALES),
        in_mel=_flag(fields, "triangularize_in_mel_space", False),
        slaney_norm=fields.has("norm") and fields.choice("norm", ("slaney",)) == "slaney",
        power=fields.number("power", 1, 2, 2),
        center=_flag(fields, "center", False),
        periodic=_flag(fields, "periodic_window", True),
        preemphasis=fields.take("preemphasis", float, 0.0),
        remove_dc=_flag(fields, "remove_dc_offset", False),
        floor=fields.take("mel_floor", float, 1e-10),
        log=_choice(fields, "log_mel", LOGS),
        coefficients=_number(fields, "num_mfcc", bands),
        dct_norm=_choice(fields, "dct_norm", DCT_NORMS),
    )
    mean, std = _mean_and_std(fields, 0.0, 1.0)
    made = AudioSettings(
        rate, samples, front, mean=mean, std=std,
        frames=_number(fields, "num_frames", _MAX_FRAMES),
        time_last=_flag(fields, "time_last", False),
    )  # fmt: skip
    fields.done()
    _check_front(front, fields.where)
    return made


_KINDS: dict[str, Callable[[Fields], AudioSettings]] = {
    "Wav2Vec2FeatureExtractor": _wav2vec2,
    "ASTFeatureExtractor": _ast,
    "WhisperFeatureExtractor": _whisper,
    "MelFeatureExtractor": _own,
}


def _check_size(made: AudioSettings, where: str) -> None:
    """A file of a few bytes must not ask for gigabytes."""
    front = made.front
    if front is None:
        return
    samples = made.samples or MAX_SECONDS * front.sampling_rate
    frames = max(made.frames or 0, samples // front.hop_length + 1)
    if frames * front.bands > _MAX_VALUES or front.fft_length * front.bands > _MAX_VALUES:
        raise FormatError(
            f"{where}: a clip must become at most {_MAX_VALUES} numbers, got {frames} frames of "
            f"{front.bands} bands from {front.fft_length} samples"
        )


def _check_front(front: MelFrontEnd, where: str) -> None:
    if not 0 <= front.low < front.high <= front.sampling_rate / 2:
        raise FormatError(
            f"{where}: min_frequency must be below max_frequency, and that at most half of "
            f"sampling_rate, got {front.low} and {front.high}"
        )
    if front.floor <= 0 or not 0 <= front.preemphasis < 1:
        raise FormatError(f"{where}: mel_floor must be above 0 and preemphasis from 0 to below 1")


def _rate(fields: Fields) -> int:
    return fields.number("sampling_rate", *RATES)


def _mean_and_std(fields: Fields, mean: float, std: float) -> tuple[float, float]:
    mean, std = fields.take("mean", float, mean), fields.take("std", float, std)
    if std <= 0:
        raise FormatError(f"{fields.where}: std must be above 0, got {std}")
    return mean, std


def _number(fields: Fields, name: str, high: int) -> int | None:
    return fields.number(name, 1, high) if fields.has(name) else None


def _flag(fields: Fields, name: str, default: bool) -> bool:
    return fields.take(name, bool) if fields.has(name) else default


def _choice(fields: Fields, name: str, choices: Sequence[str]) -> str:
    """One of them; the first if the field is not there."""
    return fields.choice(name, choices) if fields.has(name) else choices[0]
