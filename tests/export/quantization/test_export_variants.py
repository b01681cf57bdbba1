"""Bundles in fp16, int8 and int4: the weights in the file, the base, adapters on top, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from expansions import flat
from onnx import TensorProto, numpy_helper
from torch import nn

from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle, find_linears
from regrow_export.layers import block_weights
from regrow_export.modes import merged_model
from regrow_export.quantization import check_slot_inputs, rounded_weights
from regrow_export.quantization.schemes import round_weight
from regrow_export.tracing import run_torch
from regrow_export.validation import INT8_SHARE
from regrow_format.basis import BasisCache
from regrow_format.errors import RegrowError, UsageError
from regrow_format.manifest import Manifest
from regrow_format.methods import get_method

LOW = ("fp16", "int8", "int4")
QUERY = "vit.encoder.layer.0.attention.attention.query"
DOWN = "vit.encoder.layer.3.output.dense"

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module", params=LOW)
def precision(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def bundle(vit, precision, tmp_path_factory) -> tuple[Path, Manifest]:
    """A slot in every linear layer of the ViT's blocks."""
    folder = tmp_path_factory.mktemp("variants") / precision
    names = [name for name in find_linears(vit.model) if name not in vit.head]
    return folder, export_bundle(
        vit, folder, ExportRequest(ExportConfig(targets=names, precision=precision))
    )


@pytest.fixture
def pixels() -> Arrays:
    values = np.random.default_rng(5).standard_normal((3, 1, 28, 28))
    return {"pixel_values": values.astype(np.float32)}


def _graph(folder: Path) -> onnx.ModelProto:
    return onnx.load(str(folder / "backbone.onnx"))


def _tensors(folder: Path) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in _graph(folder).graph.initializer}


def _products(folder: Path, weights: Any, precision: str) -> Arrays:
    """What the file multiplies by, computed from its tensors alone."""
    tensors, found = _tensors(folder), {}
    for weight in weights:
        part = tensors[f"{weight.path}.{precision}"]
        values = numpy_helper.to_array(part).astype(np.float32)
        if precision != "fp16":
            scale = numpy_helper.to_array(tensors[f"{weight.path}.scale"])
            values = values * (np.repeat(scale, 32, axis=0) if precision == "int4" else scale)
        found[weight.path] = values
    return found


def _agree(got: np.ndarray, want: np.ndarray, precision: str) -> None:
    """int4 bundles round inputs of layers too in a default session."""
    if precision == "fp16":
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    else:
        assert np.sqrt(np.square(got - want).mean() / np.square(want).mean()) < INT8_SHARE / 2


def _random(manifest: Manifest, count: int) -> Arrays:
    rng, feeds = np.random.default_rng(0), {}
    for slot in manifest.slots:
        if slot.kind == "low_rank":
            a = rng.standard_normal((count, slot.in_features, 3)) / 10
            b = rng.standard_normal((count, 3, slot.out_features)) / 10
            feeds |= {slot.inputs["A"]: a.astype("f4"), slot.inputs["B"]: b.astype("f4")}
    return feeds


def _deltas(feeds: Arrays, row: int = 0) -> dict[str, Arrays]:
    names = {name.rpartition(".")[0] for name in feeds}
    return {n: {part: feeds[f"{n}.adapter_{part}"][row] for part in "AB"} for n in names}


# -- what is in the file -------------------------------------------------------------------------


def test_weights_in_the_file_are_those_of_the_rounding(vit, bundle, precision):
    weights = block_weights(vit.model)
    assert len(weights) == 4 * 6
    found = _products(bundle[0], weights, precision)
    for weight in weights:
        expected = round_weight(weight.values(), precision)
        assert found[weight.path].tobytes() == expected.tobytes(), weight.path


def test_nothing_else_is_changed(vit, bundle, precision):
    """No float weight of a block is left, and everything outside of blocks is float32."""
    kinds = {"fp16": TensorProto.FLOAT16, "int8": TensorProto.INT8, "int4": TensorProto.INT4}
    rest = []
    for name, tensor in _tensors(bundle[0]).items():
        if name.endswith((f".{precision}", ".zero")):
            assert tensor.data_type == kinds[precision]
        elif tensor.data_type == TensorProto.FLOAT and not name.endswith(".scale"):
            rest.append(tuple(tensor.dims))
    assert not {(64, 64), (64, 128), (128, 64)}.intersection(rest)
    assert (64, 1, 7, 7) in rest  # patches
    assert (1, 64, 10) in rest  # the head's slot


