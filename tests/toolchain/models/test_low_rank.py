"""PELA's factors: the paper's rank, the best approximation, the layers that are factored."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from regrow_export.layers import layer_type
from regrow_format.errors import RegrowError, UsageError
from regrow_toolchain.compress import factored_layers
from regrow_toolchain.models import (
    Backbone,
    LowRankPair,
    apply_plan,
    load_backbone,
    rank_for,
    weight_of,
)
from regrow_toolchain.models.low_rank import factorize


def _linear(wide: int, high: int, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(wide, high, bias=bias)


# -- rank ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wide", "high", "ratio", "rank"),
    [
        (768, 768, 2, 192),
        (768, 3072, 2, 307),
        (768, 2304, 2, 288),
        (768, 768, 3, 128),
        (4, 4, 2, 1),
    ],
)
def test_rank_is_the_papers(wide: int, high: int, ratio: float, rank: int) -> None:
    assert rank_for(wide, high, ratio) == rank_for(high, wide, ratio) == rank


@settings(deadline=None)
@given(st.integers(1, 4096), st.integers(1, 4096), st.floats(1, 64))
def test_factors_hold_at_most_the_share_of_the_ratio(wide: int, high: int, ratio: float) -> None:
    rank = rank_for(wide, high, ratio)
    assert rank * (wide + high) <= wide * high / ratio * (1 + 1e-12)
    assert (rank + 1) * (wide + high) > wide * high / ratio * (1 - 1e-12)


# -- factors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wide", "high", "rank"), [(12, 20, 5), (20, 12, 5), (16, 16, 1)])
def test_factors_are_the_best_of_their_rank(wide: int, high: int, rank: int) -> None:
    """Eckart and Young: the squared error is the sum of the squares left out."""
    layer = _linear(wide, high)
    weight = layer.weight.detach().numpy().astype(np.float64)
    pair = factorize(layer, rank)
    left_out = np.linalg.svd(weight, compute_uv=False)[rank:]
    error = np.linalg.norm(pair.weight.detach().numpy() - weight)
    assert error == pytest.approx(np.sqrt((left_out**2).sum()), rel=1e-5)


def test_singular_values_are_split_evenly() -> None:
    layer = _linear(12, 20)
    pair = factorize(layer, 4)
    values = torch.linalg.svdvals(layer.weight.detach())[:4]
    assert torch.allclose(pair.down.weight.norm(dim=1) ** 2, values, rtol=1e-5)
    assert torch.allclose(pair.up.weight.norm(dim=0) ** 2, values, rtol=1e-5)


def test_bias_is_on_the_second_factor() -> None:
    layer = _linear(12, 20)
    pair = factorize(layer, 4)
    assert pair.down.bias is None
    assert torch.equal(pair.up.bias, layer.bias)
    assert factorize(_linear(12, 20, bias=False), 4).up.bias is None


def test_full_rank_computes_the_same() -> None:
    layer, x = _linear(12, 20), torch.randn(3, 5, 12)
    assert torch.allclose(factorize(layer, 12)(x), layer(x), atol=1e-5)


def test_conv1d_of_gpt2_is_turned() -> None:
    torch.manual_seed(0)
    layer, x = Conv1D(20, 12), torch.randn(3, 5, 12)  # 12 -> 20
    nn.init.normal_(layer.bias)
    assert weight_of(layer).shape == (20, 12)
    pair = factorize(layer, 12)
    assert (pair.in_features, pair.out_features) == (12, 20)
    assert torch.allclose(pair(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_change_of_low_rank_merges_exactly(bias: bool) -> None:
    pair = factorize(_linear(12, 20, bias=bias), 4)
    a, b, x = torch.randn(12, 3), torch.randn(3, 20), torch.randn(6, 12)
    merged = layer_type(pair).with_low_rank(pair, a, b)
    assert merged.rank == 7
    assert torch.allclose(merged(x), pair(x) + (x @ a) @ b, atol=1e-5)
    assert torch.equal(merged.up.weight[:, :4], pair.up.weight)
    assert torch.equal(merged.down.weight[4:], a.T)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    layer = _linear(12, 20)
    with torch.no_grad():
        layer.weight[3, 4] = value
    with pytest.raises(RegrowError, match=r"encoder\.fc\.weight must be finite"):
        factorize(layer, 4, "encoder.fc")


# -- which layers --------------------------------------------------------------------------------

_VIT_LAYERS = {
    f"vit.encoder.layer.{i}.{name}"
    for i in range(2)
    for name in (
        "attention.attention.query", "attention.attention.key", "attention.attention.value",
        "attention.output.dense", "intermediate.dense", "output.dense",
    )
}  # fmt: skip
_BERT_LAYERS = {
    f"bert.encoder.layer.{i}.{name}"
    for i in range(2)
    for name in (
        "attention.self.query", "attention.self.key", "attention.self.value",
        "attention.output.dense", "intermediate.dense", "output.dense",
    )
}  # fmt: skip
_GPT2_LAYERS = {
    f"transformer.h.{i}.{name}"
    for i in range(2)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
}


def test_layers_of_vit(backbone: Backbone) -> None:
    """Not the patches' convolution, not the head."""
    assert {plan.name for plan in factored_layers(backbone.model, 2)} == _VIT_LAYERS


