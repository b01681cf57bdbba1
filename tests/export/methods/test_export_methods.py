"""Merged and seeded bundles of every method, on dense and factored layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from expansions import flat
from onnx.reference import ReferenceEvaluator

from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle, slot_targets
from regrow_export.methods import adapter_inputs
from regrow_export.modes import merged_model
from regrow_format.adapter import Coefficients
from regrow_format.basis import BasisCache, BasisSpec
from regrow_format.errors import MismatchError, UsageError
from regrow_format.manifest import Manifest
from regrow_format.methods import get_method
from regrow_runtime import Bundle

METHODS = ("lora", "dora", "vera", "fourierft", "ia3", "ssf", "bitfit")
LAYER = "vit.encoder.layer.1."


def _names(method: str) -> list[str]:
    names = [f"{LAYER}attention.attention.value", f"{LAYER}output.dense"]
    return [*names, f"{LAYER}layernorm_before"] if method in ("ssf", "bitfit") else names


def _expand(adapter):
    return flat(get_method(adapter.method).expand(adapter, BasisCache()))


@pytest.fixture
def inputs():
    x = np.random.default_rng(5).standard_normal((2, 1, 28, 28)).astype(np.float32)
    return {"pixel_values": x}


@pytest.mark.parametrize("method", METHODS)
def test_merged_is_the_adapter_in_the_weights(
    vit, run, tmp_path, inputs, adapter_for, merged_logits, method
):
    adapter = adapter_for(vit, _names(method), method=method)
    manifest = export_bundle(
        vit, tmp_path / "b", ExportRequest(ExportConfig(mode="merged"), adapter=adapter)
    )
    found = run(tmp_path / "b", inputs)["logits"]
    expected = merged_logits(vit, inputs, _expand(adapter))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert (manifest.mode, manifest.slots) == ("merged", ())
    assert manifest.parity["adapter_effect"] > 0
    model = onnx.load(str(tmp_path / "b" / "backbone.onnx"))
    assert [value.name for value in model.graph.input] == ["pixel_values"]


@pytest.mark.parametrize(
    ("method", "storage"), [*((method, "int4") for method in METHODS), ("fourierft", "fp16")]
)
def test_seeded_rebuilds_it_and_takes_another(
    vit, run, tmp_path, inputs, adapter_for, merged_logits, method, storage
):
    adapter, other = (
        adapter_for(vit, _names(method), method=method, storage=storage, seed=seed, draw=seed)
        for seed in (3, 4)
    )
    manifest = export_bundle(
        vit, tmp_path / "b", ExportRequest(ExportConfig(mode="seeded"), adapter=adapter)
    )
    assert Manifest.load(tmp_path / "b") == manifest
    found = run(tmp_path / "b", inputs)["logits"]
    expected = merged_logits(vit, inputs, _expand(adapter))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    fed = run(tmp_path / "b", inputs, adapter_inputs(other))["logits"]
    expected = merged_logits(vit, inputs, _expand(other))
    np.testing.assert_allclose(fed, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(fed - found).max() > 1e-3

    bundle = Bundle.open(tmp_path / "b")
    np.testing.assert_array_equal(bundle.run(inputs)["logits"], found)
    bundle.swap(other, name="other")
    np.testing.assert_array_equal(bundle.run(inputs)["logits"], fed)


@pytest.mark.parametrize("mode", ["merged", "seeded"])
@pytest.mark.parametrize("method", METHODS)
def test_pairs_pooled_features_and_grids(
    plain, plain_inputs, run, tmp_path, adapter_for, method, mode
):
    adapter = adapter_for(plain, ["stem", "pair", "pooled"], method=method)
    manifest = export_bundle(
        plain,
        tmp_path / "b",
        ExportRequest(ExportConfig(mode=mode), adapter=adapter, inputs=plain_inputs),
    )
    assert manifest.parity["adapter_max_abs"] < 1e-3
    assert manifest.parity["adapter_effect"] > 1e-3
    found = ReferenceEvaluator(str(tmp_path / "b" / "backbone.onnx")).run(None, plain_inputs)
    expected = run(tmp_path / "b", plain_inputs)
    for name, value in zip(("scores", "features"), found, strict=True):
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["merged", "seeded"])
def test_only_a_head(vit, run, tmp_path, inputs, make_adapter, with_head, mode):
    adapter = with_head(make_adapter((), method="head"), {"classifier": (64, 4)})
    manifest = export_bundle(
        vit, tmp_path / "b", ExportRequest(ExportConfig(mode=mode), adapter=adapter)
    )
    assert manifest.labels == adapter.head.labels
    with torch.inference_mode():
        x = torch.from_numpy(inputs["pixel_values"])
        features = vit.model.vit(x)[0][:, 0].numpy()
    (layer,) = adapter.head.layers
    expected = features @ layer.weight.T + layer.bias
    found = run(tmp_path / "b", inputs)["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    if mode == "seeded":
        bundle = Bundle.open(tmp_path / "b")
        bundle.swap(adapter, name="user")
        np.testing.assert_array_equal(bundle.run(inputs)["logits"], found)


def test_a_delta_merges_a_pair_to_a_dense_layer(plain):
    delta = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    merged = merged_model(plain.model, {"pair": {"delta": {"D": delta}}}).get_submodule("pair")
    assert type(merged) is torch.nn.Linear
    pair, x = plain.model.get_submodule("pair"), torch.randn(5, 16)
    torch.testing.assert_close(merged(x), pair(x) + x @ torch.from_numpy(delta))


def test_a_delta_and_a_bias_merge_into_gpt2s_convolution():
    from transformers.pytorch_utils import Conv1D

    model, x = torch.nn.Sequential(Conv1D(12, 4)), torch.randn(3, 4)
    delta, bias = np.arange(48, dtype=np.float32).reshape(4, 12), np.arange(12, dtype=np.float32)
    merged = merged_model(model, {"0": {"delta": {"D": delta}}})
    torch.testing.assert_close(merged(x), model(x) + x @ torch.from_numpy(delta))
    merged = merged_model(model, {"0": {"bias": {"b": bias}}})
    torch.testing.assert_close(merged(x), model(x) + torch.from_numpy(bias))


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Linear(4, 4, bias=False),
        torch.nn.LayerNorm(4),
        torch.nn.LayerNorm(4, elementwise_affine=False),
    ],
    ids=["no bias", "norm", "plain norm"],
)
def test_a_bias_merges_into_every_layer_that_can_have_one(layer):
    bias, x = np.arange(4, dtype=np.float32), torch.randn(3, 4)
    before = {name: value.clone() for name, value in layer.named_parameters()}
    merged = merged_model(torch.nn.Sequential(layer), {"0": {"bias": {"b": bias}}})
    torch.testing.assert_close(merged(x), layer(x) + torch.from_numpy(bias))
    assert before.keys() == dict(layer.named_parameters()).keys()
    assert all(torch.equal(before[name], value) for name, value in layer.named_parameters())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"delta": {"D": np.ones((3, 3))}},
            "must be Conv1D, Linear, ",
        ),
        (
            {"bias": {"b": np.ones(3)}},
            "LayerNorm, a pair of .* merged, got 0: Odd",
        ),
    ],
)
def test_what_cannot_be_merged_is_named(changes, match):
    class Odd(torch.nn.Module):
        in_features, out_features = 3, 3

    with pytest.raises(UsageError, match=match):
        merged_model(torch.nn.Sequential(Odd()), {"0": changes})


def test_saved_modules_replace_parameters(vit, run, tmp_path, inputs, adapter_for, merged_logits):
    weight, bias = np.full(64, 0.5, dtype=np.float16), np.arange(64, dtype=np.float32) / 64
    norm = f"{LAYER}layernorm_before"
    adapter = replace(
        adapter_for(vit, [f"{LAYER}output.dense"], method="lora"),
        extra={f"{norm}.weight": weight, f"{norm}.bias": bias},
    )
    export_bundle(vit, tmp_path / "b", ExportRequest(ExportConfig(mode="merged"), adapter=adapter))
    changed = ExportSource(_with_norm(vit.model, norm, weight, bias), vit.task, vit.backbone_id)
    expected = merged_logits(changed, inputs, _expand(adapter))
    np.testing.assert_allclose(
        run(tmp_path / "b", inputs)["logits"], expected, rtol=1e-3, atol=1e-4
    )
    with pytest.raises(UsageError, match=r"saved modules \(.*layernorm_before.bias\) to be fed"):
        export_bundle(
            vit, tmp_path / "c", ExportRequest(ExportConfig(mode="seeded"), adapter=adapter)
        )


def _with_norm(model, norm, weight, bias):
    import copy

    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.get_submodule(norm).weight.copy_(torch.from_numpy(weight))
        copied.get_submodule(norm).bias.copy_(torch.from_numpy(bias))
    return copied


def test_saved_modules_that_do_not_fit_are_refused(vit, tmp_path, adapter_for):
    norm = f"{LAYER}layernorm_before"
    values = {f"{norm}.weight": np.ones(3), f"{norm}.bia": np.ones(64)}
    adapter = replace(adapter_for(vit, _names("lora"), method="lora"), extra=values)
    with pytest.raises(MismatchError) as caught:
        export_bundle(
            vit, tmp_path / "b", ExportRequest(ExportConfig(mode="merged"), adapter=adapter)
        )
    first, second = caught.value.findings
    assert first == f"extra {norm}.weight: shape must be (64,), got (3,)"
    assert second.startswith(f"extra {norm}.bia: no such parameter; near: {norm}.bias")


def test_what_a_graph_cannot_rebuild_is_refused_with_the_reason(vit, tmp_path, adapter_for):
    adapter = adapter_for(vit, _names("vera"), method="vera")
    peft = replace(adapter, basis=BasisSpec("peft-mt19937", 1, {"in": 64, "out": 64}))
    with pytest.raises(UsageError, match="basis must be philox-sign for a graph to rebuild it"):
        export_bundle(vit, tmp_path / "b", ExportRequest(ExportConfig(mode="seeded"), adapter=peft))
    grouped = {
        name: Coefficients(part.values, np.ones((len(part.values), 8), np.float32), 8)
        for name, part in adapter.coefficients.items()
    }
    grouped = replace(adapter, coefficients=grouped, group=8)
    with pytest.raises(UsageError, match="one scale per vector in a graph, got one per group of 8"):
        export_bundle(
            vit, tmp_path / "b", ExportRequest(ExportConfig(mode="seeded"), adapter=grouped)
        )
    assert list(tmp_path.iterdir()) == []


def test_a_norm_is_no_target_of_lora(vit, tmp_path, make_adapter):
    targets = slot_targets(vit.model, _names("bitfit"), ("bias",))
    adapter = make_adapter(targets, method="lora")
    with pytest.raises(MismatchError) as caught:
        export_bundle(
            vit, tmp_path / "b", ExportRequest(ExportConfig(mode="merged"), adapter=adapter)
        )
    (finding,) = caught.value.findings
    assert finding.startswith(f"{LAYER}layernorm_before: no such linear layer")