def test_only_standard_operators_and_the_lowest_opset(bundle, precision):
    folder, manifest = bundle
    graph = _graph(folder)
    assert {node.domain for node in graph.graph.node} == {""}
    assert (manifest.opset, manifest.ir_version) == ((21, 10) if precision == "int4" else (18, 9))
    assert graph.opset_import[0].version == manifest.opset
    assert graph.ir_version == manifest.ir_version


def test_the_manifest_names_it(vit, bundle, precision):
    folder, manifest = bundle
    assert (manifest.variant, manifest.backbone_id) == (precision, vit.backbone_id)
    assert Manifest.load(folder) == manifest
    props = {item.key: item.value for item in _graph(folder).metadata_props}
    assert props["variant"] == precision
    assert {"base_max_abs", "adapter_max_abs", "mixed_max_abs"} <= set(manifest.parity)
    assert ("rounded_inputs_max_abs" in manifest.parity) == (precision == "int4")
    tight = precision != "int8"
    assert (manifest.parity["base_max_abs"] < 1e-5) == tight


def test_slots_stay_overridable_float32_inputs(bundle):
    folder, manifest = bundle
    graph = _graph(folder).graph
    defaults = {tensor.name: tensor.data_type for tensor in graph.initializer}
    inputs = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    for slot in manifest.slots:
        for name in slot.inputs.values():
            assert inputs[name] == defaults[name] == TensorProto.FLOAT
    assert {s.kind for s in manifest.slots} == {"low_rank", "head"}


def test_files_are_smaller(vit, tmp_path, bundle, precision):
    whole = export_bundle(vit, tmp_path / "fp32", ExportRequest(ExportConfig(targets=[QUERY])))
    size = {"fp16": 0.6, "int8": 0.4, "int4": 0.3}[precision]
    name = "backbone.onnx.data"
    assert bundle[1].files[name].size < size * whole.files[name].size


# -- what it computes ----------------------------------------------------------------------------


def test_nothing_fed_is_the_base_with_rounded_weights(vit, bundle, run, pixels, precision):
    with rounded_weights(vit.model, precision):
        expected = run_torch(vit.model, pixels)["logits"]
    _agree(run(bundle[0], pixels)["logits"], expected, precision)


def test_an_adapter_is_added_in_fp32(vit, bundle, run, pixels, precision, merged_logits):
    feeds = _random(bundle[1], 1)
    found = run(bundle[0], pixels, feeds)["logits"]
    with rounded_weights(vit.model, precision):
        _agree(found, merged_logits(vit, pixels, _deltas(feeds)), precision)
    assert np.abs(found - run(bundle[0], pixels)["logits"]).max() > 0.05


def test_every_sample_may_have_its_own_adapter(vit, bundle, run, pixels, precision, merged_logits):
    feeds = _random(bundle[1], 3)
    found = run(bundle[0], pixels, feeds)["logits"]
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in pixels.items()}
        with rounded_weights(vit.model, precision):
            _agree(found[row : row + 1], merged_logits(vit, alone, _deltas(feeds, row)), precision)


def test_the_head_may_have_other_classes(bundle, run, pixels):
    slot = bundle[1].slot_of("classifier")
    feeds = {
        slot.inputs["weight"]: np.zeros((1, 64, 3), np.float32),
        slot.inputs["bias"]: np.arange(3, dtype=np.float32).reshape(1, 1, 3),
    }
    np.testing.assert_array_equal(run(bundle[0], pixels, feeds)["logits"], [[0, 1, 2]] * 3)


