"""What the linear layers of transformers are called, and so what they do.

One list for Hugging Face's families and the usual plain modules. A layer is judged by its last name
and by the modules that it lies in: `c_proj` is attention's in GPT-2's `attn`, the MLP's in `mlp`.
"""

from __future__ import annotations

__all__ = ["FUSED", "PROJECTIONS", "SETS", "fused_in", "role_of"]

_QUERY = frozenset(
    {"query", "query_proj", "q", "q_proj", "q_lin", "q_attn", "wq", "to_q", "linear_q"}
)
_KEY = frozenset({"key", "key_proj", "k", "k_proj", "k_lin", "wk", "to_k", "linear_k"})
_VALUE = frozenset({"value", "value_proj", "v", "v_proj", "v_lin", "wv", "to_v", "linear_v"})
PROJECTIONS = _QUERY | _KEY | _VALUE
# What fuses several projections, and which.
FUSED = {
    **dict.fromkeys(
        ("c_attn", "qkv", "qkv_proj", "to_qkv", "query_key_value", "Wqkv", "wqkv", "in_proj"),
        "query, key and value",
    ),
    **dict.fromkeys(("kv", "kv_proj", "to_kv", "key_value"), "key and value"),
    "gate_up_proj": "gate and up",
}
_PARTS = {
    "query, key and value": PROJECTIONS,
    "key and value": _KEY | _VALUE,
    "gate and up": frozenset({"gate_proj", "up_proj"}),
}
_OUTPUT = frozenset({"out_proj", "o_proj", "out_lin", "o", "wo", "to_out", "linear_out"})
# Names of attention's output projection that say so only inside of attention.
_OUTPUT_INSIDE = frozenset({"dense", "proj", "c_proj", "Wo", "out"})
_MLP = frozenset(
    {
        "fc1", "fc2", "fc_in", "fc_out", "lin1", "lin2", "linear1", "linear2", "dense1", "dense2",
        "c_fc", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "intermediate_dense",
        "output_dense", "dense_h_to_4h", "dense_4h_to_h", "w1", "w2", "w3", "ffn", "ffn_output",
    }
)  # fmt: skip
_MLP_MODULES = frozenset(
    {"mlp", "ffn", "ff", "feed_forward", "feedforward", "densereludense", "intermediate", "output"}
)

# The named sets of targets, and the roles that belong to them.
SETS = {
    "@qv": frozenset({"query", "value", "fused"}),
    "@attention": frozenset({"query", "key", "value", "fused", "output"}),
    "@mlp": frozenset({"mlp"}),
}


def role_of(path: str) -> str | None:
    """query, key, value, fused, output (of attention), mlp, or None for anything else.

    Args:
        path: of a linear layer, from its block on: `attention.self.query`.
    """
    *modules, last = path.split(".")
    inside = any("attn" in part or "attention" in part for part in map(str.lower, modules))
    for role, names in (("query", _QUERY), ("key", _KEY), ("value", _VALUE)):
        if last in names:
            return role
    if FUSED.get(last) in ("query, key and value", "key and value") and (
        inside or last != "in_proj"  # Mamba's is another thing
    ):
        return "fused"
    if inside:
        named = last in _OUTPUT or "to_out" in modules
        return "output" if named or last in _OUTPUT_INSIDE else None
    if last in _MLP or not _MLP_MODULES.isdisjoint(part.lower() for part in modules):
        return "mlp"
    return "output" if last in _OUTPUT else None


def fused_in(name: str) -> frozenset[str]:
    """The names of fused layers that may hold what `name` says: `c_attn`, … for `q_proj`."""
    return frozenset(fused for fused, parts in FUSED.items() if name in _PARTS[parts])
