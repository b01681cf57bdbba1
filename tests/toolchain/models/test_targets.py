"""Targets: endings, patterns and named sets, pairs as one layer, what to say of mistakes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from regrow_export.layers import block_lists
from regrow_format.adapter import Target
from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.compress import Compressed
from regrow_toolchain.models import Backbone, find_targets, load_backbone

_BLOCK = "vit.encoder.layer"


def _names(targets: tuple[Target, ...]) -> list[str]:
    return [target.name for target in targets]


def test_by_default_every_linear_layer_of_the_blocks(backbone: Backbone) -> None:
    targets = find_targets(backbone.model)
    assert len(targets) == 12
    assert all(name.startswith(f"{_BLOCK}.") for name in _names(targets))
    assert _names(targets) == sorted(_names(targets), key=str.encode)
    assert Target(f"{_BLOCK}.0.intermediate.dense", 32, 64) in targets


def test_a_factored_pair_is_one_layer(backbone: Backbone, compressed: Compressed) -> None:
    """So an adapter's targets are the same before and after compression."""
    assert find_targets(compressed.backbone.model) == find_targets(backbone.model)


def test_layers_of_text_models(bert_folder: Path, gpt2_folder: Path) -> None:
    """Not the pooler, the head, or the output that shares the embeddings' weights."""
    bert = _names(find_targets(load_backbone(bert_folder).model))
    assert len(bert) == 12
    assert not any("pooler" in name or "classifier" in name for name in bert)
    gpt2 = find_targets(load_backbone(gpt2_folder).model)
    assert len(gpt2) == 8
    assert Target("transformer.h.0.attn.c_attn", 32, 96) in gpt2


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["query"], ["0.attention.attention.query", "1.attention.attention.query"]),
        (["attention.output.dense"], ["0.attention.output.dense", "1.attention.output.dense"]),
        ([f"{_BLOCK}.1.output.dense"], ["1.output.dense"]),
        (["*.layer.0.*.query"], ["0.attention.attention.query"]),
        ([f"{_BLOCK}.[1].*.key"], ["1.attention.attention.key"]),
        (
            ["query", "*.layer.0.*.query", f"{_BLOCK}.0.attention.attention.query"],
            ["0.attention.attention.query", "1.attention.attention.query"],
        ),
    ],
)
def test_endings_paths_and_patterns(
    backbone: Backbone, patterns: list[str], expected: list[str]
) -> None:
    names = _names(find_targets(backbone.model, patterns))
    assert names == [f"{_BLOCK}.{ending}" for ending in expected]


def test_an_ending_is_whole_parts(backbone: Backbone) -> None:
    with pytest.raises(UsageError, match="got 'uery', which matches none"):
        find_targets(backbone.model, ["uery"])


def test_a_factor_by_its_name(compressed: Compressed) -> None:
    targets = find_targets(compressed.backbone.model, ["query.down"])
    assert targets[0] == Target(f"{_BLOCK}.0.attention.attention.query.down", 32, 5)
    assert len(targets) == 2


def test_a_pair_wins_over_its_factors(compressed: Compressed) -> None:
    """`*` matches pairs and their factors; a layer must not lie inside another."""
    both = find_targets(compressed.backbone.model, ["query", "query.up"])
    assert [name.rpartition(".")[2] for name in _names(both)] == ["query", "query"]
    blocks = find_targets(compressed.backbone.model, [f"{_BLOCK}.*"])
    assert blocks == find_targets(compressed.backbone.model)


@pytest.mark.parametrize(
    ("pattern", "near"), [("quary", "near: query"), ("atention.query", "query")]
)
def test_no_match_lists_near_names(backbone: Backbone, pattern: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"got '{pattern}', which matches none; .*{near}"):
        find_targets(backbone.model, [pattern])


def test_no_match_and_nothing_near_lists_endings(backbone: Backbone) -> None:
    with pytest.raises(UsageError, match="endings: classifier, dense, key, query, value"):
        find_targets(backbone.model, ["zzz123"])


def test_a_model_without_blocks_needs_names() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    with pytest.raises(RegrowError, match="model must have linear layers in a stack of blocks"):
        find_targets(model)
    assert _names(find_targets(model, ["1"])) == ["1"]


# -- named sets ----------------------------------------------------------------------------------

