"""DoRA in bundles: three kinds of slot to a layer, beside adapters of other methods, and merged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from expansions import expanded

from regrow_export import ExportConfig, ExportRequest, export_bundle
from regrow_export.layers import LowRankLinear
from regrow_export.modes import merged_model
from regrow_format.adapter import Target
from regrow_format.basis import BasisCache
from regrow_format.errors import MismatchError, UsageError
from regrow_format.methods import get_method
from regrow_runtime import Bundle

LAYER = "vit.encoder.layer.1."
NAMES = [f"{LAYER}attention.attention.query", f"{LAYER}output.dense"]


@pytest.fixture(scope="module")
def folder(vit, tmp_path_factory):
    """A bundle that was exported for DoRA."""
    folder = tmp_path_factory.mktemp("dora") / "b"
    request = ExportRequest(ExportConfig(targets=NAMES, methods=("dora",)))
    manifest = export_bundle(vit, folder, request)
    kinds = [slot.kind for slot in manifest.slots if slot.target == NAMES[0]]
    assert kinds == ["low_rank", "scale", "bias"]
    assert manifest.parity["mixed_max_abs"] < 1e-4
    return folder


@pytest.fixture
def pixels():
    return np.random.default_rng(5).standard_normal((4, 1, 28, 28)).astype(np.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_every_sample_has_its_own_beside_other_methods(
    vit, folder, pixels, adapter_for, merged_logits, bias
):
    adapters = {
        "dora": adapter_for(vit, NAMES, method="dora", storage="int4", bias=bias),
        "lora": adapter_for(vit, NAMES, method="lora", draw=1),
        "rank": adapter_for(vit, NAMES[:1], method="dora", draw=2, rank=5),
    }
    bundle = Bundle.open(folder, threads=1)
    for name, adapter in adapters.items():
        bundle.load(adapter, name=name)
    names = ["dora", None, "lora", "rank"]
    found = bundle.run({"pixel_values": pixels}, adapters=names)["logits"]
    for row, name in enumerate(names):
        inputs = {"pixel_values": pixels[row : row + 1]}
        expansion = expanded(adapters[name]) if name else {}
        wanted = merged_logits(vit, inputs, expansion)
        np.testing.assert_allclose(found[row], wanted[0], rtol=1e-3, atol=1e-4)
        if name:
            bundle.swap(name)
            alone = bundle.run(inputs)["logits"]
            np.testing.assert_allclose(alone, wanted, rtol=1e-3, atol=1e-4)
            base = merged_logits(vit, inputs, {})
            assert np.abs(wanted - base).max() > 0.01


def test_blends_and_other_strengths_are_refused(vit, folder, adapter_for):
    bundle = Bundle.open(folder, threads=1)
    bundle.load(adapter_for(vit, NAMES, method="dora"), name="one")
    bundle.load(adapter_for(vit, NAMES, method="lora"), name="two")
    why = r"must add up, got .*scale.* of .*, which multiply each other: merge them, or swap"
    with pytest.raises(UsageError, match=why):
        bundle.swap({"one": 0.5, "two": 0.5}, name="both")
    with pytest.raises(UsageError, match=why):
        bundle.load(adapter_for(vit, NAMES, method="dora"), name="half", scale=0.5)
    assert set(bundle.residents) == {"one", "two"}


def test_a_bundle_for_lora_says_what_is_missing(vit, adapter_for, tmp_path):
    export_bundle(vit, tmp_path / "b", ExportRequest(ExportConfig(targets=NAMES)))
    with pytest.raises(MismatchError, match="needs low_rank and scale and bias slots, got low_ran"):
        Bundle.open(tmp_path / "b").load(adapter_for(vit, NAMES, method="dora"), name="x")


def _layers():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    pair = LowRankLinear(6, 5, 3, bias=True)
    return {"linear": torch.nn.Linear(6, 5), "no bias": torch.nn.Linear(6, 5, bias=False),
            "convolution": Conv1D(5, 6), "pair": pair}  # fmt: skip


@pytest.mark.parametrize("layer", _layers().values(), ids=_layers().keys())
def test_it_merges_into_every_linear_layer(make_adapter, layer):
    """Factors, then scales, then biases, in the weights: (y + x A B)(1 + s) + b."""
    target, x = Target("0", 6, 5), torch.randn(3, 6)
    adapter = make_adapter([target], method="dora")
    changes = get_method("dora").expand(adapter, BasisCache())
    parts = {name: torch.from_numpy(value) for name, value in expanded(adapter)["0"].items()}
    wanted = (layer(x) + x @ parts["A"] @ parts["B"]) * (1 + parts["s"]) + parts["b"]
    merged = merged_model(torch.nn.Sequential(layer), changes)
    torch.testing.assert_close(merged(x), wanted, rtol=1e-4, atol=1e-4)
