"""Slots of fixed shapes, whole weights and VeRA's vectors, on a ViT and on GPT-2."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from expansions import flat
from onnx.reference import ReferenceEvaluator

from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle
from regrow_format.manifest import Manifest
from regrow_format.methods import get_method
from regrow_inputs.predictions import top_labels
from regrow_runtime import BasisCache, BasisSpec, Bundle, MismatchError, UsageError

BLOCK = "vit.encoder.layer.1."
VIT = [f"{BLOCK}attention.attention.query", f"{BLOCK}intermediate.dense", f"{BLOCK}output.dense"]
GPT2 = ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]
IDS = np.random.default_rng(3).integers(1, 50, (3, 6))

# By name: kinds of slot, fixed rank, methods whose adapters the bundle takes.
FORMS = {
    "weight": (("weight",), None, ("nola", "vera", "lora", "fourierft")),
    "vector": (("vector",), None, ("vera",)),
    "fixed": (
        ("low_rank", "delta", "scale", "bias"),
        6,
        ("nola", "vera", "lora", "dora", "fourierft", "bitfit"),
    ),
    "fixed weight": (("weight",), 6, ("lora", "fourierft")),
}


@pytest.fixture(scope="module")
def gpt2() -> ExportSource:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(6)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, num_labels=3, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    return ExportSource(
        model, "text-classification", "sha256:" + "ab" * 32, ("score",), tuple("xyz")
    )


@pytest.fixture(scope="module", params=["vit", "gpt2"])
def case(request, vit, gpt2):
    """A source, its targets, and inputs of a batch of three."""
    pixels = np.random.default_rng(5).standard_normal((3, 1, 28, 28)).astype(np.float32)
    if request.param == "vit":
        return vit, VIT, {"pixel_values": pixels}
    return gpt2, GPT2, {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}


@pytest.fixture(scope="module")
def bundles(case, adapter_for, tmp_path_factory):
    """bundles(form): the folder of a bundle, exported once."""
    source, names, _ = case
    made = {}

    def get(form):
        if form not in made:
            kinds, rank, _ = FORMS[form]
            folder = tmp_path_factory.mktemp("fixed") / "b"
            vera = adapter_for(source, names, method="vera") if "vector" in kinds else None
            export_bundle(
                source,
                folder,
                ExportRequest(
                    ExportConfig(targets=names, slots=kinds, fixed_rank=rank), adapter=vera
                ),
            )
            made[form] = folder
        return made[form]

    return get


def _torch(source, inputs, expansion, head=None):
    """Logits by torch with a change in the weights; Conv1D's are [in, out]."""
    weights = {}
    for name, parts in expansion.items():
        layer = source.model.get_submodule(name)
        own = {part: torch.from_numpy(np.array(value)) for part, value in parts.items()}
        turned, none = type(layer).__name__ == "Conv1D", torch.zeros(1)
        factor = 1 + own.get("s", none).reshape(-1)
        delta = own["D"] if "D" in own else own["A"] @ own["B"] if "A" in own else none
        weight = (layer.weight if turned else layer.weight.T) + delta  # [in, out]
        weights[f"{name}.weight"] = weight * factor if turned else (weight * factor).T
        weights[f"{name}.bias"] = layer.bias * factor + own.get("b", none).reshape(-1)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.inference_mode():
        return torch.func.functional_call(source.model, weights, kwargs=tensors).logits.numpy()


@pytest.mark.parametrize("form", FORMS)
def test_base_adapters_and_effects(case, bundles, adapter_for, form):
    source, names, inputs = case
    bundle = Bundle.open(bundles(form), threads=1)
    base = bundle.run(inputs)["logits"]
    np.testing.assert_allclose(base, _torch(source, inputs, {}), rtol=1e-3, atol=1e-4)
    for method in FORMS[form][2]:
        adapter = adapter_for(source, names, method=method, draw=3)
        bundle.swap(adapter, name=method)
        expansion = flat(get_method(method).expand(adapter, BasisCache()))
        found, wanted = bundle.run(inputs)["logits"], _torch(source, inputs, expansion)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4, err_msg=method)
        assert np.abs(found - base).max() > 0.01, method
    bundle.swap(None)
    np.testing.assert_array_equal(bundle.run(inputs)["logits"], base)


