"""Every family of models, dense and compressed: the bundle is the model, and an adapter changes it.

The export's own checks are held to here from outside: base and adapter against torch on inputs of
the test's own, through a saved folder and the runtime.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regrow_format.methods import get_method
from regrow_runtime import Adapter, Bundle, Coefficients, UsageError
from regrow_toolchain.adapters import applied
from regrow_toolchain.compress import factored_layers
from regrow_toolchain.config import ExportConfig
from regrow_toolchain.interop import export_backbone
from regrow_toolchain.models import (
    Backbone,
    apply_plan,
    find_targets,
    load_backbone,
    quiet_transformers,
    save_backbone,
)

pytestmark = pytest.mark.slow

_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 64, "vocab_size": 60, "max_position_embeddings": 40}  # fmt: skip
_PICTURE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64, "image_size": 16, "patch_size": 4}  # fmt: skip
_CLASSES = {"num_labels": 3}
_GROUPED = {**_TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", _PICTURE | _CLASSES),
    "deit": ("DeiTForImageClassification", _PICTURE | _CLASSES),
    "swin": ("SwinForImageClassification",
             {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1],
              "num_heads": [2, 2], "window_size": 4, **_CLASSES}),
    "bert": ("BertForSequenceClassification", _TEXT | _CLASSES),
    "roberta": ("RobertaForSequenceClassification", _TEXT | _CLASSES),
    "distilbert": ("DistilBertForSequenceClassification",
                   {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 60,
                    "max_position_embeddings": 40, **_CLASSES}),
    "minilm": ("BertModel", _TEXT),
    "gpt2": ("GPT2LMHeadModel",
             {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 60, "n_positions": 40}),
    "llama": ("LlamaForCausalLM", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "clip": ("CLIPModel",
             {"text_config": {**_TEXT, "eos_token_id": 59, "bos_token_id": 58},
              "vision_config": _PICTURE, "projection_dim": 16}),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification",
                 {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "intermediate_size": 64, "conv_dim": [16, 16], "conv_kernel": [10, 3],
                  "conv_stride": [5, 2], "num_feat_extract_layers": 2,
                  "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
                  "classifier_proj_size": 16, "vocab_size": 20, **_CLASSES}),
    "kwt1": ("", {}),
}  # fmt: skip


# KWT-1's form: frames of a spectrogram, a class token, norms behind attention and MLP.
_KWT = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5, -1)
        x = self.norm1(x + self.proj((weights @ v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.fc2(nn.functional.gelu(self.fc1(x))))


class Kwt(nn.Module):
    def __init__(self, width=32, depth=2, classes=3):
        super().__init__()
        self.embed = nn.Linear(20, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, 13, width) / 4)
        self.blocks = nn.ModuleList(Block(width, 1) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, features):
        x = self.embed(features)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x[:, 0])}


def make():
    torch.manual_seed(7)
    model = Kwt().eval()
    model.labels = ["yes", "no", "silence"]
    return model
"""


def _inputs(name: str, count: int = 4) -> dict[str, np.ndarray]:
    """Of the test's own, with padding where the model takes a mask."""
    rng = np.random.default_rng(3)
    side = {"swin": 32}.get(name, 16)
    images = {"pixel_values": rng.standard_normal((count, 3, side, side)).astype(np.float32)}
    ids = rng.integers(3, 57, (count, 11))
    ids[:, -1] = 59
    mask = np.ones_like(ids)
    text = {"input_ids": ids, "attention_mask": mask}
    if name in ("vit", "deit", "swin"):
        return images
    if name == "kwt1":
        return {"features": rng.standard_normal((count, 12, 20)).astype(np.float32)}
    if name == "wav2vec2":
        return {"input_values": rng.standard_normal((count, 600)).astype(np.float32)}
    if name == "clip":
        return text | images
    if name in ("bert", "minilm"):
        text["token_type_ids"] = np.zeros_like(ids)
    if name in ("gpt2", "llama", "qwen2"):
        text["position_ids"] = np.tile(np.arange(11), (count, 1))
    mask[0, 7:] = 0
    return text


def _save(name: str, folder: Path) -> Path:
    import transformers

    kind, sizes = FAMILIES[name]
    torch.manual_seed(7)
    model_class = getattr(transformers, kind)
    spread = {"initializer_range": 0.2} if name != "clip" else {}
    model = model_class(model_class.config_class(**sizes, **spread))
    with quiet_transformers():
        model.eval().save_pretrained(folder)
    if name == "minilm":
        _describe_pooling(folder)
    return folder


def _describe_pooling(folder: Path, mode: str = "mean_tokens", *more: str) -> None:
    """As a sentence-transformers directory has it."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling", **dict.fromkeys(more, "2_More")}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"}
               for kind, path in kinds.items()]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{m}": m == mode for m in ("cls_token", "mean_tokens", "max_tokens",
                                                      "mean_sqrt_len_tokens")}  # fmt: skip
    config = json.dumps({"word_embedding_dimension": 32, **modes})
    (folder / "1_Pooling" / "config.json").write_text(config)


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Backbone]:
    """loaded("vit", "dense"): a backbone out of its folder, or of a function's making."""

    def load(name: str, form: str) -> Backbone:
        if name == "kwt1":
            (tmp_path / f"kwt_{form}.py").write_text(_KWT)
            monkeypatch.syspath_prepend(tmp_path)
            function = f"kwt_{form}:make"
            backbone, at = load_backbone(function), f"{function}@"
        else:
            backbone, at = load_backbone(_save(name, tmp_path / "dense")), ""
        if form == "dense":
            return backbone
        plans = factored_layers(backbone.model, 2)
        apply_plan(backbone.model, plans)
        backbone.layers = plans
        save_backbone(backbone, tmp_path / "small")
        return load_backbone(f"{at}{tmp_path / 'small'}")

    return load


