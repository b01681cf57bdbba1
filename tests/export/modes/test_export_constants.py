"""Seeded bundles with constants: nothing is fed, and the basis is still made as they run."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from expansions import flat
from onnx.reference import ReferenceEvaluator

from regrow_export import ExportConfig, ExportRequest, export_bundle
from regrow_format.methods import get_method
from regrow_runtime import BasisCache, Bundle, UsageError

LAYER = "vit.encoder.layer.2."
NAMES = [f"{LAYER}attention.attention.query", f"{LAYER}intermediate.dense"]
LARGE = {
    "nola": {"k": 600, "l": 500, "rank": 8},
    "vera": {"rank": 900},
    "fourierft": {"n": 300},
}


@pytest.fixture
def pixels():
    return np.random.default_rng(5).standard_normal((3, 1, 28, 28)).astype(np.float32)


@pytest.mark.parametrize("method", ["nola", "vera", "fourierft", "lora", "ia3", "ssf", "bitfit"])
def test_the_adapter_is_built_in(
    vit, adapter_for, with_head, merged_logits, pixels, tmp_path, method
):
    adapter = adapter_for(vit, NAMES, method=method, storage="int4")
    manifest = export_bundle(
        vit,
        tmp_path / "b",
        ExportRequest(ExportConfig(mode="seeded", constants=True), adapter=adapter),
    )
    bundle = Bundle.open(tmp_path / "b", threads=1)
    inputs = {"pixel_values": pixels}
    found = bundle.run(inputs)["logits"]
    expansion = flat(get_method(method).expand(adapter, BasisCache()))
    wanted = merged_logits(vit, inputs, expansion)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    assert np.abs(found - merged_logits(vit, inputs, {})).max() > 0.01
    assert manifest.seeded.inputs == {}
    assert manifest.slots == ()
    assert manifest.parity["adapter_effect"] > 0.01
    model = onnx.load(str(tmp_path / "b" / "backbone.onnx"))
    assert [value.name for value in model.graph.input] == ["pixel_values"]
    with pytest.raises(
        UsageError, match=r"got one whose adapter is built in .* without --constants"
    ):
        bundle.swap(adapter, name="x")


def test_its_head_is_built_in_too(vit, adapter_for, with_head, pixels, tmp_path):
    adapter = with_head(adapter_for(vit, NAMES), {"classifier": (64, 3)})
    manifest = export_bundle(
        vit,
        tmp_path / "b",
        ExportRequest(ExportConfig(mode="seeded", constants=True), adapter=adapter),
    )
    assert manifest.labels == adapter.head.labels
    found = Bundle.open(tmp_path / "b", threads=1).run({"pixel_values": pixels})["logits"]
    export_bundle(
        vit, tmp_path / "fed", ExportRequest(ExportConfig(mode="seeded"), adapter=adapter)
    )
    fed = Bundle.open(tmp_path / "fed", threads=1).run({"pixel_values": pixels})["logits"]
    assert found.shape == (3, 3)
    np.testing.assert_allclose(found, fed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", LARGE)
def test_onnx_runtime_does_not_fold_the_basis(vit, adapter_for, tmp_path, method):
    """What it would keep in RAM is what its optimised graph has as constants."""
    adapter = adapter_for(vit, NAMES, method=method, storage="int4", **LARGE[method])
    sizes = {}
    for name, mode in (("plain", "merged"), ("seeded", "seeded")):
        folder = tmp_path / name
        export_bundle(
            vit,
            folder,
            ExportRequest(ExportConfig(mode=mode, constants=mode == "seeded"), adapter=adapter),
        )
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(str(folder / "backbone.onnx"), options)
        graph = onnx.load(str(folder / "optimised.onnx")).graph
        stored = sum(
            (folder / file).stat().st_size for file in ("backbone.onnx", "backbone.onnx.data")
        )
        kept = sum(onnx.numpy_helper.to_array(t).nbytes for t in graph.initializer)
        sizes[name] = stored, kept
    (plain, plain_kept), (seeded, seeded_kept) = sizes.values()
    numbers = sum(part.values.size for part in adapter.coefficients.values())
    assert seeded - plain < numbers + 40_000  # and the nodes
    # Tables of cosines and counters are kept; the basis would be 300, 230 and 460 KB.
    assert seeded_kept - plain_kept < numbers + 40_000


def test_onnx_reference_runs_it(vit, adapter_for, pixels, tmp_path):
    adapter = adapter_for(vit, NAMES, k=5, l=3, rank=2)
    export_bundle(
        vit,
        tmp_path / "b",
        ExportRequest(ExportConfig(mode="seeded", constants=True), adapter=adapter),
    )
    (found,) = ReferenceEvaluator(str(tmp_path / "b" / "backbone.onnx")).run(
        ["logits"], {"pixel_values": pixels}
    )
    wanted = Bundle.open(tmp_path / "b", threads=1).run({"pixel_values": pixels})["logits"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
