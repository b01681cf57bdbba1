"""Adapters have as many numbers as the papers say, on the real architectures' shapes.

The models are built on torch's meta device: shapes without weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from regrow_format.adapter import Target
from regrow_format.errors import FormatError
from regrow_toolchain.adapters import count_parameters
from regrow_toolchain.models import find_targets


def _roberta(**sizes: int) -> nn.Module:
    shape = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    return transformers.RobertaModel(transformers.RobertaConfig(**shape, **sizes))


def _gpt2(width: int, layers: int, heads: int) -> nn.Module:
    config = transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
    return transformers.GPT2LMHeadModel(config)


def _vit(**sizes: int) -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)


def _llama(width: int, layers: int, heads: int, inner: int, kv_heads: int) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=inner,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


_LARGE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096,
}  # fmt: skip
_MODELS: dict[str, Callable[[], nn.Module]] = {
    "RoBERTa-base": _roberta,
    "RoBERTa-large": lambda: _roberta(**_LARGE),
    "GPT-2 M": lambda: _gpt2(1024, 24, 16),
    "GPT-2 L": lambda: _gpt2(1280, 36, 20),
    "ViT-B": _vit,
    "ViT-L": lambda: _vit(**_LARGE),
    "LLaMA-2 7B": lambda: _llama(4096, 32, 32, 11008, 32),
    "LLaMA-2 13B": lambda: _llama(5120, 40, 40, 13824, 40),
    "LLaMA-2 70B": lambda: _llama(8192, 80, 64, 28672, 8),
}
# In all: RoBERTa with its pooler, ViT without a head.
_SIZES = {
    "RoBERTa-base": 124_645_632, "RoBERTa-large": 355_359_744, "GPT-2 M": 354_823_168,
    "GPT-2 L": 774_030_080, "ViT-B": 85_798_656, "ViT-L": 303_301_632,
    "LLaMA-2 7B": 6_738_415_616, "LLaMA-2 13B": 13_015_864_320, "LLaMA-2 70B": 68_976_648_192,
}  # fmt: skip


@cache
def _model(name: str) -> nn.Module:
    with torch.device("meta"):
        return _MODELS[name]()


def _targets(model: str, where: str, method: str) -> tuple[Target, ...]:
    """The layers that the papers adapt: query and value are two of them where they are fused, too.

    LoRA's own GPT-2, which NOLA's authors take, gives query and value an A and a B each, though
    GPT-2 computes them in one layer. In an adapter of ours a fused layer is one target.
    """
    found = find_targets(_model(model), [where], method=method)
    if not model.startswith("GPT-2"):
        return found
    assert all(t.name.endswith("attn.c_attn") for t in found)
    assert all(t.out_features == 3 * t.in_features for t in found)
    return tuple(
        Target(f"{t.name}.{part}", t.in_features, t.in_features) for t in found for part in "qv"
    )


def _nola(k: int, rank: int = 8) -> dict[str, Any]:
    return {"k": k, "l": k, "rank": rank, "c": 1.0, "shared": True}


def _lora(rank: int) -> dict[str, Any]:
    return {"rank": rank, "alpha": 1.0}


def _fourier(n: int) -> dict[str, Any]:
    return {"n": n, "alpha": 150.0}


@pytest.mark.parametrize("model", _MODELS)
def test_the_architectures_are_the_real_ones(model: str) -> None:
    assert sum(p.numel() for p in _model(model).parameters()) == _SIZES[model]


@pytest.mark.parametrize(
    ("model", "where", "method", "config", "count", "printed"),
    [
        # NOLA (arXiv 2310.02556). It prints 47K to 49K for ViT-B: 24 layers of 2,000.
        ("GPT-2 M", "@qv", "nola", _nola(1000), 96_000, "96K"),
        ("GPT-2 L", "@qv", "nola", _nola(1000), 144_000, "144K"),
        ("GPT-2 L", "@qv", "nola", _nola(250), 36_000, "36K"),
        ("LLaMA-2 7B", "@all", "nola", _nola(128, 16), 57_344, "57K"),
        ("LLaMA-2 13B", "@all", "nola", _nola(256, 16), 143_360, None),
        ("LLaMA-2 70B", "@all", "nola", _nola(512, 16), 573_440, "0.57M"),
        ("LLaMA-2 70B", "@all", "lora", _lora(1), 12_943_360, "12.94M"),
        ("ViT-B", "@mlp", "nola", _nola(1000, 4), 48_000, None),
        ("ViT-L", "@mlp", "nola", _nola(1000, 1), 96_000, None),
        # VeRA (arXiv 2310.11454): L (out + r)
        ("RoBERTa-base", "@qv", "vera", {"rank": 1024}, 43_008, None),
        ("RoBERTa-large", "@qv", "vera", {"rank": 256}, 61_440, None),
        # FourierFT (arXiv 2405.03003): n L. It prints 239K for ViT-B and n = 10,000.
        ("RoBERTa-base", "@qv", "fourierft", _fourier(1000), 24_000, "24K"),
        ("RoBERTa-large", "@qv", "fourierft", _fourier(1000), 48_000, None),
        ("ViT-B", "@qv", "fourierft", _fourier(3000), 72_000, "72K"),
        ("ViT-B", "@qv", "fourierft", _fourier(10_000), 240_000, None),
        ("ViT-L", "@qv", "fourierft", _fourier(3000), 144_000, None),
        # LoRA, as they count it
        ("ViT-B", "@qv", "lora", _lora(4), 147_456, "147K"),
        ("ViT-B", "@qv", "lora", _lora(8), 294_912, "295K"),
        ("RoBERTa-base", "@qv", "lora", _lora(8), 294_912, "0.3M"),
        # SSF (arXiv 2210.08823): 12 x 2 (2 norms, query to output, MLP); its code adds the patches'
        # embedding and the last norm
        ("ViT-B", "@all", "ssf", {}, 12 * 2 * (2 * 768 + 4 * 768 + 3072 + 768), None),
        # BitFit (arXiv 2106.10199): every bias of the blocks, those of norms too
        ("RoBERTa-base", "@all", "bitfit", {}, 101_376, "0.1M"),
    ],
)
def test_counts_are_the_papers(
    model: str, where: str, method: str, config: dict[str, Any], count: int, printed: str | None
) -> None:
    assert count_parameters(method, config, _targets(model, where, method)) == count
    assert printed in (None, _rounded(count, printed or "0K"))


def _rounded(count: int, like: str) -> str:
    """`count` in the unit and with the decimals of `like`."""
    unit = {"K": 1e3, "M": 1e6}[like[-1]]
    decimals = len(like[:-1].partition(".")[2])
    return f"{count / unit:.{decimals}f}{like[-1]}"


def test_a_fused_layer_is_one_target() -> None:
    """So NOLA on GPT-2's fused layer takes half of the numbers of query and value apart."""
    fused = find_targets(_model("GPT-2 M"), ["@qv"])
    assert len(fused) == 24
    assert count_parameters("nola", _nola(1000), fused) == 48_000


@pytest.mark.parametrize(
    ("model", "where", "layers"),
    [
        ("RoBERTa-base", "@qv", 24),
        ("RoBERTa-base", "@attention", 48),
        ("RoBERTa-base", "@mlp", 24),
        ("ViT-L", "@qv", 48),
        ("GPT-2 L", "@all", 144),
        ("LLaMA-2 7B", "@mlp", 96),
        ("LLaMA-2 70B", "@all", 560),
    ],
)
def test_sets_of_the_real_architectures(model: str, where: str, layers: int) -> None:
    assert len(find_targets(_model(model), [where])) == layers


def test_no_targets_are_no_numbers() -> None:
    assert count_parameters("lora", _lora(4), ()) == 0


def test_a_config_is_checked() -> None:
    with pytest.raises(FormatError, match="rank"):
        count_parameters("lora", {"rank": 0, "alpha": 1.0}, ())
    with pytest.raises(FormatError, match="method must be one of"):
        count_parameters("none", {}, ())
