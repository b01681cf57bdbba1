"""Seeded bundles: the basis is rebuilt inside the graph, for the adapter built in or one fed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from expansions import expanded

from regrow_export import ExportConfig, ExportRequest, export_bundle, find_linears
from regrow_export.methods import adapter_inputs
from regrow_format.manifest import Manifest


def _names(source) -> list[str]:
    return [name for name in find_linears(source.model) if name not in source.head]


def _expected(source, adapter, inputs, merged_logits):
    return merged_logits(source, inputs, expanded(adapter))


@pytest.fixture
def inputs():
    x = np.random.default_rng(5).standard_normal((2, 1, 28, 28)).astype(np.float32)
    return {"pixel_values": x}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("storage", ["int4", "fp16"])
def test_nothing_fed_is_the_adapter_and_another_may_be_fed(
    vit, run, tmp_path, inputs, adapter_for, merged_logits, storage, shared
):
    adapter = adapter_for(vit, _names(vit), storage=storage, shared=shared)
    manifest = export_bundle(
        vit, tmp_path / "b", ExportRequest(ExportConfig(mode="seeded"), adapter=adapter)
    )
    found = run(tmp_path / "b", inputs)["logits"]
    expected = _expected(vit, adapter, inputs, merged_logits)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)

    other = adapter_for(vit, _names(vit), storage=storage, shared=shared, seed=7, draw=1)
    feeds = {manifest.seeded.inputs[name]: v for name, v in adapter_inputs(other).items()}
    fed = run(tmp_path / "b", inputs, feeds)["logits"]
    expected = _expected(vit, other, inputs, merged_logits)
    np.testing.assert_allclose(fed, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(fed - found).max() > 1e-3


def test_the_manifest_says_how_to_feed_it(vit, tmp_path, adapter_for):
    adapter = adapter_for(vit, _names(vit), storage="int4")
    manifest = export_bundle(
        vit, tmp_path / "b", ExportRequest(ExportConfig(mode="seeded"), adapter=adapter)
    )
    assert Manifest.load(tmp_path / "b") == manifest
    manifest.check_files(tmp_path / "b", hashes=True)
    spec = manifest.seeded
    assert (spec.method, spec.storage, dict(spec.config)) == ("nola", "int8", dict(adapter.config))
    assert spec.targets == tuple(target.name for target in adapter.targets)
    assert set(spec.inputs) == {"seed", "alpha", "alpha.scale", "beta", "beta.scale"}
    assert manifest.adapter == adapter.digest()
    assert [slot.kind for slot in manifest.slots] == ["head"]
    assert [value.name for value in manifest.graphs[0].inputs] == ["pixel_values"]
    assert manifest.parity["fed_max_abs"] < 1e-3


def test_its_head_is_a_slot_with_the_adapters_classes(
    vit, run, tmp_path, inputs, adapter_for, with_head
):
    adapter = with_head(adapter_for(vit, _names(vit)[:2]), {"classifier": (64, 4)})
    manifest = export_bundle(
        vit, tmp_path / "b", ExportRequest(ExportConfig(mode="seeded"), adapter=adapter)
    )
    assert manifest.labels == adapter.head.labels
    assert run(tmp_path / "b", inputs)["logits"].shape == (2, 4)
    feeds = {
        "classifier.weight": np.zeros((1, 64, 3), dtype=np.float32),
        "classifier.bias": np.ones((1, 1, 3), dtype=np.float32),
    }
    np.testing.assert_array_equal(run(tmp_path / "b", inputs, feeds)["logits"], np.ones((2, 3)))


def test_the_basis_is_not_folded_into_constants_at_load(plain, plain_inputs, tmp_path, adapter_for):
    import onnxruntime as ort

    adapter = adapter_for(plain, ["stem", "pair"], k=500, l=500)
    export_bundle(
        plain,
        tmp_path / "b",
        ExportRequest(ExportConfig(mode="seeded"), adapter=adapter, inputs=plain_inputs),
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(str(tmp_path / "b" / "backbone.onnx"), options)
    loaded = onnx.load(str(tmp_path / "loaded.onnx"), load_external_data=False)
    largest = max(np.prod(tensor.dims) for tensor in loaded.graph.initializer)
    # 500 vectors of 64 signs would be 32,000 entries; the coefficients are [2, 500].
    assert largest <= 1000
    operators = {node.op_type for node in loaded.graph.node}
    assert {"BitShift", "BitwiseXor"} <= operators


def test_only_standard_operators_are_used(plain, plain_inputs, tmp_path, adapter_for):
    adapter = adapter_for(plain, ["stem", "pair"])
    export_bundle(
        plain,
        tmp_path / "b",
        ExportRequest(ExportConfig(mode="seeded"), adapter=adapter, inputs=plain_inputs),
    )
    model = onnx.load(str(tmp_path / "b" / "backbone.onnx"))
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not any("Random" in node.op_type for node in model.graph.node)
