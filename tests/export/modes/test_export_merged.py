"""Merged bundles: plain graphs with one adapter in the weights."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from expansions import flat

from regrow_export import ExportConfig, ExportRequest, export_bundle, slot_targets
from regrow_export.modes import merged_model
from regrow_format.basis import BasisCache
from regrow_format.errors import UsageError
from regrow_format.manifest import Manifest
from regrow_format.methods import get_method
from regrow_runtime import Bundle

NAMES = [
    "vit.encoder.layer.0.attention.attention.query",
    "vit.encoder.layer.2.intermediate.dense",
]


def _expand(adapter):
    return flat(get_method(adapter.method).expand(adapter, BasisCache()))


@pytest.mark.parametrize("method", ["nola", "lora"])
def test_the_adapter_is_in_the_weights(vit, run, tmp_path, adapter_for, merged_logits, method):
    storage = "int8" if method == "nola" else "fp32"
    adapter = adapter_for(vit, NAMES, method=method, storage=storage)
    manifest = export_bundle(
        vit, tmp_path / "b", ExportRequest(ExportConfig(mode="merged"), adapter=adapter)
    )
    x = np.random.default_rng(5).standard_normal((2, 1, 28, 28)).astype(np.float32)
    np.testing.assert_allclose(
        run(tmp_path / "b", {"pixel_values": x})["logits"],
        merged_logits(vit, {"pixel_values": x}, _expand(adapter)), rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    assert (manifest.mode, manifest.slots) == ("merged", ())
    assert manifest.adapter == adapter.digest()
    assert manifest.labels == vit.labels
    assert manifest.parity["adapter_effect"] > 0
    assert Manifest.load(tmp_path / "b") == manifest
    manifest.check_files(tmp_path / "b", hashes=True)


def test_the_graph_is_a_plain_one(vit, tmp_path, adapter_for):
    export_bundle(
        vit,
        tmp_path / "b",
        ExportRequest(ExportConfig(mode="merged"), adapter=adapter_for(vit, NAMES)),
    )
    model = onnx.load(str(tmp_path / "b" / "backbone.onnx"))
    assert [value.name for value in model.graph.input] == ["pixel_values"]
    assert not any("adapter" in tensor.name for tensor in model.graph.initializer)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_without_an_adapter_it_is_the_backbone(vit, run, tmp_path, adapter_for, precision):
    manifest = export_bundle(
        vit, tmp_path / "b", ExportRequest(ExportConfig(mode="merged", precision=precision))
    )
    assert (manifest.mode, manifest.adapter, manifest.slots) == ("merged", None, ())
    assert Manifest.load(tmp_path / "b") == manifest
    model = onnx.load(str(tmp_path / "b" / "backbone.onnx"))
    assert [value.name for value in model.graph.input] == ["pixel_values"]
    x = np.random.default_rng(5).standard_normal((2, 1, 28, 28)).astype(np.float32)
    with torch.inference_mode():
        want = vit.model(pixel_values=torch.from_numpy(x)).logits.numpy()
    share = 1e-5 if precision == "fp32" else 0.2
    got = run(tmp_path / "b", {"pixel_values": x})["logits"]
    assert np.abs(got - want).max() < share * np.abs(want).max()
    bundle = Bundle.open(tmp_path / "b")
    with pytest.raises(UsageError, match="must be swappable to take an adapter"):
        bundle.swap(adapter_for(vit, NAMES), name="a")


def test_the_adapters_head_replaces_the_models(vit, run, tmp_path, adapter_for, with_head):
    adapter = with_head(adapter_for(vit, NAMES), {"classifier": (64, 4)})
    manifest = export_bundle(
        vit, tmp_path / "b", ExportRequest(ExportConfig(mode="merged"), adapter=adapter)
    )
    x = np.zeros((1, 1, 28, 28), dtype=np.float32)
    assert run(tmp_path / "b", {"pixel_values": x})["logits"].shape == (1, 4)
    assert manifest.labels == adapter.head.labels
    assert manifest.graphs[0].outputs[0].shape == ("batch_size", 4)


def test_a_pair_merges_to_a_wider_pair(plain, plain_inputs, run, tmp_path, adapter_for):
    adapter = adapter_for(plain, ["pair", "stem"])
    manifest = export_bundle(
        plain,
        tmp_path / "b",
        ExportRequest(ExportConfig(mode="merged"), adapter=adapter, inputs=plain_inputs),
    )
    assert manifest.parity["adapter_max_abs"] < 1e-4
    expansion = _expand(adapter)
    kinds = get_method(adapter.method).expand(adapter, BasisCache())
    merged = merged_model(plain.model, kinds)
    pair = plain.model.get_submodule("pair")
    assert merged.get_submodule("pair").rank == pair.rank + 4
    with torch.inference_mode():
        x = torch.randn(5, 16)
        delta = torch.from_numpy(expansion["pair"]["A"] @ expansion["pair"]["B"])
        expected = pair(x) + x @ delta
        torch.testing.assert_close(merged.get_submodule("pair")(x), expected)


def test_a_gpt2_convolution_is_merged_in_its_own_orientation():
    from transformers.pytorch_utils import Conv1D

    model = torch.nn.Sequential(Conv1D(12, 4))
    a, b = np.ones((4, 1), dtype=np.float32), np.arange(12, dtype=np.float32)[None]
    merged = merged_model(model, {"0": {"low_rank": {"A": a, "B": b}}})
    x = torch.randn(3, 4)
    expected = model(x) + x @ torch.from_numpy(a @ b)
    torch.testing.assert_close(merged(x), expected)
    assert slot_targets(model, ["0"])[0].out_features == 12


def test_tied_weights_stay_with_the_other_layer():
    model = torch.nn.ModuleDict({"one": torch.nn.Linear(3, 3), "two": torch.nn.Linear(3, 3)})
    model["two"].weight = model["one"].weight
    before = model["one"].weight.clone()
    ones = np.ones((3, 1), dtype=np.float32)
    merged = merged_model(model, {"one": {"low_rank": {"A": ones, "B": ones.T}}})
    assert torch.equal(merged["two"].weight, before)
    assert torch.equal(model["one"].weight, before)
    torch.testing.assert_close(merged["one"].weight, before + 1)


def test_a_layer_that_cannot_be_merged_is_named():
    class Odd(torch.nn.Module):
        in_features, out_features = 3, 3

    ones = np.ones((3, 1), dtype=np.float32)
    with pytest.raises(UsageError, match="have merged_with to be merged, got 0: Odd; export it"):
        merged_model(torch.nn.Sequential(Odd()), {"0": {"low_rank": {"A": ones, "B": ones.T}}})
