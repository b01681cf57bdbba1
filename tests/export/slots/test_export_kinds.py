"""Slots of kind delta and bias: what they add, on which layers, and beside low-rank ones."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from expansions import flat
from onnx.reference import ReferenceEvaluator

from regrow_export import (
    ExportConfig,
    ExportRequest,
    ExportSource,
    export_bundle,
    find_biased,
    kinds_for,
    slots,
)
from regrow_format.basis import BasisCache
from regrow_format.errors import MismatchError, RegrowError, UsageError
from regrow_format.manifest import Manifest
from regrow_format.methods import get_method
from regrow_format.slot_kinds import SLOT_KINDS
from regrow_runtime import Bundle

KINDS = ("low_rank", "delta", "bias")
QUERY = "vit.encoder.layer.0.attention.attention.query"
NORM = "vit.encoder.layer.1.layernorm_after"
SHAPES = {"A": (0, 3), "B": (3, 1), "D": (0, 1), "b": (None, 1)}


@pytest.fixture(scope="module")
def vit_bundle(vit, tmp_path_factory):
    """Every kind of slot in every linear layer and norm of the ViT's first two blocks."""
    folder = tmp_path_factory.mktemp("kinds") / "vit"
    blocks = ("vit.encoder.layer.0.", "vit.encoder.layer.1.")
    names = [name for name in find_biased(vit.model) if name.startswith(blocks)]
    return folder, export_bundle(
        vit, folder, ExportRequest(ExportConfig(targets=names, slots=KINDS))
    )


@pytest.fixture
def pixels():
    return np.random.default_rng(5).standard_normal((3, 1, 28, 28)).astype(np.float32)


def _random(bundle: Manifest, count: int, kinds=KINDS) -> dict[str, np.ndarray]:
    rng, feeds = np.random.default_rng(0), {}
    for slot in bundle.slots:
        sizes = {0: slot.in_features, 1: slot.out_features, 3: 3, None: 1}
        for part in SLOT_KINDS[slot.kind].parts if slot.kind in kinds else ():
            shape = [sizes[key] for key in SHAPES[part]]
            feeds[slot.inputs[part]] = rng.standard_normal((count, *shape)).astype("f4") / 10
    return feeds


def _expansion(feeds, row=0):
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in feeds.items():
        target, _, part = name.rpartition(".adapter_")
        found.setdefault(target, {})[part] = value[row]
    return found


@pytest.mark.parametrize("kinds", [("delta",), ("bias",), KINDS], ids="+".join)
def test_what_is_fed_is_what_is_in_the_weights(vit, vit_bundle, run, pixels, merged_logits, kinds):
    inputs, feeds = {"pixel_values": pixels}, _random(vit_bundle[1], 1, kinds)
    found = run(vit_bundle[0], inputs, feeds)["logits"]
    expected = merged_logits(vit, inputs, _expansion(feeds))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    base = run(vit_bundle[0], inputs)["logits"]
    np.testing.assert_allclose(base, merged_logits(vit, inputs, {}), rtol=1e-4, atol=1e-5)
    assert np.abs(found - base).max() > 0.01


def test_every_sample_of_a_batch_may_have_its_own(vit, vit_bundle, run, pixels, merged_logits):
    feeds = _random(vit_bundle[1], 3)
    feeds[f"{QUERY}.adapter_D"][1] = 0  # one without this delta
    found = run(vit_bundle[0], {"pixel_values": pixels}, feeds)["logits"]
    for row in range(3):
        inputs = {"pixel_values": pixels[row : row + 1]}
        expected = merged_logits(vit, inputs, _expansion(feeds, row))
        np.testing.assert_allclose(found[row : row + 1], expected, rtol=1e-3, atol=1e-4)


