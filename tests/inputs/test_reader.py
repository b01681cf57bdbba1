"""What `InputReader` takes from a bundle's manifest and files; no graph is run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from regrow_format.manifest import FileEntry, GraphSpec, Manifest, TensorSpec
from regrow_inputs import InputReader
from regrow_runtime import RegrowError, UsageError

CLIPS = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 2000}
IMAGES = {"do_resize": False, "do_rescale": False}


def _spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "int64" if name.endswith("ids") else "float32", ("batch", *shape))


@pytest.fixture
def folder(tmp_path):
    """folder(specs, preprocessing): a manifest and its files; the graph is an empty one."""

    def call(*specs: TensorSpec, preprocessing: dict | None = None) -> Path:
        outputs = (TensorSpec("logits", "float32", ("batch", 2)),)
        manifest = Manifest(
            "swappable", "any", "sha256:00", 18, 9,
            (GraphSpec("model", "backbone.onnx", specs, outputs),), (), ("a", "b"),
            {"backbone.onnx": FileEntry(0, "")},
        )  # fmt: skip
        (tmp_path / "manifest.json").write_text(manifest.to_json())
        if preprocessing is not None:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessing))
        return tmp_path

    return call


def test_images(folder):
    path = folder(_spec("x", 3, 4, 4), preprocessing=IMAGES)
    reader = InputReader.from_bundle(path)
    assert reader.takes == ("images",)
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    found = reader.images([pixels, pixels])
    assert list(found) == ["x"]
    np.testing.assert_array_equal(found["x"][1], pixels.transpose(2, 0, 1))
    assert InputReader.from_bundle(str(path)).takes == ("images",)


def test_audio(folder):
    path = folder(_spec("input_values", "length"), preprocessing=CLIPS)
    reader = InputReader.from_bundle(path)
    assert reader.takes == ("audio",)
    clip = np.linspace(-1, 1, 100, dtype=np.float32)
    found = reader.audio([clip, (clip, 1000)])["input_values"]
    assert found.shape == (2, 200)
    assert found[0, :100].std() == pytest.approx(1, abs=1e-3)


def test_sounds_of_one_length(folder):
    """The graph's: cut, or filled up behind what was made."""
    path = folder(_spec("input_values", 50), preprocessing=CLIPS)
    reader = InputReader.from_bundle(path)
    clip = np.linspace(-1, 1, 100, dtype=np.float32)
    assert reader.audio([clip])["input_values"].shape == (1, 50)
    short = reader.audio([clip[:30]])["input_values"][0]
    assert short[:30].mean() == pytest.approx(0, abs=1e-6)
    assert (short[30:] == 0).all()


@pytest.mark.parametrize(
    ("specs", "preprocessing", "kind", "message"),
    [
        ([_spec("x", 3, 4, 4)], IMAGES, "audio",
         r"model must take audio, got one that takes images \(x\)"),
        ([_spec("x", 3, 4, 4)], IMAGES, "text",
         r"model must take text, got one that takes images \(x\)"),
        ([_spec("input_values", "n")], CLIPS, "images",
         r"must take images, got one that takes audio \(input_values\)"),
        ([_spec("x", 7)], None, "audio",
         r"takes arrays \(x\) and has no preprocessor_config.json for audio"),
        ([_spec("input_ids", "n")], None, "text",
         r"takes arrays \(input_ids\) and has no tokenizer.json for text"),
    ],
)  # fmt: skip
def test_the_wrong_kind_of_input(folder, specs, preprocessing, kind, message):
    reader = InputReader.from_bundle(folder(*specs, preprocessing=preprocessing))
    with pytest.raises(UsageError, match=message):
        getattr(reader, kind)(["x"])


def test_lists_are_wanted(folder):
    reader = InputReader.from_bundle(folder(_spec("x", 3, 4, 4), preprocessing=IMAGES))
    for given in ([], "x.png", Path("x.png")):
        with pytest.raises(UsageError, match="images must be a list of at least one, got"):
            reader.images(given)


def test_no_bundle(tmp_path):
    with pytest.raises(UsageError, match="bundle must be a folder that regrow export made"):
        InputReader.from_bundle(tmp_path)


def test_missing_tokenizers_is_one_pip_line(folder, monkeypatch):
    path = folder(_spec("input_ids", "n"))
    (path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(RegrowError, match=r"texts need tokenizers: pip install .*\[run\]"):
        InputReader.from_bundle(path).text(["hello"])
