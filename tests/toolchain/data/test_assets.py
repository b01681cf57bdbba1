"""What a backbone carries to the device: labels, preprocessing, transformers' tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from regrow_format.errors import FormatError, UsageError
from regrow_format.manifest import Manifest
from regrow_inputs import InputReader, TextPreprocessor
from regrow_toolchain.compress import compress
from regrow_toolchain.config import CompressConfig
from regrow_toolchain.data import attach_assets, dummy_inputs, for_device
from regrow_toolchain.data.assets import read_labels
from regrow_toolchain.interop import export_backbone
from regrow_toolchain.models import load_backbone, save_backbone

CODE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(x)))

class Hears(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, mfcc):
        for block in self.blocks:
            mfcc = block(mfcc)
        return self.head(mfcc.mean(dim=1))

def make():
    torch.manual_seed(3)
    return Hears()
"""
MFCC = {
    "feature_extractor_type": "MelFeatureExtractor", "sampling_rate": 4000, "num_samples": 800,
    "frame_length": 100, "hop_length": 50, "fft_length": 128, "num_mel_filters": 20, "num_mfcc": 8,
}  # fmt: skip


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """A backbone that a function made, and the files that it lacks."""
    (tmp_path / "hearing_of_a_test.py").write_text(CODE)
    (tmp_path / "front.json").write_text(json.dumps(MFCC))
    (tmp_path / "names.txt").write_text("_silence_\nyes\nnon, é\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield load_backbone("hearing_of_a_test:make")
    __import__("sys").modules.pop("hearing_of_a_test", None)


LABELS = ("_silence_", "yes", "non, é")


def test_a_plain_modules_bundle_has_them(plain, tmp_path):
    made = attach_assets(plain, preprocessor=Path("front.json"), labels=Path("names.txt"))
    assert made.labels == LABELS
    assert plain.labels == ("0", "1", "2")
    assert made.backbone_id == plain.backbone_id
    export_backbone(made, "bundle", inputs=dummy_inputs(made))
    manifest = Manifest.load("bundle")
    assert manifest.labels == LABELS
    assert "preprocessor_config.json" in manifest.files
    reader = InputReader.from_bundle("bundle")
    assert reader.takes == ("audio",)
    assert reader.audio([np.zeros(10, np.float32)])["mfcc"].shape == (1, 15, 8)


def test_a_compressed_folder_keeps_them(plain, tmp_path):
    made = attach_assets(plain, preprocessor=Path("front.json"), labels=Path("names.txt"))
    small = compress(made, None, CompressConfig(ratio=1.2)).backbone
    save_backbone(small, "small")
    again = load_backbone("hearing_of_a_test:make@small")
    assert again.labels == LABELS
    assert [file.name for file in again.files] == ["preprocessor_config.json"]
    assert json.loads(again.files[0].read_text()) == MFCC
    renamed = attach_assets(again, labels=_write(tmp_path / "other.json", ["a", "b", "c"]))
    assert renamed.labels == ("a", "b", "c")


def test_noise_to_trace_with(plain):
    assert dummy_inputs(plain) is None
    made = dummy_inputs(attach_assets(plain, preprocessor=Path("front.json")))
    assert {name: array.shape for name, array in made.items()} == {"mfcc": (3, 15, 8)}
    assert (made["mfcc"][0] != made["mfcc"][1]).any()


def _write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("l.txt", "a\nb\n\n"),
        ("l.txt", "\ufeffa\r\nb"),
        ("l.json", ["a", "b"]),
        ("l.json", {"1": "b", "0": "a"}),
        ("config.json", {"id2label": {"0": "a", "1": "b"}, "other": 1}),
    ],
)
def test_files_of_labels(tmp_path, name, value):
    assert read_labels(_write(tmp_path / name, value)) == ("a", "b")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("l.txt", "", "must have a class name per line"),
        ("l.txt", "a\n\nb", "must have a class name per line"),
        ("l.txt", "a\nb\na", "must name every class once, got 'a'"),
        ("l.json", "{", "must be JSON"),
        ("l.json", {"0": "a", "2": "b"}, "must be a list of names"),
        ("l.json", [1, 2], "must have a class name per line or entry"),
        ("l.json", "3", "must be a list of names"),
    ],
)
def test_files_of_no_labels(tmp_path, name, value, message):
    with pytest.raises(FormatError, match=message):
        read_labels(_write(tmp_path / name, value))


def test_what_does_not_fit(plain, tmp_path):
    with pytest.raises(UsageError, match=r"one label per output of head, got 2 for 3"):
        attach_assets(plain, labels=_write(tmp_path / "two.txt", "a\nb"))
    with pytest.raises(UsageError, match=r"labels must be a file, got .*: no such file"):
        attach_assets(plain, labels=Path("none.txt"))
    with pytest.raises(UsageError, match="preprocessor must be a file or a folder, got none"):
        attach_assets(plain, preprocessor=Path("none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"must be a folder with preprocessor_config\.json"):
        attach_assets(plain, preprocessor=Path("empty"))
    for value, message in (("[]", "must be an object"), ({"sampling_rate": 1}, "must be of type")):
        with pytest.raises(FormatError, match=message):
            attach_assets(plain, preprocessor=_write(tmp_path / "broken.json", value))


def test_labels_of_a_hugging_face_directory(vit_folder, tmp_path):
    """They stand where its own classes look for them, and the directory is left as it was."""
    before = (vit_folder / "config.json").read_bytes()
    made = attach_assets(
        load_backbone(vit_folder), labels=_write(tmp_path / "l.json", ["x", "y", "z"])
    )
    assert made.labels == ("x", "y", "z")
    config = json.loads(next(f for f in made.files if f.name == "config.json").read_text())
    assert config["id2label"] == {"0": "x", "1": "y", "2": "z"}
    assert (vit_folder / "config.json").read_bytes() == before
    assert {f.name for f in made.files} == {f.name for f in load_backbone(vit_folder).files}


# -- tokenizers ------------------------------------------------------------------------------------


def test_a_tokenizer_of_other_files(reading_folder, tmp_path):
    """tokenizer.json is made of vocab.txt, with as many tokens as the model takes."""
    folder = Path(shutil.copytree(reading_folder, tmp_path / "bert"))
    (folder / "tokenizer.json").unlink(missing_ok=True)
    backbone = load_backbone(folder)
    made = for_device(backbone)
    files = {file.name: file for file in made.files}
    assert "tokenizer.json" in files
    assert not (folder / "tokenizer.json").exists()
    ours = TextPreprocessor.from_folder(_together(made, tmp_path / "device"))
    most = backbone.model.config.max_position_embeddings
    assert ours.length == most
    assert ours(["a b " * 500])["input_ids"].shape == (1, most)


def test_a_tokenizer_that_is_right_stays_as_it_is(reading_folder, tmp_path):
    folder = Path(shutil.copytree(reading_folder, tmp_path / "bert"))
    once = for_device(load_backbone(folder))
    device = _together(once, tmp_path / "device")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(device / name, folder / name)
    again = for_device(load_backbone(folder))
    assert {file.parent for file in again.files} == {folder}


def _together(backbone, folder: Path) -> Path:
    folder.mkdir()
    for file in backbone.files:
        shutil.copyfile(file, folder / file.name)
    return folder


def test_images_need_no_tokenizer(vit_folder):
    backbone = load_backbone(vit_folder)
    assert for_device(backbone) is backbone