def test_onnx_reference_evaluator_runs_it(vit, bundle, pixels, precision):
    from onnx.reference import ReferenceEvaluator

    folder, manifest = bundle
    one = {"pixel_values": pixels["pixel_values"][:1]}
    # It gives inputs with defaults no values, so those are fed.
    graph = _graph(folder).graph
    names = {name for slot in manifest.slots for name in slot.inputs.values()}
    defaults = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name in names}
    found = ReferenceEvaluator(_graph(folder)).run(["logits"], {**one, **defaults})[0]
    with rounded_weights(vit.model, precision):
        expected = run_torch(vit.model, one)["logits"]
    if precision == "int8":
        _agree(found, expected, precision)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_int8_is_quantize_dynamic(vit, tmp_path, run, pixels, adapter_for, caplog):
    """ONNX Runtime's quantiser, given the fp32 graph and the blocks' products, computes the same.

    Merged, because it has no way to leave alone the default of an input.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    caplog.set_level("ERROR")
    adapter = adapter_for(vit, [QUERY])
    export_bundle(
        vit, tmp_path / "fp32", ExportRequest(ExportConfig(mode="merged"), adapter=adapter)
    )
    export_bundle(
        vit,
        tmp_path / "int8",
        ExportRequest(ExportConfig(mode="merged", precision="int8"), adapter=adapter),
    )
    graph = _graph(tmp_path / "fp32")
    for index, node in enumerate(graph.graph.node):
        node.name = f"node {index}"
    wide = {t.name for t in graph.graph.initializer if tuple(t.dims)[-1:] in {(64,), (128,)}}
    chosen = [n.name for n in graph.graph.node if n.op_type == "MatMul" and n.input[1] in wide]
    assert len(chosen) == 24
    (tmp_path / "own").mkdir()
    quantize_dynamic(
        graph, tmp_path / "own" / "backbone.onnx", per_channel=True, reduce_range=True,
        weight_type=QuantType.QInt8, nodes_to_quantize=chosen,
    )  # fmt: skip
    kinds = ("DynamicQuantizeLinear", "MatMulInteger")
    counts = [
        [sum(node.op_type == kind for node in _graph(tmp_path / name).graph.node) for kind in kinds]
        for name in ("own", "int8")
    ]
    assert counts == [[16, 24], [16, 24]]  # query, key and value share a rounded input
    got, want = (run(tmp_path / name, pixels)["logits"] for name in ("int8", "own"))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# -- other modes, methods and models -------------------------------------------------------------


@pytest.fixture
def adapter(vit, adapter_for):
    return adapter_for(vit, [QUERY, DOWN])


def test_merged_weights_are_rounded_with_the_adapter_in_them(
    vit, adapter, precision, tmp_path, run, pixels
):
    folder = tmp_path / "merged"
    manifest = export_bundle(
        vit,
        folder,
        ExportRequest(ExportConfig(mode="merged", precision=precision), adapter=adapter),
    )
    assert (manifest.variant, manifest.mode, manifest.slots) == (precision, "merged", ())
    assert manifest.parity["adapter_effect"] > 0.01
    folded = merged_model(vit.model, get_method("nola").expand(adapter, BasisCache()))
    products = _products(folder, block_weights(folded), precision)
    for weight in block_weights(folded):
        assert np.array_equal(products[weight.path], round_weight(weight.values(), precision))
    with rounded_weights(folded, precision):
        _agree(run(folder, pixels)["logits"], run_torch(folded, pixels)["logits"], precision)


def test_seeded(vit, adapter, precision, tmp_path, run, pixels, merged_logits):
    folder = tmp_path / "seeded"
    manifest = export_bundle(
        vit,
        folder,
        ExportRequest(ExportConfig(mode="seeded", precision=precision), adapter=adapter),
    )
    assert (manifest.variant, manifest.seeded.method) == (precision, "nola")
    expansion = flat(get_method("nola").expand(adapter, BasisCache()))
    with rounded_weights(vit.model, precision):
        expected = merged_logits(vit, pixels, expansion)
    _agree(run(folder, pixels)["logits"], expected, precision)


def test_slots_of_other_kinds(bert, precision, tmp_path):
    name = "bert.encoder.layer.0.output.dense"
    kinds = ("low_rank", "delta", "bias")
    manifest = export_bundle(
        bert,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=[name], slots=kinds, precision=precision)),
    )
    assert [slot.kind for slot in manifest.slots] == [*kinds, "head"]
    assert manifest.parity["adapter_effect"] > 0


def test_gpt2(precision, tmp_path):
    """Conv1D: traced as Gemm with a weight [in, out]."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(5)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, num_labels=3, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    source = ExportSource(model, "text-classification", "sha256:" + "cd" * 32)
    folder = tmp_path / "gpt2"
    export_bundle(
        source,
        folder,
        ExportRequest(ExportConfig(targets=["transformer.h.0.attn.c_attn"], precision=precision)),
    )
    found = _products(folder, block_weights(model), precision)
    assert len(found) == 8
    for weight in block_weights(model):
        assert np.array_equal(found[weight.path], round_weight(weight.values(), precision))


