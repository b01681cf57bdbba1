"""Blocks and heads of models of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from regrow_export.layers import block_lists
from regrow_toolchain.models.structure import find_head

_SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip
_BERT = _SMALL | {"vocab_size": 30, "max_position_embeddings": 16}
_VIT = _SMALL | {"image_size": 8, "patch_size": 4}


def _model(name: str, **options: Any) -> nn.Module:
    import transformers

    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**options))


@pytest.mark.parametrize(
    ("name", "options", "head"),
    [
        ("ViTForImageClassification", _VIT | {"num_labels": 5}, ("classifier",)),
        ("DeiTForImageClassification", _VIT | {"num_labels": 5}, ("classifier",)),
        ("BertForSequenceClassification", _BERT | {"num_labels": 5}, ("classifier",)),
        ("BertForSequenceClassification", _BERT | {"num_labels": 16}, ("classifier",)),
        (
            "RobertaForSequenceClassification",
            _BERT | {"num_labels": 5},
            ("classifier.dense", "classifier.out_proj"),
        ),
        (
            "RobertaForSequenceClassification",
            _BERT | {"num_labels": 16},
            ("classifier.dense", "classifier.out_proj"),
        ),
        (
            "DistilBertForSequenceClassification",
            {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 30},
            ("pre_classifier", "classifier"),
        ),
        ("BertForTokenClassification", _BERT | {"num_labels": 5}, ("classifier",)),
        ("BertModel", _BERT, ()),
        ("ViTModel", _VIT, ()),
        ("LlamaForCausalLM", _BERT, ()),
    ],
)
def test_heads_of_transformers(name: str, options: dict, head: tuple[str, ...]) -> None:
    model = _model(name, **options)
    assert find_head(model, model.config.num_labels) == head


@pytest.mark.parametrize("classes", [5, 16])
def test_two_heads_side_by_side_are_none(classes: int) -> None:
    """DeiT with a teacher gives the mean of two layers: a user's one could not take their place."""
    model = _model("DeiTForImageClassificationWithTeacher", **_VIT, num_labels=classes)
    assert find_head(model, classes) == ()


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)


class _Body(nn.Module):
    def __init__(self, blocks: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = blocks
        if head is not None:
            self.head = head


class _Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


_LIST = lambda: nn.ModuleList(_Block() for _ in range(2))  # noqa: E731
_SEQUENCE = lambda: nn.Sequential(_Block(), _Block())  # noqa: E731
_MLP = lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))  # noqa: E731


@pytest.mark.parametrize("blocks", [_LIST, _SEQUENCE])
def test_heads_of_plain_modules(blocks: Any) -> None:
    assert find_head(_Body(blocks(), nn.Linear(8, 3)), None) == ("head",)
    assert find_head(_Body(blocks(), _MLP()), None) == ("head.0", "head.2")
    assert find_head(_Wrapped(_Body(blocks(), nn.Linear(8, 3))), None) == ("inner.head",)
    assert find_head(_Body(blocks(), None), None) == ()  # what comes before the blocks is none
    assert find_head(_Body(blocks(), nn.Linear(8, 4)), 4) == ("head",)


def test_plain_heads_side_by_side_are_none() -> None:
    """It takes a `head` of the module's own to say which one is meant."""
    two = _Body(_LIST(), None)
    two.left, two.right = nn.Linear(8, 3), nn.Linear(8, 3)
    assert find_head(two, None) == ()
    two.right = nn.Linear(8, 4)
    assert find_head(two, None) == ("right",)


def test_a_module_without_blocks() -> None:
    assert find_head(_MLP(), None) == ("2",)
    assert find_head(_Wrapped(_MLP()), None) == ("inner.2",)
    square = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    assert find_head(square, None) == ("2",)
    assert find_head(nn.Conv2d(1, 1, 1), None) == ()


def test_stacks() -> None:
    assert [name for name, _ in block_lists(_Body(_LIST(), None))] == ["blocks"]
    assert [name for name, _ in block_lists(_Wrapped(_Body(_SEQUENCE(), None)))] == ["inner.blocks"]
    assert block_lists(_Body(nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1)), None)) == []
    assert block_lists(_Body(_MLP(), None)) == []
    assert block_lists(_SEQUENCE()) == []  # its blocks have no list that could be named
    one = nn.Sequential(_Block())
    assert block_lists(_Body(one, None)) == []
    nested = nn.ModuleList([nn.Sequential(_Block(), _Block())])
    assert [name for name, _ in block_lists(_Body(nested, None))] == ["blocks"]


def test_stacks_of_transformers_are_as_before() -> None:
    with torch.device("meta"):
        for name, options, wanted in (
            ("ViTForImageClassification", _VIT, ["vit.encoder.layer"]),
            ("BertForSequenceClassification", _BERT, ["bert.encoder.layer"]),
            ("LlamaForCausalLM", _BERT, ["model.layers"]),
        ):
            assert [path for path, _ in block_lists(_model(name, **options))] == wanted