def test_a_layer_has_every_kind_and_a_norm_has_a_bias(vit_bundle):
    manifest = vit_bundle[1]
    assert Manifest.load(vit_bundle[0]) == manifest
    assert [slot.kind for slot in manifest.slots if slot.target == QUERY] == list(KINDS)
    (norm,) = [slot for slot in manifest.slots if slot.target == NORM]
    assert (norm.kind, norm.in_features, norm.out_features) == ("bias", 64, 64)
    assert manifest.slots[-1].kind == "head"
    # Biases of the keys cancel in the softmax and count for nothing.
    assert manifest.parity["slot_effect_min"] > 1e-4


def test_defaults_change_nothing_and_dimensions_are_named(vit_bundle):
    model = onnx.load(str(vit_bundle[0] / "backbone.onnx"))
    defaults = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    shapes = {
        value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert defaults[f"{QUERY}.adapter_D"] == [1, 0, 64]
    assert shapes[f"{QUERY}.adapter_D"] == [f"{QUERY}.delta.n", f"{QUERY}.delta.rank", 64]
    assert defaults[f"{NORM}.adapter_b"] == [1, 1, 64]
    assert shapes[f"{NORM}.adapter_b"] == [f"{NORM}.bias.n", 1, 64]


def test_a_deltas_length_is_read_from_its_shape(vit_bundle):
    graph = onnx.load(str(vit_bundle[0] / "backbone.onnx")).graph
    made = {output: node for node in graph.node for output in node.output}
    (product,) = [node for node in graph.node if f"{QUERY}.adapter_D" in node.input[1:]]
    cut = made[product.input[0]]
    assert (product.op_type, cut.op_type) == ("MatMul", "Slice")
    length = made[cut.input[2]]
    assert (length.op_type, list(length.input)) == ("Shape", [f"{QUERY}.adapter_D"])
    # What the tracer had in its place is gone.
    read = {name for node in graph.node for name in node.input}
    read |= {output.name for output in graph.output}
    assert all(read.intersection(node.output) for node in graph.node)


@pytest.mark.parametrize("method", ["lora", "vera", "fourierft", "bitfit"])
def test_the_runtime_swaps_adapters_of_every_method(
    vit, vit_bundle, pixels, merged_logits, adapter_for, method
):
    names = [NORM, QUERY] if method == "bitfit" else [QUERY, QUERY.replace("query", "value")]
    adapter = adapter_for(vit, names, method=method, storage="int4")
    bundle = Bundle.open(vit_bundle[0])
    bundle.swap(adapter, name="user")
    inputs = {"pixel_values": pixels}
    expansion = flat(get_method(method).expand(adapter, BasisCache()))
    expected = merged_logits(vit, inputs, expansion)
    np.testing.assert_allclose(bundle.run(inputs)["logits"], expected, rtol=1e-3, atol=1e-4)
    mixed = bundle.run(inputs, adapters=["user", None, "user"])["logits"]
    np.testing.assert_allclose(mixed[::2], expected[::2], rtol=1e-3, atol=1e-4)
    base = merged_logits(vit, inputs, {})
    np.testing.assert_allclose(mixed[1], base[1], rtol=1e-3, atol=1e-4)
    assert np.abs(expected - base).max() > 0.01


def test_an_adapter_of_another_kind_is_refused(plain, plain_inputs, tmp_path, adapter_for):
    export_bundle(
        plain, tmp_path / "b", ExportRequest(ExportConfig(targets=["stem"]), inputs=plain_inputs)
    )
    bundle = Bundle.open(tmp_path / "b")
    with pytest.raises(
        MismatchError, match="needs delta slots, got low_rank; export it with --for fourierft"
    ):
        bundle.swap(adapter_for(plain, ["stem"], method="fourierft"), name="user")


@pytest.mark.parametrize("kinds", [("delta",), ("bias",), KINDS], ids="+".join)
def test_pairs_pooled_features_and_grids(plain, plain_inputs, run, tmp_path, kinds):
    targets = ["stem", "pair", "pooled"]
    manifest = export_bundle(
        plain,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=targets, slots=kinds), inputs=plain_inputs),
    )
    assert len(manifest.slots) == 1 + 3 * len(kinds)
    assert manifest.parity["mixed_max_abs"] < 1e-4
    feeds = _random(manifest, 2, kinds)
    found = run(tmp_path / "b", plain_inputs, feeds)
    with torch.inference_mode():
        for row in range(2):
            x, gate = (torch.from_numpy(v[row : row + 1]) for v in plain_inputs.values())
            hooks = [
                plain.model.get_submodule(name).register_forward_hook(_adding(parts))
                for name, parts in _expansion(feeds, row).items()
            ]
            expected = plain.model(x=x, gate=gate)
            for hook in hooks:
                hook.remove()
            for name, value in expected.items():
                np.testing.assert_allclose(found[name][row : row + 1], value, atol=1e-4)


