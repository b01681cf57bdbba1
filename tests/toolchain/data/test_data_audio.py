"""Folders of audio, through the front end that the device has too."""

from __future__ import annotations

import json
import shutil
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_inputs import InputReader
from regrow_toolchain.data import attach_assets, by_user, dummy_inputs, load_data
from regrow_toolchain.interop import export_backbone
from regrow_toolchain.models import Backbone, load_backbone, logits_of

_RATE = 4000


def _pcm(values: np.ndarray, width: int) -> bytes:
    """Little-endian PCM of floats from -1 to 1 (exclusive)."""
    numbers = np.round(values * 2 ** (8 * width - 1)).astype(np.int64)
    if width == 1:
        return (numbers + 128).astype(np.uint8).tobytes()
    return b"".join(int(n).to_bytes(width, "little", signed=True) for n in numbers.ravel())


def _write(path: Path, clip: np.ndarray, rate: int = _RATE, width: int = 2) -> Path:
    """`clip` [length] or [length, channels]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(1 if clip.ndim == 1 else clip.shape[1])
        stream.setsampwidth(width)
        stream.setframerate(rate)
        stream.writeframes(_pcm(clip, width))
    return path


def _tone(length: int, pitch: float, rate: int = _RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(length) / rate)


@pytest.fixture(scope="session")
def wav2vec2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of audio at 4 kHz; its extractor normalises, and gives no mask."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForSequenceClassification,
    )

    torch.manual_seed(4)
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        conv_dim=(16, 16), conv_kernel=(10, 8), conv_stride=(5, 4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=16,
        num_labels=3, vocab_size=8, mask_time_prob=0.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "wav2vec2"
    Wav2Vec2ForSequenceClassification(config).eval().save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=_RATE).save_pretrained(folder)
    return folder


@pytest.fixture
def wav2vec2(wav2vec2_folder: Path) -> Backbone:
    return load_backbone(wav2vec2_folder)


# -- folders -------------------------------------------------------------------------------------


@pytest.fixture
def audio(tmp_path: Path) -> Callable[..., Path]:
    """audio(name): low and high tones of several rates and lengths."""

    def make(name: str = "data") -> Path:
        folder = tmp_path / name
        for index in range(3):
            length = 600 + 100 * index
            _write(folder / "low" / f"{index}.wav", _tone(length, 200))
            _write(folder / "high" / f"{index}.WAV", _tone(2 * length, 900, 8000), 8000, width=3)
        return folder

    return make


def test_a_folder_of_audio(audio: Callable[..., Path], wav2vec2: Backbone) -> None:
    assert wav2vec2.task == "audio-classification"
    assert wav2vec2.head == ("classifier",)
    data = load_data(audio(), wav2vec2)
    assert data.names == ("high", "low")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    values = data.inputs["input_values"]
    assert list(data.inputs) == ["input_values"]
    assert (values.shape, values.dtype) == ((6, 800), np.float32)
    first = values[3, :600]  # as if it were alone: mean 0, variance 1; zeros behind
    wanted = _tone(600, 200)
    np.testing.assert_allclose(first, (wanted - wanted.mean()) / wanted.std(), atol=1e-3)
    assert (values[3, 600:] == 0).all()
    with torch.no_grad():
        assert logits_of(wav2vec2.model, {"input_values": torch.from_numpy(values)}).shape == (6, 3)


def test_a_mask_where_the_extractor_gives_one(
    audio: Callable[..., Path], wav2vec2_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(wav2vec2_folder, tmp_path / "model"))
    _edit(folder, return_attention_mask=True)
    data = load_data(audio(), load_backbone(folder))
    mask = data.inputs["attention_mask"]
    assert mask.dtype == np.int64
    assert mask.sum(axis=1).tolist() == [600, 700, 800] * 2


def test_a_folder_per_user_of_audio(
    audio: Callable[..., Path], wav2vec2: Backbone, tmp_path: Path
) -> None:
    audio("speakers/ann")
    audio("speakers/bob")
    data = load_data(tmp_path / "speakers", wav2vec2, users="folder")
    assert {user: len(part) for user, part in by_user(data).items()} == {"ann": 6, "bob": 6}


def test_long_sounds_are_cut(
    wav2vec2: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "d" / "a" / "1.wav", _tone(5 * 8000, 200), 8000)
    _write(tmp_path / "d" / "b" / "1.wav", _tone(500, 200))
    monkeypatch.setattr("regrow_inputs.wav.MAX_SECONDS", 2)
    assert load_data(tmp_path / "d", wav2vec2).inputs["input_values"].shape == (2, 2 * _RATE)
    monkeypatch.setattr("regrow_toolchain.data.audio.MAX_VALUES", 15999)
    with pytest.raises(UsageError, match="must come to at most 15999 values, got 16000"):
        load_data(tmp_path / "d", wav2vec2)


def test_images_beside_audio(audio: Callable[..., Path], wav2vec2: Backbone) -> None:
    folder = audio()
    (folder / "low" / "cover.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"must be images or audio, got both: .*cover\.png"):
        load_data(folder, wav2vec2)


def test_backbones_that_take_no_audio(
    audio: Callable[..., Path], backbone: Backbone, wav2vec2: Backbone, bert_folder: Path
) -> None:
    with pytest.raises(UsageError, match=r"backbone must take audio .*got one of pixel_values"):
        load_data(audio(), backbone)
    plain = Backbone(torch.nn.Linear(2, 2), "sha256:x", "other", (), ())
    with pytest.raises(UsageError, match=r"or ready arrays \(input\) in an \.npz"):
        load_data(audio(), plain)


def test_audio_backbones_take_no_images(
    class_folder: Callable[..., Path], wav2vec2: Backbone, tmp_path: Path
) -> None:
    class_folder(tmp_path, 6, 0)
    with pytest.raises(RegrowError, match="must take images"):
        load_data(tmp_path, wav2vec2)


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling_rate": "4000"},
        {"sampling_rate": 1},
        {"sampling_rate": 10**9},
        {"sampling_rate": None},
        {"padding_value": "0"},
        {"feature_extractor_type": "NoSuchExtractor"},
        {"feature_extractor_type": ["x"]},
        {"feature_extractor_type": "NoSuch", "auto_map": {"AutoFeatureExtractor": "evil.E"}},
        {"do_normalize": "yes"},
    ],
)
def test_a_broken_extractor(
    audio: Callable[..., Path], wav2vec2_folder: Path, tmp_path: Path, changes: dict
) -> None:
    folder = Path(shutil.copytree(wav2vec2_folder, tmp_path / "model"))
    flag = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(flag)!r}, 'w').close()\n")
    _edit(folder, **changes)
    with pytest.raises(FormatError, match=r"preprocessor_config\.json"):
        load_data(audio(), load_backbone(folder))
    assert not flag.exists()


_MFCC = {
    "feature_extractor_type": "MelFeatureExtractor", "sampling_rate": _RATE, "num_samples": 800,
    "frame_length": 100, "hop_length": 50, "fft_length": 128, "num_mel_filters": 20, "num_mfcc": 8,
}  # fmt: skip


def test_a_plain_module_hears_what_the_device_hears(
    audio: Callable[..., Path], tmp_path: Path
) -> None:
    """Training's numbers and the device's are the same, to the bit; so are those of a bundle."""

    class Hears(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(
                torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(2)
            )
            self.head = torch.nn.Linear(8, 2)

        def forward(self, mfcc: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                mfcc = block(mfcc)
            return self.head(mfcc.mean(dim=1))

    (tmp_path / "front.json").write_text(json.dumps(_MFCC))
    plain = Backbone(
        Hears().eval(), "sha256:x", "classification", ("head",), ("0", "1"), function="a:b"
    )
    heard = attach_assets(plain, preprocessor=tmp_path / "front.json")
    data = load_data(folder := audio(), heard)
    assert data.inputs.keys() == {"mfcc"}
    assert data.inputs["mfcc"].shape == (6, 15, 8)
    export_backbone(heard, tmp_path / "bundle", inputs=dummy_inputs(heard))
    files = sorted(folder.rglob("*.[wW][aA][vV]"), key=lambda f: (f.parent.name, f.name))
    reader = InputReader.from_bundle(tmp_path / "bundle")
    for file, row in zip(files, data.inputs["mfcc"], strict=True):
        np.testing.assert_array_equal(reader.audio([file])["mfcc"][0], row)