@pytest.mark.parametrize("form", FORMS)
def test_the_manifest_says_what_is_fixed(bundles, form):
    folder = bundles(form)
    manifest = Manifest.load(folder)
    model = onnx.load(str(folder / "backbone.onnx"))
    onnx.checker.check_model(str(folder / "backbone.onnx"), full_check=True)
    shapes = {
        value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    for slot in manifest.slots:
        fixed = all(isinstance(size, int) for name in slot.inputs.values() for size in shapes[name])
        assert slot.fixed == fixed, slot
        assert slot.fixed == (form != "vector" and (form != "weight" or slot.kind == "weight"))
        if slot.kind == "weight":
            stored = np.fromfile(folder / slot.weight.file, "<f4", offset=slot.weight.offset)
            default = onnx.numpy_helper.to_array(
                next(t for t in model.graph.initializer if t.name == slot.inputs["W"])
            )
            assert default.shape == (1, slot.in_features, slot.out_features)
            np.testing.assert_array_equal(stored[: default.size], default.ravel())
    assert {node.domain for node in model.graph.node} <= {""}
    assert manifest.parity["slot_effect_min"] > 0
    assert ("mixed_max_abs" in manifest.parity) == (form == "vector")


@pytest.mark.parametrize("form", FORMS)
def test_onnx_reference_runs_them(case, bundles, adapter_for, form):
    source, names, inputs = case
    folder, method = bundles(form), FORMS[form][2][0]
    bundle = Bundle.open(folder, threads=1)
    bundle.swap(adapter_for(source, names, method=method), name="x")
    evaluator = ReferenceEvaluator(str(folder / "backbone.onnx"))
    # Its LayerNormalization needs no slots; feeds are what the runtime would give ONNX Runtime.
    feeds = bundle._active.feeds
    (found,) = evaluator.run(["logits"], {**inputs, **feeds})
    np.testing.assert_allclose(found, bundle.run(inputs)["logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["weight", "fixed"])
def test_samples_of_a_batch_share_an_adapter(case, bundles, adapter_for, form):
    source, names, inputs = case
    bundle = Bundle.open(bundles(form), threads=1)
    bundle.load(adapter_for(source, names), name="x")
    match = (
        r"need slots whose n is the batch size, got fixed ones \(such as .*, (weight|low_rank)\)"
    )
    with pytest.raises(UsageError, match=match):
        bundle.run(inputs, ["x", None, "x"])


def test_vectors_may_differ_from_sample_to_sample(case, bundles, adapter_for):
    source, names, inputs = case
    bundle = Bundle.open(bundles("vector"), threads=1)
    made = {"one": adapter_for(source, names, method="vera", draw=1)}
    made["other"] = adapter_for(source, names[1:], method="vera", draw=2)  # of fewer layers
    for name, adapter in made.items():
        bundle.load(adapter, name=name)
    found = bundle.run(inputs, ["one", "other", None])["logits"]
    for row, name in enumerate(["one", "other", None]):
        expansion = flat(get_method("vera").expand(made[name], BasisCache())) if name else {}
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        wanted = _torch(source, alone, expansion)
        np.testing.assert_allclose(found[row : row + 1], wanted, rtol=1e-3, atol=1e-4)
    assert sum(v.nbytes for v in bundle._residents["one"].feeds.values()) < 4 * 1000


def test_vectors_are_of_one_basis(case, bundles, adapter_for):
    source, names, _ = case
    bundle = Bundle.open(bundles("vector"), threads=1)
    good = adapter_for(source, names, method="vera")
    fields = {"in": 128, "out": 128, "dtype": "float32"}
    for other in (
        replace(good, seed=3),
        adapter_for(source, names, method="vera", rank=7),
        replace(good, basis=BasisSpec("peft-mt19937", 1, fields)),
    ):
        with pytest.raises(MismatchError, match=r"vector slots, rank 6 and .* --for vera"):
            bundle.swap(other, name="x")
    with pytest.raises(
        MismatchError, match="needs low_rank slots, got vector; export it with --fo"
    ):
        bundle.swap(adapter_for(source, names), name="x")
    assert bundle.active is None


def test_a_fixed_rank_is_a_bound(case, bundles, adapter_for):
    source, names, _ = case
    bundle = Bundle.open(bundles("fixed"), threads=1)
    with pytest.raises(
        MismatchError, match=r"must have rank 6 or less, as .*, got 7: export .* --fixed-rank 7"
    ):
        bundle.swap(adapter_for(source, names, rank=7), name="x")


def test_a_fixed_head_is_filled_up(vit, adapter_for, with_head, tmp_path):
    export_bundle(vit, tmp_path / "b", ExportRequest(ExportConfig(targets=VIT, fixed_rank=4)))
    bundle = Bundle.open(tmp_path / "b", threads=1)
    pixels = np.random.default_rng(5).standard_normal((2, 1, 28, 28)).astype(np.float32)
    adapter = with_head(adapter_for(vit, VIT), {"classifier": (64, 3)})
    bundle.swap(adapter, name="x")
    logits = bundle.run({"pixel_values": pixels})["logits"]
    assert logits.shape == (2, 10)
    assert (logits[:, 3:] == -np.inf).all()
    assert [best[0][0] for best in top_labels(logits, bundle.labels())] == [
        f"label {row[:3].argmax()}" for row in logits
    ]
    export_bundle(vit, tmp_path / "free", ExportRequest(ExportConfig(targets=VIT)))
    free = Bundle.open(tmp_path / "free", threads=1)
    free.swap(adapter, name="x")
    wanted = free.run({"pixel_values": pixels})["logits"]
    np.testing.assert_allclose(logits[:, :3], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        MismatchError, match="classifier must have 10 classes or less in a bundle of"
    ):
        bundle.swap(with_head(adapter, {"classifier": (64, 11)}), name="y")


@pytest.mark.parametrize(
    ("kinds", "rank"),
    [(("weight",), None), (("low_rank", "delta", "bias"), 3), (("vector",), None)],
)
def test_pooled_features_and_grids(plain, plain_inputs, adapter_for, tmp_path, kinds, rank):
    names = ["stem", "pooled"] + ["pair"] * ("weight" not in kinds)
    vera = adapter_for(plain, names, method="vera")
    manifest = export_bundle(
        plain,
        tmp_path / "b",
        ExportRequest(
            ExportConfig(targets=names, slots=kinds, fixed_rank=rank),
            adapter=vera,
            inputs=plain_inputs,
        ),
    )
    assert manifest.parity["adapter_max_abs"] < 1e-4 < manifest.parity["slot_effect_min"]
    assert len(manifest.slots) == 1 + len(names) * len(kinds)


@pytest.mark.parametrize(("kinds", "rank"), [(("weight",), None), (("low_rank",), 3)])
def test_windows_need_not_be_told_apart(tmp_path, run, kinds, rank):
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(7)
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4
    )
    model = SwinForImageClassification(config).eval()
    source = ExportSource(model, "image-classification", "sha256:00", ("classifier",))
    name = "swin.encoder.layers.0.blocks.1.attention.self.value"
    manifest = export_bundle(
        source,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=[name], slots=kinds, fixed_rank=rank)),
    )
    assert manifest.parity["slot_effect_min"] > 1e-4
    graph = onnx.load(str(tmp_path / "b" / "backbone.onnx")).graph
    slot = manifest.slot_of(name).inputs
    (product,) = [n for n in graph.node if slot.get("A", slot.get("W")) in n.input]
    # Nothing regroups the windows: it reads what the query and the key read.
    assert sum(product.input[0] in node.input for node in graph.node) >= 3


