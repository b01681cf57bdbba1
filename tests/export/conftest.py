"""Tiny models, made adapters, and a plain ONNX Runtime session to run bundles with."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from regrow_export import ExportConfig, ExportRequest, ExportSource, kinds_for, slot_targets
from regrow_format.adapter import Adapter, Coefficients, Head, HeadLayer, Target
from regrow_format.methods import get_method

os.environ.setdefault("HF_HUB_OFFLINE", "1")
BACKBONE = "sha256:" + "ab" * 32
CONFIGS: dict[str, dict[str, Any]] = {
    "nola": {"k": 32, "l": 20, "rank": 4, "c": 1.0, "shared": True},
    "vera": {"rank": 6},
    "fourierft": {"n": 20, "alpha": 64.0},
    "lora": {"rank": 2, "alpha": 2.0, "rslora": False},
    "ia3": {"feedforward": ["a", "down", "output.dense", "pair"]},
    "ssf": {},
    "bitfit": {},
    "head": {},
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"an export must not use the network, got {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def asked() -> Callable[..., ExportRequest]:
    """asked(**options): a request of settings and objects, told apart by their names."""
    settings = {item.name for item in fields(ExportConfig)}

    def make(**options: Any) -> ExportRequest:
        config = ExportConfig(**{k: v for k, v in options.items() if k in settings})
        return ExportRequest(config, **{k: v for k, v in options.items() if k not in settings})

    return make


class Pair(nn.Module):
    """Two factors with the interface of a PELA pair: in -> rank -> out."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))

    def merged_with(self, a: torch.Tensor, b: torch.Tensor) -> Pair:
        wide = Pair(self.in_features, self.out_features, self.rank + a.shape[1])
        with torch.no_grad():
            wide.down.weight.copy_(torch.cat([self.down.weight, a.T]))
            wide.up.weight.copy_(torch.cat([self.up.weight, b.T], dim=1))
            wide.up.bias.copy_(self.up.bias)
        return wide


class Plain(nn.Module):
    """No Hugging Face model: targets see 4-D, 3-D and pooled 2-D inputs, one is a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 16)
        self.pair = Pair(16, 16, 4)
        self.pooled = nn.Linear(16, 16)
        self.fc = nn.Linear(16, 5, bias=False)
        self.idle = nn.Linear(16, 16)  # never called

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> dict[str, torch.Tensor]:
        grid = torch.tanh(self.stem(x))  # (batch, 3, 4, 16)
        tokens = torch.tanh(self.pair(grid.flatten(1, 2))) * gate[:, None, None]
        pooled = torch.tanh(self.pooled(tokens.mean(1)))
        return {"scores": self.fc(pooled), "features": tokens}


@pytest.fixture(scope="session")
def vit() -> ExportSource:
    """4 layers, 64 wide, 17 tokens, 10 classes."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        image_size=28, patch_size=7, num_channels=1, num_labels=10,
    )  # fmt: skip
    labels = tuple(str(i) for i in range(10))
    model = ViTForImageClassification(config).eval()
    return ExportSource(model, "image-classification", BACKBONE, ("classifier",), labels)


def _text_config() -> dict[str, int]:
    return {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "vocab_size": 100, "num_labels": 3,
    }  # fmt: skip


@pytest.fixture(scope="session")
def bert() -> ExportSource:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(2)
    model = BertForSequenceClassification(BertConfig(**_text_config())).eval()
    return ExportSource(model, "text-classification", BACKBONE, ("classifier",), ("a", "b", "c"))