def _adding(parts):
    """A hook that adds what a slot with these parts does."""
    delta = parts.get("D", 0) + (parts["A"] @ parts["B"] if "A" in parts else 0)

    def hook(_module, args, output):
        change = args[0] @ torch.from_numpy(delta) if np.ndim(delta) else 0
        return output + change + torch.from_numpy(parts["b"][0] if "b" in parts else np.zeros(1))

    return lambda *arguments: hook(*arguments).float()


def test_onnx_reference_runs_every_kind(plain, plain_inputs, run, tmp_path):
    targets = ["stem", "pair", "pooled"]
    manifest = export_bundle(
        plain,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=targets, slots=KINDS), inputs=plain_inputs),
    )
    evaluator = ReferenceEvaluator(str(tmp_path / "b" / "backbone.onnx"))
    feeds = _random(manifest, 2)
    for given in ({}, feeds):
        found = evaluator.run(None, {**plain_inputs, **given})
        expected = run(tmp_path / "b", plain_inputs, given)
        for name, value in zip(evaluator.output_names, found, strict=True):
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_called_twice(run, tmp_path):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)

        def forward(self, x):
            for _ in range(2):
                x = torch.tanh(self.layer(self.norm(x)))
            return x

    torch.manual_seed(0)
    model = Twice().eval()
    inputs = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}
    source = ExportSource(model, "custom", "sha256:00")
    export_bundle(
        source,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=["layer", "norm"], slots=KINDS), inputs=inputs),
    )
    d, b = np.eye(4, dtype=np.float32)[None], np.ones((1, 1, 4), dtype=np.float32)
    found = run(tmp_path / "b", inputs, {"layer.adapter_D": d, "norm.adapter_b": b})["output"]
    with torch.no_grad():
        model.layer.weight += torch.eye(4)
        model.norm.bias += 1
        expected = model(torch.from_numpy(inputs["x"])).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_gpt2_convolution_and_its_norms(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(6)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, num_labels=3, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    source = ExportSource(model, "text-classification", "sha256:00", ("score",))
    names = ["transformer.h.0.attn.c_attn", "transformer.h.0.ln_1"]
    manifest = export_bundle(
        source,
        tmp_path / "gpt2",
        ExportRequest(ExportConfig(targets=names, slots=("delta", "bias"))),
    )
    assert [slot.kind for slot in manifest.slots] == ["delta", "bias", "bias", "head"]
    assert manifest.parity["slot_effect_min"] > 0


def test_windows_folded_into_the_batch_keep_their_samples_slots(tmp_path):
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(7)
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4
    )
    model = SwinForImageClassification(config).eval()
    source = ExportSource(model, "image-classification", "sha256:00", ("classifier",))
    names = [n for n in find_biased(model) if n.endswith(("query", "dense", "layernorm_before"))]
    manifest = export_bundle(
        source,
        tmp_path / "swin",
        ExportRequest(ExportConfig(targets=names, slots=("delta", "bias"))),
    )
    assert manifest.parity["mixed_max_abs"] < 1e-4
    assert manifest.parity["slot_effect_min"] > 0


