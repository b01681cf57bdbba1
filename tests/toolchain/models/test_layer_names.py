"""What a layer does, told from its path."""

from __future__ import annotations

import pytest

from regrow_toolchain.models.layer_names import FUSED, fused_in, role_of


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("0.attention.self.query", "query"),
        ("0.attn.q_attn", "query"),
        ("0.layer.1.EncDecAttention.k", "key"),
        ("0.self_attention_block.linear_v", "value"),
        ("0.wv", "value"),
        ("0.attn.c_attn", "fused"),
        ("0.self_attention.query_key_value", "fused"),
        ("0.attn.in_proj", "fused"),
        ("0.attention.output.dense", "output"),
        ("0.attn.to_out.0", "output"),
        ("0.attn.c_proj", "output"),
        ("0.attn.Wo", "output"),
        ("0.wo", "output"),
        ("0.output.dense", "mlp"),
        ("0.mlp.c_proj", "mlp"),
        ("0.mlp.Wo", "mlp"),
        ("0.layer.1.DenseReluDense.wo", "mlp"),
        ("0.mlp.0", "mlp"),
        ("0.albert_layers.0.ffn_output", "mlp"),
        ("0.experts.3.w2", "mlp"),
        # Neither attention nor the MLP, whatever they lie in.
        ("0.attention.self.continuous_position_bias_mlp.0", None),
        ("0.downsample.reduction", None),
        ("0.mixer.in_proj", None),
        ("0.gate", None),
    ],
)
def test_roles(path: str, role: str | None) -> None:
    assert role_of(path) == role


def test_what_may_hold_a_projection() -> None:
    assert {"c_attn", "qkv", "in_proj"} <= fused_in("q_proj")
    assert "kv" not in fused_in("q_proj")
    assert {"kv", "qkv"} <= fused_in("value")
    assert fused_in("up_proj") == {"gate_up_proj"}
    assert fused_in("dense") == set()
    assert all(fused_in(name) == set() for name in FUSED)