class _Blocks(nn.Module):
    """Blocks that see pooled, two-dimensional features (Gemm) and share a weight."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])
        self.fc = nn.Linear(40, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.fc(x)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.idle = nn.Linear(40, 40), nn.Linear(40, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x)


class _Turned(nn.Module):
    """Multiplies by what is no weight of its own any more when it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(40, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.one(x)
        parts = self.one.weight.split(20)
        return torch.cat([x @ part.T for part in parts], dim=-1)


def _plain(block: type[nn.Module]) -> ExportSource:
    torch.manual_seed(6)
    model = _Blocks(block).eval()
    return ExportSource(model, "custom", "sha256:" + "ef" * 32, ("fc",), ("a", "b", "c"))


_X = {"x": np.random.default_rng(7).standard_normal((3, 40)).astype(np.float32)}


def test_gemm_shared_and_idle_weights(precision, tmp_path, run):
    """In is no multiple of int4's block; what is never called has no weight in the graph."""
    source = _plain(_Block)
    source.model.blocks[1].one.weight = source.model.blocks[0].one.weight
    folder = tmp_path / "b"
    export_bundle(
        source,
        folder,
        ExportRequest(ExportConfig(targets=["blocks.1.one"], precision=precision), inputs=_X),
    )
    stored = [name for name in _tensors(folder) if name.endswith(f".{precision}")]
    assert stored == [f"blocks.0.one.weight.{precision}"]
    with rounded_weights(source.model, precision):
        expected = run_torch(source.model, _X)["output"]
    _agree(run(folder, _X)["output"], expected, precision)


def test_a_factored_pair(plain, precision, tmp_path):
    """Both factors are stored."""
    pair = plain.model.pair

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = type(pair)(40, 40, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pair(x)

    export_bundle(
        _plain(Pairs),
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=["blocks.0.pair"], precision=precision), inputs=_X),
    )
    stored = {name for name in _tensors(tmp_path / "b") if name.endswith(f".{precision}")}
    assert stored == {
        f"blocks.{i}.pair.{part}.weight.{precision}" for i in (0, 1) for part in ("down", "up")
    }


def test_the_model_is_not_changed(vit, precision, tmp_path):
    before = {name: value.clone() for name, value in vit.model.state_dict().items()}
    export_bundle(
        vit, tmp_path / "b", ExportRequest(ExportConfig(targets=[QUERY], precision=precision))
    )
    assert all(torch.equal(value, before[n]) for n, value in vit.model.state_dict().items())


# -- refused -------------------------------------------------------------------------------------


def test_an_unknown_precision(vit, tmp_path):
    with pytest.raises(UsageError, match="precision must be one of fp32, fp16, int8, int4, got"):
        export_bundle(
            vit, tmp_path / "b", ExportRequest(ExportConfig(targets=[QUERY], precision="bf16"))
        )


def test_a_model_without_blocks(plain, plain_inputs, tmp_path):
    with pytest.raises(RegrowError, match="model must have linear layers in a stack of blocks"):
        export_bundle(
            plain,
            tmp_path / "b",
            ExportRequest(ExportConfig(targets=["pair"], precision="int4"), inputs=plain_inputs),
        )
    assert not (tmp_path / "b").exists()


def test_weights_that_are_lost_in_the_trace(precision, tmp_path):
    message = "got no trace of blocks.0.one.weight, blocks.1.one.weight; export fp32"
    with pytest.raises(RegrowError, match=message):
        export_bundle(
            _plain(_Turned),
            tmp_path / "b",
            ExportRequest(ExportConfig(targets=[], precision=precision), inputs=_X),
        )
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("value", "kind", "message"), [
    (np.nan, "int8", "blocks.0.one.weight: weight must be finite"),
    (1e5, "fp16", "blocks.0.one.weight: weight must be below 65520 for fp16, got 100000"),
])  # fmt: skip
def test_weights_that_cannot_be_rounded(value, kind, message, tmp_path):
    source = _plain(_Block)
    with torch.no_grad():
        source.model.blocks[0].one.weight[0, 0] = value
    with pytest.raises(RegrowError, match=message):
        export_bundle(
            source,
            tmp_path / "b",
            ExportRequest(ExportConfig(targets=["blocks.1.one"], precision=kind), inputs=_X),
        )


def test_operators_that_int4_would_change(tmp_path):
    class Sampled(_Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x)
            grid = torch.tanh(x).reshape(-1, 4, 5, 2)
            image = x.reshape(-1, 2, 4, 5)
            return nn.functional.grid_sample(image, grid, align_corners=False).flatten(1)

    source = _plain(Sampled)
    int4, fp16 = (
        ExportRequest(ExportConfig(targets=["blocks.0.one"], precision=kind), inputs=_X)
        for kind in ("int4", "fp16")
    )
    with pytest.raises(RegrowError, match="model must not use GridSample for int4"):
        export_bundle(source, tmp_path / "b", int4)
    export_bundle(source, tmp_path / "b", fp16)


def test_slots_are_asserted(bundle):
    graph = _graph(bundle[0])
    check_slot_inputs(graph, [f"{QUERY}.adapter_A"])
    graph.graph.initializer[0].name = "another"
    for name in ("no slot", "pixel_values"):
        with pytest.raises(RegrowError, match="slot must stay a float32 input with a default"):
            check_slot_inputs(graph, [name])
