"""Expanders in a bundle: listed, checked, and the same bits as what the runtime feeds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from regrow_export import ExportConfig, ExportRequest, export_bundle
from regrow_export.methods import adapter_inputs
from regrow_format.errors import FormatError, RegrowError
from regrow_format.manifest import Manifest
from regrow_runtime import BasisCache, BasisSpec, UsageError
from regrow_runtime.slots import expand

LAYER = "vit.encoder.layer.2."
NAMES = [f"{LAYER}intermediate.dense", f"{LAYER}output.dense"]
KINDS = ("low_rank", "delta", "bias", "scale", "input_scale")
METHODS = ("nola", "vera", "lora", "fourierft", "ia3", "ssf", "bitfit")


@pytest.fixture(scope="module")
def adapters(vit, adapter_for):
    """By name; two of NOLA, one of them like another that is not listed twice."""
    made = {method: adapter_for(vit, NAMES, method=method, storage="int4") for method in METHODS}
    made["again"] = adapter_for(vit, NAMES, storage="int8", seed=7, draw=5)
    made["one"] = adapter_for(vit, NAMES[:1], storage="fp16", k=9)
    return made


@pytest.fixture(scope="module", params=[None, 9], ids=["dynamic", "fixed rank"])
def folder(request, vit, adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expanders") / "b"
    export_bundle(
        vit,
        folder,
        ExportRequest(
            ExportConfig(targets=NAMES, slots=KINDS, fixed_rank=request.param),
            expanders=tuple(adapters.values()),
        ),
    )
    return folder


def _run(path, inputs):
    import onnxruntime as ort

    session = ort.InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def test_the_manifest_lists_them(folder, adapters):
    manifest = Manifest.load(folder)
    manifest.check_files(folder, hashes=True)
    files = [f"expand-{method}.onnx" for method in METHODS] + ["expand-nola-2.onnx"]
    assert [spec.file for spec in manifest.expanders] == files
    assert {path.name for path in folder.glob("expand-*")} == set(files)
    for spec, name in zip(manifest.expanders, [*METHODS, "one"], strict=True):
        adapter = adapters[name]
        assert (spec.method, dict(spec.config)) == (adapter.method, dict(adapter.config))
        assert spec.targets == tuple(target.name for target in adapter.targets)
        session_inputs = onnx.load(str(folder / spec.file)).graph.input
        assert [i.name for i in session_inputs] == [i.name for i in spec.inputs]
        for item in spec.inputs:
            value = adapter_inputs(adapter)[item.name]
            assert (item.dtype, item.shape) == (str(value.dtype), value.shape)
        slots = {name for slot in manifest.slots for name in slot.inputs.values()}
        assert set(spec.outputs) <= slots


@pytest.mark.parametrize("name", [*METHODS, "again", "one"])
def test_outputs_are_what_the_runtime_feeds(folder, adapters, name):
    manifest, adapter = Manifest.load(folder), adapters[name]
    file = {"again": "expand-nola.onnx", "one": "expand-nola-2.onnx"}.get(
        name, f"expand-{name}.onnx"
    )
    wanted = expand(adapter, manifest, BasisCache(), folder)
    inputs = adapter_inputs(adapter)
    found = _run(folder / file, inputs)
    evaluator = ReferenceEvaluator(str(folder / file))
    reference = dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))
    assert found.keys() == reference.keys() == wanted.keys()
    for tensor, value in wanted.items():
        for got in (found[tensor], reference[tensor]):
            assert (got.shape, got.dtype) == (value.shape, np.float32)
            if name in ("fourierft", "one"):  # cosines, and sums of floats, are rounded
                limit = 1e-6 * np.abs(value).max()
                np.testing.assert_allclose(got, value, rtol=0, atol=limit, err_msg=tensor)
            else:
                assert got.tobytes() == value.tobytes(), tensor


def test_they_hold_no_basis_and_are_no_newer_than_the_backbone(folder):
    for path in folder.glob("expand-*"):
        model = onnx.load(str(path))
        assert (model.ir_version, model.opset_import[0].version) == (9, 18)
        assert {node.domain for node in model.graph.node} == {""}
        assert path.stat().st_size < 40_000, path.name


def test_what_cannot_be_expanded_is_refused(vit, adapters, adapter_for, tmp_path, asked):
    def refused(match, *expanders, **options):
        request = {"targets": NAMES, "expanders": expanders, **options}
        with pytest.raises(UsageError, match=match):
            export_bundle(vit, tmp_path / "b", asked(**request))
        assert not (tmp_path / "b").exists()

    refused("expander of fourierft must have delta slots to feed, got none", adapters["fourierft"],
            slots=("low_rank",))  # fmt: skip
    refused("got none for vit.encoder.layer.2.output.dense", adapters["nola"], targets=NAMES[:1])
    refused("nola must have low_rank slots", adapters["nola"], slots=("weight",))
    refused("rank 3 or less, as the slots have, got 4", adapters["nola"], fixed_rank=3)
    refused(
        "expander must be of a method with targets, got head",
        adapter_for(vit, [], method="head"),
        slots=("low_rank",),
    )
    basis = BasisSpec("peft-mt19937", 1, {"in": 128, "out": 128, "dtype": "float32"})
    refused("basis must be philox-sign", replace(adapters["vera"], basis=basis))
    refused(
        "expanders must be for mode swappable, got merged", adapters["nola"], mode="merged",
        adapter=adapters["nola"], targets=(),
    )  # fmt: skip


def test_a_graph_that_gives_something_else_is_refused(vit, adapters, tmp_path, monkeypatch):
    import regrow_export.modes.expander_files as module

    build = module.build_expander

    def wrong(*arguments, **options):
        model = build(*arguments, **options)
        for tensor in model.graph.initializer:
            value = onnx.numpy_helper.to_array(tensor)
            if value.dtype == np.int32 and list(value) == [2]:  # of 2 (bits x codes) - sum(codes)
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([3], np.int32), tensor.name))
        return model

    monkeypatch.setattr(module, "build_expander", wrong)
    with pytest.raises(RegrowError, match=r"expand-nola\.onnx: .* must be the runtime's within 0"):
        export_bundle(
            vit,
            tmp_path / "b",
            ExportRequest(ExportConfig(targets=NAMES), expanders=[adapters["nola"]]),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_lists_its_expanders_files(folder):
    manifest = Manifest.load(folder)
    files = {name: entry for name, entry in manifest.files.items() if "nola" not in name}
    copy = folder.parent / "copy"
    copy.mkdir(exist_ok=True)
    (copy / "manifest.json").write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
    with pytest.raises(FormatError, match=r"files must list expand-nola\.onnx"):
        Manifest.load(copy)
