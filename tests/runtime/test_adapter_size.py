"""What a file takes beyond its coefficients: at most 700 bytes, and 90 per target."""

from __future__ import annotations

import numpy as np
import pytest

from regrow_format.adapter import Adapter, Coefficients, Head, HeadLayer, Probe, Target
from regrow_format.basis import BasisSpec
from regrow_format.methods import get_method

BACKBONE = "sha256:" + "ab" * 32


def _bert(layers: int, width: int) -> tuple[Target, ...]:
    """Query and value, as Hugging Face's BERT and ViT name them; the names are long."""
    names = [
        f"encoder.layer.{i}.attention.attention.{part}"
        for i in range(layers)
        for part in ("query", "value")
    ]
    return tuple(Target(name, width, width) for name in sorted(names))


def _llama(layers: int) -> tuple[Target, ...]:
    """Every linear layer of LLaMA-2 7B: four shapes."""
    shapes = {
        "mlp.down_proj": (11008, 4096), "mlp.gate_proj": (4096, 11008),
        "mlp.up_proj": (4096, 11008), "self_attn.k_proj": (4096, 4096),
        "self_attn.o_proj": (4096, 4096), "self_attn.q_proj": (4096, 4096),
        "self_attn.v_proj": (4096, 4096),
    }  # fmt: skip
    names = [(f"model.layers.{i}.{part}", shapes[part]) for i in range(layers) for part in shapes]
    return tuple(Target(name, *shape) for name, shape in sorted(names))


CONFIGS = {
    "nola": {"k": 1000, "l": 1000, "rank": 8, "c": 0.5, "shared": True},
    "vera": {"rank": 256},
    "fourierft": {"n": 1000, "alpha": 300.0},
    "lora": {"rank": 1, "alpha": 16.0, "rslora": True},
    "ia3": {"feedforward": ["down_proj", "query"]},
    "ssf": {},
    "bitfit": {},
    "head": {},
}


def _adapter(method: str, targets: tuple[Target, ...], storage: str, **more) -> Adapter:
    config, kind = CONFIGS[method], get_method(method)
    constants = kind.constants(config, targets)
    group = more.get("group")
    values = {
        name: Coefficients.store(np.ones(shape, np.float32), constants[name], storage, group)
        for name, shape in kind.layout(config, targets).items()
    }
    seed = 2**64 - 1  # of as many digits as there are
    # As many numbers as training writes, and a tolerance of as many digits.
    more = {"probe": Probe(np.ones(32, np.float16), 0.00012, "0123456789abcdef"), **more}
    return Adapter(method, config, seed, BACKBONE, targets, values, storage, **more)


def _overhead(adapter: Adapter) -> int:
    """Bytes beyond codes, scales, a stored basis, the head's numbers and its labels."""
    bits = {"fp32": 32, "fp16": 16}.get(adapter.storage) or int(adapter.storage.removeprefix("int"))
    used = 0
    for part in adapter.coefficients.values():
        rows, length = part.values.shape
        used += rows * -(-length * bits // 8) + part.scale.nbytes
    used += sum(array.nbytes for array in adapter.stored_basis.values())
    if adapter.head:
        used += sum(2 * (layer.weight.size + layer.bias.size) for layer in adapter.head.layers)
        used += sum(len(label) + 5 for label in adapter.head.labels)  # quotes are escaped in JSON
    return len(adapter.to_bytes()) - used


def test_the_example_of_the_readme():
    """ViT-B, QV, NOLA with k = l = 1000 in 4 bits: 24,000 bytes of codes."""
    adapter = _adapter("nola", _bert(12, 768), "int4")
    assert len(adapter.to_bytes()) <= 25_500
    assert _overhead(adapter) <= 700 + 90 * 24


@pytest.mark.parametrize("storage", ["int4", "fp32"])
@pytest.mark.parametrize("targets", [_bert(12, 768), _llama(4)], ids=["vit", "llama"])
@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_overhead(method, targets, storage):
    head = Head((HeadLayer("classifier", np.ones((2, 16), np.float32), np.ones(2, np.float32)),),
                ("negative", "positive"))  # fmt: skip
    more = {"head": head} if method == "head" else {}
    adapter = _adapter(method, () if method == "head" else targets, storage, **more)
    assert _overhead(adapter) <= 700 + 90 * len(adapter.targets)


@pytest.mark.parametrize(
    ("method", "basis"),
    [
        ("vera", BasisSpec("peft-mt19937", 1, {"in": 11008, "out": 11008, "dtype": "bfloat16"})),
        ("fourierft", BasisSpec("peft-mt19937")),
    ],
)
def test_overhead_of_what_comes_from_peft(method, basis):
    adapter = _adapter(method, _bert(12, 768), "fp32", basis=basis)
    assert _overhead(adapter) <= 700 + 90 * 24


def test_overhead_of_stored_places_and_grouped_scales():
    targets = _llama(2)
    places = {
        f"places.{t.out_features}x{t.in_features}": np.arange(1000, dtype=np.uint32)
        for t in targets
    }
    adapter = _adapter(
        "fourierft", targets, "int4", basis=BasisSpec("stored"), stored_basis=places, group=64
    )
    assert _overhead(adapter) <= 700 + 90 * len(targets)