def _adapter(backbone: Backbone) -> Adapter:
    """NOLA in every linear layer of the blocks, with random coefficients."""
    targets = find_targets(backbone.model)
    config: dict[str, Any] = {"k": 24, "l": 16, "rank": 2, "c": 1.0, "shared": True}
    method, rng = get_method("nola"), np.random.default_rng(5)
    constants = method.constants(config, targets)
    values = {
        name: Coefficients.store(
            rng.standard_normal(shape).astype(np.float32), constants[name], "int8"
        )
        for name, shape in method.layout(config, targets).items()
    }
    return Adapter("nola", config, 5, backbone.backbone_id, targets, values, "int8")


def _outputs(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        found = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return {n: value.numpy() for n, value in found.items() if isinstance(value, torch.Tensor)}


def _close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found
    for name, value in found.items():
        size = max(1.0, float(np.abs(wanted[name]).max()))
        np.testing.assert_allclose(value, wanted[name], rtol=1e-3, atol=1e-4 * size, err_msg=name)


@pytest.mark.parametrize("form", ["dense", "compressed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name: str, form: str, loaded: Callable[[str, str], Backbone], tmp_path: Path):
    backbone = loaded(name, form)
    adapter, inputs = _adapter(backbone), _inputs(name)
    manifest = export_backbone(
        backbone, tmp_path / "bundle", inputs=inputs if name == "kwt1" else None
    )
    assert {t.name for t in adapter.targets} <= {slot.target for slot in manifest.slots}
    assert {slot.target for slot in manifest.slots if slot.kind == "head"} == set(backbone.head)
    assert manifest.parity["slot_effect_min"] > 0
    assert (manifest.cache is not None) == (name in ("gpt2", "llama", "qwen2"))
    bundle = Bundle.open(tmp_path / "bundle", threads=1)
    base = bundle.run(inputs)
    _close(base, _outputs(backbone.model, inputs))
    bundle.swap(adapter, name="user")
    found = bundle.run(inputs)
    with applied(backbone.model, adapter) as model:
        _close(found, _outputs(model, inputs))
    assert ("sentence_embedding" in base) == (name == "minilm")
    assert max(np.abs(found[n] - base[n]).max() for n in base) > 0.01
    mixed = bundle.run(inputs, ["user", None, "user", None])
    for output, value in mixed.items():
        if name == "clip" and output.startswith("logits"):
            continue  # each depends on the whole batch
        np.testing.assert_allclose(value[::2], found[output][::2], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(value[1::2], base[output][1::2], rtol=1e-3, atol=1e-3)


def test_the_cache_on_the_command_line(cli: Callable[..., Any], tmp_path: Path) -> None:
    """It is there unless --no-cache says otherwise, and so is what ends a text, compressed too."""
    folder = _save("llama", tmp_path / "dense")
    ends = {"eos_token_id": [4, 5], "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    save_backbone(load_backbone(folder), tmp_path / "small")
    for source in ("dense", "small"):
        said = cli("export", tmp_path / source, "-o", tmp_path / f"b-{source}", "--target", "@qv")
        assert (said.code, said.err) == (0, "")
        assert said.out.rstrip().endswith("opset 18, key-value cache")
        cache = Bundle.open(tmp_path / f"b-{source}").manifest.cache
        assert cache is not None
        assert (cache.stop, cache.context) == ((4, 5), 40)
    bare = cli("export", folder, "-o", tmp_path / "bare", "--target", "@qv", "--no-cache", "--json")
    assert bare.json["cache"] is False
    assert Bundle.open(tmp_path / "bare").manifest.cache is None


@pytest.mark.parametrize(("mode", "more"), [("mean_tokens", ("Normalize",)), ("cls_token", ()),
                                            ("max_tokens", ())])  # fmt: skip
def test_sentence_embeddings(mode: str, more: tuple[str, ...], tmp_path: Path) -> None:
    """The formulas of sentence-transformers' Pooling and Normalize, padding left out."""
    _describe_pooling(_save("minilm", tmp_path / "dense"), mode, *more)
    backbone = load_backbone(tmp_path / "dense")
    if mode == "cls_token":
        save_backbone(backbone, tmp_path / "small")
        backbone = load_backbone(tmp_path / "small")
    export_backbone(backbone, tmp_path / "bundle", ExportConfig(targets=["query"]))
    inputs = _inputs("minilm")
    bundle = Bundle.open(tmp_path / "bundle", threads=1)
    found = bundle.run(inputs)
    tokens, mask = found["last_hidden_state"], inputs["attention_mask"][..., None]
    wanted = {
        "mean_tokens": (tokens * mask).sum(1) / mask.sum(1),
        "cls_token": tokens[:, 0],
        "max_tokens": np.where(mask != 0, tokens, -np.inf).max(1),
    }[mode]
    if more:
        wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(found["sentence_embedding"], wanted, rtol=1e-4, atol=1e-5)
    # A text alone, shorter and without padding, has the same embedding.
    alone = bundle.run({name: value[:1, :7] for name, value in inputs.items()})
    np.testing.assert_allclose(alone["sentence_embedding"], wanted[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "more", "match"),
    [("mean_sqrt_len_tokens", (), "pooling must be pooling_mode_mean_tokens"),
     ("mean_tokens", ("Dense",), "must list Transformer, Pooling and Normalize, got Dense")],
)  # fmt: skip
def test_another_pooling_is_refused(
    mode: str, more: tuple[str, ...], match: str, tmp_path: Path
) -> None:
    _describe_pooling(_save("minilm", tmp_path / "dense"), mode, *more)
    with pytest.raises(UsageError, match=match):
        load_backbone(tmp_path / "dense")
