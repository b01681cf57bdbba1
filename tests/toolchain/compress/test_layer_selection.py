"""Which layers are factored: sizes of known models, every family there and back, patterns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.compress import compress, factored_layers, plan_layers, plans_of
from regrow_toolchain.compress.calibration import first_tensor
from regrow_toolchain.models import (
    LowRankPair,
    apply_plan,
    count_macs,
    example_inputs,
    load_backbone,
    quiet_transformers,
    save_backbone,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64}  # fmt: skip
TEXT = {**SMALL, "vocab_size": 60, "max_position_embeddings": 40}
PICTURE = {**SMALL, "image_size": 16, "patch_size": 8}
DECODER = {**TEXT, "num_key_value_heads": 2}
AUDIO = {**SMALL, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
         "num_feat_extract_layers": 2}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40, "vocab_size": 60}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4],
        "window_size": 4}  # fmt: skip
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
CLIP = {"text_config": TEXT, "vision_config": PICTURE, "projection_dim": 16}

# Family: config, its settings, model class, factored layers.
FAMILIES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "ViT": ("ViTConfig", PICTURE, "ViTForImageClassification", 12),
    "DeiT": ("DeiTConfig", PICTURE, "DeiTForImageClassificationWithTeacher", 12),
    "Swin": ("SwinConfig", SWIN, "SwinForImageClassification", 15),
    "Swin v2": ("Swinv2Config", SWIN, "Swinv2ForImageClassification", 15),
    "BLIP's images": ("BlipVisionConfig", PICTURE, "BlipVisionModel", 8),
    "BERT": ("BertConfig", TEXT, "BertForSequenceClassification", 12),
    "RoBERTa": ("RobertaConfig", TEXT, "RobertaForSequenceClassification", 12),
    "MiniLM": ("BertConfig", TEXT, "BertModel", 12),
    "GPT-2": ("GPT2Config", GPT, "GPT2LMHeadModel", 8),
    "T5's encoder": ("T5Config", T5, "T5EncoderModel", 12),
    "Llama": ("LlamaConfig", DECODER, "LlamaForCausalLM", 14),
    "Qwen2": ("Qwen2Config", DECODER, "Qwen2ForCausalLM", 14),
    "CLIP": ("CLIPConfig", CLIP, "CLIPModel", 24),
    "Wav2Vec2": ("Wav2Vec2Config", AUDIO, "Wav2Vec2ForSequenceClassification", 12),
}


def _meta(config: str, model: str, **settings: Any) -> nn.Module:
    with torch.device("meta"):
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return made.eval()


def _millions(model: nn.Module) -> float:
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


# -- full size -------------------------------------------------------------------------------------


def test_deit_base_has_the_papers_size_and_multiplications() -> None:
    model = _meta("ViTConfig", "ViTForImageClassification", num_labels=1000)
    inputs = example_inputs(model)
    assert _millions(model) == 86.57
    assert round(count_macs(model, inputs) / 1e9, 2) == 17.56
    apply_plan(model, factored_layers(model, 2), empty=True)
    assert _millions(model) == 44.08
    assert round(count_macs(model, inputs) / 1e9, 2) == 9.19


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class _Block(nn.Module):
    """As timm names its parts; only shapes matter here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = _Attention(width), _Mlp(width)


def test_deit_base_with_fused_projections() -> None:
    """As the paper's own code has them: ranks 288, 192 and 307."""
    model = nn.Module()
    with torch.device("meta"):
        model.blocks = nn.Sequential(*(_Block(768) for _ in range(12)))
    plans = factored_layers(model, 2)
    assert [p.rank for p in plans[:4]] == [288, 192, 307, 307]
    before = sum(p.numel() for p in model.parameters())
    apply_plan(model, plans, empty=True)
    saved = before - sum(p.numel() for p in model.parameters())
    assert 86_567_656 - saved == 44_081_896


