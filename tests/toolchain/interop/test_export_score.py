"""What a precision costs, in the score of every task: beside torch and the runtime alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regrow_format.errors import RegrowError, UsageError
from regrow_format.manifest import Score
from regrow_runtime import Bundle
from regrow_toolchain.config import ExportConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.interop import export_backbone
from regrow_toolchain.models import Backbone, load_backbone, quiet_transformers

Arrays = dict[str, np.ndarray]
Model = Callable[[str, dict[str, Any]], Backbone]

# Odd sizes: 3 heads of 14, no width a multiple of 4.
_TEXT = {"hidden_size": 42, "num_hidden_layers": 2, "num_attention_heads": 3,
         "intermediate_size": 77, "vocab_size": 61, "max_position_embeddings": 40}  # fmt: skip
_GROUPED = {**_TEXT, "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """model("BertModel", {...}): a saved one with random weights, large enough to be rounded."""

    def make(name: str, settings: dict[str, Any]) -> Backbone:
        import transformers

        kind = getattr(transformers, name)
        torch.manual_seed(3)
        made = kind(kind.config_class(**settings, initializer_range=0.3)).eval()
        with quiet_transformers():
            made.save_pretrained(tmp_path / "model")
        return load_backbone(tmp_path / "model")

    return make


@pytest.fixture
def texts() -> Arrays:
    """Seven texts of 3 to 9 tokens, padded on the right."""
    rng = np.random.default_rng(0)
    lengths = np.array([9, 3, 4, 5, 6, 7, 8])
    mask = (np.arange(9) < lengths[:, None]).astype(np.int64)
    return {"input_ids": rng.integers(1, 61, (7, 9)) * mask, "attention_mask": mask}


def _export(backbone: Backbone, data: Dataset, out: Path, **options: Any) -> Score:
    settings = {"precision": "int4", **options}
    adapter = settings.pop("adapter", None)
    config = ExportConfig(**settings)
    score = export_backbone(backbone, out, config, data=data, adapter=adapter).score
    assert score is not None
    assert json.loads((out / "manifest.json").read_text())["score"] == vars(score)
    assert score.samples == len(data)
    return score


def _torch(backbone: Backbone, inputs: Arrays, output: str) -> np.ndarray:
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.inference_mode():
        return getattr(backbone.model(**tensors), output).numpy()


def _bundle(folder: Path, inputs: Arrays, output: str) -> np.ndarray:
    """Sample by sample, in the runtime."""
    bundle = Bundle.open(folder, threads=1)
    names = [spec.name for spec in bundle.graph.inputs]
    full = {"token_type_ids": 0 * inputs["input_ids"], **inputs}
    rows = range(len(full["input_ids"]))
    return np.concatenate(
        [bundle.run({name: full[name][i : i + 1] for name in names})[output] for i in rows]
    )


def _pair(backbone: Backbone, folder: Path, inputs: Arrays, output: str) -> list[np.ndarray]:
    return [_torch(backbone, inputs, output), _bundle(folder, inputs, output)]


def test_regression(model: Model, texts: Arrays, tmp_path: Path) -> None:
    backbone = model("BertForSequenceClassification", {**_TEXT, "num_labels": 1})
    values = np.random.default_rng(1).standard_normal(7).astype(np.float32)
    score = _export(backbone, Dataset(texts, values), tmp_path / "b")
    want = [
        np.sqrt(np.square(found[:, 0] - values).mean())
        for found in _pair(backbone, tmp_path / "b", texts, "logits")
    ]
    assert (score.metric, score.higher_is_better) == ("rmse", False)
    assert [score.fp32, score.variant] == pytest.approx(want, rel=1e-4)
    assert score.fp32 != score.variant


def _nats(logits: np.ndarray, tokens: np.ndarray) -> float:
    chances = torch.log_softmax(torch.from_numpy(logits[:, :-1]).double(), -1).numpy()
    picked = np.take_along_axis(chances, np.maximum(tokens[:, 1:], 0)[..., None], -1)[..., 0]
    return float(-picked[tokens[:, 1:] >= 0].mean())


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", ["Qwen2ForCausalLM", "GPTNeoXForCausalLM"])
def test_a_language_model(
    kind: str, cache: bool, model: Model, texts: Arrays, tmp_path: Path
) -> None:
    settings = _GROUPED if kind.startswith("Qwen2") else _TEXT
    backbone = model(kind, settings)
    tokens = np.where(texts["attention_mask"] > 0, texts["input_ids"], -100)
    score = _export(backbone, Dataset(texts, tokens), tmp_path / "b", cache=cache)
    assert (score.metric, score.higher_is_better) == ("nats per token", False)
    assert score.fp32 == pytest.approx(_nats(_torch(backbone, texts, "logits"), tokens), rel=1e-4)
    assert 0 < abs(score.variant - score.fp32) < 0.5
    if not cache:
        positions = {"position_ids": np.arange(9)[None].repeat(7, 0)}
        logits = _bundle(tmp_path / "b", {**positions, **texts}, "logits")
        assert score.variant == pytest.approx(_nats(logits, tokens), rel=1e-4)


def _pooled(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_embeddings_without_labels(
    precision: str, model: Model, texts: Arrays, tmp_path: Path
) -> None:
    """The mean cosine to what torch gives in fp32."""
    backbone = model("BertModel", _TEXT)
    data = Dataset(texts, np.full(7, -1), named=False)
    score = _export(backbone, data, tmp_path / "b", precision=precision)
    exact, found = (
        _pooled(tokens, texts["attention_mask"])
        for tokens in _pair(backbone, tmp_path / "b", texts, "last_hidden_state")
    )
    assert (score.metric, score.higher_is_better) == ("cosine with fp32", True)
    assert score.fp32 == pytest.approx(1.0)
    assert score.variant == pytest.approx((exact * found).sum(1).mean(), abs=1e-4)
    assert score.variant < score.fp32


def test_embeddings_by_classes(model: Model, texts: Arrays, tmp_path: Path) -> None:
    backbone = model("BertModel", _TEXT)
    score = _export(backbone, Dataset(texts, np.arange(7) % 2, ("a", "b")), tmp_path / "b")
    near = [
        found @ found.T - 2 * np.eye(7)
        for found in (
            _pooled(tokens, texts["attention_mask"])
            for tokens in _pair(backbone, tmp_path / "b", texts, "last_hidden_state")
        )
    ]
    want = [float((n.argmax(1) % 2 == np.arange(7) % 2).mean()) for n in near]
    assert (score.metric, score.higher_is_better) == ("1-NN accuracy", True)
    assert [score.fp32, score.variant] == pytest.approx(want)


def test_images_beside_texts(model: Model, tmp_path: Path) -> None:
    """CLIP, by its image's embedding; its logits are one number a sample, which may be near 0."""
    image = {"hidden_size": 35, "num_hidden_layers": 2, "num_attention_heads": 5,
               "intermediate_size": 45, "image_size": 18, "patch_size": 6}  # fmt: skip
    text = {**_TEXT, "hidden_size": 30, "eos_token_id": 59, "bos_token_id": 58}
    settings = {"text_config": text, "vision_config": image, "projection_dim": 13}
    backbone = model("CLIPModel", settings)
    rng = np.random.default_rng(0)
    inputs = {
        "input_ids": np.concatenate([rng.integers(1, 58, (4, 6)), np.full((4, 1), 59)], axis=1),
        "pixel_values": rng.standard_normal((4, 3, 18, 18)).astype(np.float32),
    }
    data = Dataset(inputs, np.full(4, -1), named=False)
    score = _export(backbone, data, tmp_path / "b", precision="int8")
    assert (score.metric, score.higher_is_better) == ("cosine with fp32", True)
    assert score.fp32 == pytest.approx(1.0)
    assert 0.9 < score.variant < 1