_WIDTHS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
_BERT = {
    "qv": ["attention.self.query", "attention.self.value"],
    "attention": ["attention.self.query", "attention.self.key", "attention.self.value",
                  "attention.output.dense"],
    "mlp": ["intermediate.dense", "output.dense"],
}  # fmt: skip
_VIT = {
    name: [path.replace("self", "attention") for path in paths] for name, paths in _BERT.items()
}
_LLAMA = {
    "qv": ["self_attn.q_proj", "self_attn.v_proj"],
    "attention": [f"self_attn.{part}_proj" for part in "qkvo"],
    "mlp": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
}


def _architectures() -> dict[str, tuple[Any, Any, dict[str, list[str]]]]:
    """Config, class, and what the sets are, from a block on."""
    import transformers as t

    image = {**_WIDTHS, "image_size": 16, "patch_size": 8}
    text = {**_WIDTHS, "vocab_size": 60}
    clip = t.CLIPConfig(text_config=text, vision_config=image)
    swin = t.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    qkv = ["attention.q_proj", "attention.v_proj"]
    return {
        "vit": (t.ViTConfig(**image), t.ViTForImageClassification, _VIT),
        "deit": (t.DeiTConfig(**image), t.DeiTForImageClassification, _VIT),
        "swin": (swin, t.SwinForImageClassification,
                 {name: [f"blocks.0.{path}" for path in paths] for name, paths in _BERT.items()}),
        "bert": (t.BertConfig(**text), t.BertForSequenceClassification, _BERT),
        "roberta": (t.RobertaConfig(**text), t.RobertaForSequenceClassification, _BERT),
        "distilbert": (
            t.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=60),
            t.DistilBertForSequenceClassification,
            {"qv": ["attention.q_lin", "attention.v_lin"],
             "attention": [f"attention.{part}_lin" for part in ("q", "k", "v", "out")],
             "mlp": ["ffn.lin1", "ffn.lin2"]},
        ),
        "gpt2": (
            t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60), t.GPT2LMHeadModel,
            {"qv": ["attn.c_attn"], "attention": ["attn.c_attn", "attn.c_proj"],
             "mlp": ["mlp.c_fc", "mlp.c_proj"]},
        ),
        "llama": (t.LlamaConfig(**text), t.LlamaForCausalLM, _LLAMA),
        "qwen2": (t.Qwen2Config(**text), t.Qwen2ForCausalLM, _LLAMA),
        "clip": (
            clip, t.CLIPModel,
            {"qv": ["self_attn.q_proj", "self_attn.v_proj"],
             "attention": [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")],
             "mlp": ["mlp.fc1", "mlp.fc2"]},
        ),
        "wav2vec2": (
            t.Wav2Vec2Config(**_WIDTHS), t.Wav2Vec2ForSequenceClassification,
            {"qv": qkv, "attention": [*qkv, "attention.k_proj", "attention.out_proj"],
             "mlp": ["feed_forward.intermediate_dense", "feed_forward.output_dense"]},
        ),
    }  # fmt: skip


@cache
def _built(name: str) -> tuple[nn.Module, dict[str, list[str]]]:
    """A model of two blocks on the meta device, and its sets."""
    config, kind, sets = _architectures()[name]
    with torch.device("meta"):
        return kind(config), sets


@pytest.mark.parametrize("where", ["qv", "attention", "mlp"])
@pytest.mark.parametrize("name", list(_architectures()))
def test_sets_by_architecture(name: str, where: str) -> None:
    model, sets = _built(name)
    found = _names(find_targets(model, [f"@{where}"]))
    # A stack's path ends before the block's number.
    blocks = {f"{prefix}.{i}" for prefix, stack in block_lists(model) for i in range(len(stack))}
    assert found == sorted(
        (f"{block}.{path}" for block in blocks for path in sets[where]), key=str.encode
    )


@pytest.mark.parametrize("name", list(_architectures()))
def test_all_is_the_default(name: str) -> None:
    model, _ = _built(name)
    assert find_targets(model, ["@all"]) == find_targets(model)
    rest = set(find_targets(model)) - set(find_targets(model, ["@attention", "@mlp"]))
    assert all(target.name.endswith("downsample.reduction") for target in rest)
    assert len(rest) == (1 if name == "swin" else 0)


def test_sets_of_a_compressed_backbone(backbone: Backbone, compressed: Compressed) -> None:
    for where in ("@qv", "@attention", "@mlp", "@all", "all-linear"):
        assert find_targets(compressed.backbone.model, [where]) == find_targets(
            backbone.model, [where]
        )


