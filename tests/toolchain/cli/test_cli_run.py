"""`regrow run` from an image, a clip and a text to an answer, as a person types it."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from regrow_toolchain.cli.commands.run import run_command
from regrow_toolchain.cli.generation import generated, generated_lines, goes_on
from regrow_toolchain.interop import export_backbone
from regrow_toolchain.models import load_backbone, quiet_transformers

RATE = 4000
WORDS = ["low", "high", "silence"]


@pytest.fixture
def run():
    """run(*arguments): what `regrow run` gives, its last line as JSON."""

    def call(*arguments: object) -> dict:
        done = CliRunner().invoke(run_command, [*map(str, arguments), "--json"])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout.splitlines()[-1])

    return call


def _shown(*arguments: object) -> str:
    done = CliRunner().invoke(run_command, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def _sound(path: Path, length: int, pitch: float, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = 0.5 * np.sin(2 * np.pi * pitch * np.arange(length) / rate)
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes((tone * 32767).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def audio_bundle(tmp_path_factory):
    """A Wav2Vec2 of random weights, its bundle, and what torch makes of a clip."""
    with quiet_transformers():
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
        vocab_size=8, mask_time_prob=0.0, id2label=dict(enumerate(WORDS)),
        label2id={word: i for i, word in enumerate(WORDS)},
    )  # fmt: skip
    room = tmp_path_factory.mktemp("audio")
    model = Wav2Vec2ForSequenceClassification(config).eval()
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    model.save_pretrained(room / "model")
    extractor.save_pretrained(room / "model")
    export_backbone(load_backbone(room / "model"), room / "bundle")

    def logits(clip: np.ndarray) -> np.ndarray:
        inputs = extractor(clip, sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            return model(**inputs).logits.numpy()

    return room / "bundle", logits


@pytest.mark.slow
def test_audio(run, audio_bundle, tmp_path):
    """Each alone, whatever is beside it; torch gives the same probabilities."""
    bundle, logits = audio_bundle
    files = [_sound(tmp_path / f"{n}.wav", n, 300) for n in (900, 1500)]
    result = run(bundle, "--wav", files[0], files[1], "--top", 3, "-o", tmp_path / "o.npz")
    with np.load(tmp_path / "o.npz") as stored:
        found = stored["logits"]
    for row, answer, length in zip(found, result["answers"], (900, 1500), strict=True):
        tone = 0.5 * np.sin(2 * np.pi * 300 * np.arange(length) / RATE)
        clip = (tone * 32767).astype("<i2") / np.float32(32768)
        np.testing.assert_allclose(row[None], logits(clip.astype(np.float32)), atol=1e-4)
        assert answer["label"] == WORDS[row.argmax()]
        assert [part["label"] for part in answer["top"]] == [WORDS[i] for i in (-row).argsort()]
        assert sum(part["probability"] for part in answer["top"]) == pytest.approx(1)


@pytest.mark.slow
def test_a_folder_of_audio_by_class(run, audio_bundle, tmp_path):
    for word in WORDS[:2]:
        _sound(tmp_path / "data" / word / "1.wav", 900, 400)
        _sound(tmp_path / "data" / word / "2.WAV", 1800, 400, 8000)
    result = run(audio_bundle[0], "--wav", tmp_path / "data")
    assert [answer["true"] for answer in result["answers"]] == ["high"] * 2 + ["low"] * 2
    assert result["accuracy"] in (0, 0.25, 0.5, 0.75, 1)


@pytest.fixture(scope="module")
def vit_bundle(vit_folder, tmp_path_factory):
    bundle = tmp_path_factory.mktemp("images") / "bundle"
    export_backbone(load_backbone(vit_folder), bundle)
    return bundle


def test_integer_labels_are_shown_by_name(run, vit_bundle, images, tmp_path):
    pixels, labels = images(6, 1)
    np.savez(tmp_path / "x.npz", images=pixels, labels=labels)
    result = run(vit_bundle, "--input", tmp_path / "x.npz")
    assert [answer["true"] for answer in result["answers"]] == ["left", "middle", "right"] * 2
    np.savez(tmp_path / "x.npz", images=pixels, labels=labels + 1)  # 3 is no output
    result = run(vit_bundle, "--input", tmp_path / "x.npz")
    assert [answer["true"] for answer in result["answers"]] == ["1", "2", "3"] * 2
    assert result["accuracy"] is None


@pytest.mark.slow
def test_images(run, vit_bundle, class_folder, tmp_path):
    data = class_folder(tmp_path / "data", 9, 3)
    result = run(vit_bundle, "--image", data)
    assert result["accuracy"] >= 0.8
    files = sorted((data / "left").iterdir())
    found = run(vit_bundle, "--image", files[0], "--image", files[1], files[2])
    assert [answer["sample"] for answer in found["answers"]] == [str(f) for f in files]
    assert "accuracy" not in found
    assert "top" not in found["answers"][0]
    table = _shown(vit_bundle, "--image", files[0], "--top", 2)
    assert table.splitlines()[2].split()[0] == str(files[0])
    assert len(table.splitlines()) == 4


@pytest.fixture(scope="module")
def texts_bundle(reading_folder, tmp_path_factory):
    """(bundle, folder) of a BERT that classifies."""
    bundle = tmp_path_factory.mktemp("text") / "bundle"
    export_backbone(load_backbone(reading_folder), bundle)
    return bundle, reading_folder


@pytest.mark.slow
def test_texts(run, texts_bundle):
    bundle, folder = texts_bundle
    with quiet_transformers():
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = ["a word", "more words than that are here"]
    with torch.no_grad():
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        shares = model(**inputs).logits.softmax(-1).max(-1)
        pair = model(**tokenizer(texts[:1], texts[1:], return_tensors="pt")).logits.softmax(-1)
    result = run(bundle, "--text", texts[0], "--text", texts[1])
    assert [a["sample"] for a in result["answers"]] == texts
    names = [model.config.id2label[int(i)] for i in shares.indices]
    assert [a["label"] for a in result["answers"]] == names
    found = [a["probability"] for a in result["answers"]]
    np.testing.assert_allclose(found, shares.values.numpy(), atol=1e-5)
    (answer,) = run(bundle, "--text", texts[0], "--text-pair", texts[1])["answers"]
    assert answer["sample"] == " | ".join(texts)
    assert answer["probability"] == pytest.approx(float(pair.max()), abs=1e-5)


@pytest.mark.slow
def test_embeddings(run, texts_bundle, tmp_path):
    """The mean of the last hidden states, as torch has it, whatever is beside a text."""
    with quiet_transformers():
        from transformers import AutoTokenizer, BertModel

        tokenizer = AutoTokenizer.from_pretrained(texts_bundle[1], local_files_only=True)
        model = BertModel.from_pretrained(texts_bundle[1]).eval()
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    export_backbone(load_backbone(tmp_path / "model"), tmp_path / "bundle")
    texts = ["one word", "here are more words than one"]
    expected = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        expected.append(torch.nn.functional.normalize(states, dim=0).numpy())
    result = run(
        tmp_path / "bundle", "--text", texts[0], "--text", texts[1], "-o", tmp_path / "o.npz"
    )
    with np.load(tmp_path / "o.npz") as stored:
        np.testing.assert_allclose(stored["embedding"], expected, atol=1e-5)
    assert result["similarity"][0][1] == pytest.approx(float(expected[0] @ expected[1]), abs=1e-5)


@pytest.mark.slow
def test_the_wrong_kind_of_input(vit_bundle, texts_bundle, audio_bundle, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    wav = _sound(tmp_path / "x.wav", 100, 300)
    given = {"images": ("--image", tmp_path / "x.png"), "audio": ("--wav", wav),
             "text": ("--text", "hello")}  # fmt: skip
    bundles = {"images": vit_bundle, "text": texts_bundle[0], "audio": audio_bundle[0]}
    for takes, bundle in bundles.items():
        for kind, options in given.items():
            if kind == takes:
                continue
            done = CliRunner().invoke(run_command, [str(bundle), *map(str, options)])
            message = f"model must take {kind}, got one that takes {takes} ("
            assert str(done.exception).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a.wav"], "got a.wav: name files with --image or --wav"),
        (["--image", "a", "--wav", "b"], "give one of --input, --image, --wav and --text"),
        (["--wav", "a", "--text", "b"], "give one of"),
        (["--text", "a", "--text-pair", "b", "--text-pair", "c"], "once for every --text, got 2"),
        (["--image", "a", "--text", "b", "--text-pair", "c"], "once for every --text"),
        (["--text-pair", "c"], "give one of"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    done = CliRunner().invoke(run_command, ["bundle", *options])
    assert done.exit_code == 2
    assert message in done.output


# -- language models -------------------------------------------------------------------------------


class _Model:
    """As much of a language model's bundle as the command sees."""

    active = None

    def __init__(self, cache: object = "there") -> None:
        self.manifest = SimpleNamespace(cache=cache, task="text-generation")
        self.asked: list[dict] = []

    def generate(self, ids: np.ndarray, **options: object) -> SimpleNamespace:
        self.asked.append({"ids": ids.tolist(), **options})
        return SimpleNamespace(tokens=(np.array([7, 8]),), first_token_ms=1.5, tokens_per_s=20.0)


def test_a_language_model_goes_on(monkeypatch):
    tokens = SimpleNamespace(
        prompt=lambda text: np.array([[1, 2]]), decode=lambda new, after: f" {after} then {new}"
    )
    reader = SimpleNamespace(from_bundle=lambda bundle: SimpleNamespace(tokens=tokens))
    monkeypatch.setattr("regrow_inputs.InputReader", reader)
    model = _Model()
    options = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    result = generated(model, ["Once", "Twice"], options, None)
    assert model.asked[0] == {
        "ids": [[1, 2]], "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3,
    }  # fmt: skip
    assert [one["tokens"] for one in result["generated"]] == [2, 2]
    assert generated_lines(result) == ["Once [1, 2] then [7, 8]", "Twice [1, 2] then [7, 8]"]


def test_a_language_model_without_a_cache():
    assert goes_on(_Model(), None)
    assert not goes_on(_Model(None), Path("logits.npz"))
    with pytest.raises(Exception, match="bundle must have a key-value cache to go on with a text"):
        goes_on(_Model(None), None)