def test_embeddings_to_a_teachers(model: Model, texts: Arrays, tmp_path: Path) -> None:
    backbone = model("BertModel", _TEXT)
    teacher = np.random.default_rng(2).standard_normal((7, 42)).astype(np.float32)
    score = _export(backbone, Dataset(texts, teacher), tmp_path / "b")
    known = teacher / np.linalg.norm(teacher, axis=1, keepdims=True)
    want = [
        float((_pooled(tokens, texts["attention_mask"]) * known).sum(1).mean())
        for tokens in _pair(backbone, tmp_path / "b", texts, "last_hidden_state")
    ]
    assert (score.metric, score.higher_is_better) == ("cosine", True)
    assert [score.fp32, score.variant] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(("outputs", "metric"), [
    (4, "agreement with fp32"), (1, "rmse with fp32"),
])  # fmt: skip
def test_a_head_without_labels(
    outputs: int, metric: str, model: Model, texts: Arrays, tmp_path: Path
) -> None:
    backbone = model("BertForSequenceClassification", {**_TEXT, "num_labels": outputs})
    score = _export(backbone, Dataset(texts, np.full(7, -1), named=False), tmp_path / "b")
    exact, found = _pair(backbone, tmp_path / "b", texts, "logits")
    same = float((exact.argmax(1) == found.argmax(1)).mean())
    far = float(np.sqrt(np.square(exact - found).mean()))
    assert (score.metric, score.higher_is_better) == (metric, outputs > 1)
    assert score.fp32 == pytest.approx(1.0 if outputs > 1 else 0.0, abs=1e-5)
    assert score.variant == pytest.approx(same if outputs > 1 else far, abs=1e-4)


def test_data_that_does_not_fit(model: Model, texts: Arrays, tmp_path: Path) -> None:
    """One error, and nothing is left."""
    backbone = model("BertForSequenceClassification", {**_TEXT, "num_labels": 2})
    bad: list[tuple[Dataset, type[RegrowError], str]] = [
        (Dataset(texts, np.arange(7), tuple("abcdefg")), UsageError,
         "labels must be among the backbone's .*: give other data, or none"),
        (Dataset(texts, np.ones(7, np.float32)), RegrowError,
         "labels must have as many values as the model gives, 2 per sample, got 1"),
        (Dataset({"input_ids": texts["input_ids"] + 100}, np.full(7, -1), named=False),
         RegrowError, "model must take the data's inputs, got input_ids"),
        (Dataset({"input_ids": texts["input_ids"][:0]}, np.zeros(0, int)), UsageError,
         "data must have samples to measure on, got none"),
    ]  # fmt: skip
    for data, kind, message in bad:
        with pytest.raises(kind, match=message):
            export_backbone(backbone, tmp_path / "b", ExportConfig(precision="int4"), data=data)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command_says_which_way_is_better(
    cli: Callable[..., Any], model: Model, texts: Arrays, tmp_path: Path
) -> None:
    model("GPTNeoXForCausalLM", _TEXT)
    np.savez(tmp_path / "d.npz", **texts, labels=texts["input_ids"])
    arguments = ("export", tmp_path / "model", "--precision", "int8", "--data", tmp_path / "d.npz")
    said = cli(*arguments, "-o", tmp_path / "b", "--json")
    score = said.json["score"]
    assert (score["metric"], score["higher_is_better"]) == ("nats per token", False)
    line = (
        f"nats per token (lower is better): {score['variant']:.6g} of the bundle, "
        f"{score['fp32']:.6g} of torch in fp32, on 7 samples"
    )
    assert cli(*arguments, "-o", tmp_path / "c").out.splitlines()[0] == line
    assert f"score         {line}" in cli("inspect", tmp_path / "b").out
