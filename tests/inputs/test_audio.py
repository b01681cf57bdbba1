"""Front ends against their formulas; tests/toolchain compares them to transformers' extractors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from regrow_inputs import AudioPreprocessor
from regrow_runtime import FormatError, UsageError

RATE = 2000
MFCC = {
    "feature_extractor_type": "MelFeatureExtractor",
    "sampling_rate": RATE,
    "num_samples": 500,
    "frame_length": 60,
    "hop_length": 20,
    "fft_length": 64,
    "power": 1,
    "num_mel_filters": 12,
    "min_frequency": 20,
    "max_frequency": 950,
    "mel_scale": "kaldi",
    "triangularize_in_mel_space": True,
    "mel_floor": 1e-12,
    "num_mfcc": 7,
    "dct_norm": "htk",
}
AUDIO = np.random.default_rng(0).normal(0, 0.2, 500).astype(np.float32)


@pytest.fixture
def read(tmp_path):
    """read(**fields): a preprocessor from a folder."""

    def call(**fields: object) -> AudioPreprocessor:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
        return AudioPreprocessor.from_folder(tmp_path)

    return call


def _mel(hertz: float, scale: str) -> float:
    if scale == "slaney":
        return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000, 6.4)
    return (
        1127 * math.log(1 + hertz / 700) if scale == "kaldi" else 2595 * math.log10(1 + hertz / 700)
    )


def _inverse(mel: float, scale: str) -> float:
    """By bisection, so that it needs no formula of its own."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _mel(middle, scale) < mel else (low, middle)
    return low