def test_layers_with_a_bias_are_found(vit, plain):
    found = find_biased(vit.model)
    assert NORM in found
    assert QUERY in found
    assert "vit.embeddings.patch_embeddings.projection" not in found  # a convolution
    assert list(find_biased(plain.model)) == ["stem", "pair", "pair.up", "pooled", "idle"]
    norms = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.RMSNorm(3), torch.nn.LayerNorm(3))
    assert list(find_biased(norms)) == ["2"]


def test_methods_have_their_kinds():
    kinds = {"nola": ("low_rank",), "vera": ("low_rank",), "lora": ("low_rank",),
             "fourierft": ("delta",), "ia3": ("scale", "input_scale"),
             "ssf": ("scale", "bias"), "bitfit": ("bias",), "head": ()}  # fmt: skip
    assert {method: kinds_for(method) for method in kinds} == kinds


def test_only_a_head(plain, plain_inputs, tmp_path):
    manifest = export_bundle(
        plain, tmp_path / "b", ExportRequest(ExportConfig(methods=("head",)), inputs=plain_inputs)
    )
    assert [slot.kind for slot in manifest.slots] == ["head"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"slots": "bias"}, "slots must be a list of names, got the string 'bias'"),
        (
            {"slots": ["head"]},
            "slots must be among .*, got 'head'",
        ),
        ({"slots": ["bias", "bias"]}, "slots must be named once, got 'bias' twice"),
        ({"methods": ["head"]}, "targets must be left out for methods head, .* got stem"),
        ({"targets": ["norm"]}, "path of a linear layer, got 'norm'"),
        ({"targets": ["norm"], "slots": ["delta"]}, "path of a linear layer, got 'norm'"),
        ({"targets": ["normm"], "slots": ["bias"]}, "path of a layer, got 'normm'; near: norm"),
    ],
)
def test_requests_that_make_no_sense(tmp_path, asked, options, match):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(self.stem(x))

    source = ExportSource(Model().eval(), "custom", "sha256:00")
    inputs = {"x": np.ones((2, 4), dtype=np.float32)}
    request = {"targets": ["stem"], "inputs": inputs, **options}
    with pytest.raises(UsageError, match=match):
        export_bundle(source, tmp_path / "b", asked(**request))
    assert list(tmp_path.iterdir()) == []


def test_a_bias_without_effect_is_refused_where_torch_has_one(tmp_path, monkeypatch):
    import regrow_export.validation.parity

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    source = ExportSource(model.eval(), "custom", "sha256:00")
    inputs = {"input": np.ones((2, 4), dtype=np.float32)}
    whole = regrow_export.validation.parity.Checker.change
    monkeypatch.setattr(
        regrow_export.validation.parity.Checker, "change",
        lambda self, feeds, what: 0.0 if what.endswith("(bias)") else whole(self, feeds, what),
    )  # fmt: skip
    with pytest.raises(RegrowError, match=r"slot 0 \(bias\) must change the output, got no change"):
        export_bundle(
            source,
            tmp_path / "b",
            ExportRequest(ExportConfig(targets=["0"], slots=["bias"]), inputs=inputs),
        )


def test_a_product_that_the_exporter_rewrote_is_refused(plain, plain_inputs, tmp_path, monkeypatch):
    rewrite = slots.KINDS["delta"].rewrite

    def rewritten(model, deltas, *, whole):
        for node in model.graph.node:
            node.op_type = {"MatMul": "Gemm"}.get(node.op_type, node.op_type)
        rewrite(model, deltas, whole=whole)

    monkeypatch.setattr(slots.KINDS["delta"], "rewrite", rewritten)
    with pytest.raises(RegrowError, match=r"stem\.adapter_D must be traced as a slice and"):
        export_bundle(
            plain,
            tmp_path / "b",
            ExportRequest(ExportConfig(targets=["stem"], slots=["delta"]), inputs=plain_inputs),
        )