def test_sets_and_patterns_together(backbone: Backbone) -> None:
    found = _names(find_targets(backbone.model, ["@qv", "query", "*.1.*.key"]))
    assert [name.rpartition(".")[2] for name in found] == [
        "query",
        "value",
        "key",
        "query",
        "value",
    ]


class _Plain(nn.Module):
    """A transformer as people write it: no config, names of their own."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layers = nn.ModuleList([nn.ModuleDict(layers)])
        self.head = nn.Linear(8, 3)


def test_sets_of_a_plain_module() -> None:
    names = ("wq", "wk", "wv", "wo", "fc1", "fc2")
    model = _Plain(**{name: nn.Linear(8, 8) for name in names})
    assert _names(find_targets(model, ["@qv"])) == ["layers.0.wq", "layers.0.wv"]
    assert _names(find_targets(model, ["@mlp"])) == ["layers.0.fc1", "layers.0.fc2"]
    assert len(find_targets(model, ["@attention"])) == 4
    linears = _names(find_targets(model, ["all-linear"]))
    assert linears == ["embed", *sorted(f"layers.0.{name}" for name in names)]


def test_sets_of_a_model_without_blocks() -> None:
    model = nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_v": nn.Linear(4, 4)})
    assert _names(find_targets(model, ["@qv"])) == ["to_q", "to_v"]


def test_all_linear_is_pefts() -> None:
    """Outside of the blocks too, but neither the head nor the output of a language model."""
    bert = _names(find_targets(_built("bert")[0], ["all-linear"]))
    assert len(bert) == 13
    assert "bert.pooler.dense" in bert
    gpt2 = _names(find_targets(_built("gpt2")[0], ["all-linear"]))
    assert len(gpt2) == 8
    roberta = _names(find_targets(_built("roberta")[0], ["all-linear"]))
    assert not any("classifier" in name for name in roberta)


def test_an_unknown_set(backbone: Backbone) -> None:
    known = "one of @all, @qv, @attention, @mlp, got '@query'"
    with pytest.raises(UsageError, match=known):
        find_targets(backbone.model, ["@query"])


def test_a_set_that_names_do_not_tell() -> None:
    model = _Plain(a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    with pytest.raises(UsageError, match=r"@qv must match a layer of the blocks.*endings: a, b,"):
        find_targets(model, ["@qv"])
    half = _Plain(query=nn.Linear(8, 8), val=nn.Linear(8, 8))
    with pytest.raises(UsageError, match="got query and no value: name the targets"):
        find_targets(half, ["@qv"])


# -- layers that are not there as such -----------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "v", "*.q_proj", "to_q",
                "self_attn.q_proj"]
)  # fmt: skip
def test_a_fused_layer_is_named(pattern: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_targets(_built("gpt2")[0], [pattern])
    assert f"got {pattern!r}, which matches none" in str(caught.value)
    assert str(caught.value).endswith("target it as a whole: c_attn")


@pytest.mark.parametrize("fused", ["qkv", "query_key_value", "Wqkv", "qkv_proj", "to_qkv"])
def test_fused_layers_by_any_name(fused: str) -> None:
    model = _Plain(**{fused: nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
    with pytest.raises(UsageError, match=f"target it as a whole: {fused}"):
        find_targets(model, ["v_proj"])
    assert _names(find_targets(model, ["@qv"])) == [f"layers.0.{fused}"]


def test_a_fused_gate() -> None:
    model = _Plain(gate_up_proj=nn.Linear(8, 16), down_proj=nn.Linear(8, 8))
    with pytest.raises(UsageError, match=r"gate and up are one layer here, .*: gate_up_proj"):
        find_targets(model, ["gate_proj"])
    assert len(find_targets(model, ["@mlp"])) == 2


def test_the_same_layer_by_its_name_here(backbone: Backbone) -> None:
    """What PEFT's examples call q_proj is `query` in a ViT."""
    with pytest.raises(UsageError, match="got 'v_proj', which matches none; near: value"):
        find_targets(backbone.model, ["v_proj"])