def test_deit_iii_large_has_the_papers_size() -> None:
    """LayerScale's two vectors a block come on top of Hugging Face's ViT."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
             "intermediate_size": 4096, "num_labels": 1000}  # fmt: skip
    model = _meta("ViTConfig", "ViTForImageClassification", **sizes)
    scales = 24 * 2 * 1024 / 1e6
    assert _millions(model) + scales == pytest.approx(304.4, abs=0.05)
    apply_plan(model, factored_layers(model, 2), empty=True)
    assert _millions(model) + scales == pytest.approx(153.2, abs=0.05)


def test_swin_base_has_the_papers_size() -> None:
    """62.12 M with separate projections; fused they have a rank of their own: 62.16 M."""
    sizes = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32],
             "num_labels": 1000}  # fmt: skip
    model = _meta("SwinConfig", "SwinForImageClassification", **sizes)
    layers = plan_layers(model, 1.5)
    apply_plan(model, plans_of(layers), empty=True)
    assert _millions(model) == 62.12
    reasons = {layer.name.rsplit(".", 1)[-1]: layer.skip_reason for layer in layers}
    assert reasons["reduction"] == "merges patches, dense in the paper's code"
    more = 0
    for width, blocks in zip((128, 256, 512, 1024), (2, 2, 18, 2), strict=True):
        fused = int(3 * width * width / (1.5 * 4 * width)) * 4 * width
        more += blocks * (fused - 3 * int(width / 3) * 2 * width)
    assert _millions(model) + round(more / 1e6, 2) == pytest.approx(62.16, abs=0.006)


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "GPT-2", "Llama", "Qwen2", "CLIP"])
def test_text_is_multiplied_as_much_less(family: str) -> None:
    """The linear layers' share of the multiplications falls by the ratio."""
    name, settings, model_name, _ = FAMILIES[family]
    model = _meta(name, model_name, **settings)
    inputs = example_inputs(model, 16)
    before = count_macs(model, inputs)
    layers = plan_layers(model, 2)
    apply_plan(model, plans_of(layers), empty=True)
    tokens = {"CLIP": 0}.get(family, 16)
    saved = sum(a.dense - a.after for a in layers) * tokens
    if tokens:
        assert before - count_macs(model, inputs) == saved
    else:
        assert count_macs(model, inputs) < 0.7 * before


def test_counting_leaves_a_module_in_two_places_as_it_was() -> None:
    """T5's encoder and decoder have one table of embeddings, as one module."""
    settings = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1,
                "num_heads": 2}  # fmt: skip
    model = transformers.T5EncoderModel(transformers.T5Config(**settings)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert count_macs(model, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}) > 0
    after = model.state_dict()
    assert all(type(tensor) is Tensor for tensor in after.values())
    assert all(torch.equal(after[name], value) for name, value in before.items())


# -- every family, there and back ------------------------------------------------------------------


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, value in example_inputs(model, 12).items():
        generator = torch.Generator().manual_seed(0)
        if value.dtype == torch.int64:
            found[name] = torch.randint(3, 60, value.shape, generator=generator)
        else:
            found[name] = torch.randn(value.shape, generator=generator)
    if "input_values" in found:
        found["input_values"] = found["input_values"][:, :2000]
    return found


def _saved(family: str, folder: Path) -> Path:
    name, settings, model_name, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, name)(**settings))
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_there_and_back(family: str, tmp_path: Path) -> None:
    """Compressed, saved, loaded without the dense weights: the same outputs."""
    source = load_backbone(_saved(family, tmp_path / "dense"))
    small = save_backbone(compress(source).backbone, tmp_path / "small")
    assert len(small.layers) == FAMILIES[family][3]
    assert small.parameters < source.parameters
    inputs = _inputs(small.model)
    with torch.no_grad():
        wanted = first_tensor(small.model(**inputs))
    stored = load_file(tmp_path / "small" / "regrow.safetensors")
    assert not {f"{plan.name}.weight" for plan in small.layers} & stored.keys()
    again = load_backbone(tmp_path / "small")
    assert sum(isinstance(m, LowRankPair) for m in again.model.modules()) == len(small.layers)
    with torch.no_grad():
        assert torch.equal(first_tensor(again.model(**inputs)), wanted)


# -- patterns and reasons --------------------------------------------------------------------------


@pytest.fixture
def vit() -> nn.Module:
    return _meta("ViTConfig", "ViTForImageClassification", **PICTURE)