def test_layers_of_bert(bert_folder: Path) -> None:
    """Not the pooler, not the head."""
    assert {
        plan.name for plan in factored_layers(load_backbone(bert_folder).model, 2)
    } == _BERT_LAYERS


def test_layers_of_gpt2(gpt2_folder: Path) -> None:
    """Its Conv1D layers, not the output that shares the embeddings' weights."""
    plans = factored_layers(load_backbone(gpt2_folder).model, 2)
    assert {plan.name for plan in plans} == _GPT2_LAYERS
    assert {(p.in_features, p.out_features, p.rank) for p in plans} == {
        (32, 96, 12), (32, 32, 8), (32, 128, 12), (128, 32, 12),
    }  # fmt: skip


def test_merging_of_patches_and_narrow_layers_stay_dense() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.reduction = nn.Linear(32, 32)
            self.narrow = nn.Linear(32, 9)

    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), Block()])
    assert [plan.name for plan in factored_layers(model, 2)] == ["blocks.0.fc", "blocks.1.fc"]


def test_deit_base_has_the_papers_size() -> None:
    """86.57 M to 44.08 M parameters, by the formula and in the model itself."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_labels=1000)).eval()
    dense = sum(p.numel() for p in model.parameters())
    plans = factored_layers(model, 2)
    ranks = {
        plan.name.split(".layer.0.")[1]: plan.rank for plan in plans if ".layer.0." in plan.name
    }
    assert ranks == {
        "attention.attention.query": 192, "attention.attention.key": 192,
        "attention.attention.value": 192, "attention.output.dense": 192,
        "intermediate.dense": 307, "output.dense": 307,
    }  # fmt: skip
    apply_plan(model, plans, empty=True)
    saved = 12 * (4 * (768 * 768 - 192 * 1536) + 2 * (768 * 3072 - 307 * 3840))
    assert dense == 86_567_656
    assert sum(p.numel() for p in model.parameters()) == dense - saved == 44_081_896


# -- applying ------------------------------------------------------------------------------------


def test_applying_replaces_the_planned_layers_alone(backbone: Backbone) -> None:
    model = backbone.model
    head = model.classifier.weight.clone()
    apply_plan(model, factored_layers(model, 2))
    pairs = {name for name, m in model.named_modules() if isinstance(m, LowRankPair)}
    assert pairs == _VIT_LAYERS
    assert torch.equal(model.classifier.weight, head)
    assert not any(module.training for module in model.modules())


def test_ratio_one_costs_no_parameters(backbone: Backbone) -> None:
    before = backbone.parameters
    apply_plan(backbone.model, factored_layers(backbone.model, 1))
    assert backbone.parameters <= before


@pytest.mark.parametrize("ratio", [0.99, 0, -2, math.nan, math.inf])
def test_a_ratio_below_one_is_refused(backbone: Backbone, ratio: float) -> None:
    with pytest.raises(UsageError, match="ratio must be a finite number of at least 1, got"):
        factored_layers(backbone.model, ratio)


def test_a_ratio_that_leaves_no_rank_is_refused(backbone: Backbone) -> None:
    with pytest.raises(UsageError, match=r"rank of 1 or more, got 17.*query \(32 -> 32\)"):
        factored_layers(backbone.model, 17)


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(32, 32)), nn.ModuleList([nn.Conv2d(3, 3, 1)] * 2)]
)
def test_a_model_without_blocks_of_linear_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(RegrowError, match="model must have linear layers"):
        factored_layers(model, 2)


def test_nan_in_a_model_names_the_layer(backbone: Backbone) -> None:
    with torch.no_grad():
        backbone.model.vit.encoder.layer[1].output.dense.weight[0, 0] = math.nan
    with pytest.raises(RegrowError, match=r"vit\.encoder\.layer\.1\.output\.dense\.weight"):
        apply_plan(backbone.model, factored_layers(backbone.model, 2))