def _reference(clip: np.ndarray, fields: dict) -> np.ndarray:
    """docs/inputs.md written out, with a Fourier matrix and loops."""
    length, hop, size = fields["frame_length"], fields["hop_length"], fields["fft_length"]
    scale = fields.get("mel_scale", "htk")
    if fields.get("center"):
        clip = np.pad(clip, length // 2, mode="reflect")
    span = length if fields.get("periodic_window", True) else length - 1
    window = [math.sin(math.pi * n / span) ** 2 for n in range(length)]
    turns = np.arange(size // 2 + 1)[:, None] * np.arange(length) / size
    fourier = np.exp(-2j * np.pi * turns)
    bands = fields["num_mel_filters"]
    low, high = (_mel(fields[f"{end}_frequency"], scale) for end in ("min", "max"))
    ends = [low + (high - low) * i / (bands + 1) for i in range(bands + 2)]
    places = [fields["sampling_rate"] * k / size for k in range(size // 2 + 1)]
    if fields.get("triangularize_in_mel_space"):
        places = [_mel(place, scale) for place in places]
    else:
        ends = [_inverse(end, scale) for end in ends]
    weights = np.zeros((bands, len(places)))
    for b in range(bands):
        left, top, right = ends[b : b + 3]
        for k, place in enumerate(places):
            if left < place <= top:
                weights[b, k] = (place - left) / (top - left)
            elif top < place < right:
                weights[b, k] = (right - place) / (right - top)
        if fields.get("norm") == "slaney":
            weights[b] *= 2 / (right - left)
    rows = []
    for start in range(0, len(clip) - length + 1, hop):
        frame = clip[start : start + length].astype(np.float64)
        if fields.get("remove_dc_offset"):
            frame = frame - frame.mean()
        amount = fields.get("preemphasis", 0)
        frame = np.array([frame[n] - amount * frame[max(n - 1, 0)] for n in range(length)])
        spectrum = np.abs(fourier @ (frame * window)) ** fields.get("power", 2)
        logs = np.log(np.maximum(weights @ spectrum, fields.get("mel_floor", 1e-10)))
        rows.append(logs / math.log(10) if fields.get("log_mel") == "log10" else logs)
    found = np.array(rows)
    if count := fields.get("num_mfcc"):
        cosines = [
            [math.cos(math.pi * m * (b + 0.5) / bands) for m in range(count)] for b in range(bands)
        ]
        found = found @ np.array(cosines) * math.sqrt(2 / bands)
        if fields.get("dct_norm", "ortho") == "ortho":
            found[:, 0] /= math.sqrt(2)
    return (found - fields.get("mean", 0)) / fields.get("std", 1)


VARIANTS = [
    {},
    {"dct_norm": "ortho"},
    {"num_mfcc": None, "power": 2, "log_mel": "log10", "mel_floor": 1e-10},
    {"mel_scale": "htk", "triangularize_in_mel_space": False, "power": 2},
    {"mel_scale": "slaney", "triangularize_in_mel_space": False, "norm": "slaney", "center": True},
    {"norm": "slaney", "mel_scale": "htk"},
    {"preemphasis": 0.97, "remove_dc_offset": True, "periodic_window": False},
    {"mean": -3.0, "std": 2.5, "num_mfcc": None},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_frames_are_those_of_the_formulas(read, changes):
    fields = {k: v for k, v in {**MFCC, **changes}.items() if v is not None}
    found = read(**fields)([AUDIO])["values"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], _reference(AUDIO, fields), rtol=2e-6, atol=2e-6)


def test_the_cosine_transform_is_scipys(read):
    fft = pytest.importorskip("scipy.fft")
    bands = {k: v for k, v in MFCC.items() if k not in ("num_mfcc", "dct_norm")}
    logs = read(**bands)([AUDIO])["values"][0]
    expected = fft.dct(logs, type=2, axis=1, norm="ortho")[:, :7]
    found = read(**{**MFCC, "dct_norm": "ortho"})([AUDIO])["values"][0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_lengths(read):
    front = read(**MFCC)
    assert front([AUDIO])["values"].shape == (1, 23, 7)  # 1 + (500 - 60) // 20
    for length in (1, 60, 3000):  # filled up, or cut
        assert front([np.zeros(length, np.float32)])["values"].shape == (1, 23, 7)
    loose = {k: v for k, v in MFCC.items() if k != "num_samples"}
    assert read(**loose)([AUDIO[:10]])["values"].shape == (1, 1, 7)
    fixed = read(**loose, num_frames=30, time_last=True)([AUDIO])["values"]
    assert fixed.shape == (1, 7, 30)
    assert (fixed[0, :, 23:] == 0).all()


def test_silence_is_a_sound(read):
    for fields in (
        MFCC,
        {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": RATE},
    ):
        assert np.isfinite(read(**fields)([np.zeros(500, np.float32)])["values"]).all()


def test_a_batch_is_its_audio(read):
    """Each as if it were alone; the shorter one is filled up."""
    front = read(
        feature_extractor_type="Wav2Vec2FeatureExtractor", sampling_rate=RATE,
        padding_value=0.5, return_attention_mask=True,
    )  # fmt: skip
    made = front([AUDIO, AUDIO[:300]])
    alone = front([AUDIO[:300]])
    np.testing.assert_array_equal(made["values"][1, :300], alone["values"][0])
    assert (made["values"][1, 300:] == 0.5).all()
    assert made["attention_mask"].sum(axis=1).tolist() == [500, 300]
    assert front.feeds([AUDIO], ["input_values"]).keys() == {"input_values"}
    assert front.feeds([AUDIO], ["mask", "x"][1:]).keys() == {"x"}
    with pytest.raises(UsageError, match=r"must take audio \(input_values, .*got input_ids, a, b"):
        front.feeds([AUDIO], ["input_ids", "a", "b"])


def test_other_rates_are_brought_to_the_models(read):
    front = read(**MFCC)
    tone = np.sin(2 * np.pi * 440 * np.arange(1000) / 4000).astype(np.float32)
    found = front([(tone, 4000)])["values"]
    direct = front([np.sin(2 * np.pi * 440 * np.arange(500) / RATE).astype(np.float32)])["values"]
    np.testing.assert_allclose(found[0, 3:-3], direct[0, 3:-3], atol=0.5)
    assert found.shape == direct.shape


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ([], "audio must be at least one clip, got none"),
        ([np.zeros(0, np.float32)], "must have finite samples, got none"),
        ([np.full(5, np.inf, np.float32)], "must have finite samples, got NaN or infinity"),
        ([np.zeros((5, 2), np.float32)], r"must be floats \[length\].*got float32 \[5, 2\]"),
        ([np.zeros(5, np.int16)], r"got int16 \[5\]"),
        ([[0.0]], "got list"),
        ([(np.zeros(5, np.float32), 10)], "must be of 1000 to 384000 Hz, got 10"),
    ],
)
def test_sounds_that_are_none(read, audio, message):
    with pytest.raises(UsageError, match=message):
        read(**MFCC)(audio)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_extractor_type": "ClapFeatureExtractor"}, "must be one of Wav2Vec2Feature"),
        ({"feature_extractor_type": None}, "feature_extractor_type must be of type str"),
        ({"sampling_rate": 1}, "sampling_rate must be from 1000 to 384000, got 1"),
        ({"sampling_rate": "16000"}, "sampling_rate must be of type int"),
        ({"num_mfcc": 13}, "num_mfcc must be from 1 to 12, got 13"),
        ({"fft_length": 32}, "fft_length must be from 60 to"),
        ({"hop_length": 0}, "hop_length must be from 1"),
        ({"max_frequency": 1001}, "min_frequency must be below max_frequency, and that at most"),
        ({"min_frequency": 950}, "min_frequency must be below max_frequency"),
        ({"mel_floor": 0}, "mel_floor must be above 0"),
        ({"mel_scale": "bark"}, "mel_scale must be one of htk, kaldi, slaney, got 'bark'"),
        ({"std": 0}, "std must be above 0"),
        ({"mean": 1e999}, "must be JSON|must be a finite number"),
        ({"power": 3}, "power must be from 1 to 2"),
        ({"speed": 1}, "unknown fields speed"),
        ({"num_samples": 10**9}, "num_samples must be from 1 to 60000"),
        (
            {"num_samples": 60_000, "hop_length": 1, "num_mel_filters": 4096},
            "must become at most 16777216 numbers, got 60001 frames of 4096 bands",
        ),
        ({"num_frames": 1 << 20, "num_mel_filters": 4096}, "must become at most"),
    ],
)
def test_files_that_are_broken(read, changes, message):
    with pytest.raises(FormatError, match=message) as error:
        read(**{**MFCC, **changes})
    assert "preprocessor_config.json" in str(error.value)


# -- the page --------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text(encoding="utf-8")


def test_the_pages_keyword_spotter(read):
    """Its JSON works as it stands: 98 frames of 40."""
    fields = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    draw = np.random.default_rng(1).normal(0, 0.1, 16_000).astype(np.float32)
    found = read(**fields)([draw])["values"]
    assert found.shape == (1, 98, 40)
    np.testing.assert_allclose(found[0], _reference(draw, fields), rtol=1e-5, atol=1e-4)


def test_the_page_names_every_field(read):
    table = PAGE[PAGE.index("### MelFeatureExtractor") : PAGE.index("Triangle b rises")]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    more = {
        "center": True, "remove_dc_offset": True, "preemphasis": 0.5, "periodic_window": False,
        "norm": "slaney", "log_mel": "log10", "mean": 1.0, "std": 2.0, "num_frames": 5,
        "time_last": True,
    }  # fmt: skip
    assert named == {*MFCC, *more} - {"feature_extractor_type"}
    assert read(**MFCC, **more)([AUDIO])["values"].shape == (1, 7, 5)