def test_zeros_are_stored_once(vit, tmp_path):
    """Deltas of fixed shapes are as large as the weights, and all zeros."""
    sizes = []
    for name, rank in (("dynamic", None), ("fixed", 4)):
        folder = tmp_path / name
        export_bundle(
            vit,
            folder,
            ExportRequest(ExportConfig(targets=VIT, slots=("low_rank", "delta"), fixed_rank=rank)),
        )
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
    assert sizes[1] - sizes[0] < 4 * 64 * 128 + 4096  # one delta, of 64 x 128


def test_vera_matrices_are_stored_once_per_width(vit, adapter_for, tmp_path):
    vera = adapter_for(vit, VIT, method="vera", rank=50)
    export_bundle(
        vit,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=VIT, slots=("vector",)), adapter=vera),
    )
    model = onnx.load(str(tmp_path / "b" / "backbone.onnx"))
    signs = [t for t in model.graph.initializer if t.name.startswith("vera.")]
    assert sorted((t.name, *t.dims) for t in signs) == [
        ("vera.A.128.signs", 128, 50), ("vera.A.64.signs", 64, 50),
        ("vera.B.128.signs", 50, 128), ("vera.B.64.signs", 50, 64),
    ]  # fmt: skip
    assert {t.data_type for t in signs} == {onnx.TensorProto.INT8}


def test_requests_that_make_no_sense(vit, plain, plain_inputs, adapter_for, tmp_path, asked):
    def refused(match, source=vit, **options):
        with pytest.raises(UsageError, match=match):
            export_bundle(source, tmp_path / "b", asked(**{"targets": VIT, **options}))
        assert not (tmp_path / "b").exists()

    refused("fixed_rank must be from 1 to 4096, got 0", fixed_rank=0)
    refused(
        "precision must be fp32 for weight slots, .* got int8", slots=["weight"], precision="int8"
    )
    refused("adapter must be of VeRA for vector slots, .* got none", slots=["vector"])
    lora = adapter_for(vit, VIT, method="lora")
    refused(
        "adapter must be of VeRA for vector slots, .* got one of lora",
        slots=["vector"],
        adapter=lora,
    )
    fields = {"in": 128, "out": 128, "dtype": "float32"}
    peft = replace(adapter_for(vit, VIT, method="vera"), basis=BasisSpec("peft-mt19937", 1, fields))
    refused("adapter must have the basis philox-sign for vector slots, got peft",
            slots=["vector"], adapter=peft)  # fmt: skip
    refused("constants must be for mode seeded, got swappable", constants=True)
    refused("fixed_rank must be for mode swappable, got seeded",
            mode="seeded", adapter=lora, targets=(), fixed_rank=3)  # fmt: skip
    refused("one float weight for a weight slot, got pair, Pair: use slots of another kind",
            plain, targets=["pair"], slots=["weight"], inputs=plain_inputs)  # fmt: skip