def _torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize(
    "pattern", ["in_proj", "in_proj_weight", "self_attn.in_proj_weight", "q_proj", "value",
                "out_proj", "*.out_proj", "layers.0.self_attn.out_proj", "@qv", "@attention"]
)  # fmt: skip
def test_multihead_attention_calls_no_layers(pattern: str) -> None:
    """Its products would not see a change of a layer: better an error than an idle adapter."""
    with pytest.raises(UsageError, match=r"nn\.MultiheadAttention multiplies by its parameters"):
        find_targets(_torch_encoder(), [pattern])


@pytest.mark.parametrize("patterns", [(), ("@all",), ("@mlp",), ("all-linear",), ("*",)])
def test_what_is_left_of_multihead_attention(patterns: tuple[str, ...]) -> None:
    model = _torch_encoder()
    names = _names(find_targets(model, patterns))
    assert names == [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    called = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        model.eval()(torch.ones(1, 3, 8))
    assert called == names


# -- methods that change other things ------------------------------------------------------------


def test_bitfit_changes_whatever_has_a_bias() -> None:
    found = find_targets(_built("bert")[0], method="bitfit")
    first = [t for t in found if t.name.startswith("bert.encoder.layer.0.")]
    assert [t.name.removeprefix("bert.encoder.layer.0.") for t in first] == [
        "attention.output.LayerNorm", "attention.output.dense", "attention.self.key",
        "attention.self.query", "attention.self.value", "intermediate.dense", "output.LayerNorm",
        "output.dense",
    ]  # fmt: skip
    assert first[0] == Target("bert.encoder.layer.0.attention.output.LayerNorm", 32, 32)
    assert first[5] == Target("bert.encoder.layer.0.intermediate.dense", 32, 64)
    gpt2 = _names(find_targets(_built("gpt2")[0], ["ln_1", "c_fc"], method="bitfit"))
    assert gpt2 == [f"transformer.h.{i}.{name}" for i in range(2) for name in ("ln_1", "mlp.c_fc")]


def test_bitfit_by_pattern_and_set(backbone: Backbone) -> None:
    norms = find_targets(backbone.model, ["layernorm_before"], method="bitfit")
    assert norms[0] == Target(f"{_BLOCK}.0.layernorm_before", 32, 32)
    sets = find_targets(backbone.model, ["@qv"], method="bitfit")
    assert sets == find_targets(backbone.model, ["@qv"])


def test_bitfit_of_a_compressed_backbone(backbone: Backbone, compressed: Compressed) -> None:
    """A pair's bias is its second factor's."""
    model = compressed.backbone.model
    assert find_targets(model, method="bitfit") == find_targets(backbone.model, method="bitfit")
    up = find_targets(model, ["query.up"], method="bitfit")
    assert up[0] == Target(f"{_BLOCK}.0.attention.attention.query.up", 5, 32)
    with pytest.raises(UsageError, match=r"query\.down has none, and method bitfit"):
        find_targets(model, ["query.down"], method="bitfit")


def test_bitfit_leaves_other_norms_alone() -> None:
    """A bias along the channels of an image is not added to the last dimension."""
    layers = {"bn": nn.BatchNorm2d(8), "gn": nn.GroupNorm(2, 8), "conv": nn.Conv2d(8, 8, 3)}
    model = _Plain(**layers, norm=nn.LayerNorm(8), grid=nn.LayerNorm((4, 8)))
    assert find_targets(model, method="bitfit") == (Target("layers.0.norm", 8, 8),)


def test_bitfit_without_a_bias() -> None:
    llama, _ = _built("llama")
    with pytest.raises(RegrowError, match="model must have layers with a bias in a stack"):
        find_targets(llama, method="bitfit")
    for pattern in ("@qv", "q_proj"):
        with pytest.raises(UsageError, match=r"layer with a bias, got '.*0\.self_attn\.q_proj has"):
            find_targets(llama, [pattern], method="bitfit")
    with pytest.raises(UsageError, match="must match a layer with a bias, got 'zzz', which"):
        find_targets(_built("bert")[0], ["zzz"], method="bitfit")


def test_a_head_has_no_targets(backbone: Backbone) -> None:
    assert find_targets(backbone.model, method="head") == ()
    with pytest.raises(UsageError, match="method head changes no layers, got targets query"):
        find_targets(backbone.model, ["query"], method="head")


@pytest.mark.parametrize("method", ["nola", "vera", "fourierft", "lora"])
def test_methods_of_weights_take_linear_layers(backbone: Backbone, method: str) -> None:
    assert find_targets(backbone.model, method=method) == find_targets(backbone.model)