@pytest.fixture(scope="session")
def roberta() -> ExportSource:
    """Its head has two layers."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(3)
    model = RobertaForSequenceClassification(RobertaConfig(**_text_config())).eval()
    head = ("classifier.dense", "classifier.out_proj")
    return ExportSource(model, "text-classification", BACKBONE, head, ("a", "b", "c"))


@pytest.fixture(scope="session")
def plain() -> ExportSource:
    torch.manual_seed(4)
    return ExportSource(Plain().eval(), "custom", BACKBONE, ("fc",), tuple("vwxyz"))


@pytest.fixture(scope="session")
def plain_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 6)).astype(np.float32)
    return {"x": x, "gate": np.array([1.0, 0.5], dtype=np.float32)}


def _values(
    method: str, config: Mapping[str, Any], targets: Sequence[Target], storage: str, rng: Any
) -> dict[str, Coefficients]:
    found = get_method(method)
    constants = found.constants(config, targets)
    return {
        name: Coefficients.store(
            3 * rng.standard_normal(shape).astype(np.float32), constants[name], storage
        )
        for name, shape in found.layout(config, targets).items()
    }


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Adapter]:
    """An adapter with random coefficients, large enough that its effect is plain to see."""

    def make(
        targets: Sequence[Target],
        *,
        method: str = "nola",
        storage: str = "int8",
        seed: int = 2**63 + 5,
        draw: int = 0,
        **config: Any,
    ) -> Adapter:
        config = {**CONFIGS[method], **config}
        values = _values(method, config, targets, storage, np.random.default_rng(draw))
        return Adapter(method, config, seed, BACKBONE, tuple(targets), values, storage)

    return make


@pytest.fixture(scope="session")
def adapter_for(make_adapter: Callable[..., Adapter]) -> Callable[..., Adapter]:
    """As `make_adapter`, for module paths of a source's model."""

    def make(source: ExportSource, names: Sequence[str], **options: Any) -> Adapter:
        kinds = kinds_for(options.get("method", "nola"))
        return make_adapter(slot_targets(source.model, names, kinds), **options)

    return make


@pytest.fixture(scope="session")
def with_head() -> Callable[..., Adapter]:
    """An adapter with a random head of some classes."""

    def make(adapter: Adapter, widths: Mapping[str, tuple[int, int]]) -> Adapter:
        rng = np.random.default_rng(9)
        layers = tuple(
            HeadLayer(
                name,
                rng.standard_normal((classes, wide)).astype(np.float32),
                rng.standard_normal(classes).astype(np.float32),
            )
            for name, (wide, classes) in widths.items()
        )
        labels = tuple(f"label {i}" for i in range(len(layers[-1].bias)))
        return replace(adapter, head=Head(layers, labels))

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., dict[str, np.ndarray]]:
    """Run a bundle's graph: run(folder, inputs, feeds) gives outputs by name."""
    import onnxruntime as ort

    def call(
        folder: Path,
        inputs: Mapping[str, np.ndarray],
        feeds: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(folder / "backbone.onnx"), options)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, {**inputs, **(feeds or {})}), strict=True))

    return call


@pytest.fixture(scope="session")
def merged_logits() -> Callable[..., np.ndarray]:
    """Logits of a Hugging Face model with an expansion in its weights and biases, by torch.

    Targets are nn.Linear or nn.LayerNorm; parts are A and B, D, s, t, b, or several of them.
    """

    def call(source: ExportSource, inputs: Mapping[str, np.ndarray], expansion: Any) -> np.ndarray:
        weights = {}
        for name, parts in expansion.items():
            layer = source.model.get_submodule(name)
            weights[f"{name}.weight"], weights[f"{name}.bias"] = _changed(layer, parts)
        tensors = {name: torch.from_numpy(value.copy()) for name, value in inputs.items()}
        with torch.inference_mode():
            result = torch.func.functional_call(source.model, weights, kwargs=tensors)
        return result.logits.numpy()

    return call


def _changed(layer: Any, parts: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a Linear or a LayerNorm with an expansion's parts in them."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    own = {name: torch.from_numpy(np.array(value)) for name, value in parts.items()}
    if "A" in own:
        weight = weight + (own["A"] @ own["B"]).T
    if "D" in own:
        weight = weight + own["D"].T
    if "t" in own:
        weight = weight * (1 + own["t"].reshape(-1))
    if "s" in own:
        factor = 1 + own["s"].reshape(-1)
        rows = factor[:, None] if weight.dim() > 1 else factor
        weight, bias = rows * weight, factor * bias
    return weight, bias + own["b"].reshape(-1) if "b" in own else bias
