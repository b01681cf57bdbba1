"""Targets: endings, paths and patterns, a factored pair as one layer, near names for mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from regrow_runtime.adapter import Target
from regrow_runtime.errors import RegrowError, UsageError
from regrow_toolchain.backbone import Backbone, load_backbone
from regrow_toolchain.compressing import Compressed
from regrow_toolchain.targets import find_targets

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
