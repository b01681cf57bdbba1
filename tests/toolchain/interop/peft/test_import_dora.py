"""DoRA of PEFT: what is refused, and how rounding keeps the lengths that PEFT trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from expansions import expanded
from torch import nn

from regrow_format.adapter import STORAGE
from regrow_toolchain.interop import import_peft
from regrow_toolchain.models import load_backbone, quiet_transformers

Room = Any  # see conftest.py
Q, K = "base_model.model.blocks.0.q", "base_model.model.blocks.0.k"
VECTOR = "lora_magnitude_vector"
DORA = {"use_dora": True}


def _ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def _magnitudes(**changes: Any) -> dict[str, Any]:
    return {f"{Q}.{VECTOR}": _ones(6), f"{K}.{VECTOR}": _ones(4)} | changes


def test_a_bundle_has_no_weights_to_measure(room: Room) -> None:
    room.write(DORA, _magnitudes())
    said = room.refusal()
    assert "must be a backbone for DoRA, which needs the norms of its weights, got a bun" in said
    assert "give the folder that it was exported from" in said


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (_magnitudes(**{f"{Q}.{VECTOR}": _ones(5)}), f"q must have {VECTOR} [6], got [5]"),
        (_magnitudes(**{f"{Q}.{VECTOR}": _ones(6, 1)}), f"q must have {VECTOR} [6], got [6, 1]"),
        (_magnitudes(**{f"{Q}.{VECTOR}.default": _ones(6)}), "is there twice, for blocks.0.q"),
        ({f"{Q}.{VECTOR}": _ones(6)}, f"blocks.0.k.{VECTOR} missing: save it again"),
    ],
)
def test_magnitudes_that_do_not_fit(room: Room, tensors: dict[str, Any], words: str) -> None:
    room.write(DORA, tensors)
    assert words in room.refusal("backbone")


def test_without_torch_it_says_what_to_install(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow_toolchain.interop.peft.base_model._has_torch", lambda: False)
    room.write(DORA, _magnitudes())
    assert "must be loaded for its weights, which takes torch, got none: pip install" in (
        room.refusal("backbone")
    )


@pytest.mark.parametrize("storage", STORAGE)
def test_rounding_keeps_lengths_and_biases(tmp_path: Path, storage: str) -> None:
    """Rows of the imported weight are as long as PEFT's, within what s itself is rounded by."""
    import transformers

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    with quiet_transformers():
        model.save_pretrained(tmp_path / "gpt2")
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True
    )
    trained = peft.get_peft_model(load_backbone(tmp_path / "gpt2").model, config)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    trained.save_pretrained(tmp_path / "peft")
    adapter = import_peft(tmp_path / "peft", tmp_path / "gpt2", storage=storage)
    bits = STORAGE[storage]
    step = 2.0**-10 if bits == 16 else 1 / (2 ** (bits - 1) - 1) if bits < 16 else 1e-6
    for name, parts in expanded(adapter).items():
        layer: nn.Module = trained.get_submodule(f"base_model.model.{name}")
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().numpy()
        weight = layer.base_layer.weight.detach().double().numpy() + parts["A"] @ parts["B"]
        lengths = np.linalg.norm(weight * (1 + parts["s"]), axis=0)
        allowed = 0.51 * step * np.abs(parts["s"]).max() * np.linalg.norm(weight, axis=0)
        assert (np.abs(lengths - np.abs(magnitude)) <= allowed + 1e-5).all(), name
        wanted = -parts["s"] * layer.base_layer.bias.detach().numpy()
        assert np.abs(parts["b"] - wanted).max() <= 0.51 * step * np.abs(wanted).max() + 1e-7