def test_only_and_keep_dense(vit: nn.Module) -> None:
    names = {p.name.rsplit(".", 1)[-1] for p in factored_layers(vit, 2, only=("query", "value"))}
    assert names == {"query", "value"}
    assert len(factored_layers(vit, 2, only=("@mlp",))) == 4
    assert len(factored_layers(vit, 2, keep_dense=("*.layer.0.*",))) == 6
    layers = {layer.name: layer for layer in plan_layers(vit, 2, keep_dense=("query",))}
    assert layers["classifier"].skip_reason == "outside of the blocks"
    assert layers["vit.encoder.layer.0.attention.attention.query"].skip_reason == "as asked for"


def test_the_largest_ratio_is_told(vit: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"got 16\.5, which leaves .* none: take at most 16,"):
        plan_layers(vit, 16.5)
    assert all(layer.rank for layer in plan_layers(vit, 16) if not layer.skip_reason)
    narrow = nn.ModuleDict({"a": nn.Linear(1, 64), "b": nn.Linear(64, 64)})
    with pytest.raises(UsageError, match=r"leaves a \(1 -> 64\) none: keep it dense"):
        plan_layers(narrow, 1, only=["a", "b"])


def test_a_layer_outside_of_the_blocks_can_be_asked_for() -> None:
    model = _meta("BertConfig", "BertModel", **TEXT)
    assert [p.name for p in factored_layers(model, 2, only=("pooler.dense",))] == ["pooler.dense"]


def test_a_pattern_without_a_layer_is_refused(vit: nn.Module) -> None:
    with pytest.raises(UsageError, match="querry"):
        plan_layers(vit, 2, keep_dense=("querry",))


def test_what_the_model_does_not_call_stays_dense() -> None:
    """torch's attention reads its projection's weight; its encoder's fast path reads linear1's."""
    stack = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(stack, 2).eval()
    layers = plan_layers(model, 1)
    reasons = {
        layer.name.partition(".")[2].partition(".")[2]: layer.skip_reason for layer in layers
    }
    assert "without calling" in reasons["self_attn.out_proj"]
    assert reasons["linear1"] == reasons["linear2"] == ""
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        wanted = model(x)
        apply_plan(model, plans_of(layers))
        assert model(x).shape == wanted.shape


def test_a_tied_layer_stays_dense() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.free = (nn.Linear(32, 32) for _ in range(3))
            self.two.weight = self.one.weight

    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), Block()])
    assert [p.name for p in factored_layers(model, 2)] == ["blocks.0.free", "blocks.1.free"]


def test_nothing_left_to_factor_says_why(vit: nn.Module) -> None:
    with pytest.raises(RegrowError, match=r"13 that stay dense: as asked for; outside of"):
        factored_layers(vit, 2, keep_dense=("@all",))


# -- regrow inspect --------------------------------------------------------------------------------


def test_inspect_needs_the_config_alone(tmp_path: Path, cli: Callable[..., Any]) -> None:
    config = transformers.ViTConfig(num_labels=1000, architectures=["ViTForImageClassification"])
    config.save_pretrained(tmp_path)
    shown = cli("inspect", tmp_path, "--keep-dense", "*.attention.output.dense")
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert "86,567,656 parameters become 47,620,840" in lines[0]
    assert "17.56 GMACs become" in lines[1]
    (kept,) = [line for line in lines if "attention.output.dense ×12" in line]
    assert kept.endswith("as asked for")
    found = cli("inspect", tmp_path, "--ratio", 3, "--json").json
    assert found["layers"][0]["rank"] == 128
    assert found["layers"][-1]["dense_because"] == "outside of the blocks"


def test_inspect_of_a_function(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from torch import nn\ndef made():\n    m = nn.Module()\n    m.blocks = nn.ModuleList("
    code += "[nn.Sequential(nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 32))])\n    return m\n"
    (tmp_path / "inspected_one.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = cli("inspect", "inspected_one:made", "--json").json
    assert [layer["rank"] for layer in found["layers"]] == [8, 8]
    assert found["macs"] == {"dense": None, "compressed": None}
    assert json.dumps(found)
