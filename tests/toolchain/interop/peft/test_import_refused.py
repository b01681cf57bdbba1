"""Configs and tensors that `regrow import` refuses, and in which words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from regrow_toolchain.interop import import_peft

Room = Any  # see conftest.py
Q, K = "base_model.model.blocks.0.q", "base_model.model.blocks.0.k"
HEAD = "base_model.model.head"

_FIELDS: list[tuple[dict[str, Any], str]] = [
    (
        {"peft_type": "ADALORA"},
        "must be one of LORA, VERA, FOURIERFT, IA3, got 'ADALORA': train",
    ),
    ({"peft_type": None}, "peft_type must be of type str"),
    ({"use_dora": True}, "use_dora must not be set, got True: DoRA also scales"),
    ({"lora_bias": True}, "lora_bias must not be set"),
    ({"bias": "all"}, "bias must be 'none', got 'all'"),
    ({"bias": "lora_only"}, "bias must be 'none', got 'lora_only'"),
    ({"target_parameters": ["w"]}, "target_parameters must not be set"),
    ({"layer_replication": [[0, 2]]}, "the layers are not those of the backbone"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices must not be set"),
    ({"alora_invocation_tokens": [1]}, "aLoRA switches on at a token"),
    ({"use_qalora": True}, "QA-LoRA pools its inputs"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights must be one that leaves the base"),
    ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
    ({"shiny_new": 3}, "fields that are set must be those of PEFT 0.21, got 'shiny_new'"),
    ({"r": 0}, "r must be from 1 to 4096, got 0"),
    ({"r": 10**9}, "r must be from 1 to 4096"),
    ({"r": 3}, "must have factors [3, in] and [out, 3], as its config says, got [2, 8]"),
    ({"rank_pattern": {"q": 3}}, "blocks.0.q must have factors [3, in]"),
    ({"lora_alpha": "much"}, "lora_alpha must be of type float"),
    ({"lora_alpha": 1e300}, "must be finite, got NaN or infinity"),
    ({"alpha_pattern": {"(q": 1}}, "a pattern must be a regular expression"),
    ({"alpha_pattern": {"(a+)+q": 1}}, "without repeated groups"),
    ({"alpha_pattern": {"a*" * 9: 1}}, "without repeated groups"),
    ({"alpha_pattern": {"a?" * 30 + "a" * 30: 1}}, "without repeated groups"),
    ({"alpha_pattern": {"(.|.)" * 30: 1}}, "without repeated groups"),
    ({"alpha_pattern": {"q": None}}, "alpha_pattern: q must be of type float"),
    ({"modules_to_save": "head"}, "modules_to_save must be of type list"),
]


@pytest.mark.parametrize(("fields", "words"), _FIELDS, ids=[str(f[0])[:40] for f in _FIELDS])
def test_configs(room: Room, fields: dict[str, Any], words: str) -> None:
    room.write(config=fields)
    assert words in room.refusal()


def _ones(*shape: int, dtype: str = "f4") -> np.ndarray:
    return np.ones(shape, dtype)


_NAN = np.full((2, 8), np.nan, "f4")
# By name: what is put into the file; None takes the tensor out.
_TENSORS: list[tuple[dict[str, Any], str]] = [
    ({"base_model.model.emb.lora_embedding_A": _ones(2, 8)}, "is an embedding's LoRA"),
    ({f"{Q}.lora_magnitude_vector": _ones(6)}, "is DoRA's, which cannot come in"),
    ({f"{Q}.lora_B.bias": _ones(6)}, "is no A or B of plain LoRA"),
    ({f"{Q}.base_layer.weight": _ones(6, 8)}, "save with save_embedding_layers=False"),
    ({"blocks.0.q.weight": _ones(6, 8)}, "does not begin with base_model.model."),
    ({f"{Q}.gamma": _ones(6)}, "is neither lora_A, lora_B nor a module's weight or bias"),
    ({f"{Q}.lora_A.default.weight": _ones(2, 8)}, "is there twice, for blocks.0.q of two adapters"),
    ({"base_model.model.norm.weight": _ones(6)}, "must be the head (head), got norm: train"),
    ({f"{Q}\x07.lora_A.weight": _ones(2, 8)}, "has no printable name"),
    ({f"{Q}.lora_B.weight": None}, "of every layer, blocks.0.q.lora_B missing: save it again"),
    ({f"{p}.lora_{x}.weight": None for p in (Q, K) for x in "AB"}, "of a layer, got none"),
    ({f"{Q}.lora_A.weight": _NAN}, "blocks.0.q.lora_A.weight must be finite, got NaN"),
    ({f"{Q}.lora_A.weight": _ones(2, 8, dtype="f8")}, "must be F32, F16, BF16, got F64"),
    ({f"{Q}.lora_A.weight": _ones(2, 8, 1, 1)}, "blocks.0.q must be a linear layer, got factors"),
    ({f"{Q}.lora_A.weight": _ones(2, 9)}, "blocks.0.q must be 8 -> 6, got 9 -> 6"),
    ({f"{HEAD}.weight": _ones(5, 7)}, "head head must have a weight [classes, 6], got [5, 7]"),
    ({f"{HEAD}.bias": _ones(4)}, "head head must have a bias [5], got [4]"),
    ({f"{HEAD}.weight": None}, "head head must be in modules_to_save whole"),
    ({f"{HEAD}.lora_A.weight": _ones(2, 6), f"{HEAD}.lora_B.weight": _ones(5, 2)},
     "head must be no target, got a layer of the head: use modules_to_save"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), _TENSORS, ids=[t[1][:40] for t in _TENSORS])
def test_tensors(room: Room, changes: dict[str, Any], words: str) -> None:
    room.write(tensors=changes)
    assert words in room.refusal()


def test_a_head_that_the_config_names_must_be_there(room: Room) -> None:
    none: dict[str, Any] = {f"{HEAD}.weight": None, f"{HEAD}.bias": None}
    room.write({"modules_to_save": ["head"]}, none)
    assert "head head must be in modules_to_save whole, got no weight of it" in room.refusal()
    room.write({"modules_to_save": ["score"]}, none)
    assert import_peft(room.path / "peft", room.path / "bundle").head is None
